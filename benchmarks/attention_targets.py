"""The project's targets for the attention block on a CPU, and which of them a run has met.

They are stated at ResNet-50's four stages, contiguous float32 (and bfloat16 where said), against rates and rivals of
the same run.
"""

from collections.abc import Sequence
from typing import NamedTuple

from attention_report import Row, threads
from attention_settings import FORWARD, STAGES, TRAINING

SHARE_OF_MM = {FORWARD: 0.8, TRAINING: 0.7}
TIMES_EAGER = {FORWARD: (4, 1.3, 1.05, 0.97), TRAINING: (3, 1.2, 1.05, 0.97)}  # at stages 1 to 4
TIMES_SDPA = 1.0  # faster than each
BF16_OVER_FP32 = (1.5, 1.8, 1.8, 1.8)  # forward, on a processor with AVX512-BF16
SHARE_OF_EAGER_MEMORY = 0.1  # at stage 1, forward + backward


class Target(NamedTuple):
    stage: str
    threads: int
    pass_: str
    what: str
    wanted: float
    measured: float | None  # None where the run lacks what it takes

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.wanted if "memory" in self.what else self.measured >= self.wanted


def targets(rows: Sequence[Row]) -> list[Target]:
    """Every target of the stages, threads and passes that were measured."""
    found = []
    key = {(r.shape, r.threads, r.pass_, r.dtype, r.candidate): r for r in rows if r.memory_format == "contiguous"}
    for stage, count, pass_ in dict.fromkeys((k[0], k[1], k[2]) for k in key):
        if stage not in STAGES:
            continue
        index = list(STAGES).index(stage)
        here = {(k[3], k[4]): row for k, row in key.items() if k[:3] == (stage, count, pass_)}
        ours, eager, bf16 = (here.get(k) for k in (("fp32", "ours"), ("fp32", "eager"), ("bf16", "ours")))
        sdpa = [row.milliseconds for (dtype, name), row in here.items() if dtype == "fp32" and name.startswith("sdpa")]
        over_sdpa = min(sdpa) / ours.milliseconds if sdpa and ours else None
        bf16_rate = ours.milliseconds / bf16.milliseconds if ours and bf16 else None
        memory = None
        if ours and eager and ours.peak_bytes is not None and eager.peak_bytes:
            memory = ours.peak_bytes / eager.peak_bytes
        checks = [
            ("fp32, share of torch's 2048³ product", SHARE_OF_MM[pass_], ours and ours.share_of_mm),
            ("fp32, times faster than eager", TIMES_EAGER[pass_][index], eager and eager.times_ours),
            ("fp32, times faster than the best SDPA", TIMES_SDPA, over_sdpa),
        ]
        if pass_ == FORWARD:
            checks.append(("bf16, times faster than our own fp32", BF16_OVER_FP32[index], bf16_rate))
        if pass_ == TRAINING and stage == "stage1":
            checks.append(("fp32, peak memory as a share of eager's", SHARE_OF_EAGER_MEMORY, memory))
        found += [Target(stage, count, pass_, *check) for check in checks]
    return found


def target_table(found: Sequence[Target]) -> str:
    lines = [f"{'shape':<7} {'threads':<10} {'pass':<18} {'target':<40} {'wanted':>7} {'measured':>9}"]
    for t in found:
        wanted = f"{'≤' if 'memory' in t.what else '≥'} {t.wanted:.2f}"
        measured = "not run" if t.measured is None else f"{t.measured:.3f}"
        verdict = {True: "met", False: "not met", None: ""}[t.met]
        line = f"{t.stage:<7} {threads(t.threads):<10} {t.pass_:<18} {t.what:<40} {wanted:>7} {measured:>9} {verdict}"
        lines.append(line.rstrip())
    met, missed = (sum(t.met is value for t in found) for value in (True, False))
    lines.append(f"{met} of {len(found)} targets met, {missed} not met, {len(found) - met - missed} not run")
    return "\n".join(lines)
