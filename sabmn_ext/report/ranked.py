"""Ranked galleries as a picture: a query a row, its nearest valid gallery images beside it, framed green or red."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GREEN, RED, GREY = (30, 160, 60), (215, 45, 40), (90, 90, 90)


@dataclass(frozen=True)
class Side:
    """Queries or gallery: features [n, D], labels [n], image files, and the features of changed networks by name."""

    features: Tensor
    pids: np.ndarray
    camids: np.ndarray | None
    paths: Sequence[str] | None
    counterfactuals: Mapping[str, Tensor] = field(default_factory=dict)


def pick_queries(ap: np.ndarray, pids: np.ndarray, count: int = 2) -> dict[int, str]:
    """The queries with the best, the median and the worst AP, ``count`` each, all of different identities.

    Returns:
        query index → "best", "median" or "worst", in the order of falling AP; fewer where there are fewer identities.
    """
    order = np.argsort(-ap, kind="stable")[: int((~np.isnan(ap)).sum())]  # NaN (no valid match) comes last
    middle = order[np.argsort(np.abs(np.arange(len(order)) - len(order) // 2), kind="stable")]
    titles: dict[int, str] = {}
    for title, candidates in (("best", order), ("worst", order[::-1]), ("median", middle)):
        for q in candidates:
            if pids[q] not in {pids[other] for other in titles} and list(titles.values()).count(title) < count:
                titles[int(q)] = title
    return {int(q): titles[q] for q in order if q in titles}


def nearest(query: Side, gallery: Side, index: int, k: int, metric: str) -> tuple[list[int], list[float]]:
    """The first ``k`` valid gallery items of one query, by the evaluator's distances, ties and rules."""
    valid = gallery.pids != -1
    if query.camids is not None and gallery.camids is not None:
        valid &= (gallery.pids != query.pids[index]) | (gallery.camids != query.camids[index])
    items = torch.from_numpy(valid.nonzero()[0])
    distances = torch.ops.sabmn_ext.pair_distances(
        query.features, gallery.features, torch.full_like(items, index), items, metric, None
    )
    order = distances.argsort(stable=True)[:k]
    shown = distances[order].sqrt() if metric == "euclidean" else distances[order]
    return items[order].tolist(), shown.tolist()


def draw_ranked(
    file: str | Path,
    query: Side,
    gallery: Side,
    titles: dict[int, str],
    *,
    ap: np.ndarray,
    metric: str = "euclidean",
    k: int = 10,
    height: int = 128,
) -> None:
    """Write the picture: for each query of ``titles`` its first ``k`` valid gallery images, green where the pid agrees.

    Args:
        titles: query index → what stands under it (``pick_queries``).
        ap: [Q] the queries' average precision.
        height: of an image in pixels; the width, for all images, is in the first query's proportion.
    """
    from PIL import Image, ImageDraw, ImageFont

    from sabmn_ext.data.images import to_rgb

    if query.paths is None or gallery.paths is None:
        raise ValueError("ranked galleries need the files of the images")
    with Image.open(query.paths[next(iter(titles))]) as first:
        width = min(max(height * first.width // first.height, height // 2), 2 * height)  # labels need some
    frame, gap, text = 3, 8, 28
    cell, row = width + 2 * frame + gap, height + 2 * frame + text + gap
    sheet = Image.new("RGB", (gap * 3 + (k + 1) * cell, gap + row * len(titles)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)

    def place(path: str, x: int, y: int, color: tuple[int, int, int], lines: Sequence[str]) -> None:
        draw.rectangle((x, y, x + width + 2 * frame - 1, y + height + 2 * frame - 1), fill=color)
        with Image.open(path) as image:
            sheet.paste(to_rgb(image).resize((width, height)), (x + frame, y + frame))
        draw.multiline_text((x, y + height + 2 * frame), "\n".join(lines), fill="black", font=font, spacing=2)

    def camera(side: Side, index: int) -> str:
        return "" if side.camids is None else f"camera {side.camids[index]}"

    for number, (q, title) in enumerate(titles.items()):
        y = gap + number * row
        place(query.paths[q], gap, y, GREY, (f"{title} AP {100 * ap[q]:.0f}", camera(query, q)))
        items, distances = nearest(query, gallery, q, k, metric)
        for position, (item, distance) in enumerate(zip(items, distances, strict=True), start=1):
            color = GREEN if gallery.pids[item] == query.pids[q] else RED
            lines = (camera(gallery, item), f"{distance:#.3g}")
            place(gallery.paths[item], 2 * gap + position * cell, y, color, lines)
    sheet.save(file)
