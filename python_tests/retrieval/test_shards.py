"""Evaluation over several processes: equal to that of one, bit for bit; errors and deaths end all of them."""

import dataclasses
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sabmn_ext
from sabmn_ext.ops import dispatch
from sabmn_ext.retrieval import RetrievalResult, evaluate_retrieval, labels

WORKER = Path(__file__).with_name("shard_worker.py")
SECONDS = 120  # for all the processes to end; starting python and torch takes most of it

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


def launch(jobs: list[dict[str, Any]], folder: Path, dying: int | None = None) -> list[list[Any]]:
    """The outcomes (a result or an error's text) of the jobs in each process, started as torchrun starts them."""
    size = len(jobs[0]["parts"]) - 1
    file = folder / "jobs"
    file.write_bytes(pickle.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(Path(sabmn_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, file],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        deadline = time.monotonic() + SECONDS
        errors = [process.communicate(timeout=max(0, deadline - time.monotonic()))[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    expected = [9 if rank == dying else 0 for rank in range(size)]
    assert [process.returncode for process in processes] == expected, "\n".join(errors)
    survivors = [rank for rank in range(size) if rank != dying]
    return [pickle.loads(file.with_suffix(f".{rank}").read_bytes()) for rank in survivors]


def draw(seed: int, *, integers: bool = False, num_gallery: int = 90, leave_one_out: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    num_queries = num_gallery if leave_one_out else 23

    def features(count: int) -> np.ndarray:
        values = rng.normal(size=(count, 7)).astype(np.float32)
        return values.round() if integers else values

    gallery, gallery_pids = features(num_gallery), rng.integers(-1, 8, num_gallery)
    query, query_pids = features(num_queries), rng.integers(-1, 9, num_queries)
    if leave_one_out:
        query, query_pids = gallery, gallery_pids
    camids = None if leave_one_out else (rng.integers(4, size=num_queries), rng.integers(4, size=num_gallery))
    return {
        "query_features": query,
        "gallery_features": gallery,
        "query_pids": query_pids,
        "gallery_pids": gallery_pids,
        "query_camids": camids and camids[0],
        "gallery_camids": camids and camids[1],
        "exclude_self": leave_one_out,
    }


def assert_identical(ours: RetrievalResult, expected: RetrievalResult) -> None:
    def values(result: Any) -> dict[str, Any]:
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}

    for name, value in values(expected).items():
        if name == "pairs":
            for part, array in values(value).items():
                np.testing.assert_array_equal(getattr(ours.pairs, part), array, err_msg=part)
        else:
            np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)


CASES: list[tuple[list[int], dict[str, Any]]] = [
    ([0, 45, 90], {}),
    ([0, 3, 90], {"integers": True}),
    ([0, 90, 90], {"integers": True}),
    ([0, 0, 90], {"leave_one_out": True}),
    ([0, 20, 61, 90], {"integers": True}),
    ([0, 0, 71, 90], {}),
    ([0, 33, 34, 90], {"leave_one_out": True}),
    ([0, 90, 90, 90], {"leave_one_out": True, "integers": True}),
]


@pytest.mark.parametrize("size", [2, 3])
def test_equal_to_one_process(size: int, tmp_path: Path, seed: int) -> None:
    jobs = []
    for number, (parts, options) in enumerate(CASES):
        if len(parts) == size + 1:
            arguments = draw(100 * seed + number, **options)
            jobs.append({"parts": parts, "arguments": arguments | {"metric": "euclidean"}})
            shifted = {name: arguments[name] + np.float32(0.5) for name in ("query_features", "gallery_features")}
            jobs.append({"parts": parts, "arguments": arguments | shifted | {"metric": "cosine"}})  # no zero rows
    for outcomes in launch(jobs, tmp_path):
        for job, outcome in zip(jobs, outcomes, strict=True):
            assert isinstance(outcome, RetrievalResult), outcome
            assert_identical(outcome, evaluate_retrieval(**job["arguments"]))


def test_blocks_of_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same blocks in all processes, however the matches are spread."""
    arguments = draw(3, num_gallery=3000, integers=True)
    arguments["query_pids"][:], arguments["gallery_pids"][:] = 1, 1
    monkeypatch.setattr(labels, "_BLOCK_MATCHES", 20000)
    with dispatch.record() as calls:
        expected = evaluate_retrieval(**arguments)
    assert calls.count(("count_nonmatches", "cpu")) + calls.count(("count_nonmatches", "torch")) == 4
    (first,), (second,) = launch([{"parts": [0, 100, 3000], "arguments": arguments}], tmp_path)
    assert_identical(first, expected)
    assert_identical(second, expected)


def test_all_processes_raise_what_one_has_met(tmp_path: Path) -> None:
    good = draw(0)
    bad = good["gallery_features"].copy()
    bad[70, 3] = np.nan
    one_camera = {"query_camids": np.zeros(23, int), "gallery_camids": np.zeros(90, int)}
    numbers = np.zeros((23, 7), np.float32)
    different, mixed = "processes 0 and 1 of the group were given different queries", "of the group differ in metric"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"gallery_features": bad}, {}, "ValueError: gallery_features row 25 holds NaN"),
        (one_camera, {}, "only under the query's own camera (there is one)"),
        ({}, {"metric": "cosine"}, mixed),
        ({}, {"query_camids": None, "gallery_camids": None}, mixed),
        ({}, {"query_pids": np.zeros(23, np.int64)}, different),
        ({}, {"query_features": numbers}, different),
        ({}, {"query_features": numbers[:5], "query_pids": [1] * 5, "query_camids": [1] * 5}, different),
        ({}, {"gallery_features": np.zeros((45, 6), np.float32)}, "one D ≥ 1, but are [23, 7] and [45, 6]"),
        ({}, {"gallery_pids": [1, 2]}, "gallery_pids has shape [2]; expected [45]"),
        ({}, {"max_rank": 0}, "max_rank is 0"),
    ]
    jobs = [{"parts": [0, 45, 90], "arguments": good | both, "changes": {1: one}} for both, one, _ in cases]
    jobs.append({"parts": [0, 45, 90], "arguments": good})  # and the group still works
    first, second = launch(jobs, tmp_path)
    for (_, _, message), *texts in zip(cases, first[:-1], second[:-1], strict=True):
        assert all(isinstance(text, str) and message in text for text in texts), (message, texts)
    assert first[0].startswith("RuntimeError: process 1 of 2 has failed: ValueError: ")
    assert second[0].startswith("ValueError: ")
    assert_identical(first[-1], second[-1])


@pytest.mark.parametrize("size", [2, 3])
def test_a_process_that_dies_ends_the_others(size: int, tmp_path: Path) -> None:
    job = {"parts": [0, *range(30, 30 * size, 30), 90], "arguments": draw(0)}
    for outcome, death in launch([job, job | {"dies": size - 1}], tmp_path, dying=size - 1):
        assert isinstance(outcome, RetrievalResult)
        assert "another process of the evaluation has ended or cannot be reached" in death


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        evaluate_retrieval(**draw(0), group=object())
