"""A user's own data as a CSV file."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_data import write_image

from sabmn_ext.data import load_data


def write_csv(folder: Path, *lines: str) -> str:
    for i in range(6):
        write_image(folder / "images" / f"{i}.png", i)
    file = folder / "mine.csv"
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def test_numbers_relative_and_absolute_paths_and_junk(tmp_path: Path) -> None:
    data = load_data(write_csv(
        tmp_path, "path,pid,camid,split", "images/0.png,30,1,train", "images/1.png,4,1,train",
        f"{tmp_path}/images/2.png,7,2,query", "images/3.png,7,1,gallery", "images/4.png,-1,1,gallery",
        "images/5.png,-1,1,train",
    ))  # fmt: skip
    assert [tuple(record) for record in data.train] == [
        (str(tmp_path / "images/0.png"), 30, 1),
        (str(tmp_path / "images/1.png"), 4, 1),
    ]
    assert data.train_labels() == [1, 0]
    assert data.query == [(str(tmp_path / "images/2.png"), 7, 2)]
    assert [record[1:] for record in data.gallery] == [(7, 1), (-1, 1)]
    assert data.notes == ["left out 1 junk images (pid −1) of train or query"]


def test_names_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    data = load_data(write_csv(
        tmp_path, "split, pid, path, camid", "train,zoe,images/0.png,hall", "train,-1,images/1.png,door",
        "query,bob,images/2.png,hall", "gallery,-1,images/3.png,door", "gallery,bob,images/4.png,door",
    ))  # fmt: skip
    found = [record[1:] for record in (*data.train, *data.query, *data.gallery)]
    assert found == [(1, 1), (0, 1), (-1, 0), (0, 0)]


def test_without_cameras_the_flag_is_named_and_works(tmp_path: Path) -> None:
    file = write_csv(tmp_path, "path,pid,split", "images/0.png,1,query", "images/1.png,1,gallery")
    with pytest.raises(ValueError, match="--no-camera-rule"):
        load_data(file)
    data = load_data(file, cameras=False)
    assert not data.has_cameras
    assert data.notes == ["no row has split train: good for evaluation only"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,id,split"], "must name path, pid, split"),
        (["path,pid,split", "images/0.png,1,test"], "line 2: split 'test'"),
        (["path,pid,split", "images/0.png,1,query", "images/9.png,1,gallery"], "line 3: no such file: .*9"),
        (["path,pid,split", "images/0.png,,query"], "line 2: path and pid"),
        (["path,pid,split", "images/0.png,1,query"], "no row with split gallery"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_data(write_csv(tmp_path, *lines), cameras=False)
