"""Market-1501, CUHK03-NP and other data in Market-1501's folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_data import make_fake_market, write_image

from sabmn_ext.data import load_data
from sabmn_ext.data.records import ImageRecord


def write_folders(root: Path, train: list[str], query: list[str], gallery: list[str]) -> Path:
    for folder, names in (("bounding_box_train", train), ("query", query), ("bounding_box_test", gallery)):
        for name in names:
            write_image(root / folder / name)
    return root


def test_published_counts_are_found_without_a_note(tmp_path: Path) -> None:
    data = load_data(make_fake_market(tmp_path, full=True))
    assert (data.name, data.notes) == ("market1501", [])
    assert (len(data.train), len(data.query), len(data.gallery)) == (12_936, 3_368, 19_732)
    assert data.num_train_identities == 751
    assert len({record.pid for record in data.query}) == 750
    assert sum(record.pid == -1 for record in data.gallery) == 3_819
    assert sum(record.pid == 0 for record in data.gallery) == 2_798
    # The tests that use this fake rely on it: every query has a match in another camera.
    cameras: dict[int, set[int]] = {}
    for record in data.gallery:
        cameras.setdefault(record.pid, set()).add(record.camid)
    assert all(cameras[record.pid] - {record.camid} for record in data.query)


def test_a_difference_from_the_published_counts_is_a_note(tmp_path: Path) -> None:
    root = Path(make_fake_market(tmp_path / "Market-1501-v15.09.15"))
    data = load_data(str(tmp_path))  # the folder around it is good as well
    assert data.root == str(root)
    assert data.notes[:2] == [
        "train has 48 images, market1501 was published with 12,936",
        "train has 8 identities, market1501 was published with 751",
    ]
    assert len(data.notes) == 6
    assert load_data(str(tmp_path), format="market").notes == []


def test_only_the_files_own_name_is_parsed_and_other_files_are_ignored(tmp_path: Path) -> None:
    root = write_folders(
        tmp_path / "0007_c3s1_000001_00",
        [
            "0005_c12s1_000001_00.JPG",
            "-1_c1s1_000001_00.jpg",
            "0003_c2.jpeg",
            ".0009_c1s1_000001_00.jpg",
            "readme.png",
        ],
        ["0010_c1s2_000001_00.png"],
        ["-1_c4s1_000001_00.png", "0010_c2s2_000001_00.Png", "0000_c2s2_000001_00.bmp"],
    )
    (root / "query" / "Thumbs.db").write_bytes(b"x")
    data = load_data(str(root))

    def seen(records: list[ImageRecord]) -> list[tuple[str, int, int]]:
        return [(Path(record.path).name, record.pid, record.camid) for record in records]

    assert seen(data.train) == [("0003_c2.jpeg", 3, 2), ("0005_c12s1_000001_00.JPG", 5, 12)]
    assert seen(data.query) == [("0010_c1s2_000001_00.png", 10, 1)]
    assert seen(data.gallery) == [
        ("-1_c4s1_000001_00.png", -1, 4),
        ("0000_c2s2_000001_00.bmp", 0, 2),
        ("0010_c2s2_000001_00.Png", 10, 2),
    ]
    assert all(Path(record.path).is_absolute() for record in data.train)
    assert data.notes == [
        "bounding_box_train: left out 1 junk images (pid −1)",
        "bounding_box_train: left out 1 images whose names do not start with an identity number, "
        "'readme.png' first",
    ]


def test_labels_follow_the_sorted_pids_whatever_the_order_of_the_files(tmp_path: Path) -> None:
    names = ["0100_c1s1_1.png", "0020_c1s1_1.png", "1000_c1s1_1.png", "0020_c2s1_1.png"]
    test = ["0001_c1.png"], ["0001_c2.png"]
    first = load_data(str(write_folders(tmp_path / "a", names, *test)))
    second = load_data(str(write_folders(tmp_path / "b", names[::-1], *test)))
    assert first.train_labels() == second.train_labels() == [0, 0, 1, 2]
    assert [record.pid for record in first.train] == [20, 20, 100, 1000]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    make_fake_market(tmp_path)
    (tmp_path / "query").rename(tmp_path / "queries")
    for format in ("auto", "market1501"):
        with pytest.raises(FileNotFoundError, match=f"missing.*{tmp_path}/query"):
            load_data(str(tmp_path), format=format)


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    root = write_folders(tmp_path, ["0001_c1.png"], ["0002_c1.png"], ["gallery.png"])
    with pytest.raises(ValueError, match=r"bounding_box_test has no image named like .*'gallery.png'"):
        load_data(str(root))


def test_people_in_train_and_query_are_noted(tmp_path: Path) -> None:
    write_folders(tmp_path, ["0001_c1.png", "0002_c1.png"], ["0002_c1.png"], ["0002_c2.png"])
    data = load_data(str(tmp_path))
    assert data.notes == ["1 identities are in train and in query, pid 2 first"]


@pytest.mark.parametrize(
    "names", [("0002_a.png", "0002_b.png"), ("0002_c1_a.png", "0002_c1_b.png")], ids=["none", "one"]
)
def test_no_camera_or_one_needs_the_flag_that_the_error_names(tmp_path: Path, names: tuple[str, str]) -> None:
    root = str(write_folders(tmp_path, ["0001.png", "0003_c5.png"], [names[0]], [names[1]]))
    with pytest.raises(ValueError, match=r"--no-camera-rule .*cameras=False"):
        load_data(root)
    data = load_data(root, cameras=False)
    assert not data.has_cameras
    assert {record.camid for record in (*data.train, *data.query, *data.gallery)} == {-1}


def test_cuhk03_np_labeled_and_detected(tmp_path: Path) -> None:
    for kind in ("labeled", "detected"):
        write_folders(tmp_path / "cuhk03-np" / kind, ["0001_c1_1.png"], ["0002_c1_1.png"], ["0002_c2_1.png"])
    with pytest.raises(ValueError, match=r"several data sets \(detected, labeled\)"):
        load_data(str(tmp_path / "cuhk03-np"))
    data = load_data(str(tmp_path / "cuhk03-np" / "detected"))
    assert data.name == "cuhk03-np detected"
    assert "train has 1 images, cuhk03-np detected was published with 7,365" in data.notes


def test_raw_cuhk03_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "cuhk-03.mat").write_bytes(b"MATLAB")
    for path, format in ((tmp_path, "auto"), (tmp_path / "cuhk-03.mat", "auto"), (tmp_path, "cuhk03-np")):
        with pytest.raises(ValueError, match=r"Market-style folders .*zhunzhong07/person-re-ranking"):
            load_data(str(path), format=format)
