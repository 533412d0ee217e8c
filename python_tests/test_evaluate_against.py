"""``python -m sabmn_ext.evaluate --against RUN``: the difference of two results, and results that have none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_files import LABELS, draw, error_of, write

from sabmn_ext.evaluate import main
from sabmn_ext.retrieval import evaluate_retrieval
from sabmn_ext.retrieval.statistics import FIGURES, QueryScores, bootstrap_difference


@pytest.mark.parametrize("by_folder", [True, False])
def test_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str], by_folder: bool, seed: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    result = run / "last.evaluation.json"
    good, bad = write(tmp_path, seed), write(tmp_path, seed, name="noisy", noise=2.0)
    assert main(["--features", str(good), "--json", str(result)]) == 0
    capsys.readouterr()
    assert main(["--features", str(bad), "--against", str(run if by_folder else result)]) == 0
    printed = capsys.readouterr().out

    results = []
    for noise in (2.0, 0.0):
        arrays = draw(seed, noise)
        names = ("query_features", "gallery_features", *LABELS)
        results.append(evaluate_retrieval(*(arrays[name] for name in names)))
    expected = bootstrap_difference(*map(QueryScores.of, results))
    report = json.loads((tmp_path / "noisy.evaluation.json").read_text())["against"]
    assert (report["file"], report["confidence"]) == (str(result), 0.95)
    assert report["map"]["other"] == results[1].map
    for name in FIGURES:
        x = expected[name]
        figures = {"difference": x.value, "low": x.low, "high": x.high, "zero_within": x.low <= 0 <= x.high}
        assert {key: report[name][key] for key in figures} == figures
        verdict = "within" if x.low <= 0 <= x.high else "outside"
        assert f"{100 * x.low:+6.2f} … {100 * x.high:+6.2f}   0 lies {verdict}\n" in printed
    assert f"{100 * results[0].map:8.2f}{100 * results[1].map:8.2f}{100 * expected['map'].value:+12.2f}" in printed
    assert "This covers the sample of test identities, not the noise of training" in printed


def test_a_result_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    file = write(tmp_path, seed)
    assert main(["--features", str(file)]) == 0
    before = json.loads((tmp_path / "features.evaluation.json").read_text())
    assert main(["--features", str(file), "--against", str(tmp_path / "features.evaluation.json")]) == 0
    assert capsys.readouterr().out.count("+0.00    +0.00 …  +0.00   0 lies within") == 4
    after = json.loads((tmp_path / "features.evaluation.json").read_text())
    del after["against"]
    assert after == before


def test_results_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = write(tmp_path), tmp_path / "other.json"
    assert main(["--features", str(file), "--json", str(other)]) == 0
    whole = json.loads(other.read_text())
    queries = whole["queries"]

    def error(**changes: Any) -> str:
        other.write_text(json.dumps(whole | changes))
        return error_of(capsys, "--features", file, "--against", other)

    start = f"error: cannot compare with {other}: "
    few = {name: column[:5] for name, column in queries.items()}
    assert error(queries=few).startswith(f"{start}the results have 6 and 5 queries")
    assert "query 0 has the pid" in error(queries=queries | {"pids": [77, *queries["pids"][1:]]})
    assert "expected the same query order" in error(queries=queries | {"pids": queries["pids"][::-1]})
    assert "query 5 has the number of true matches 0 in one and 1 in the other (1 of 6" in error(
        queries=queries
        | {"num_matches": [*queries["num_matches"][:5], 1]}
        | {name: [*queries[name][:5], 0.5] for name in ("ap", "ap_trapezoid", "inp")}
    )
    assert "there is no list 'inp'" in error(queries=queries | {"inp": None})
    assert "the list 'ap' has 5 values for 6 pids" in error(queries=queries | {"ap": queries["ap"][:5]})
    assert "a query with matches has no score" in error(queries=queries | {"ap": [None] * 6})
    assert "without junk the galleries have" in error(num_gallery=whole["num_gallery"] + 1)
    assert "other.json is not a whole result (" in error(num_junk=None)
    assert not (tmp_path / "features.evaluation.json").exists()


def test_what_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    line = ("--features", file, "--against")
    assert f"evaluate --checkpoint {run / 'last.pt'}" in error_of(capsys, *line, run)
    assert "there is no result" in error_of(capsys, *line, tmp_path / "none.json")
    assert "features.npz is not a whole result (" in error_of(capsys, *line, file)
    assert main(["--features", str(file), "--json", str(tmp_path / "whole.json")]) == 0
    text = (tmp_path / "whole.json").read_text()
    damaged = tmp_path / "damaged.json"
    noise = np.random.default_rng(0).bytes(9)
    for content in (b"", text[: len(text) // 2].encode(), b"[]", b'{"map": 0.5}', b'{"queries": []}', noise):
        damaged.write_bytes(content)
        assert "damaged.json is not a whole result (" in error_of(capsys, *line, damaged)
