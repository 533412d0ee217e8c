"""MSMT17: both versions, the list files, the validation images."""

from __future__ import annotations

from pathlib import Path

import pytest

from sabmn_ext.data import load_data


def write_lists(root: Path, folders: tuple[str, str]) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True)
    lines = {
        "train": ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0003/0003_001_14_0303noon_0008_0.jpg 3"],
        "val": ["0000/0000_002_15_0303morning_0009_0.jpg 0"],
        "query": ["0000/0000_000_02_0303morning_0008_1.jpg 0"],
        "gallery": ["0000/0000_001_05_0303morning_0009_0.jpg 0", "0007/0007_001_06_0303morning_0001_0.jpg 7"],
    }
    for name, content in lines.items():
        (root / f"list_{name}.txt").write_text("\n".join(content) + "\n")


@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")], ids=["V1", "V2"])
def test_msmt17(tmp_path: Path, folders: tuple[str, str]) -> None:
    root = tmp_path / "MSMT17"
    write_lists(root, folders)
    data = load_data(str(tmp_path))
    assert (data.name, data.root) == ("msmt17", str(root))
    assert data.train[1] == (str(root / folders[0] / "0003/0003_001_14_0303noon_0008_0.jpg"), 3, 14)
    assert data.gallery[0] == (str(root / folders[1] / "0000/0000_001_05_0303morning_0009_0.jpg"), 0, 5)
    assert data.train_labels() == [0, 1]
    assert "train has 2 images, msmt17 was published with 30,248" in data.notes
    assert not any("in train and in query" in note for note in data.notes)  # pid 0 is somebody else in each
    with_val = load_data(str(root), with_val=True)
    assert with_val.train_labels() == [0, 1, 0]
    assert "train has 3 images, msmt17 was published with 32,621" in with_val.notes


def test_errors_name_the_file_the_line_and_the_folder(tmp_path: Path) -> None:
    write_lists(tmp_path, ("train", "test"))
    with (tmp_path / "list_query.txt").open("a") as stream:
        stream.write("0001/picture.jpg 1\n")
    with pytest.raises(ValueError, match=r"list_query\.txt, line 2: .*picture"):
        load_data(str(tmp_path))
    (tmp_path / "test").rmdir()
    with pytest.raises(FileNotFoundError, match=r"missing .*train and test"):
        load_data(str(tmp_path))
    (tmp_path / "list_val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing file .*list_val.txt"):
        load_data(str(tmp_path), format="msmt17")
