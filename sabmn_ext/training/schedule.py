"""Learning rates as a pure function of the position in the run: a resumed run has no state to restore."""

from __future__ import annotations

import math
from collections.abc import Sequence


def rate_factor(
    step: int,
    epoch: int,
    total_steps: int,
    *,
    kind: str = "step",
    milestones: Sequence[int] = (160,),
    factor: float = 0.1,
    warmup_steps: int = 0,
) -> float:
    """What the full rates are multiplied by at one step.

    Args:
        step: steps taken before this one, from 0.
        epoch: the epoch this step belongs to, from 1.
        total_steps: steps of the whole run.
        kind: "step": multiplied by ``factor`` after each epoch of ``milestones`` (160 means that epochs
            1..160 have the full rate and epoch 161 is the first at the lower one); "cosine": half a cosine
            from 1 after the warm-up to 0 after the last step; "constant".
        warmup_steps: over this many steps the factor rises linearly; step 0 has 1/warmup_steps of it.
    """
    warmup = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    if kind == "constant":
        return warmup
    if kind == "step":
        return warmup * factor ** sum(epoch > milestone for milestone in milestones)
    if kind == "cosine":
        done = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
        return warmup * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    raise ValueError(f"schedule kind '{kind}': expected step, cosine or constant")
