"""A report that cannot be written costs a run nothing else."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from sabmn_ext.training.config import load_recipe
from sabmn_ext.training.run_report import write_run_report


@pytest.mark.parametrize("error", [OSError("no space left"), ValueError("a bad image"), ImportError("no matplotlib")])
def test_a_failure_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(folder: Path, _: object) -> None:
        assert folder == tmp_path / "report"
        raise error

    monkeypatch.setattr("sabmn_ext.report.page.write_report", fails)
    drawn = {"result": None, "query": None, "gallery": None}
    write_run_report(tmp_path, load_recipe("demo"), SimpleNamespace(attention=None), "cpu", {"data": "demo"}, drawn)
    again = f"python -m sabmn_ext.evaluate --checkpoint {tmp_path / 'last.pt'} --report {tmp_path / 'report'}"
    assert capsys.readouterr().out == (f"no report: {error}. Everything else is written; the report alone: {again}\n")
