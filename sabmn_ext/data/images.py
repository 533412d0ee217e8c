"""Image files to uint8 tensors. Pillow decodes and resizes (bilinear, antialiased when shrinking)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .records import ImageRecord

if TYPE_CHECKING:
    from PIL import Image

FILL = (124, 116, 104)  # ImageNet's mean colour, 0 after normalisation: stands behind transparent pixels


class UnreadableImageError(RuntimeError):
    """An image file that cannot be decoded; the message names it and says why."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB, 8 bits a channel, whatever the file holds.

    The EXIF orientation is applied, as viewers do; palettes, gray and CMYK are converted; transparent pixels
    show ImageNet's mean colour, not the hidden one; 16-bit gray keeps its upper 8 bits (Pillow would clip it
    to white).
    """
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        backdrop = Image.new("RGB", image.size, FILL)
        backdrop.paste(image, mask=image.getchannel("A"))
        return backdrop
    return image.convert("RGB")


def load_image(path: str, height: int, width: int) -> torch.Tensor:
    """One image as uint8 [3, height, width]; UnreadableImageError names a file that cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = to_rgb(file).resize((width, height), Image.Resampling.BILINEAR)
    except MemoryError:
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, …: damage has many names
        raise UnreadableImageError(
            f"cannot read image {path} ({type(error).__name__}: {error}). Repair or remove the file, "
            "or choose to skip unreadable images (on_error='skip')"
        ) from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def check_on_error(on_error: str) -> None:
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")


class ImageDataset(torch.utils.data.Dataset[tuple[torch.Tensor, int, int]]):
    """Images for training: item i is (image uint8 [3, height, width], label, index).

    labels: one int a record, or None (then every label is the record's pid).
    on_error: "stop" raises UnreadableImageError; "skip" gives the next readable image of the list instead,
        with that one's label and index: the replacement depends on nothing but the list.
    """

    def __init__(
        self, records: Sequence[ImageRecord], labels: Sequence[int] | None,
        height: int, width: int, on_error: str = "stop",
    ) -> None:  # fmt: skip
        if labels is not None and len(labels) != len(records):
            raise ValueError(f"labels must be one a record: got {len(labels)} for {len(records)} records")
        if height < 1 or width < 1:
            raise ValueError(f"height and width must be positive, got {height} and {width}")
        check_on_error(on_error)
        self.records = list(records)
        self.labels = [record.pid for record in records] if labels is None else list(labels)
        self.height, self.width, self.on_error = height, width, on_error
        # Filled by cache_images: the decoded images [n, 3, height, width], and the index that each one is of.
        self.pixels: torch.Tensor | None = None
        self.sources: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        if not -len(self) <= index < len(self):  # an IndexError ends `for item in dataset`
            raise IndexError(f"index {index} of {len(self)} images")
        for step in range(len(self)):
            i = (index + step) % len(self)
            try:
                return load_image(self.records[i].path, self.height, self.width), self.labels[i], i
            except UnreadableImageError:
                if self.on_error == "stop":
                    raise
        raise UnreadableImageError(f"none of {len(self)} images can be read, {self.records[0].path} first")

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images uint8 [B, 3, height, width], labels and indices int64 [B], from cache_images's memory."""
        if self.pixels is None or self.sources is None:
            raise RuntimeError("the images are not in memory: call cache_images first")
        chosen = torch.tensor(indices)
        sources = self.sources[chosen]
        return self.pixels.index_select(0, chosen), torch.tensor([self.labels[i] for i in sources.tolist()]), sources
