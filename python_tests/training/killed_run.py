"""Run the trainer and die by SIGKILL at a chosen moment. Started by test_resume.py: killed_run.py MOMENT OPTIONS…

MOMENT is "step:N" (before the N-th step of this process), "write:N" (with the N-th checkpoint half written),
"replace:N" (with it whole, but not yet in its place) or "result" (before result.json is in its place).
"""

import io
import os
import signal
import sys

import torch

from sabmn_ext import train
from sabmn_ext.training import checkpoint, loop


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    moment, _, number = sys.argv[1].partition(":")
    calls = {"step": 0, "write": 0, "replace": 0}

    def counted(name: str) -> bool:
        calls[name] += 1
        return moment == name and calls[name] == int(number)

    real_step, real_save, real_replace = loop.train_step, torch.save, os.replace

    def train_step(*args, **kwargs):
        if counted("step"):
            die()
        return real_step(*args, **kwargs)

    def save(state, file):
        if counted("write"):
            buffer = io.BytesIO()
            real_save(state, buffer)
            file.write(buffer.getvalue()[: buffer.tell() // 2])
            file.flush()
            die()
        real_save(state, file)

    def replace(source, target):
        name = os.path.basename(target)
        if (name == "last.pt" and counted("replace")) or (name == "result.json" and moment == "result"):
            die()
        real_replace(source, target)

    loop.train_step, torch.save, checkpoint.os.replace = train_step, save, replace
    sys.exit(train.main(sys.argv[2:]))


if __name__ == "__main__":
    main()
