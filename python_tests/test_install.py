"""Building and installing: compilers that are wrong or missing, sources and binaries that do not belong together."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "sabmn_ext")


def copy_sources(target: Path) -> Path:
    """The source tree alone, without binaries or an earlier build."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_fingerprint.txt")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignore)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    dropped = ("PYTHONPATH", "CUDA_HOME", "CUDA_PATH", "CXX", "SABMN_CUDA", "SABMN_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, **environment)


def said(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that the build means for the user."""
    return [line for line in result.stderr.splitlines() if line.startswith("sabmn_ext: ")]


def python(tree: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, cwd=tree, **environment)


@pytest.fixture(scope="module")
def path_without_nvcc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with every program of this one but nvcc."""
    folder = tmp_path_factory.mktemp("bin")
    for entry in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(entry).iterdir() if Path(entry).is_dir() else ():
            if program.name != "nvcc":
                (folder / program.name).unlink(missing_ok=True)
                (folder / program.name).symlink_to(program)
    return str(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A tree built where nvcc is found, but does not work."""
    tree = copy_sources(tmp_path_factory.mktemp("built"))
    toolkit = tree / "toolkit" / "bin"
    toolkit.mkdir(parents=True)
    nvcc = toolkit / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\ncase $* in *--list-gpu-arch*) echo compute_80;; *) echo 'nvcc error: too new' >&2; exit 1;; esac\n"
    )
    nvcc.chmod(0o755)
    return tree, build(tree, CUDA_HOME=str(toolkit.parent))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_wrong_compiler_gives_one_line_and_a_working_package(tmp_path: Path, compiler: str) -> None:
    tree = copy_sources(tmp_path)
    result = build(tree, CXX=compiler, SABMN_CUDA="0")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in said(result) if "CUDA" not in line]
    assert line.startswith("sabmn_ext: native module left out, operations run through plain torch: ")
    if compiler == "no-such-compiler":
        assert "no C++ compiler found (tried no-such-compiler); install g++ or set CXX" in line
    code = (
        "import torch, sabmn_ext; from sabmn_ext.ops import dispatch\n"
        "with dispatch.record() as calls: sabmn_ext.SelfAttention2d(16)(torch.randn(2, 16, 3, 5))\n"
        "print(calls); from sabmn_ext import info; print(info.render(info.collect()))"
    )
    used = python(tree, code)
    assert used.returncode == 0, used.stderr
    assert used.stderr.count("operations run through plain torch") == 1
    assert "('attention_forward', 'torch')" in used.stdout
    assert "native module  none: the native module was not built: " in used.stdout


def test_cuda_that_is_asked_for_and_missing_is_an_error(tmp_path: Path, path_without_nvcc: str) -> None:
    result = build(copy_sources(tmp_path), SABMN_CUDA="1", PATH=path_without_nvcc)
    assert result.returncode != 0
    assert "SABMN_CUDA=1 was asked for, but: no nvcc found (CUDA_HOME, PATH); SABMN_CUDA=wheels" in result.stderr


def test_unknown_values_of_the_variables(tmp_path: Path, built: tuple[Path, object]) -> None:
    tree = copy_sources(tmp_path)
    assert "SABMN_CUDA='yes' is not one of auto, 0, 1, wheels" in build(tree, SABMN_CUDA="yes").stderr
    toolkit = str(built[0] / "toolkit")
    result = build(tree, SABMN_CUDA="1", SABMN_CUDA_ARCHS="8.0;Hopper", CUDA_HOME=toolkit)
    assert result.returncode != 0
    assert "cannot read the CUDA architecture 'Hopper'" in result.stderr


def test_a_broken_nvcc_leaves_a_cpu_build(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    tree, result = built
    assert result.returncode == 0, result.stderr
    assert said(result) == ["sabmn_ext: CUDA kernels left out: nvcc error: too new"]
    found = python(tree, "import _sabmn_ext; print(_sabmn_ext.build_info())")
    assert "'cuda_targets': []" in found.stdout, found.stderr
    assert "nvcc error: too new" in found.stdout


def test_the_binary_needs_no_torch(built: tuple[Path, object]) -> None:
    code = "import sys, _sabmn_ext; print(_sabmn_ext.isa(), 'torch' in sys.modules)"
    assert python(built[0], code).stdout.split()[1] == "False"


def test_the_instruction_set_can_be_asked_for(built: tuple[Path, object]) -> None:
    code = "import _sabmn_ext; print(_sabmn_ext.isa())"
    assert python(built[0], code, SABMN_ISA="baseline").stdout.strip() == "baseline"
    assert "'mmx' is not available here" in python(built[0], code, SABMN_ISA="mmx").stderr


def test_sources_and_binary_that_do_not_belong_together(built: tuple[Path, object], tmp_path: Path) -> None:
    tree = tmp_path / "changed"
    shutil.copytree(built[0], tree)
    assert python(tree, "import sabmn_ext").returncode == 0
    header = tree / "csrc" / "common" / "dtype.h"
    header.write_text(header.read_text() + "// changed\n")
    result = python(tree, "import sabmn_ext")
    assert result.returncode != 0
    assert f"the sources {tree} (fingerprint " in result.stderr
    assert "do not belong together; run: pip install ." in result.stderr


def fresh_environment(folder: Path) -> tuple[str, str]:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return str(folder / "bin" / "python"), str(folder / "bin" / "pip")


@pytest.mark.heavy
@pytest.mark.parametrize("mode", ["regular", "editable", "wheels"])
def test_pip_install_in_isolation(tmp_path: Path, mode: str, path_without_nvcc: str) -> None:
    """No torch, pybind11 or ninja in the environment; the build fetches what it needs."""
    tree = copy_sources(tmp_path / "tree")
    python_program, pip = fresh_environment(tmp_path / "environment")
    variables = (
        {"SABMN_CUDA": "wheels", "SABMN_CUDA_ARCHS": "9.0", "PATH": path_without_nvcc}
        if mode == "wheels"
        else {"SABMN_CUDA": "0"}
    )
    flags = ["-e"] if mode == "editable" else []
    installed = run(pip, "install", "--no-deps", *flags, ".", cwd=tree, **variables)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (elsewhere, tree):  # from the repository root too, the installed binary is the one that loads
        code = "import _sabmn_ext as n; print(n.__file__, len(n.build_info()['cuda_targets']))"
        found = run(python_program, "-c", code, cwd=folder)
        assert found.returncode == 0, found.stderr
        file, targets = found.stdout.split()
        assert Path(file).is_relative_to(tree if mode == "editable" else tmp_path / "environment")
        assert int(targets) == (1 if mode == "wheels" else 0)
    packaged = list((tmp_path / "environment").glob("lib/*/site-packages/sabmn_ext/recipes/*.toml"))
    assert bool(packaged) == (mode != "editable")
