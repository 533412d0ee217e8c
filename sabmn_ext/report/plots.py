"""The curves of a report as PNG files: training, CMC, verification, counterfactuals. Rates are drawn in percent."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sabmn_ext.report.evaluation import COUNTERFACTUAL_TITLES, FALSE_POSITIVE_RATES, TITLES
from sabmn_ext.retrieval.result import RetrievalResult

Curve = tuple[Sequence[float], Sequence[float]]  # x, y
BLUE, ORANGE = "#1f5fa8", "#c8641e"


def read_curves(folder: Path) -> dict[str, Curve]:
    """The scalars of a TensorBoard folder, name → (steps, values); empty where there are none.

    A run that was resumed has several files there; what was written after the checkpoint it went on from counts once.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    curves: dict[str, Curve] = {}
    for name in events.Tags()["scalars"]:
        points = events.Scalars(name)
        curves[name] = [point.step for point in points], [point.value for point in points]
    return curves


def new_axes(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure of its own, outside pyplot's list of open ones: no display, nothing to close."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    row = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axes in row:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, row


def _axes(width: float = 4.4, height: float = 2.9) -> tuple[Any, Any]:
    figure, (axes,) = new_axes(width, height)
    return figure, axes


def draw_training(file: Path, curves: dict[str, Curve], title: str) -> None:
    """Curves over the steps of a training, with a legend where there are several; in percent if the title says so."""
    figure, axes = _axes()
    for (name, (steps, values)), color, style in zip(curves.items(), (BLUE, ORANGE), ("-", "--"), strict=False):
        marker = "o" if len(steps) == 1 else None
        y = np.asarray(values) * (100 if "%" in title else 1)
        axes.plot(steps, y, style, color=color, marker=marker, label=name)
    axes.set_xlabel("step")
    axes.set_title(title, fontsize=10)
    if len(curves) > 1:
        axes.legend(frameon=False)
    figure.savefig(file)


def draw_cmc(file: Path, result: RetrievalResult) -> None:
    """The share of queries with a match within the first k ranks."""
    figure, axes = _axes()
    cmc = 100 * result.cmc
    axes.step(np.arange(1, len(cmc) + 1), cmc, where="post", color=BLUE, marker="o" if len(cmc) == 1 else None)
    axes.set_ylim(min(cmc[0], 90) - 5, 101)
    axes.set_xlabel("rank k")
    axes.set_title("CMC: queries with a match within the first k, %", fontsize=10)
    figure.savefig(file)


def draw_verification(file: Path, result: RetrievalResult) -> bool:
    """TPR over FPR from the lowest rate that can be measured; False, and no file, where none can."""
    _, fpr, tpr = result.pairs.curve()
    measurable = fpr * result.pairs.num_negatives >= 10
    if not measurable.any() or result.pairs.num_positives == 0:
        return False
    figure, axes = _axes()
    axes.step(fpr[measurable], 100 * tpr[measurable], where="post", color=BLUE)
    points = [point for rate in FALSE_POSITIVE_RATES if (point := result.verification(rate)).measurable and point.fpr]
    axes.plot([point.fpr for point in points], [100 * point.tpr for point in points], "o", color=ORANGE)
    axes.set_xscale("log")
    axes.set_ylim(-2, 102)
    axes.set_xlabel("false-positive rate")
    axes.set_title("verification: true-positive rate, %", fontsize=10)
    figure.savefig(file)
    return True


def draw_counterfactuals(file: Path, report: dict[str, Any]) -> None:
    """The drop in mAP and in rank-1 without each part, with its interval; ``report`` as in the JSON."""
    names = [name for name in COUNTERFACTUAL_TITLES if name in report]
    figure, axes = _axes(6.4, 1.3 + 0.45 * len(names))
    axes.axvline(0, color="black", linewidth=0.8)
    for figure_name, color, shift in (("map", BLUE, -0.13), ("rank1", ORANGE, 0.13)):
        rows = [report[name][figure_name] for name in names]
        drop, low, high = (100 * np.array([row[key] for row in rows]) for key in ("drop", "low", "high"))
        y = np.arange(len(names)) + shift
        axes.hlines(y, low, high, color=color, linewidth=2)
        axes.plot(drop, y, "o", color=color, markersize=5, label=TITLES[figure_name])
    axes.set_yticks(range(len(names)), [COUNTERFACTUAL_TITLES[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)  # numbers as long as -0.075 would run into one another
    axes.set_title(f"drop in points, {100 * report['confidence']:g} % intervals", fontsize=10)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file)
