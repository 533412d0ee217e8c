"""Counts and audit against data whose faults were put there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_data import make_fake_market, write_image
from PIL import Image, ImageEnhance

from sabmn_ext.data import ImageRecord, ReidData, load_data
from sabmn_ext.data.summary import as_text, audit, difference_hash, near_pairs, summarize


def smooth_picture(seed: int) -> Image.Image:
    """A picture with structure: a hash of pure noise would change with every re-compression."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 128), Image.Resampling.BICUBIC)


def test_counts(tmp_path: Path) -> None:
    summary = summarize(load_data(make_fake_market(tmp_path)))
    assert summary["train"] == {
        "images": 48, "identities": 8, "cameras": 6, "junk": 0, "one_camera_identities": 0,
        "images_per_identity": {"min": 6, "median": 6, "max": 6},
        "cameras_per_identity": {"min": 6, "median": 6, "max": 6},
    }  # fmt: skip
    gallery = summary["gallery"]
    assert (gallery["images"], gallery["identities"], gallery["junk"], gallery["distractors"]) == (
        29,
        5,
        2,
        3,
    )
    assert gallery["images_per_identity"] == {"min": 3, "median": 6, "max": 6}
    assert summary["query"]["without_match"] == 0
    assert json.loads(json.dumps(summary)) == summary


def test_one_camera_identities_and_queries_without_a_match() -> None:
    def records(*pairs: tuple[int, int]) -> list[ImageRecord]:
        return [ImageRecord(f"{i}.png", pid, camid) for i, (pid, camid) in enumerate(pairs)]

    query = records(
        (1, 1), (2, 1), (3, 1), (4, 1)
    )  # 2: only its own camera; 3: nobody; 4: its own and another
    gallery = records((1, 2), (2, 1), (2, 1), (4, 1), (4, 3), (-1, 2))
    train = records((1, 1), (1, 1), (2, 1), (2, 3), (3, 1), (3, 1), (3, 2))
    summary = summarize(ReidData("made up", "/", train, query, gallery))
    assert summary["query"]["without_match"] == 2
    assert summary["train"]["one_camera_identities"] == 1
    assert summary["train"]["images_per_identity"] == {"min": 2, "median": 2, "max": 3}
    assert summary["train"]["cameras_per_identity"] == {"min": 1, "median": 2, "max": 2}
    blind = [record._replace(camid=-1) for record in query]
    summary = summarize(ReidData("no cameras", "/", [], blind, [r._replace(camid=-1) for r in gallery]))
    assert summary["query"]["without_match"] == 1  # without the camera rule only 3 has none
    assert (summary["cameras_known"], summary["train"]["images_per_identity"]) == (False, {})


@pytest.fixture
def faulty(tmp_path: Path) -> ReidData:
    folders = [tmp_path / name for name in ("bounding_box_train", "query", "bounding_box_test")]
    for folder in folders:
        folder.mkdir()
    train, query, gallery = folders
    for i in range(4):
        smooth_picture(i).save(train / f"{i:04d}_c1_{i}.png")
        smooth_picture(10 + i).save(query / f"{10 + i:04d}_c1_{i}.png")
        smooth_picture(20 + i).save(gallery / f"{10 + i:04d}_c2_{i}.png")
    shutil.copy(query / "0011_c1_1.png", gallery / "0011_c3_copy.png")
    shutil.copy(query / "0011_c1_1.png", gallery / "0011_c4_copy.png")
    shutil.copy(train / "0002_c1_2.png", gallery / "0500_c1_leak.png")
    ImageEnhance.Brightness(smooth_picture(3)).enhance(1.1).save(query / "0013_c1_near.jpg", quality=60)
    (gallery / "0012_c5_broken.png").write_bytes(b"no picture")
    return load_data(str(tmp_path))


def test_audit_finds_what_was_put_there_and_nothing_else(faulty: ReidData) -> None:
    found = audit(faulty, progress=False)

    def names(*paths: str) -> list[str]:
        return [Path(path).name for path in paths]

    assert [names(item["path"]) for item in found["unreadable"]] == [["0012_c5_broken.png"]]
    assert "UnidentifiedImageError" in found["unreadable"][0]["why"]
    assert [names(*pair) for pair in found["query_in_gallery"]] == [["0011_c1_1.png", "0011_c3_copy.png"]]
    assert sorted(names(*group) for group in found["exact"]) == [
        ["0002_c1_2.png", "0500_c1_leak.png"],
        ["0011_c1_1.png", "0011_c3_copy.png", "0011_c4_copy.png"],
    ]
    assert found["exact_across_train_and_test"] == 1
    assert found["exact_with_different_pids"] == 1
    assert [names(*pair) for pair in found["near"]] == [["0003_c1_3.png", "0013_c1_near.jpg"]]
    assert json.loads(json.dumps(found)) == found
    text = as_text(summarize(faulty), found)
    for part in (
        "unreadable files: 1",
        "0012_c5_broken.png",
        "inside the gallery: 1",
        "exact copies: 2",
        "1 pairs",
    ):
        assert part in text


def test_a_thousand_copies_are_one_group_and_no_near_pair(tmp_path: Path) -> None:
    path = str(write_image(tmp_path / "a.png"))
    records = [ImageRecord(path, 1, 1)] * 1000
    found = audit(ReidData("copies", "/", records, records, records), progress=False)
    assert (len(found["exact"]), len(found["query_in_gallery"]), found["near"]) == (1, 1000, [])


def test_near_pairs_are_those_of_a_brute_force() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((700, 128)) < 0.5, rng.random((300, 128)) < 0.5
    for k in range(40):  # near copies at distances 0 … 9
        b[k] = a[15 * k]
        b[k, rng.choice(128, k % 10, replace=False)] ^= True
    expected = {(i, j) for i in range(700) for j in range(300) if (a[i] != b[j]).sum() <= 8}
    assert len(expected) == 36
    assert set(near_pairs(a, b)) == expected
    assert list(near_pairs(a[:0], b)) == list(near_pairs(a, b[:0])) == []


def test_difference_hash_compares_neighbours(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 180, 20, dtype=np.uint8), (9, 1))
    Image.fromarray(ramp).save(tmp_path / "right.png")
    Image.fromarray(ramp.T.copy()).save(tmp_path / "down.png")
    assert difference_hash(str(tmp_path / "right.png")).tolist() == [True] * 64 + [False] * 64
    assert difference_hash(str(tmp_path / "down.png")).tolist() == [False] * 64 + [True] * 64
