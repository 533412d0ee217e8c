"""``python -m sabmn_ext.evaluate``: features and checkpoints in, table and files out; one clear line for errors."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_files import LABELS, draw, error_of, write
from PIL import Image

from sabmn_ext.evaluate import main
from sabmn_ext.retrieval import evaluate_retrieval
from sabmn_ext.retrieval.statistics import FIGURES, QueryScores, bootstrap


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_features_give_the_table_and_the_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str, seed: int
) -> None:
    file = write(tmp_path, seed)
    assert main(["--features", str(file), "--metric", metric, "--max-rank", "7"]) == 0
    arrays = draw(seed)
    expected = evaluate_retrieval(
        arrays["query_features"],
        arrays["gallery_features"],
        *(arrays[name] for name in LABELS),
        metric=metric,
        max_rank=7,
    )
    printed = capsys.readouterr().out
    assert expected.table() in printed
    assert "6 queries (1 without a valid match" in printed
    assert f"chance {100 * expected.chance_map:7.2f}" in printed
    report = json.loads((tmp_path / "features.evaluation.json").read_text())
    assert {name: report[name] for name in expected.to_dict()} == expected.to_dict()
    assert report["cmc"] == expected.cmc.tolist()
    assert len(report["cmc"]) == 7
    assert report["invalid_queries"] == [5]
    assert (report["metric"], report["camera_rule"], report["features"]) == (metric, True, str(file))
    scores = QueryScores.of(expected)
    assert report["queries"] == scores.to_dict()
    assert report["queries"]["ap"][5] is None
    assert report["camera_pairs"] == [dataclasses.asdict(pair) for pair in expected.camera_pairs()] != []
    intervals = bootstrap(scores)
    assert report["intervals"]["num_identities"] == scores.num_identities
    for name, title in zip(FIGURES, ("mAP", "mAP (trapezoid)", "mINP", "rank-1"), strict=True):
        x = intervals[name]
        assert report["intervals"][name] == [x.low, x.high]
        assert f"{title:16}{100 * x.value:8.2f}   {100 * x.low:6.2f} … {100 * x.high:6.2f}\n" in printed
    assert main(["--features", str(file), "--metric", metric, "--confidence", "50"]) == 0
    half = json.loads((tmp_path / "features.evaluation.json").read_text())["intervals"]
    assert [half["map_trapezoid"], half["confidence"]] == [
        list(dataclasses.astuple(bootstrap(scores, confidence=0.5)["map_trapezoid"]))[1:],
        0.5,
    ]


def test_verification_in_the_table_and_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    arrays = draw(seed)
    for name in arrays:
        if name.startswith("gallery"):
            arrays[name] = np.concatenate([arrays[name]] * 8)  # negatives enough for the higher rates
    assert main(["--features", str(write(tmp_path, **arrays))]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "features.evaluation.json").read_text())["verification"]
    features = [arrays[f"{side}_features"].astype(np.float64) for side in ("query", "gallery")]
    distances = np.linalg.norm(features[0][:, None] - features[1][None], axis=-1)
    pids, camids = ([arrays[f"{side}_{x}"] for side in ("query", "gallery")] for x in ("pids", "camids"))
    same = pids[0][:, None] == pids[1]
    other_camera = camids[0][:, None] != camids[1]
    positives, negatives = distances[same & other_camera], distances[~same & other_camera & (pids[1] != -1)]
    assert (report["num_positives"], report["num_negatives"]) == (len(positives), len(negatives))
    point = report["points"][3]
    assert 0.05 < point["fpr"] <= 0.1
    assert point["fpr"] == (negatives <= point["threshold"]).mean()
    assert point["tpr"] == (positives <= point["threshold"]).mean()
    assert f"{100 * point['tpr']:8.2f}{100 * point['fpr']:12.4f}{point['threshold']:12.5g}\n" in printed
    assert report["points"][0] == {"requested_fpr": 1e-4, "threshold": None, "fpr": None, "tpr": None}
    assert "0.01              not measurable: too few pairs of two people\n" in printed


def test_a_folder_of_npy_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    for name, array in (draw(seed) | {"something": np.array([{}])}).items():
        np.save(folder / f"{name}.npy", array)
    assert main(["--features", str(folder), "--json", str(tmp_path / "a.json")]) == 0
    assert main(["--features", str(write(tmp_path, seed)), "--json", str(tmp_path / "b.json")]) == 0
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert [a.pop("features"), b.pop("features")] == [str(folder), str(tmp_path / "features.npz")]
    assert a == b

    file = folder / "gallery_features.npy"
    whole = file.read_bytes()
    for cut in (0, 5, 90, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert "gallery_features.npy is not a whole .npy file" in error_of(capsys, "--features", folder)
    file.unlink()
    assert "lacks gallery_features; it holds gallery_camids, gallery_pids" in error_of(capsys, "--features", folder)
    np.save(folder / "query_pids.npy", np.array([{}] * 6))
    assert "query_pids.npy is not a whole .npy file of a plain array" in error_of(capsys, "--features", folder)


def test_one_identity_has_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, query_pids=np.full(6, 2), query_camids=np.full(6, 8))
    assert main(["--features", str(file)]) == 0
    assert "no intervals: they come from resampling identities, and one alone" in capsys.readouterr().out
    assert json.loads((tmp_path / "features.evaluation.json").read_text())["intervals"] is None


BAD = [
    ({"query_features": np.zeros((0, 3), np.float32), "query_pids": [], "query_camids": []}, "there are no queries"),
    (
        {"gallery_features": np.zeros((0, 3), np.float32), "gallery_pids": [], "gallery_camids": []},
        "there are no gallery items",
    ),
    ({"query_pids": [1, 2]}, "query_pids has shape [2]; expected [6]"),
    ({"gallery_camids": np.ones(31, int)}, "gallery_camids has shape [31]; expected [30]"),
    ({"gallery_camids": None}, "one of query_camids and gallery_camids is missing"),
    ({"gallery_pids": np.linspace(0, 1, 30)}, "gallery_pids must be integers, but has dtype float64"),
    ({"gallery_features": np.zeros((30, 4), np.float32)}, "[6, 3] and [30, 4]"),
    ({"gallery_features": np.zeros((30, 3))}, "one dtype and device"),
    ({"query_features": np.zeros((6, 3), np.int32)}, "query_features: expected a tensor or array of float16"),
    ({"query_features": np.zeros(6, np.float32)}, "query_features has shape [6]; expected two dimensions"),
    ({"query_features": np.float32(1)}, "query_features has shape []; expected two dimensions"),
    ({"query_features": np.full((6, 3), np.inf, np.float32)}, "query_features row 0 holds NaN or infinite"),
    ({"query_pids": np.arange(50, 56)}, "no query has a valid match in the gallery: their pids do not meet"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_arrays_give_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert message in error_of(capsys, "--features", write(tmp_path, **changes))
    assert not list(tmp_path.glob("*.json"))



def test_without_cameras_and_without_the_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = draw(1)
    file = write(tmp_path, 1, query_camids=None, gallery_camids=None)
    assert main(["--features", str(file), "--json", str(tmp_path / "a.json")]) == 0
    assert "no camera numbers: the camera rule is off" in capsys.readouterr().out
    assert main(["--features", str(write(tmp_path, 1)), "--no-camera-rule", "--json", str(tmp_path / "b.json")]) == 0
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a == b
    ones = np.ones(30, int)
    one_camera = write(tmp_path, 1, query_camids=ones[:6], gallery_camids=ones)
    assert "pass no camids (command line: --no-camera-rule)" in error_of(capsys, "--features", one_camera)
    assert main(["--features", str(one_camera), "--no-camera-rule"]) == 0
    assert (
        a["map"]
        == evaluate_retrieval(*(arrays[f"{s}_{x}"] for x in ("features", "pids") for s in ("query", "gallery"))).map
    )


def test_bad_files_give_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, gallery_features=None, query_pids=None)
    message = error_of(capsys, "--features", file)
    assert "lacks gallery_features, query_pids; it holds" in message
    assert "gallery_camids" in message

    whole = write(tmp_path).read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert "features.npz is not a whole .npz file" in error_of(capsys, "--features", file)
    damaged = bytearray(whole)
    damaged[len(whole) // 4] ^= 0xFF
    file.write_bytes(damaged)
    assert "features.npz is not a whole .npz file" in error_of(capsys, "--features", file)

    np.save(tmp_path / "one.npy", np.zeros((3, 3)))
    assert "it is no archive" in error_of(capsys, "--features", tmp_path / "one.npy")
    assert "no such file" in error_of(capsys, "--features", tmp_path / "none.npz")
    assert "no folder" in error_of(capsys, "--features", write(tmp_path), "--json", tmp_path / "none" / "a.json")
    assert "--flip goes with --checkpoint" in error_of(capsys, "--features", write(tmp_path), "--flip")
    assert "query_paths" in error_of(capsys, "--features", write(tmp_path), "--ranked", tmp_path / "a.png")
    for percent in ("0", "100", "-5", "nan"):
        assert f"--confidence {percent}: expected percent between 0 and 100" in error_of(
            capsys, "--features", write(tmp_path), "--confidence", percent
        )
    assert "max_rank" in error_of(capsys, "--features", write(tmp_path), "--max-rank", "0")
    assert not list(tmp_path.glob("*.json"))


def test_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    file = write(tmp_path, query_pids=np.array([Bomb()] * 6, dtype=object))
    assert "not a whole .npz file of plain arrays" in error_of(capsys, "--features", file)
    assert not ran.exists()


def test_an_error_names_the_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = draw(0)["gallery_features"]
    features[17] = np.nan
    paths = {
        f"{side}_paths": np.array([f"{side}/{i}.jpg" for i in range(n)]) for side, n in (("query", 6), ("gallery", 30))
    }
    file = write(tmp_path, gallery_features=features, **paths)
    assert "gallery_features row 17 (gallery/17.jpg) holds NaN" in error_of(capsys, "--features", file)
    assert "query_paths has shape [5]" in error_of(
        capsys, "--features", write(tmp_path, **paths | {"query_paths": paths["query_paths"][:5]})
    )


def test_as_a_command(tmp_path: Path) -> None:
    def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", "sabmn_ext.evaluate", *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    good = command("--features", str(write(tmp_path)))
    assert good.returncode == 0, good.stderr
    assert "mAP (trapezoid)" in good.stdout
    bad = command("--features", str(tmp_path / "none.npz"))
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)


def market(root: Path) -> Path:
    """Four identities in Market-1501's folders; everybody wears a colour of their own."""
    rng = np.random.default_rng(0)
    for folder, cameras in (("bounding_box_train", (1, 2)), ("query", (1,)), ("bounding_box_test", (1, 2, 3))):
        (root / folder).mkdir(parents=True)
        for pid in range(1, 5):
            for camera in cameras:
                pixels = np.full((32, 16, 3), (60 * pid, 255 - 60 * pid, 30 * pid)) + rng.integers(-10, 10, (32, 16, 3))
                name = f"{pid:04}_c{camera}s1_{10 * camera:06}_00.jpg"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / folder / name)
    return root


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from sabmn_ext.nn.sabmn import SABMN
    from sabmn_ext.training.checkpoint import save_checkpoint
    from sabmn_ext.training.config import load_recipe

    torch.manual_seed(0)
    model = SABMN(4, backbone="resnet18", feature_dim=16, spectral_norm=False, weights="none")
    config = dataclasses.asdict(load_recipe("demo"))
    config["image"] = {"height": 32, "width": 16}
    config["data"]["path"] = None
    state = {"model_config": model.config, "model": model.state_dict(), "config": config}
    save_checkpoint(tmp_path / "last.pt", state)
    return tmp_path / "last.pt"


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_checkpoint_on_a_data_set(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --data PATH" in error_of(capsys, "--checkpoint", checkpoint)
    data = market(tmp_path / "market")
    picture = tmp_path / "ranked.png"
    line = ["--checkpoint", str(checkpoint), "--data", str(data), "--device", "cpu"]
    assert main([*line, "--ranked", str(picture)]) == 0
    report = json.loads((tmp_path / "last.evaluation.json").read_text())
    assert (report["num_queries"], report["num_gallery"], report["skipped_images"]) == (4, 12, [])
    assert report["map"] > 2 * report["chance_map"]  # colours alone tell these people apart
    assert Image.open(picture).width > 300
    capsys.readouterr()

    assert main([*line, "--flip", "--metric", "cosine", "--no-camera-rule", "--json", str(tmp_path / "b.json")]) == 0
    other = json.loads((tmp_path / "b.json").read_text())
    assert (other["flip"], other["metric"], other["camera_rule"]) == (True, "cosine", False)

    broken = data / "bounding_box_test" / "0001_c2s1_000020_00.jpg"
    broken.write_bytes(b"")
    assert broken.name in error_of(capsys, *line)
    assert main([*line, "--on-error", "skip"]) == 0
    report = json.loads((tmp_path / "last.evaluation.json").read_text())
    assert report["skipped_images"] == [str(broken)]
    assert report["num_gallery"] == 11
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "last.pt" in error_of(capsys, *line)


def test_counterfactuals_and_report_of_a_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sabmn_ext.training.checkpoint import load_checkpoint, save_checkpoint

    state = load_checkpoint(checkpoint)
    for name, gamma in (("last.pt", 5.0), ("zero.pt", 0.0)):
        state["model"]["attention.gamma"].fill_(gamma)
        save_checkpoint(tmp_path / name, state)
    line = ["--data", str(market(tmp_path / "market")), "--device", "cpu", "--checkpoint"]
    assert main([*line, str(checkpoint), "--report", str(tmp_path / "report")]) == 0
    assert "counterfactuals: the drop without each part" in capsys.readouterr().out
    assert main([*line, str(checkpoint), "--no-counterfactuals", "--json", str(tmp_path / "plain.json")]) == 0
    assert main([*line, str(tmp_path / "zero.pt"), "--no-counterfactuals"]) == 0
    assert "the drop without" not in capsys.readouterr().out
    full, plain, zero = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("last.evaluation", "plain", "zero.evaluation")
    )
    counterfactuals = full.pop("counterfactuals")
    assert plain.pop("counterfactuals") is None
    assert full == plain
    assert set(counterfactuals) == {"confidence", "num_identities", "gamma_zero", "uniform", "shuffled"}
    for figure in FIGURES:
        assert counterfactuals["gamma_zero"][figure]["value"] == zero[figure]
        assert counterfactuals["gamma_zero"][figure]["drop"] == full[figure] - zero[figure]

    page = (tmp_path / "report" / "report.html").read_text()
    assert "What each part is worth" in page
    assert "backbone = &quot;resnet18&quot;" in page
    assert {f"query{i}_{what}.png" for i in (1, 2, 3, 4) for what in ("ranked", "attention")} <= {
        file.name for file in (tmp_path / "report").iterdir()
    }


def test_report_of_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path)
    assert main(["--features", str(file), "--report", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "the features came without the files of their images" in page
    assert "--no-counterfactuals goes with --checkpoint" in error_of(capsys, "--features", file, "--no-counterfactuals")
    assert "features.npz: that is a file; expected a folder" in error_of(capsys, "--features", file, "--report", file)
    assert "there is no folder" in error_of(capsys, "--features", file, "--report", tmp_path / "none" / "report")
    assert "--report does not go with --conformance" in error_of(capsys, "--conformance", "--report", tmp_path)
    paths = {
        f"{side}_paths": np.array([str(tmp_path / f"{side}{i}.jpg") for i in range(n)])
        for side, n in (("query", 6), ("gallery", 30))
    }
    missing = error_of(capsys, "--features", write(tmp_path, **paths), "--report", tmp_path / "report")
    assert "No such file" in missing
    assert str(tmp_path / "query") in missing
