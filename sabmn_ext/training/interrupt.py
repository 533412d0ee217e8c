"""SIGINT and SIGTERM during a run: between steps they save and leave, elsewhere they leave at once."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any


class TrainingInterrupted(BaseException):
    """A signal ended the run. ``signum`` is its number; the message says what is saved and how to go on.

    Like KeyboardInterrupt no Exception: what handles the errors of reading or writing a file must not take it for one.
    """

    def __init__(self, signum: int, out: Path, where: str) -> None:
        go_on = f"; go on with: python -m sabmn_ext.train --out {out} --resume" * (out / "config.toml").exists()
        super().__init__(f"stopped by {signal.Signals(signum).name} {where}{go_on}")
        self.signum = signum


class StopRequest:
    """While entered, a signal sets ``signum``, which the loop reads after each step.

    Outside the steps (``at_once``), and for a second signal, TrainingInterrupted is raised where the program is. A
    signal within a second of the first is the same one: torchrun passes on what a terminal has sent already.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.signum: int | None = None
        self.at_once = True
        self._first_at = 0.0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        second = self.signum is not None and now - self._first_at > 1
        if self.signum is None:
            self.signum, self._first_at = number, now
        if self.at_once or second:
            raise TrainingInterrupted(number, self.out, "outside the training steps" if self.at_once else "twice")
