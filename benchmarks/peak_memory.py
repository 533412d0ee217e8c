"""Peak extra memory of a call: what it needs at its worst moment beyond what was there before, results included.

On a GPU torch's allocator knows it. On a CPU the kernel does: the high-water mark of the process's resident memory
counts everything, whoever allocated it (torch's profiler would not see what a library takes for itself). For that the
call runs in a fresh process in which every large block goes back to the system when it is freed, so that nothing kept
from before hides a need; a first call pays for what libraries set up once.
"""

import gc
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from sabmn_ext.ops.cpu.buffers import release

Run = Callable[[], object]

# glibc: blocks of this size and more are mapped one by one. Set, it also stops growing on its own.
_MMAP_THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}


@contextmanager
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """An executor with one new process, in which ``peak_bytes`` measures on a CPU."""
    before = {name: os.environ.get(name) for name in _MMAP_THRESHOLD}
    os.environ.update(_MMAP_THRESHOLD)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            yield process
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def peak_bytes(run: Run, device: str = "cpu") -> int | None:
    """Peak extra bytes of one call, after one to warm up; None where the system cannot tell (it takes Linux).

    What the operations keep from one call for the next counts as needed.
    """
    run()
    gc.collect()
    release()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0)
    except OSError:
        return None


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match[1]) << 10
