"""Several processes of one job, forked from the tests' own: what torchrun starts, without importing torch each time."""

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sabmn_ext

SECONDS = 120


def environment() -> dict[str, str]:
    """Another process then finds this package, and computes with as many threads, hence the same bits."""
    path = str(Path(sabmn_ext.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}


class Outcome(NamedTuple):
    code: int  # negative: the signal that killed it
    value: Any  # what the function returned
    printed: str  # stdout and stderr


def run_forked(size: int, function: Callable[[int], Any], folder: Path) -> list[Outcome]:
    """Call ``function(rank)`` in ``size`` processes with torchrun's environment variables (none of them for size 1)."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    files = [(folder / f"{rank}.pickle", folder / f"{rank}.txt") for rank in range(size)]
    for file, _ in files:
        file.unlink(missing_ok=True)

    def child(rank: int) -> None:
        code = 1
        value, printed = files[rank]
        output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        try:
            if size > 1:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                os.environ.update({name: str(number) for name, number in numbers.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            value.write_bytes(pickle.dumps(function(rank)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(size)]
    try:
        deadline = time.monotonic() + SECONDS
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    texts = [printed.read_text() for _, printed in files]
    assert None not in codes, f"not at an end after {SECONDS} s: {codes}\n" + "\n".join(texts)
    values = [pickle.loads(file.read_bytes()) if file.exists() else None for file, _ in files]
    return [Outcome(*each) for each in zip(codes, values, texts, strict=True)]
