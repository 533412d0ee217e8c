"""A report: one HTML page that needs nothing beside it, its pictures inside, and the same pictures as PNG files."""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import torch

from sabmn_ext.report import plots
from sabmn_ext.report.evaluation import COUNTERFACTUAL_TITLES, TITLES
from sabmn_ext.report.ranked import Side, draw_ranked, pick_queries
from sabmn_ext.retrieval.result import RetrievalResult

if TYPE_CHECKING:
    from sabmn_ext.report.attention import Network

PAGE = "report.html"

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc; }
h3 { font-size: 1em; margin: 1.6em 0 0.4em; }
table { border-collapse: collapse; margin: 0.8em 0; }
th, td { padding: 0.2em 0.9em; text-align: right; border-bottom: 1px solid #e4e4e4; }
td { font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
figure { display: inline-block; margin: 0.4em 1.2em 0.4em 0; vertical-align: top; max-width: 100%; }
img { max-width: 100%; height: auto; } figcaption, .note { color: #555; font-size: 0.9em; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 0.85em; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


@dataclass(frozen=True)
class ReportContents:
    """What a report shows; what is None, or left out of ``figures``, is left out of the page.

    Attributes:
        title: of the page.
        figures: the result as it stands in the JSON: of its keys "intervals", "counterfactuals", "verification",
            "untrained", "gamma", "attention_ratio" and "against" are shown.
        result, query, gallery: the evaluation and the features and files that it is about.
        metric: the distance that ranked the gallery.
        network: of which attention maps are drawn.
        curves: TensorBoard's folder of the training.
        settings: what was in effect, as text.
    """

    title: str
    figures: dict[str, Any]
    result: RetrievalResult
    query: Side
    gallery: Side
    metric: str
    network: "Network | None" = None
    curves: Path | None = None
    settings: str = ""


def check_folder(folder: Path) -> None:
    """That a report can be written to ``folder``, which is made where its parent is there."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"report {folder}: that is a file; expected a folder for the page and its pictures")
    if not folder.resolve().parent.is_dir():
        raise FileNotFoundError(f"report {folder}: there is no folder {folder.parent}")


def write_report(folder: Path, contents: ReportContents) -> Path:
    """Write ``report.html`` and its pictures into ``folder``, over those of an earlier report, and return the page.

    Raises:
        OSError: the folder cannot be written to, or an image of the ranked galleries cannot be read.
    """
    check_folder(folder)
    folder.mkdir(exist_ok=True)
    sections = [
        _retrieval(contents, folder),
        _verification(contents, folder),
        _counterfactuals(contents, folder),
        _training(contents, folder),
        _ranked(contents, folder),
        _settings(contents),
    ]
    page = folder / PAGE
    title = html.escape(contents.title)
    page.write_text(_PAGE.substitute(title=title, body="\n".join(filter(None, sections))), encoding="utf-8")
    return page


# ---- pieces of HTML ----


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<table>", line(header, "th"), *(line(row, "td") for row in rows), "</table>"])


def _picture(file: Path, meaning: str, caption: str = "") -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    image = f'<img alt="{html.escape(meaning)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _percent(x: float | None, digits: int = 2) -> str:
    return "–" if x is None else f"{100 * x:.{digits}f}"


# ---- sections ----


def _retrieval(contents: ReportContents, folder: Path) -> str:
    result, figures = contents.result, contents.figures
    intervals, untrained = figures.get("intervals"), figures.get("untrained") or {}
    without = result.num_queries - result.num_valid_queries
    notes = (
        f"{result.num_queries:,} queries ({without:,} without a valid match, left out of the means), "
        f"{result.num_gallery:,} gallery items ({result.num_junk:,} junk); distance: {contents.metric}, camera rule "
        f"{'on' if result.camera_rule else 'off'}."
    )
    titles = TITLES | {"rank5": "rank-5", "rank10": "rank-10"}
    values = result.to_dict()
    header = ["in %", "result"]
    if intervals:
        header.append(f"{100 * intervals['confidence']:g} % interval")
        notes += (
            f" Intervals come from resampling the {intervals['num_identities']:,} query identities: they cover the "
            "sample of test identities, not the noise of training."
        )
    header += ["before training"] * bool(untrained) + ["chance"]
    rows = []
    for name, title in titles.items():
        row = [title, _percent(values[name])]
        if intervals:
            row.append(" … ".join(map(_percent, intervals[name])) if name in intervals else "")
        row += [_percent(untrained.get(name))] * bool(untrained)
        rows.append([*row, _percent(result.chance_map) if name == "map" else ""])
    plots.draw_cmc(folder / "cmc.png", result)
    parts = ["<h2>Retrieval</h2>", _note(notes), _table(header, rows)]
    if against := figures.get("against"):
        parts += ["<h3>Difference to another result</h3>", _note(f"This result minus {against['file']}, paired.")]
        rows = [
            [
                title,
                _percent(against[name]["other"]),
                f"{100 * against[name]['difference']:+.2f}",
                f"{100 * against[name]['low']:+.2f} … {100 * against[name]['high']:+.2f}",
            ]
            for name, title in TITLES.items()
        ]
        parts.append(_table(["in %", "other", "difference", f"{100 * against['confidence']:g} % interval"], rows))
    parts.append(_picture(folder / "cmc.png", "CMC curve"))
    return "\n".join(parts)


def _verification(contents: ReportContents, folder: Path) -> str:
    report = contents.figures.get("verification")
    if not report:
        return ""

    def row(point: dict[str, float | None]) -> list[str]:
        rate = f"{100 * point['requested_fpr']:g}"  # type: ignore[operator]
        if point["fpr"] is None:
            return [rate, "too few pairs", "", ""]
        threshold = "accepts nothing" if point["threshold"] is None else f"{point['threshold']:.5g}"
        return [rate, _percent(point["tpr"]), _percent(point["fpr"], 4), threshold]

    text = (
        f"Are two images of one person? {report['num_positives']:,} pairs of one person, {report['num_negatives']:,} "
        "of two; a pair is accepted if its distance is at most the threshold."
    )
    header = ["false-positive rate at most, %", "true-positive rate, %", "rate reached, %", "threshold"]
    parts = ["<h2>Verification</h2>", _note(text), _table(header, map(row, report["points"]))]
    if plots.draw_verification(folder / "verification.png", contents.result):
        caption = "From the lowest false-positive rate that can be measured; the points are those of the table."
        parts.append(_picture(folder / "verification.png", "verification curve", caption))
    return "\n".join(parts)


def _counterfactuals(contents: ReportContents, folder: Path) -> str:
    report = contents.figures.get("counterfactuals")
    if not report:
        return ""

    def cells(x: dict[str, float]) -> list[str]:
        return [f"{100 * x['drop']:+.2f}", f"{100 * x['low']:+.2f} … {100 * x['high']:+.2f}"]

    rows = [
        [title, _percent(report[name]["map"]["value"]), *cells(report[name]["map"]), *cells(report[name]["rank1"])]
        for name, title in COUNTERFACTUAL_TITLES.items()
        if name in report
    ]
    interval = f"{100 * report['confidence']:g} % interval"
    header = ["in %", "mAP", "drop in mAP", interval, "drop in rank-1", interval]
    text = (
        "The trained network with one part taken out, on the same images. The drop is trained minus changed: above 0 "
        f"the part helps on this data; where the interval holds 0, {report['num_identities']:,} identities do not show "
        "that it does. Folding the spectral norm into the weights should change nothing. A network trained without the "
        "part may do better than one that has lost it."
    )
    plots.draw_counterfactuals(folder / "counterfactuals.png", report)
    picture = _picture(folder / "counterfactuals.png", "drop in mAP and rank-1 with paired intervals")
    return "\n".join(["<h2>What each part is worth</h2>", _note(text), _table(header, rows), picture])


def _training(contents: ReportContents, folder: Path) -> str:
    curves = plots.read_curves(contents.curves) if contents.curves else {}
    if not curves:
        return ""
    rates = {name.removeprefix("rate/"): curve for name, curve in curves.items() if name.startswith("rate/")}
    titles = {
        "loss": "loss",
        "accuracy": "accuracy on training images, %",
        "held_out_map": "mAP on held-out identities, %",
        "gamma": "gamma of the attention block",
        "rates": "learning rates",
    }
    parts = ["<h2>Training</h2>"]
    for name, title in titles.items():
        lines = rates if name == "rates" else {name: curves[name]} if name in curves else {}
        if lines:
            plots.draw_training(folder / f"{name}.png", lines, title)
            parts.append(_picture(folder / f"{name}.png", title))
    gamma, ratio = (contents.figures.get(name) for name in ("gamma", "attention_ratio"))
    if gamma is not None and ratio is not None:
        parts.append(
            _note(
                f"At the end gamma is {gamma:+.4f}; over the query images the attention changes the feature map by "
                f"{100 * ratio:.2f} % of its length, |gamma a| / |x|."
            )
        )
    return "\n".join(parts)


def _ranked(contents: ReportContents, folder: Path) -> str:
    query, gallery, result = contents.query, contents.gallery, contents.result
    parts = ["<h2>Ranked galleries</h2>"]
    if query.paths is None or gallery.paths is None:
        return "\n".join([*parts, _note("No pictures: the features came without the files of their images.")])
    text = (
        "The best, the median and the worst queries by average precision, each of another person, and what the network "
        "finds, nearest first, without the images that the rules leave out. Green frame: the right person; red frame: "
        "another. Under each image its camera and its distance to the query."
    )
    if contents.network:
        text += (
            " Below it the query's attention map: what all positions of the feature map gather on average, and what "
            "the position in the white square gathers. Bright is much, each picture to its own largest value, which is "
            "given in units of 1/N, the value of a map without preference."
        )
    parts.append(_note(text))
    for number, (q, title) in enumerate(pick_queries(result.ap, query.pids).items(), start=1):
        file = folder / f"query{number}_ranked.png"
        draw_ranked(file, query, gallery, {q: title}, ap=result.ap, metric=contents.metric)
        camera = "" if query.camids is None else f", camera {query.camids[q]}"
        heading = f"{title.capitalize()}: AP {_percent(result.ap[q], 1)} %, first match at rank "
        heading += f"{result.first_match_rank[q]:,}, {result.num_matches[q]:,} matches; person {query.pids[q]}{camera}"
        parts += [f"<h3>{html.escape(heading)}</h3>", _picture(file, "query and ranked gallery", query.paths[q])]
        if contents.network:
            from sabmn_ext.report.attention import draw_attention

            file = folder / f"query{number}_attention.png"
            draw_attention(file, contents.network, query.paths[q])
            parts.append(_picture(file, "the query's attention map"))
    return "\n".join(parts)


def _settings(contents: ReportContents) -> str:
    figures = contents.figures
    known = ("recipe", "data", "checkpoint", "features", "steps", "seconds", "flip", "skipped_images", "best")
    rows = [[name.replace("_", " "), json.dumps(figures[name])] for name in known if figures.get(name) is not None]
    parts = ["<h2>Settings</h2>", _table(["", ""], [*rows, ["torch", torch.__version__]])]
    if contents.settings:
        text = f"<pre>{html.escape(contents.settings)}</pre>"
        parts.append(f"<details><summary>all settings of the training</summary>{text}</details>")
    return "\n".join(parts)
