"""The picture of a search: who is framed in green, and whatever the images' sizes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sabmn_ext.report.found import GREEN, GREY, Found, draw_found


def image(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (20, 40)) -> str:
    Image.new("RGB", size, color).save(path)
    return str(path)


def test_picture(tmp_path: Path) -> None:
    query = image(tmp_path / "query.png", (255, 0, 255))
    paths = [
        image(tmp_path / f"{i}.png", (60 * i, 0, 255), size) for i, size in enumerate([(20, 40), (90, 30), (5, 900)])
    ]
    found = [Found(path, 0.5 + i, i < 2, str(i), "") for i, path in enumerate(paths)]
    file = tmp_path / "found.png"
    draw_found(file, [(query, found), (query, found[::-1])], "a caption that is longer than the picture is wide " * 3)
    picture = np.asarray(Image.open(file))
    # A frame of 4 pixels round 64 × 128.
    for color, count in ((GREEN, 4), (GREY, 2)):
        assert 0 <= (picture == color).all(axis=2).sum() - count * 4 * 2 * (72 + 128) < 60
    for i, area in enumerate([64 * 128, 64 * 21, 1 * 128]):
        assert (picture == (60 * i, 0, 255)).all(axis=2).sum() == 2 * area
    assert (picture == (255, 0, 255)).all(axis=2).sum() == 2 * 64 * 128
    draw_found(file, [(query, found[:1])])
    assert Image.open(file).height < 250


def test_labels_and_a_missing_image(tmp_path: Path) -> None:
    assert Found("a.png", 1.0, None, "7", "2").labels == ["person 7", "camera 2"]
    assert Found("a.png", 1.0, None, "-1", "2").labels == ["junk", "camera 2"]
    assert Found("a.png", 1.0, None, "", "2").labels == ["camera 2"]
    assert Found("a.png", 1.0, None, "", "").labels == []
    query = image(tmp_path / "query.png", (255, 0, 255))
    with pytest.raises(OSError, match=r"cannot draw .*gone\.png \(FileNotFoundError"):
        draw_found(tmp_path / "x.png", [(query, [Found(str(tmp_path / "gone.png"), 1.0, None, "", "")])])
