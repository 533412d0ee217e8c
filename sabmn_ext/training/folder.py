"""The folder of a run: one process at a time, and what it goes on from."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sabmn_ext.training.checkpoint import load_checkpoint

try:
    import fcntl
except ImportError:  # not POSIX: two runs in one folder are the user's own care
    fcntl = None  # type: ignore[assignment]

WAIT = 10.0  # seconds; the decoding processes of a run that was killed hold its folder until they notice


@contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Make the folder and hold it against other runs; the system lets go of it when the process ends, however it does.

    A ValueError if another run holds it. A folder that is empty at the end is removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        deadline = time.monotonic() + WAIT
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    message = f"another process trains in {out} now: wait for it, or give another --out"
                    raise ValueError(message) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)
        with suppress(OSError):
            out.rmdir()


def repair(out: Path) -> str | None:
    """See to it that ``last.pt`` is whole, by ``previous.pt`` where it must be; returns a note if that was done.

    Raises what load_checkpoint does if neither is whole.
    """
    last, previous = out / "last.pt", out / "previous.pt"
    if not last.exists():
        return None
    try:
        load_checkpoint(last)
        return None
    except ValueError as damage:
        try:
            step = load_checkpoint(previous)["step"]
        except (ValueError, FileNotFoundError):
            raise damage from None
        os.replace(last, out / "last.damaged.pt")
        os.replace(previous, last)
        return f"{damage}; it is last.damaged.pt now, and the run goes on from the checkpoint before it, step {step}"
