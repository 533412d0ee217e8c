"""The results of attention_bench.py: a row for each candidate, as a table, a CSV file and a plot."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

MM_LABEL = "torch.mm, 2048³"
BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # legible on a line, too


@dataclass(frozen=True)
class Row:
    """One candidate in one pass of one setting. Times are medians; None where there is nothing to say."""

    shape: str
    batch: int
    channels: int
    height: int
    width: int
    reduced: int
    form: str
    memory_format: str
    device: str
    threads: int
    dtype: str
    pass_: str
    candidate: str
    backend: str | None  # that the dispatcher recorded, for ours
    rounds: int
    milliseconds: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    gflops: float  # 10⁹ operations a second
    mm_gflops: float  # of torch's 2048³ product, measured in the same rounds
    share_of_mm: float
    share_of_copy: float | None  # the time that the least bytes would take at the rate of a copy, over the time taken
    times_ours: float | None  # this candidate's time over ours
    peak_bytes: int | None

    @property
    def setting(self) -> str:
        sizes = f"B {self.batch}, C {self.channels}, {self.height}×{self.width}, d {self.reduced}"
        name = f"{self.shape}: " if self.shape.startswith("stage") else ""
        return f"{name}{sizes}, {self.memory_format}, {threads(self.threads)}"


def threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def table(rows: Sequence[Row]) -> str:
    """One setting's rows under a heading."""
    columns = {
        "backend": [row.backend or "" for row in rows],
        "rounds": [str(row.rounds) for row in rows],
        "ms": [f"{row.milliseconds:.3f}" for row in rows],
        "± %": [f"{50 * (row.upper_quartile_ms - row.lower_quartile_ms) / row.milliseconds:.0f}" for row in rows],
        "GF/s": [f"{row.gflops:.1f}" for row in rows],
        "of mm": [f"{row.share_of_mm:.2f}" for row in rows],
        "of copy": ["" if row.share_of_copy is None else f"{row.share_of_copy:.2f}" for row in rows],
        "/ ours": ["" if row.times_ours is None else f"{row.times_ours:.2f}" for row in rows],
        "peak MB": ["" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}" for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    widths = [max(8, *map(len, cells)) for cells in columns.values()]

    def line(pass_: str, dtype: str, candidate: str, cells: Iterable[str]) -> str:
        start = f"{pass_:<18} {dtype:<5} {candidate:<14}"
        return " ".join([start, *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))]).rstrip()

    lines, before = [rows[0].setting, line("pass", "dtype", "candidate", columns)], None
    for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
        group = (row.pass_, row.dtype)
        lines.append(line(*(group if group != before else ("", "")), row.candidate, cells))
        before = group
    return "\n".join(lines)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Every field of every row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of GF/s for each shape and candidate, the product's rate above them: a column for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = list(dict.fromkeys((row.dtype, row.memory_format, row.threads) for row in rows))
    passes = list(dict.fromkeys(row.pass_ for row in rows))
    names = list(dict.fromkeys(row.candidate for row in rows))
    shapes = list(dict.fromkeys(row.shape for row in rows))
    size = (1.5 + len(passes) * max(3.5, 0.5 + 0.3 * len(shapes) * (len(names) + 1)), 0.9 + 3.4 * len(settings))
    figure, axes = pyplot.subplots(len(settings), len(passes), figsize=size, squeeze=False, sharey="row")
    for line, setting in zip(axes, settings, strict=True):
        for axis, pass_ in zip(line, passes, strict=True):
            here = [r for r in rows if (r.dtype, r.memory_format, r.threads) == setting and r.pass_ == pass_]
            _bars(axis, here, shapes, names)
            axis.set_title(f"{pass_}, {setting[0]}, {setting[1]}, {threads(setting[2])}", fontsize=10)
        line[0].set_ylabel("GF/s")
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    labels = [*names, MM_LABEL]
    columns = min(len(labels), 3 * len(passes))
    figure.legend([handles[label] for label in labels], labels, loc="lower center", ncols=columns, frameon=False)
    title = f"Self-attention on {rows[0].device.upper()}: GF/s, and median time (higher bars are faster)"
    figure.suptitle(title, fontsize=11)
    below = (0.1 + 0.25 * -(-len(labels) // columns)) / size[1]
    figure.tight_layout(rect=(0, below, 1, 1 - 0.1 / size[1]))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axis: Any, rows: Sequence[Row], shapes: list[str], names: list[str]) -> None:
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        found = [row for row in rows if row.candidate == name]
        if not found:
            continue
        places = [shapes.index(row.shape) - 0.42 + (i + 0.5) * width for row in found]
        bars = axis.bar(places, [row.gflops for row in found], 0.92 * width, label=name, color=f"C{i}")
        labels = [f"{row.milliseconds:.{2 if row.milliseconds < 10 else 1}f} ms" for row in found]
        axis.bar_label(bars, labels, fontsize=7, rotation=90, padding=2, bbox=BEHIND)
    for j, shape in enumerate(shapes):
        for rate in {row.mm_gflops for row in rows if row.shape == shape}:
            axis.hlines(rate, j - 0.45, j + 0.45, "black", "dashed", linewidth=1, label=MM_LABEL)
    one = {row.shape: row for row in rows}
    labels = [_two_lines(one[shape]) if shape in one else shape for shape in shapes]
    axis.set_xticks(range(len(shapes)), labels, fontsize=8)
    axis.set_xlim(-0.55, len(shapes) - 0.45)
    axis.margins(y=0.2)
    axis.spines[["top", "right"]].set_visible(False)


def _two_lines(row: Row) -> str:
    if not row.shape.startswith("stage"):
        return row.shape
    return f"stage {row.shape.removeprefix('stage')}\nN {row.height * row.width}, C {row.channels}"
