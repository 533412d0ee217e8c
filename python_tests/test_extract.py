"""``python -m sabmn_ext.extract``: a data set or a folder in, files out that the other commands read."""

import json
from functools import partial
from pathlib import Path

import command_errors
import numpy as np
import pytest
from fake_data import make_fake_market
from small_checkpoint import models_read_once, write_checkpoint, write_images  # noqa: F401  (a fixture)

from sabmn_ext import evaluate
from sabmn_ext.extract import main

error_of = partial(command_errors.error_of, main)
pytestmark = pytest.mark.usefixtures("models_read_once")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "last.pt")


def test_a_data_set_for_the_evaluation(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = make_fake_market(tmp_path), tmp_path / "features"
    line = ["--checkpoint", str(checkpoint), "--data", data, "--out", str(out), "--device", "cpu"]
    assert main(line) == 0
    assert f"{out}/gallery_features.npy: 29 × 16 float32; gallery.csv beside it\n" in capsys.readouterr().out
    assert np.load(out / "query_features.npy", mmap_mode="r").shape == (8, 16)
    assert evaluate.main(["--features", str(out), "--json", str(tmp_path / "a.json")]) == 0
    options = ["--checkpoint", str(checkpoint), "--data", data, "--device", "cpu", "--json", str(tmp_path / "b.json")]
    assert evaluate.main(options) == 0
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert (a["map"], a["queries"]) == (b["map"], b["queries"])

    assert main([*line, "--split", "train"]) == 0
    assert np.load(out / "train_features.npy").shape == (48, 16)
    assert "holds features of other settings" in error_of(capsys, *line, "--flip")
    line[1] = str(write_checkpoint(tmp_path / "other.pt", seed=1))
    assert "holds features of another checkpoint" in error_of(capsys, *line)


def test_a_folder_with_a_damaged_image(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_images(tmp_path / "images", ["a.png", "b.png", "c.png"])
    paths[1].write_bytes(b"no image")
    line = ["--checkpoint", str(checkpoint), "--images", str(tmp_path / "images"), "--device", "cpu"]
    line += ["--out", str(tmp_path / "out")]
    assert "cannot read image" in (message := error_of(capsys, *line))
    assert "b.png" in message
    with pytest.warns(UserWarning, match=r"skipped: .*b\.png"):
        assert main([*line, "--on-error", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "gallery_features.npy: 2 × 16 float32 (1 unreadable images left out); gallery.csv beside it" in printed


def test_bad_arguments(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "out"]
    write_images(tmp_path / "images", ["a.png"])
    images = ["--images", tmp_path / "images"]
    assert "no such file" in error_of(capsys, "--checkpoint", tmp_path / "none.pt", *images, *out)
    (tmp_path / "foreign.pt").write_bytes(b"something else")
    message = error_of(capsys, "--checkpoint", tmp_path / "foreign.pt", *images, *out)
    assert "foreign.pt is not a whole checkpoint of sabmn_ext" in message
    first = ["--checkpoint", checkpoint]
    assert "no such folder of images" in error_of(capsys, *first, "--images", tmp_path / "none", *out)
    assert "go with --data" in error_of(capsys, *first, *images, "--split", "query", *out)
    assert "batch_size is -1; expected 1 or more" in error_of(capsys, *first, *images, *out, "--batch-size", "-1")
    assert not (tmp_path / "out").exists()
