"""The demo data set: layout, the same bytes for the same seed, cached safely, and hard for mean colour."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sabmn_ext.data import ReidData, demo, load_data
from sabmn_ext.data.demo import cache_folder, demo_root, mean_colour_features, write_demo


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReidData:
    """The whole data set, drawn once (seconds)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SABMN_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_data("demo")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder for data sets of 8 people."""
    monkeypatch.setattr(demo, "NUM_PEOPLE", 8)
    monkeypatch.setattr(demo, "NUM_STRANGERS", 2)
    monkeypatch.setattr(demo, "NUM_JUNK", 2)
    monkeypatch.setenv("SABMN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = b"".join(path.relative_to(folder).as_posix().encode() + path.read_bytes() for path in files)
    return hashlib.sha256(content).hexdigest()


def test_it_is_a_small_market1501(data: ReidData) -> None:
    assert (data.name, data.notes, data.has_cameras) == ("demo", [], True)
    assert (len(data.train), len(data.query), len(data.gallery)) == (1440, 160, 400)
    train, query = ({record.pid for record in records} for records in (data.train, data.query))
    assert (len(train), len(query), train & query) == (120, 40, set())
    pids = [record.pid for record in data.gallery]
    assert set(pids) == query | {0, -1}
    assert (pids.count(0), pids.count(-1)) == (48, 32)
    assert {record.camid for record in data.train} == {1, 2, 3, 4, 5, 6}
    for record in data.query:  # everyone has six matches in three other cameras
        matches = [r.camid for r in data.gallery if r.pid == record.pid and r.camid != record.camid]
        assert (len(matches), len(set(matches))) == (6, 3)
    with Image.open(data.train[0].path) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (64, 128), "RGB")


def test_mean_colour_hardly_finds_anybody(data: ReidData) -> None:
    query, gallery = (mean_colour_features(records) for records in (data.query, data.gallery))
    assert (query.shape, query.dtype) == ((160, 3), np.float32)
    with Image.open(data.query[5].path) as image:
        assert np.allclose(query[5], np.asarray(image, dtype=np.float64).mean((0, 1)), atol=1e-3)
    precisions = []
    for record, feature in zip(data.query, query, strict=True):
        kept = [(float(((feature - other) ** 2).sum()), r.pid == record.pid)
                for r, other in zip(data.gallery, gallery, strict=True)
                if r.pid != -1 and (r.pid, r.camid) != record[1:]]  # fmt: skip
        hits = [rank for rank, (_, match) in enumerate(sorted(kept), 1) if match]
        precisions.append(np.mean([(i + 1) / rank for i, rank in enumerate(hits)]))
    assert np.mean(precisions) < 0.06


def test_pictures_of_one_person_differ_and_people_differ(data: ReidData) -> None:
    contents = {Path(record.path).read_bytes() for record in (*data.train, *data.query, *data.gallery)}
    assert len(contents) == 2000


def test_a_seed_gives_the_same_bytes_in_any_process(small: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "a", 3)
    script = (
        "import sys; from sabmn_ext.data import demo; "
        "demo.NUM_PEOPLE = 8; demo.NUM_STRANGERS = demo.NUM_JUNK = 2; "
        "demo.write_demo(sys.argv[1], 3)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "b")], env=environment, check=True)
    write_demo(tmp_path / "c", 4)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_it_is_drawn_once_and_found_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = load_data("demo:5").root
    assert root == str(small / f"demo-v{demo.DRAWING_VERSION}-seed5")
    monkeypatch.setattr(demo, "write_demo", None)  # calling it would fail
    assert load_data("demo:5").root == root
    assert [path.name for path in small.iterdir()] == [Path(root).name]


def test_an_interrupted_drawing_leaves_nothing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(root: Path, seed: int) -> None:
        write_demo(root, seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write_demo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_root(0)
    assert list(small.iterdir()) == []


def test_a_second_process_that_was_faster_wins(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(root: Path, seed: int) -> None:
        write_demo(root, seed)
        write_demo(small / f"demo-v{demo.DRAWING_VERSION}-seed{seed}", seed)

    monkeypatch.setattr(demo, "write_demo", overtaken)
    root = demo_root(1)
    assert [path.name for path in small.iterdir()] == [root.name]
    assert len(list((root / "bounding_box_train").iterdir())) == 72


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SABMN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "sabmn_ext"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "sabmn_ext"
    monkeypatch.setenv("SABMN_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize("path", ["demo:x", "demo:-1", "demo:1.5"])
def test_a_bad_seed_is_an_error(path: str) -> None:
    with pytest.raises(ValueError, match=f"'{path}' is not 'demo' or 'demo:SEED'"):
        load_data(path)
