"""Builds the native module ``_sabmn_ext``: finds the compilers, lists the sources, lets ninja compile them.

Environment (README, "Building"): SABMN_CUDA=auto|0|1|wheels, SABMN_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX,
CUDA_HOME. torch is never imported here: the native core includes no torch header.
"""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
FINGERPRINT = runpy.run_path(str(ROOT / "sabmn_ext" / "_fingerprint.py"))["source_fingerprint"](ROOT)

# Every *_cpu.cpp is compiled once for each of these (the last: those that multiply bfloat16 in pairs); which one is
# taken is decided at run time (default_isa in csrc/bindings.cpp).
AVX512_FLAGS = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
}
BF16_SOURCES = ["attention_backward_cpu.cpp", "attention_forward_cpu.cpp"]
ISAS = list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
# Ranks must not depend on the processor: only what the source fuses is fused.
EXTRA_FLAGS = {"retrieval": ["-ffp-contract=off"]}
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]

# "compute_N" is PTX, which newer GPUs compile when they load it. No sm_103: nvcc is known to miscompile for it.
CUDA_TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "compute_80", "compute_120"]
CUDA_WHEELS = "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"
CUDA_MODE = os.environ.get("SABMN_CUDA", "auto")
# What nvcc compiles for the GPU, and g++ for the harness that runs it on a CPU (csrc/simt/README.md).
CUDA_SOURCES = sorted(CSRC.glob("*/*_cuda.cu"))
SIMT_FLAGS = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-omit-frame-pointer", "-fno-ipa-icf"]
SIMT_SANITIZERS = {
    "none": ["-O2"],
    # Without object-size, AddressSanitizer is the one that reports an access out of bounds.
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize=object-size", "-fno-sanitize-recover"],
    "thread": ["-O1", "-fsanitize=thread"],
}


class BuildError(Exception):
    """A compiler that is missing or does not work; the message is the one line that the user reads."""


def say(line: str) -> None:
    print(f"sabmn_ext: {line}", file=sys.stderr, flush=True)


def find_cxx() -> str:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        if shutil.which(candidate.split()[0]):
            return candidate
    raise BuildError(f"no C++ compiler found (tried {', '.join(candidates)}); install g++ or set CXX")


