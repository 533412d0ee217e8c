"""The snippets of docs/search.md run, its commands have the options that it names; docs/ablation.md names every row."""

import re
from pathlib import Path

import pytest

from sabmn_ext import ablate, evaluate, extract, search
from sabmn_ext.training.ablation import GROUPS

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "search.md").read_text()
PARSERS = {"evaluate": evaluate.build_parser(), "extract": extract.build_parser(), "search": search.build_parser()}


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_snippets_run(code: str) -> None:
    exec(compile(code, "docs/search.md", "exec"), {})


def test_commands_have_their_options() -> None:
    commands = re.findall(r"(?:python -m sabmn_ext\.|`)(\w+)((?: +--[\w-]+[^\n`]*)+)", TEXT)
    assert len(commands) >= 6
    for module, arguments in commands:
        for option in re.findall(r"--[\w-]+", arguments):
            assert option in PARSERS[module].format_help(), f"python -m sabmn_ext.{module} has no {option}"


def test_the_page_of_the_ablation() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "ablation.md").read_text().replace("\\\n", "")
    for options in re.findall(r"python -m sabmn_ext\.ablate ([^\n`]*)", page):
        ablate.build_parser().parse_args(options.split())
    for group in ("paper", "gradient"):
        assert f"| `{group}` |" in page
        assert all(f"`{row.name}`" in page for row in GROUPS[group])
    assert len(GROUPS["spectral"]) == 6
