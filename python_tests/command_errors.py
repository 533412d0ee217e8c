"""What a command says of bad input."""

from collections.abc import Callable, Sequence

import pytest


def error_of(main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command ends with, exit status 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err
