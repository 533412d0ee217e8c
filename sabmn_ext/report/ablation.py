"""The table of an ablation, as text and Markdown, and its picture: each row's figures beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from sabmn_ext.report.evaluation import TITLES

FIGURES = ("map", "rank1")
HEADINGS = (
    "row",
    *(heading for figure in FIGURES for heading in (TITLES[figure], "95 % interval", "paper")),
    "loss",
    "steps not finite",
    "σ",
    "σ stored",
)


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Mean and spread over the seeds of a row: {"map": {"mean", "spread", "interval"}, "rank1": …, "loss", …}.

    Args:
        row: "runs", one for each seed, as ``training.ablation.run`` returns them.

    The spread is the standard deviation (n − 1), None for fewer than two seeds; the interval is the first seed's, from
    resampling identities. Rates are None where no run has ended; σ and steps are the largest and the sum of all seeds.
    """
    runs = row["runs"]
    results = [run["result"] for run in runs if run["result"]]
    found: dict[str, Any] = {}
    for figure in FIGURES:
        values = [result[figure] for result in results]
        interval = (results[0].get("intervals") or {}).get(figure) if results else None
        found[figure] = {**_over_seeds(values), "interval": interval}
    losses = [run["loss"] for run in runs if run["loss"] is not None]
    found["loss"] = _over_seeds(losses)
    found["not_finite"] = sum(run["not_finite"] for run in runs)
    found["steps"] = sum(run["steps"] for run in runs)
    found["sigma"], found["sigma_stored"] = (max(run[key] for run in runs) for key in ("sigma", "sigma_stored"))
    return found


def _over_seeds(values: list[float]) -> dict[str, float | None]:
    return {"mean": mean(values) if values else None, "spread": stdev(values) if len(values) > 1 else None}


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table, under ``HEADINGS``; rates in percent."""
    found = summary(row)
    line = [row["title"]]
    for figure, paper in zip(FIGURES, reversed(row["paper"] or (None, None)), strict=True):
        line.append(_number(found[figure], ".1f", 100))
        interval = found[figure]["interval"]
        line.append(f"{100 * interval[0]:.1f} … {100 * interval[1]:.1f}" if interval else "-")
        line.append("-" if paper is None else f"{paper:.1f}")
    line.append(_number(found["loss"], ".3f", 1))
    line.append(f"{found['not_finite']} of {found['steps']}")
    return [*line, f"{found['sigma']:.3g}", f"{found['sigma_stored']:.3g}"]


def _number(over_seeds: dict[str, float | None], form: str, factor: float) -> str:
    middle, spread = over_seeds["mean"], over_seeds["spread"]
    if middle is None:
        return "-"
    return f"{factor * middle:{form}}" + ("" if spread is None else f" ± {factor * spread:{form}}")


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [list(HEADINGS), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """mAP and rank-1 of every row: a dot for each seed, their mean with the first one's interval, and the paper's."""
    from sabmn_ext.report.plots import BLUE, ORANGE, new_axes

    figure, panels = new_axes(9.6, 1.2 + 0.32 * len(rows), columns=len(FIGURES))
    for panel, name, place in zip(panels, FIGURES, (1, 0), strict=True):
        for y, row in enumerate(rows):
            results = [run["result"] for run in row["runs"] if run["result"]]
            found = summary(row)[name]
            if found["interval"]:
                panel.hlines(y, *(100 * limit for limit in found["interval"]), color=BLUE, linewidth=2)
            if results:
                values = [100 * result[name] for result in results]
                panel.plot(values, [y] * len(values), ".", color=BLUE, markersize=5)
                panel.plot(100 * found["mean"], y, "o", color=BLUE, markersize=7)
            else:
                panel.annotate("diverged", (0.02, y), xycoords=("axes fraction", "data"), va="center", color=BLUE)
            if row["paper"]:
                panel.plot(row["paper"][place], y, "D", color=ORANGE, markerfacecolor="none")
        panel.set_title(f"{TITLES[name]}, %", fontsize=10)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.set_yticks(range(len(rows)), [row["title"] for row in rows])
    panels[1].set_yticklabels([])
    panels[0].plot([], [], "o-", color=BLUE, label="mean over seeds (small dots), interval of the first one")
    if any(row["paper"] for row in rows):
        panels[0].plot([], [], "D", color=ORANGE, markerfacecolor="none", label="the paper, on Market-1501")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(file)
