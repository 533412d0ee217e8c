"""How load_data finds a data set, and what it says when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_data import make_fake_market

from sabmn_ext.data import load_data


def test_a_bad_path_or_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        load_data(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=f"no data set in {tmp_path} .*bounding_box_train"):
        load_data(str(tmp_path))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="is no data set: give a folder"):
        load_data(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="'market1502' is unknown: give one of auto, market1501"):
        load_data(str(tmp_path), format="market1502")
    with pytest.raises(ValueError, match="is a file, and format 'msmt17'"):
        load_data(str(tmp_path / "a.txt"), format="msmt17")


def test_two_data_sets_side_by_side_are_not_guessed_at(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_fake_market(tmp_path / name)
    with pytest.raises(ValueError, match=r"several data sets \(one, two\)"):
        load_data(str(tmp_path))
    assert len(load_data(str(tmp_path / "two")).train) == 48


def test_a_home_folder_and_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fake_market(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert load_data("~/data").root == load_data("data").root == str(tmp_path / "data")
