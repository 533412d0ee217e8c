"""``python -m sabmn_ext.evaluate --rerank``: junk goes first, the rest is re-ranked, and the result says so."""

import json
from pathlib import Path

import numpy as np
import pytest
from feature_files import draw, error_of, write

import sabmn_ext
from sabmn_ext.evaluate import main


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_result_is_that_of_the_reranked_distances(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str, seed: int
) -> None:
    names = {f"{side}_paths": np.array([f"{i}.jpg" for i in range(n)]) for side, n in (("query", 6), ("gallery", 30))}
    file = write(tmp_path, seed, **names)
    arrays = draw(seed)
    kept = arrays["gallery_pids"] != -1
    assert 0 < kept.sum() < 30
    distances = sabmn_ext.rerank(arrays["query_features"], arrays["gallery_features"][kept], metric=metric)
    gallery = [arrays[f"gallery_{name}"][kept] for name in ("pids", "camids")]
    labels = arrays["query_pids"], gallery[0], arrays["query_camids"], gallery[1]
    expected = sabmn_ext.evaluate_distances(distances, *labels)
    line = ["--features", str(file), "--metric", metric]
    plain, reranked = tmp_path / "plain.json", tmp_path / "reranked.json"
    assert main([*line, "--json", str(plain)]) == 0
    capsys.readouterr()
    assert main([*line, "--json", str(reranked), "--rerank", "--against", str(plain)]) == 0
    printed = capsys.readouterr().out
    assert f"30 gallery items ({30 - kept.sum()} junk)\ndistance: {metric}, re-ranked, camera rule on\n" in printed
    assert expected.table().split("\n")[-2:] == printed.split("\n")[3:5]
    assert "difference to" in printed
    a, b = (json.loads(path.read_text()) for path in (plain, reranked))
    assert (b["map"], b["num_gallery"], b["num_junk"]) == (expected.map, 30, 30 - kept.sum())
    assert (b["metric"], b["rerank"]) == (metric, {"k1": 20, "k2": 6, "lambda": 0.3})
    assert a["rerank"] is None


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--ranked", "--report"):
        assert f"give one of --rerank and {option}" in error_of(
            capsys, "--features", write(tmp_path), "--rerank", option, tmp_path / "drawn"
        )
    names = {"query_paths": np.array([f"{i}.jpg" for i in range(6)])}
    for changes, message in (
        ({"gallery_pids": np.full(30, -1)}, "every gallery item has pid −1 (junk)"),
        ({"gallery_pids": np.ones(40, int)}, "gallery_pids has shape [40]; expected [30]"),
        ({"gallery_camids": np.ones(20, int)}, "gallery_camids has shape [20]; expected [30]"),
        ({"query_features": np.full((6, 3), np.nan, np.float32)} | names, "query_features row 0 (0.jpg) holds NaN"),
    ):
        assert message in error_of(capsys, "--features", write(tmp_path, **changes), "--rerank")
    assert not list(tmp_path.glob("*.json"))
