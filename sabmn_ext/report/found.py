"""A search as a picture: a query a row, what was found beside it, framed green where it passes for the same person."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

GREEN, BLACK, GREY = (30, 160, 60), (20, 20, 20), (190, 190, 190)
_HEIGHT, _WIDTHS, _FRAME, _GAP, _LINE = 128, (64, 170), 4, 8, 14


@dataclass(frozen=True)
class Found:
    """One gallery image in the ranked list of a query."""

    path: str
    distance: float
    same: bool | None  # whether the distance is within the threshold; None: there is none
    pid: str  # "" where it is unknown, as the camera
    camid: str

    @property
    def labels(self) -> list[str]:
        """What is known of it, in words."""
        person = "junk" if self.pid == "-1" else f"person {self.pid}" if self.pid else ""
        return [words for words in (person, f"camera {self.camid}" if self.camid else "") if words]


def _read(path: str) -> "Image.Image":
    from PIL import Image

    from sabmn_ext.data.images import to_rgb

    try:
        with Image.open(path) as file:
            return to_rgb(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise OSError(f"cannot draw {path} ({type(error).__name__}: {error})") from None


def draw_found(file: str | Path, lists: Sequence[tuple[str, Sequence[Found]]], caption: str = "") -> None:
    """Write the picture.

    Args:
        lists: for each query its image file and what was found, nearest first; the lists are of one length.
        caption: a line above.

    Raises:
        OSError: an image is not there any more or cannot be decoded (names the file).
    """
    from PIL import Image, ImageDraw, ImageFont

    pictures = {path: _read(path) for query, found in lists for path in (query, *(item.path for item in found))}
    # One width for all, by the middle of their proportions; each picture keeps its own within that.
    proportions = sorted(picture.width / picture.height for picture in pictures.values())
    width = round(min(max(_HEIGHT * proportions[len(proportions) // 2], _WIDTHS[0]), _WIDTHS[1]))
    font = ImageFont.load_default(11)
    num_lines = 2 + max((len(item.labels) for _, found in lists for item in found), default=0)
    cell, row = width + 2 * _FRAME + _GAP, _HEIGHT + 2 * _FRAME + num_lines * _LINE + _GAP
    top = _GAP + (_LINE + _GAP if caption else 0)
    columns = 1 + max(len(found) for _, found in lists)
    sheet_width = max(3 * _GAP + columns * cell, 2 * _GAP + round(font.getlength(caption)))
    sheet = Image.new("RGB", (sheet_width, top + row * len(lists)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), caption, fill="black", font=font)

    def fitting(text: str) -> str:
        """The text, or as much of its end as fits under a picture."""
        if font.getlength(text) <= cell - _GAP:
            return text
        while font.getlength(f"…{text}") > cell - _GAP:
            text = text[1:]
        return f"…{text}"

    def place(path: str, x: int, y: int, color: tuple[int, int, int], lines: Sequence[str]) -> None:
        box = (width + 2 * _FRAME, _HEIGHT + 2 * _FRAME)
        draw.rectangle((x, y, x + box[0] - 1, y + box[1] - 1), fill=color)
        draw.rectangle((x + _FRAME, y + _FRAME, x + box[0] - _FRAME - 1, y + box[1] - _FRAME - 1), fill="white")
        picture = pictures[path]
        scale = min(width / picture.width, _HEIGHT / picture.height)
        size = max(1, round(scale * picture.width)), max(1, round(scale * picture.height))
        corner = x + (box[0] - size[0]) // 2, y + (box[1] - size[1]) // 2
        sheet.paste(picture.resize(size, Image.Resampling.BILINEAR), corner)
        for number, line in enumerate(lines):
            draw.text((x, y + box[1] + number * _LINE), fitting(line), fill="black", font=font)

    for number, (query, found) in enumerate(lists):
        y = top + number * row
        place(query, _GAP, y, BLACK, ("query", Path(query).name))
        for rank, item in enumerate(found, start=1):
            color = GREEN if item.same else GREY
            lines = (f"{rank}: {item.distance:#.4g}", Path(item.path).name, *item.labels)
            place(item.path, 2 * _GAP + rank * cell, y, color, lines)
    sheet.save(file)
