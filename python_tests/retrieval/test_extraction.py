"""Features in files: what is written, going on after a kill, and what is refused."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_checkpoint import write_checkpoint, write_images

import sabmn_ext
from sabmn_ext.data.images import UnreadableImageError
from sabmn_ext.data.records import ImageRecord
from sabmn_ext.retrieval import extraction
from sabmn_ext.retrieval.extraction import images_below, read_part, write_features

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    names = ["a,b.png", 'quo"te.png', "sp ace/ü.png", "line\nbreak.png", *(f"{i:02}.png" for i in range(9))]
    paths = write_images(tmp_path / "images", names)
    return [ImageRecord(str(path), i // 3 - 1, 1 + i % 2) for i, path in enumerate(paths)]


def test_features_and_labels(extractor: sabmn_ext.Extractor, records: list[ImageRecord], tmp_path: Path) -> None:
    out = tmp_path / "out"
    parts = {"query": records[:5], "gallery": records}
    assert write_features(out, extractor, parts, labelled=True) == {"query": 5, "gallery": 13}
    features, rows = read_part(out, "gallery")
    assert isinstance(features, np.memmap)
    assert features.dtype == np.float32
    assert np.array_equal(features, extractor([record.path for record in records]).numpy())
    assert [tuple(row.values()) for row in rows] == [(r.path, str(r.pid), str(r.camid)) for r in records]
    assert np.load(out / "gallery_pids.npy").tolist() == [record.pid for record in records]
    assert np.load(out / "gallery_camids.npy").tolist() == [record.camid for record in records]
    assert np.load(out / "gallery_paths.npy").tolist() == [record.path for record in records]
    assert len(read_part(out, "query")[1]) == 5
    assert not list(out.glob("*.partial"))


def test_a_folder_of_images(extractor: sabmn_ext.Extractor, records: list[ImageRecord], tmp_path: Path) -> None:
    write_images(tmp_path / "images", [".hidden/x.png", ".y.png"])
    (tmp_path / "images" / "notes.txt").write_text("no image")
    found = images_below(tmp_path / "images")
    assert {record.path for record in found} == {record.path for record in records}
    assert [record.path for record in found] == sorted((record.path for record in found), key=Path)
    write_features(tmp_path / "out", extractor, {"gallery": found}, labelled=False)
    rows = read_part(tmp_path / "out", "gallery")[1]
    assert {(row["pid"], row["camid"]) for row in rows} == {("", "")}
    assert not (tmp_path / "out" / "gallery_pids.npy").exists()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        images_below(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no image in"):
        images_below(tmp_path / "empty")


def test_it_goes_on_from_any_state_that_a_kill_leaves(
    extractor: sabmn_ext.Extractor,
    records: list[ImageRecord],
    tmp_path: Path,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = tmp_path / "whole"
    write_features(whole, extractor, {"gallery": records}, labelled=True)
    features, lines = (whole / f"gallery{name}" for name in ("_features.npy", ".csv"))
    out, rng = tmp_path / "out", random.Random(seed)
    out.mkdir()
    (out / "extraction.json").write_bytes((whole / "extraction.json").read_bytes())
    once_more = []

    def counted(images: torch.Tensor) -> torch.Tensor:
        once_more[-1] += len(images)
        return sabmn_ext.Extractor.features_of_normalized(extractor, images)

    monkeypatch.setattr(extractor, "features_of_normalized", counted)
    checksum = extraction.file_sha256(extractor.checkpoint)
    monkeypatch.setattr(extraction, "file_sha256", lambda file: checksum)
    for _ in range(8):
        for file in out.glob("gallery*"):
            file.unlink()
        # Rows reach the disk before their lines, and either may be cut anywhere.
        size = len(lines.read_bytes())
        cut = rng.randrange(size + 1)
        text = lines.read_bytes()[:cut]
        done = len(extraction._csv_rows(text.decode(errors="ignore")))
        rows = rng.randrange(done, 14) * 64 + rng.choice((0, 0, 37))
        (out / "gallery_features.npy.partial").write_bytes(features.read_bytes()[: 128 + rows])
        (out / "gallery.csv.partial").write_bytes(text)
        once_more.append(0)
        assert write_features(out, extractor, {"gallery": records}, labelled=True) == {"gallery": 13}
        assert once_more[-1] == 13 - done
        assert lines.read_bytes() == (out / "gallery.csv").read_bytes()
        ours, theirs = (np.load(folder / "gallery_features.npy") for folder in (whole, out))
        np.testing.assert_allclose(theirs, ours, atol=1e-5)  # the batches are others
        assert np.array_equal(theirs[:done], ours[:done])
    assert len(set(once_more)) > 3


@pytest.mark.heavy
def test_sigkill(extractor: sabmn_ext.Extractor, tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images", [f"{i:03}.png" for i in range(120)])
    out = tmp_path / "out"
    code = (
        "import sys, time\n"
        "import sabmn_ext\nfrom sabmn_ext.retrieval import extraction\nfrom sabmn_ext.extract import main\n"
        "plain = sabmn_ext.Extractor.features_of_normalized\n"
        "def slow(self, images):\n    time.sleep(0.1)\n    return plain(self, images)\n"
        "sabmn_ext.Extractor.features_of_normalized = slow\n"
        "extraction._COMMIT_SECONDS = 0\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["--checkpoint", str(extractor.checkpoint), "--images", str(tmp_path / "images"), "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments, "--device", "cpu"])
    lines = out / "gallery.csv.partial"
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.read_text().count("\n") > 8):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = lines.read_text().count("\n") - 1
    assert 8 <= done < 120
    assert not (out / "gallery_features.npy").exists()
    with pytest.raises(FileNotFoundError, match="is not finished; go on by the same call"):
        read_part(out, "gallery")
    found = images_below(tmp_path / "images")
    assert write_features(out, extractor, {"gallery": found}, labelled=False) == {"gallery": 120}
    features, rows = read_part(out, "gallery")
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    np.testing.assert_allclose(features, extractor(paths).numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:skipped")
def test_unreadable_images(extractor: sabmn_ext.Extractor, records: list[ImageRecord], tmp_path: Path) -> None:
    for i in (5, 12):
        Path(records[i].path).write_bytes(b"no image")
    out = tmp_path / "out"
    with pytest.raises(UnreadableImageError, match=r"01\.png"):
        write_features(out, extractor, {"gallery": records}, labelled=True)
    assert len(extraction._csv_rows((out / "gallery.csv.partial").read_text())) == 4  # the batch before it is kept
    assert write_features(out, extractor, {"gallery": records}, labelled=True, on_error="skip") == {"gallery": 11}
    features, rows = read_part(out, "gallery")
    kept = [record for i, record in enumerate(records) if i not in (5, 12)]
    assert [row["path"] for row in rows] == [record.path for record in kept]
    np.testing.assert_allclose(features, extractor([record.path for record in kept]).numpy(), atol=1e-5)
    for record in records:
        Path(record.path).write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 13 gallery images could be read"):
        write_features(tmp_path / "none", extractor, {"gallery": records}, labelled=True, on_error="skip")


def test_another_checkpoint_other_settings_and_other_images(
    extractor: sabmn_ext.Extractor, records: list[ImageRecord], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_features(out, extractor, {"gallery": records}, labelled=True)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def refused(
        message: str, made_by: sabmn_ext.Extractor = extractor, changed: "list[ImageRecord] | None" = None
    ) -> None:
        with pytest.raises(ValueError, match=message):
            write_features(out, made_by, {"gallery": changed or records}, labelled=True)
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before

    other = sabmn_ext.Extractor(write_checkpoint(tmp_path / "other.pt", seed=1), device="cpu")
    refused(r"out holds features of another checkpoint \(.*last\.pt, with other contents than .*other\.pt\)", other)
    refused("features of other settings", sabmn_ext.Extractor(extractor.checkpoint, device="cpu", flip=True))
    refused("other gallery images .13 images then, 12 now", changed=records[:-1])
    refused("other gallery images", changed=[records[0]._replace(pid=77), *records[1:]])
    os.utime(records[3].path, ns=(1, 1))
    refused("other gallery images .13 images then, 13 now, or other paths, labels, sizes or times of change")


def test_two_at_a_time(extractor: sabmn_ext.Extractor, records: list[ImageRecord], tmp_path: Path) -> None:
    with extraction._locked(tmp_path), pytest.raises(ValueError, match="another extraction is writing into"):
        write_features(tmp_path, extractor, {"gallery": records}, labelled=True)
    assert write_features(tmp_path, extractor, {"gallery": records}, labelled=True) == {"gallery": 13}


def test_more_parts_later_and_nothing_twice(
    extractor: sabmn_ext.Extractor, records: list[ImageRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_features(out, extractor, {"gallery": records}, labelled=True)
    write_features(out, extractor, {"query": records[:3]}, labelled=True)
    monkeypatch.setattr(extractor, "features_of_normalized", None)  # is not called any more
    assert write_features(out, extractor, {"query": records[:3], "gallery": records}, labelled=True) == {
        "query": 3,
        "gallery": 13,
    }


def test_damaged_files(extractor: sabmn_ext.Extractor, records: list[ImageRecord], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"holds no gallery_features\.npy; write it by"):
        read_part(tmp_path, "gallery")
    write_features(out, extractor, {"gallery": records}, labelled=True)
    features, lines = out / "gallery_features.npy", out / "gallery.csv"
    whole, text = features.read_bytes(), lines.read_text()
    features.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"gallery_features\.npy and gallery\.csv are not whole"):
        read_part(out, "gallery")
    features.write_bytes(whole)
    for damaged in ("", "path,pid\nx,3\n", text.split("\n")[0] + "\na.png"):
        lines.write_text(damaged)
        with pytest.raises(ValueError, match="gallery"):
            read_part(out, "gallery")
    (out / "extraction.json").write_text("{}")
    with pytest.raises(ValueError, match=r"extraction\.json is damaged or not of this sabmn_ext"):
        write_features(out, extractor, {"gallery": records}, labelled=True)


def test_the_csv_is_one_for_any_reader(
    extractor: sabmn_ext.Extractor, records: list[ImageRecord], tmp_path: Path
) -> None:
    write_features(tmp_path / "out", extractor, {"gallery": records}, labelled=True)
    with open(tmp_path / "out" / "gallery.csv", newline="", encoding="utf-8") as stream:
        assert next(csv.reader(stream)) == ["path", "pid", "camid"]
