"""Ranked galleries: who is picked, who is shown, and the frames' colours in the picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sabmn_ext.report.ranked import GREEN, GREY, RED, Side, draw_ranked, nearest, pick_queries


def test_best_median_and_worst_of_different_identities() -> None:
    ap = np.array([0.9, 1.0, np.nan, 0.2, 1.0, 0.5, 0.6, 0.1, 0.4])
    pids = np.array([1, 2, 3, 4, 2, 6, 7, 8, 9])
    assert pick_queries(ap, pids, count=1) == {1: "best", 5: "median", 7: "worst"}
    assert pick_queries(ap, pids) == {1: "best", 0: "best", 6: "median", 5: "median", 3: "worst", 7: "worst"}
    assert pick_queries(np.array([np.nan, 0.5]), np.array([1, 1])) == {1: "best"}


def sides(tmp_path: Path) -> tuple[Side, Side]:
    paths = []
    for i in range(6):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (10, 20), (40 * i, 0, 255)).save(paths[-1])
    query = Side(torch.tensor([[0.0], [10.0]]), np.array([1, 2]), np.array([1, 1]), paths[:2])
    gallery = Side(
        torch.tensor([[3.0], [0.5], [-3.0], [0.0], [9.0], [1.0]]),
        np.array([1, 2, 2, -1, 2, 1]),
        np.array([2, 2, 2, 2, 2, 1]),
        paths,
    )
    return query, gallery


def test_shown_are_the_nearest_valid_items(tmp_path: Path) -> None:
    query, gallery = sides(tmp_path)
    # 3 is junk, 5 has the query's pid and camera; 0 and 2 tie.
    assert nearest(query, gallery, 0, 10, "euclidean") == ([1, 0, 2, 4], [0.5, 3.0, 3.0, 9.0])
    without = Side(query.features, query.pids, None, query.paths)
    assert nearest(without, gallery, 0, 2, "euclidean") == ([1, 5], [0.5, 1.0])
    shifted = Side(query.features + 1, query.pids, query.camids, query.paths)
    above = Side(gallery.features + 4, gallery.pids, gallery.camids, gallery.paths)
    assert nearest(shifted, above, 0, 3, "cosine")[0] == [0, 1, 2]  # one dimension: all cosines are 1


def test_picture(tmp_path: Path) -> None:
    query, gallery = sides(tmp_path)
    file = tmp_path / "ranked.png"
    titles = {0: "best", 1: "worst"}
    draw_ranked(file, query, gallery, titles, ap=np.array([0.5, 0.25]), k=3, height=40)
    picture = np.asarray(Image.open(file))
    for color, count in ((GREY, 2), (GREEN, 2), (RED, 4)):
        # A frame of 3 pixels round 20 × 40 has 3 · 2 · (26 + 40) = 396; text may have a few grey ones.
        # Query 0: 1 red, 0 green, 2 red. Query 1: 4 green, 0 red, 5 red.
        assert 0 <= (picture == color).all(axis=2).sum() - 396 * count < 40
    for inside in ((40 * i, 0, 255) for i in (0, 1, 2, 4, 5)):
        assert (picture == inside).all(axis=2).sum() >= 800
    with pytest.raises(ValueError, match="need the files of the images"):
        draw_ranked(file, Side(query.features, query.pids, None, None), gallery, titles, ap=np.array([0.5, 0.25]))
