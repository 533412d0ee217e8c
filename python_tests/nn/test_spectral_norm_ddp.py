"""Normalised networks in DistributedDataParallel: two processes are one with the whole batch, and overlap works."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import spectral_norm_ddp_worker as worker
import torch

import sabmn_ext

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("ddp")
    paths = [str(Path(sabmn_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    commands = [[sys.executable, worker.__file__, str(rank), "2", str(folder)] for rank in range(2)]
    processes = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True, env=environment) for c in commands]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("skip", [False, True])
def test_two_processes_train_as_one_with_the_whole_batch(results: list[dict[str, Any]], skip: bool) -> None:
    model = worker.make(skip)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    worker.train(model, 0, 1)
    for key, expected in model.state_dict().items():
        first, second = (result[f"skip {skip}"][key] for result in results)
        assert torch.equal(first, second), key
        assert torch.allclose(first, expected, rtol=1e-10, atol=1e-12), key
        assert not torch.equal(expected, before[key]), key


def test_the_last_layers_are_sent_off_before_the_first_ones_are_reached(results: list[dict[str, Any]]) -> None:
    for events in (result["order"] for result in results):
        assert [e for e in events if e.startswith("reached")] == [
            f"reached {name}" for name in ("last", "third", "middle", "second", "first")
        ]
        # Groups of two weights, counted from the end: [last, third], [middle, second], [first].
        assert max(events.index("sent last"), events.index("sent third")) < events.index("reached middle"), events
        assert max(events.index("sent middle"), events.index("sent second")) < events.index("reached first"), events
        assert sorted(e for e in events if e.startswith("sent") and "bias" not in e) == sorted(
            f"sent {name}" for name in ("first", "second", "middle", "third", "last")
        )