def find_cuda_root() -> "Path | None":
    """The toolkit's folder: the wheels of this build environment, CUDA_HOME, CUDA_PATH, or the nvcc on PATH."""
    if CUDA_MODE == "wheels":
        roots = [Path(entry) / "nvidia" / "cu13" for entry in sys.path]
    else:
        roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        on_path = shutil.which("nvcc")
        if on_path:
            # nvcc names its own toolkit; the file on PATH may be a wrapper or a link.
            dry_run = subprocess.run(
                [on_path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
            )
            top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
            roots.append(Path(top[1]) if top else Path(on_path).resolve().parent.parent)
    return next((root.resolve() for root in roots if (root / "bin" / "nvcc").exists()), None)


def cuda_targets(nvcc: Path) -> "list[str]":
    """The architectures to compile for: those asked for, else the shipped ones that this nvcc knows."""
    asked = os.environ.get("SABMN_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        targets = []
        for word in re.split(r"[;,\s]+", asked.strip()):
            match = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", word)
            if not match:
                raise BuildError(f"cannot read the CUDA architecture {word!r}; write 8.0;9.0;12.0+PTX or 80;90;120+PTX")
            targets += [f"sm_{match[1]}{match[2]}"] + [f"compute_{match[1]}{match[2]}"] * bool(match[3])
        return targets
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    targets = [target for target in CUDA_TARGETS if target.replace("sm_", "compute_") in known]
    if not targets:
        raise BuildError(f"{nvcc} knows none of {', '.join(CUDA_TARGETS)}")
    return targets


def cuda_codes(targets: "list[str]") -> "list[str]":
    """nvcc's options. What does not depend on the GPU takes most of the time, so it is done once for all machine code:
    the kernels use nothing that the oldest of the targets has not."""
    plain = [target for target in targets if re.fullmatch(r"sm_\d+", target)]
    base = min(plain, key=lambda target: int(target[3:])).replace("sm_", "compute_") if plain else ""
    groups = [(base, [*plain, *[t for t in targets if t == base]])] if plain else []
    groups += [(t.replace("sm_", "compute_"), [t]) for t in targets if t not in plain and t != base]
    return [f"'-gencode=arch={arch},code=[{','.join(codes)}]'" for arch, codes in groups]


class Ninja:
    """A build.ninja file in the making."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [
            "rule compile\n  command = $compiler -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            # What nvcc says stays beside the object: registers, spills (benchmarks/cuda_resources.py reads it).
            "rule compile_cuda\n  command = $compiler -MD -MF $out.d -c $in -o $out > $out.txt 2>&1 || "
            "(cat $out.txt; false)\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $compiler $in -o $out $libraries",
        ]

    def compile(self, source: Path, command: "list[str]", tag: str, rule: str = "compile") -> str:
        name = f"{source.parent.name}.{source.stem}.{tag}.o"
        self.lines.append(f"build {name}: {rule} {source}\n  compiler = {' '.join(command)}")
        return name

    def link(self, output: Path, objects: "list[str]", command: "list[str]", libraries: "list[str]") -> None:
        build = f"build {output}: link {' '.join(objects)}"
        self.lines.append(f"{build}\n  compiler = {' '.join(command)}\n  libraries = {' '.join(libraries)}")

    def run(self, *targets: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Ninja begins with what stands first: the CUDA sources, which take longest.
        lines = sorted(self.lines, key=lambda line: (not line.startswith("rule"), ": compile_cuda " not in line))
        (self.folder / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        command = [sys.executable, "-m", "ninja", "-C", str(self.folder), "-j", jobs, *targets]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print(result.stdout, end="", flush=True)
        if result.returncode:
            errors = re.findall(r"^(?!\[).*(?:error:|fatal|not found|cannot find).*$", result.stdout, re.MULTILINE)
            raise BuildError(errors[0].strip() if errors else "the compiler failed without a word")


class NinjaBuild(build_ext):
    """Compiles csrc/ with ninja; where that fails, installs a stand-in module that carries the reason."""

    def run(self) -> None:
        import pybind11  # of the build environment

        output = Path(self.get_ext_fullpath("_sabmn_ext")).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        stand_in = output.with_name("_sabmn_ext.py")
        try:
            self.compile_native(output, pybind11.get_include())
            stand_in.unlink(missing_ok=True)
        except BuildError as error:
            if CUDA_MODE in ("1", "wheels"):
                raise SystemExit(f"sabmn_ext: SABMN_CUDA={CUDA_MODE} was asked for, but: {error}") from None
            say(f"native module left out, operations run through plain torch: {error}")
            output.unlink(missing_ok=True)
            stand_in.write_text(f"BUILD_ERROR = {str(error)!r}\nFINGERPRINT = {FINGERPRINT!r}\n")

    def ninja_folder(self) -> Path:
        return (Path(self.build_temp) / "ninja").resolve()

    def compile_native(self, output: Path, pybind11_include: str) -> None:
        cxx = find_cxx()
        ninja = Ninja(self.ninja_folder())
        compiler = [cxx, *CXX_FLAGS, f"-I{CSRC}"]
        objects = []
        for source in sorted(CSRC.glob("*/*_cpu.cpp")):
            for isa in ISAS:
                if isa == "avx512_bf16" and source.name not in BF16_SOURCES:
                    continue
                flags = [*ISA_FLAGS[isa], *EXTRA_FLAGS.get(source.parent.name, []), f"-DSABMN_ISA={isa}"]
                objects.append(ninja.compile(source, compiler + flags, isa))

        cuda_objects, cuda_libraries, defines = self.compile_cuda(ninja, cxx, objects)
        python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11_include}"]
        defines += [f"-DSABMN_{isa.upper()}" for isa in ISAS] + [f'-DSABMN_FINGERPRINT=\'"{FINGERPRINT}"\'']
        objects.append(ninja.compile(CSRC / "bindings.cpp", compiler + python + defines, "module"))
        ninja.link(output, objects + cuda_objects, [cxx, "-shared", "-s", "-fopenmp"], cuda_libraries)
        ninja.run(str(output))

    def compile_cuda(
        self, ninja: Ninja, cxx: str, beside: Sequence[str] = ()
    ) -> "tuple[list[str], list[str], list[str]]":
        """Objects, link flags and defines of the CUDA part; all empty but for the reason where there is none.

        The objects ``beside`` are compiled on the processors that the longest CUDA source leaves free.
        """
        try:
            if CUDA_MODE not in ("auto", "0", "1", "wheels"):
                raise SystemExit(f"sabmn_ext: SABMN_CUDA={CUDA_MODE!r} is not one of auto, 0, 1, wheels")
            if CUDA_MODE == "0":
                raise BuildError("SABMN_CUDA=0")
            root = find_cuda_root()
            if root is None:
                raise BuildError("no nvcc found (CUDA_HOME, PATH); SABMN_CUDA=wheels fetches one from PyPI")
            nvcc = root / "bin" / "nvcc"
            targets = cuda_targets(nvcc)
            command = [str(nvcc), "-std=c++17", "-O3", "-ccbin", cxx.split()[0], "-cudart", "static", f"-I{CSRC}"]
            command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", *cuda_codes(targets)]
            objects = [ninja.compile(source, command, "cuda", "compile_cuda") for source in CUDA_SOURCES]
            ninja.run(*objects, *beside)
        except BuildError as error:
            if CUDA_MODE in ("1", "wheels"):
                raise
            say(f"CUDA kernels left out: {error}")
            return [], [], [f"-DSABMN_CUDA_MISSING='\"{json_safe(str(error))}\"'"]
        say(f"CUDA kernels for {' '.join(targets)} with {nvcc}")
        folders = [folder for folder in (root / "lib64", root / "lib") if (folder / "libcudart_static.a").exists()]
        libraries = [f"-L{folder}" for folder in folders] + ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return objects, libraries, [f"-DSABMN_CUDA_TARGETS='\"{' '.join(targets)}\"'"]


class CudaReport(Command):
    """Compiles the CUDA kernels that are not compiled yet, and names the compiler's report of each source."""

    description = "compile the CUDA kernels and print where the compiler's reports are"
    user_options = []  # noqa: RUF012  setuptools' own form

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        build = self.get_finalized_command("build_ext")
        folder = build.ninja_folder()
        try:
            objects, _, _ = build.compile_cuda(Ninja(folder), find_cxx())
        except BuildError as error:
            raise SystemExit(f"sabmn_ext: the CUDA kernels were not compiled: {error}") from None
        for name in objects:
            print(f"report {folder / name}.txt")


class SimtBuild(Command):
    """Compiles the CUDA sources and their tests (``*_simt.cpp``) for the CPU: ``build/simt/SANITIZER/tests``."""

    description = "build the tests of the CUDA kernels that run on a CPU"
    user_options = [("sanitizer=", None, f"one of {', '.join(SIMT_SANITIZERS)}")]  # noqa: RUF012  setuptools' own form

    def initialize_options(self) -> None:
        self.sanitizer = "none"

    def finalize_options(self) -> None:
        if self.sanitizer not in SIMT_SANITIZERS:
            raise SystemExit(f"sabmn_ext: --sanitizer={self.sanitizer!r} is not one of {', '.join(SIMT_SANITIZERS)}")

    def run(self) -> None:
        flags = SIMT_SANITIZERS[self.sanitizer]
        command = [find_cxx(), *SIMT_FLAGS, *flags, f"-I{CSRC}"]
        # The scheduler works between the threads' stacks and for all of them: a sanitizer must not watch it.
        watched_by = {"none": [], "address": ["-DSIMT_ASAN"], "thread": ["-DSIMT_TSAN"]}[self.sanitizer]
        scheduler = [*command, "-fno-sanitize=all", "-O3", "-fno-tree-loop-distribute-patterns", *watched_by]
        ninja = Ninja(ROOT / "build" / "simt" / self.sanitizer)
        objects = [
            ninja.compile(CSRC / "simt" / f"{name}.cpp", scheduler, "host") for name in ("fiber", "simt", "symbols")
        ]
        objects += [ninja.compile(source, [*command, "-x", "c++"], "host") for source in CUDA_SOURCES]
        for source in [CSRC / "simt" / "test.cpp", *sorted(CSRC.glob("*/*_simt.cpp"))]:
            objects.append(ninja.compile(source, command, "host"))
        output = ninja.folder / "tests"
        ninja.link(output, objects, [command[0], *flags], [])
        try:
            ninja.run(str(output))
        except BuildError as error:
            raise SystemExit(f"sabmn_ext: the tests of the CUDA kernels were not built: {error}") from None


def json_safe(text: str) -> str:
    """Text that survives a shell's quotes, ninja's dollar signs and a C string."""
    return re.sub(r"[^\w .,;:/()=+-]", "", text)


class BuildPy(build_py):
    """Leaves the sources' fingerprint in the installed package, where there is no csrc/ to compute it from."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "sabmn_ext" / "_fingerprint.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(FINGERPRINT)


setup(
    ext_modules=[Extension("_sabmn_ext", sources=[])],
    cmdclass={"build_ext": NinjaBuild, "build_py": BuildPy, "cuda_report": CudaReport, "simt": SimtBuild},
    setup_requires=[CUDA_WHEELS] if CUDA_MODE == "wheels" else [],
)
