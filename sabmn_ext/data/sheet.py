"""A contact sheet: one row an identity, one column an image, with pid and camera beneath."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .images import UnreadableImageError, load_image
from .records import ImageRecord, ReidData

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")


def _evenly(items: Sequence[T], count: int) -> Sequence[T]:
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


def draw_sheet(
    data: ReidData, *, rows: int = 8, columns: int = 12, height: int = 160, width: int = 80
) -> Image.Image:
    """Identities evenly out of the sorted list, each with images evenly over its cameras.

    They are training identities, or those of the queries if there is nothing to train on.
    """
    from PIL import Image, ImageDraw

    people: dict[int, list[ImageRecord]] = {}
    for record in data.train or [*data.query, *data.gallery]:
        if record.pid >= 0:
            people.setdefault(record.pid, []).append(record)
    pids = _evenly(sorted(people), rows)
    label, gap = 14, 4
    size = columns * (width + gap) + gap, len(pids) * (height + label + gap) + gap
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for row, pid in enumerate(pids):
        images = sorted(people[pid], key=lambda record: (record.camid, record.path))
        for column, record in enumerate(_evenly(images, columns)):
            x, y = gap + column * (width + gap), gap + row * (height + label + gap)
            try:
                pixels = load_image(record.path, height, width).permute(1, 2, 0).numpy()
                sheet.paste(Image.fromarray(pixels), (x, y))
            except UnreadableImageError:
                draw.rectangle((x, y, x + width, y + height), outline=(200, 0, 0))
                draw.text((x + 4, y + 4), "unreadable", fill=(200, 0, 0))
            camera = f" cam {record.camid}" if record.camid >= 0 else ""
            draw.text((x, y + height + 1), f"pid {record.pid}{camera}", fill=(0, 0, 0))
    return sheet


def save_sheet(data: ReidData, file: str) -> None:
    if Path(file).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"sheet file {file!r} must end in .png, .jpg or .webp")
    Path(file).absolute().parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(data).save(file)
