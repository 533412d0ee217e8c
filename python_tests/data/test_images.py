"""Decoding: every kind of file becomes upright 8-bit RGB; a file that cannot be read is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_data import write_image
from PIL import Image

from sabmn_ext.data import ImageDataset, ImageRecord, UnreadableImageError, load_image
from sabmn_ext.data.images import FILL


def colours(path: Path) -> list[tuple[int, ...]]:
    """The four quarters' colours of a picture that is 4 × 8 blocks of one colour each."""
    image = load_image(str(path), 8, 4)
    return [tuple(image[:, y, x].tolist()) for y in (0, 7) for x in (0, 3)]


def test_an_rgb_picture_at_its_own_size_is_unchanged(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    image = load_image(str(path), 8, 4)
    assert (image.dtype, image.shape, image.is_contiguous()) == (torch.uint8, (3, 8, 4), True)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 255  # without antialiasing a row would be picked: 0 or 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    inner = load_image(str(tmp_path / "a.png"), 8, 8)[:, 1:-1, 1:-1].float()
    assert (inner - 127.5).abs().max() < 8


@pytest.mark.parametrize(
    ("mode", "stored", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), FILL),
        ("LA", (99, 0), FILL),
        ("I;16", 0x4D12, (0x4D,) * 3),
    ],
)
def test_modes(tmp_path: Path, mode: str, stored: int | tuple[int, ...], expected: tuple[int, ...]) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (4, 8), stored).save(path)
    assert colours(path) == [expected] * 4


def test_palettes_with_and_without_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (4, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert colours(tmp_path / "opaque.png") == [(200, 100, 50)] * 4
    assert colours(tmp_path / "clear.png") == [FILL] * 4


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    upright = Image.new("RGB", (4, 8), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 4, 4))  # red above blue
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to view"
    upright.rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    assert colours(tmp_path / "a.png") == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2


def broken_files(folder: Path) -> list[Path]:
    good = write_image(folder / "good.jpg", size=(64, 64)).read_bytes()
    contents = {"empty.jpg": b"", "text.jpg": b"not an image", "cut.jpg": good[: len(good) // 2]}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for path in (*broken_files(tmp_path), tmp_path / "missing.jpg"):
        with pytest.raises(UnreadableImageError, match=f"cannot read image {path} .*on_error='skip'"):
            load_image(str(path), 8, 4)


def test_dataset_stops_or_takes_the_next_readable_image(tmp_path: Path) -> None:
    broken = broken_files(tmp_path)
    good = [write_image(tmp_path / f"{i}.png", i) for i in range(2)]
    files = [good[0], broken[0], broken[1], good[1], broken[2]]
    records = [ImageRecord(str(path), 10 + i, 1) for i, path in enumerate(files)]
    with pytest.raises(UnreadableImageError, match=r"empty.jpg"):
        ImageDataset(records, None, 8, 4)[1]
    dataset = ImageDataset(records, [5, 6, 7, 8, 9], 8, 4, on_error="skip")
    assert [dataset[i][1:] for i in range(5)] == [
        (5, 0),
        (8, 3),
        (8, 3),
        (8, 3),
        (5, 0),
    ]  # the last wraps around
    assert torch.equal(dataset[1][0], load_image(str(good[1]), 8, 4))
    assert ImageDataset(records, None, 8, 4)[3][1] == 13
    assert [index for _, _, index in dataset] == [0, 3, 3, 3, 0], "iteration ends after the last image"
    with pytest.raises(UnreadableImageError, match="none of 2 images"):
        ImageDataset(records[1:3], None, 8, 4, on_error="skip")[0]


def test_arguments_are_checked() -> None:
    record = ImageRecord("a.png", 1, 1)
    with pytest.raises(ValueError, match="2 for 1 records"):
        ImageDataset([record], [1, 2], 8, 4)
    with pytest.raises(ValueError, match="height and width"):
        ImageDataset([record], None, 0, 4)
    with pytest.raises(ValueError, match="'stop' or 'skip', got 'ignore'"):
        ImageDataset([record], None, 8, 4, on_error="ignore")
