"""The README's snippets run, and its commands have the options that it names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_snippets_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def commands() -> list[tuple[str, str]]:
    found = re.findall(r"python -m sabmn_ext\.(\w+)([^\n`#]*)", README)
    return sorted({(module, arguments.strip()) for module, arguments in found})


@pytest.mark.parametrize(("module", "arguments"), commands())
def test_commands_have_their_options(module: str, arguments: str) -> None:
    command = [sys.executable, "-m", f"sabmn_ext.{module}", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for option in re.findall(r"--[\w-]+", arguments):
        assert option in text, f"python -m sabmn_ext.{module} has no {option}"


def test_there_is_something_to_test() -> None:
    assert len(blocks("python")) >= 3
    assert {module for module, _ in commands()} >= {"train", "evaluate", "data", "info"}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(path: str) -> None:
    assert (Path(__file__).resolve().parent.parent / path).exists()
