"""What each process of test_shards.py runs, under the launcher's environment variables: evaluations, in turn."""

import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sabmn_ext.retrieval import evaluate_retrieval


def part_of(job: dict[str, Any], rank: int) -> dict[str, Any]:
    first, last = job["parts"][rank], job["parts"][rank + 1]
    arguments = dict(job["arguments"])
    for name in ("gallery_features", "gallery_pids", "gallery_camids"):
        if arguments.get(name) is not None:
            arguments[name] = arguments[name][first:last]
    return arguments | job.get("changes", {}).get(rank, {})


def main(file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    outcomes: list[Any] = []
    for job in pickle.loads(file.read_bytes()):
        if job.get("dies") == rank:
            os._exit(9)
        try:
            outcomes.append(evaluate_retrieval(**part_of(job, rank), group=dist.group.WORLD))
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    file.with_suffix(f".{rank}").write_bytes(pickle.dumps(outcomes))
    os._exit(0)  # the group cannot be taken down in order where a process has died


main(Path(sys.argv[1]))
