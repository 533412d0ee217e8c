"""python -m sabmn_ext.data: the table, JSON, the sheet, and one clear line for an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_data import make_fake_market, write_image

from sabmn_ext.data.__main__ import main


def test_table_and_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_fake_market(tmp_path / "data")
    assert main([root, "--sheet", str(tmp_path / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["images", "48", "8", "29"] in [line.split() for line in lines]
    assert any(line.startswith("groups of exact copies: ") for line in lines)
    assert (tmp_path / "sheet.png").exists()


def test_json_with_and_without_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_fake_market(tmp_path)
    assert main([root, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["train"]["images"], found["audit"]["unreadable"]) == (48, [])
    assert main([root, "--json", "--no-audit"]) == 0
    assert json.loads(capsys.readouterr().out)["audit"] is None


def test_no_camera_rule_is_named_and_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        write_image(tmp_path / folder / "0001_a.png")
    assert main([str(tmp_path)]) == 2
    assert "--no-camera-rule" in capsys.readouterr().err
    assert main([str(tmp_path), "--no-camera-rule"]) == 0
    assert "without the camera rule" in capsys.readouterr().out


def test_a_bad_path_is_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sabmn_ext.data", str(tmp_path / "nowhere")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"error: no such file or folder: {tmp_path / 'nowhere'}\n"
