"""``python -m sabmn_ext.search``: the list that is printed is topk's, the threshold is the evaluation's."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import command_errors
import pytest
from fake_data import make_fake_market
from PIL import Image
from small_checkpoint import models_read_once, write_checkpoint, write_images  # noqa: F401  (a fixture)

import sabmn_ext
from sabmn_ext import extract
from sabmn_ext.search import main

error_of = partial(command_errors.error_of, main)
pytestmark = pytest.mark.usefixtures("models_read_once")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "last.pt")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return write_images(tmp_path / "images", [f"{i:02}.png" for i in range(14)])


@pytest.fixture
def line(checkpoint: Path, images: list[Path], tmp_path: Path) -> list[str]:
    gallery, query = str(images[0].parent), str(images[3])
    return [
        *("--checkpoint", str(checkpoint), "--gallery", gallery, "--query", query),
        *("--out", str(tmp_path / "found.png"), "--device", "cpu"),
    ]


def lists(text: str) -> list[list[tuple[float, bool, str]]]:
    """(distance, same person, file name) of each line of each list."""
    found = []
    for part in text.split("\nquery ")[1:]:
        rows = re.findall(r"^ +\d+ +(\S+) +(same person)? +(/.*?)(?:  \(.*\))?$", part, re.MULTILINE)
        found.append([(float(distance), bool(same), Path(path).name) for distance, same, path in rows])
    return found


def test_a_folder(
    line: list[str], checkpoint: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = images[9]
    query_at = line.index("--query") + 1
    line[query_at : query_at + 1] = [str(images[3]), str(other)]
    extractor = sabmn_ext.Extractor(checkpoint, device="cpu")
    for metric, k in (("euclidean", 4), ("cosine", 14)):
        assert main([*line, "--k", str(k), "--metric", metric]) == 0
        distances, items = sabmn_ext.topk(extractor([images[3], other]), extractor(images), k, metric=metric)
        found = lists(capsys.readouterr().out)
        assert [[name for _, _, name in each] for each in found] == [[images[i].name for i in row] for row in items]
        for each, row in zip(found, distances.tolist(), strict=True):
            assert [d for d, _, _ in each] == pytest.approx(row, rel=1e-4, abs=1e-9)
            assert not any(same for _, same, _ in each)
    assert found[0][0][2] == "03.png"  # itself
    assert Image.open(tmp_path / "found.png").width > 14 * 70
    assert main(line) == 0
    assert [len(each) for each in lists(capsys.readouterr().out)] == [10, 10]
    threshold = (found[0][6][0] + found[0][7][0]) / 2
    assert main([*line, "--metric", "cosine", "--threshold", str(threshold)]) == 0
    for each in lists(capsys.readouterr().out):
        assert [same for _, same, _ in each] == [d <= threshold for d, _, _ in each]
        assert {same for _, same, _ in each} == {True, False}


def test_extracted_features_and_labels(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = make_fake_market(tmp_path / "data"), tmp_path / "features"
    first = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    assert extract.main([*first, "--data", data, "--out", str(out), "--split", "gallery"]) == 0
    query = sorted(Path(data).glob("query/*.png"))[0]
    picture = ["--out", str(tmp_path / "a.png")]
    assert main([*first, "--gallery", str(out), "--query", str(query), "--k", "6", *picture]) == 0
    printed = capsys.readouterr().out
    assert "29 images in" in printed
    assert printed.count("(person 2, camera") == 6  # the same picture six times: see fake_data
    assert main([*first, "--gallery", f"{data}/bounding_box_test", "--query", str(query), "--k", "6", *picture]) == 0
    again = capsys.readouterr().out
    assert lists(again)[0] == lists(printed)[0]
    assert "person" not in again

    other = write_checkpoint(tmp_path / "other.pt", seed=1)
    line = ["--gallery", out, "--query", query, *picture]
    assert "are those of another checkpoint" in error_of(capsys, "--checkpoint", other, *line)
    assert "were made with" in error_of(capsys, *first, *line, "--flip")
    (out / "gallery_features.npy").rename(out / "gallery_features.npy.partial")
    assert "is not finished; go on by the same call" in error_of(capsys, *first, *line)


def result(**changes: Any) -> dict[str, Any]:
    points = [
        {"requested_fpr": 1e-3, "threshold": None, "fpr": None, "tpr": None},
        {"requested_fpr": 1e-2, "threshold": 2.5, "fpr": 0.009, "tpr": 0.75},
    ]
    return {"metric": "euclidean", "flip": False, "verification": {"points": points}} | changes


def test_the_threshold_of_a_result(line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    file = run / "last.evaluation.json"
    file.write_text(json.dumps(result()))
    for place in (run, file):
        assert main([*line, "--result", str(place), "--fpr", "0.01"]) == 0
        printed = capsys.readouterr().out
        assert "same person: at most 2.5 (accepted 0.9 % of the pairs of two people and 75 % of those of one" in printed
        assert all(same == (d <= 2.5) for d, same, _ in lists(printed)[0])
    message = error_of(capsys, *line, "--result", run)
    assert "has no threshold for --fpr 0.001: too few pairs of two people" in message
    assert "it has them for 0.01" in message
    message = error_of(capsys, *line, "--result", run, "--fpr", "0.5")
    assert "no threshold for --fpr 0.5; it has them for 0.01" in message
    for changes, why in (
        ({"metric": "cosine"}, "are for cosine distances, without --flip"),
        ({"flip": True}, "are for euclidean distances, with --flip"),
        ({"rerank": {"k1": 20}}, "are for euclidean distances, re-ranked"),
    ):
        file.write_text(json.dumps(result(**changes)))
        assert why in error_of(capsys, *line, "--result", run, "--fpr", "0.01")
    for text in ("", "[]", "{}", '{"verification": null}', '{"verification": {"points": [3]}, "metric": "cosine"}'):
        file.write_text(text)
        assert "is not a result with verification rates; write one by" in error_of(capsys, *line, "--result", run)
    assert "there is no result" in error_of(capsys, *line, "--result", tmp_path / "none.json")
    file.unlink()
    (run / "result.json").write_text(json.dumps(result()))  # what training leaves
    assert main([*line, "--result", str(run), "--fpr", "0.01"]) == 0
    assert "same person: at most 2.5" in capsys.readouterr().out


def test_bad_input(line: list[str], images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--k -3: expected 1 or more" in error_of(capsys, *line, "--k", "-3")
    assert "--k 0: expected 1 or more" in error_of(capsys, *line, "--k", "0")
    assert "--k 15: the gallery" in (message := error_of(capsys, *line, "--k", "15"))
    assert "has 14 images" in message
    assert "give one of them" in error_of(capsys, *line, "--threshold", "1", "--result", tmp_path)
    assert "--result RUN, which is missing" in error_of(capsys, *line, "--fpr", "0.1")
    assert "there is no folder" in error_of(capsys, *line, "--out", tmp_path / "none" / "a.png")
    assert "none.png: no such file" in error_of(capsys, *line, "--query", tmp_path / "none.png")
    assert "no such folder of images" in error_of(capsys, *line, "--gallery", tmp_path / "none")
    assert "no such file" in error_of(capsys, *line, "--checkpoint", tmp_path / "none.pt")
    (tmp_path / "foreign.pt").write_bytes(b"something else")
    assert "is not a whole checkpoint" in error_of(capsys, *line, "--checkpoint", tmp_path / "foreign.pt")

    images[5].write_bytes(b"no image")
    assert "05.png" in error_of(capsys, *line)
    with pytest.warns(UserWarning, match="skipped"):
        assert main([*line, "--on-error", "skip", "--k", "13"]) == 0
    assert "05.png" not in capsys.readouterr().out
    assert "05.png" in error_of(capsys, *line, "--query", images[5], "--on-error", "skip")
    assert not list(tmp_path.glob("*.json"))
