"""Augmentation of whole batches by one torch.Generator: the same state of it gives the same batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional

# Of ImageNet, as every published re-ID code uses them; in units of 0-255.
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

# Random erasing (Zhong et al., AAAI 2020): range of the area's share, range of height / width, uniform in its
# logarithm or not, number of tries for a box that fits. "field" is what the re-ID codes (torchreid, BoT) do.
ERASING: dict[str, tuple[tuple[float, float], tuple[float, float], bool, int]] = {
    "field": ((0.02, 0.4), (0.3, 1 / 0.3), False, 100),
    "torchvision": ((0.02, 0.33), (0.3, 3.3), True, 10),
}


_TRIES_AT_ONCE = 8  # nearly every image has its box by then


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W] → float32 [B, 3, H, W]: (x − mean) / std with ImageNet's values."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return images.to(torch.float32).sub_(mean).div_(std)


def erasing_boxes(kind: str, batch: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """For each image a box to erase, int64 [batch, 4]: top, left, height, width; all 0 if none of the tries fitted."""
    (low, high), (narrow, tall), logarithmic, tries = ERASING[kind]
    draws = torch.rand((batch, tries, 4), generator=generator, dtype=torch.float64)
    boxes = torch.zeros((batch, 4), dtype=torch.int64)
    missing = torch.arange(batch)  # images without a box so far
    for some in draws.split(_TRIES_AT_ONCE, dim=1):
        part = some[missing]  # [missing, tries, 4]
        area = (low + (high - low) * part[..., 0]) * height * width
        if logarithmic:
            aspect = torch.exp(math.log(narrow) + math.log(tall / narrow) * part[..., 1])
        else:
            aspect = narrow + (tall - narrow) * part[..., 1]
        h, w = torch.sqrt(area * aspect).round().long(), torch.sqrt(area / aspect).round().long()
        top, left = (part[..., 2] * (height - h + 1)).long(), (part[..., 3] * (width - w + 1)).long()
        fits = (h < height) & (w < width)
        first = fits.to(torch.uint8).argmax(dim=1)
        found = fits.any(dim=1)
        chosen = torch.stack((top, left, h, w), dim=-1)[torch.arange(len(missing)), first]
        boxes[missing[found]] = chosen[found]
        missing = missing[~found]
        if not len(missing):
            break
    return boxes


class Augmentation(NamedTuple):
    """What is done to each image of a batch, drawn on the CPU."""

    flip: torch.Tensor  # bool [B]
    corner: torch.Tensor  # int64 [B, 2]: row and column of the crop within the padded image
    box: torch.Tensor  # int64 [B, 4]: top, left, height, width to erase; height 0: nothing


class TrainTransform:
    """Flip, pad and crop, normalise, erase: uint8 [B, 3, height, width] → float32 of the same shape.

    flip_probability: of a left-right flip, for each image.
    padding: black pixels added at every side before a random crop back to height × width; 0: no crop.
    erasing: "field" (area 0.02-0.4, height / width uniform in 0.3-3.33), "torchvision" (its RandomErasing:
        0.02-0.33, 0.3-3.3, log-uniform) or "none"; filled with 0 after normalisation, which is the mean.
    erasing_probability: for each image.
    """

    def __init__(
        self, height: int, width: int, *, flip_probability: float = 0.5, padding: int = 0,
        erasing: str = "field", erasing_probability: float = 0.5,
    ) -> None:  # fmt: skip
        if not (0 <= flip_probability <= 1 and 0 <= erasing_probability <= 1):
            given = f"{flip_probability} and {erasing_probability}"
            raise ValueError(f"flip_probability and erasing_probability must be between 0 and 1, got {given}")
        if padding < 0:
            raise ValueError(f"padding must be 0 or more pixels, got {padding}")
        if erasing not in (*ERASING, "none"):
            raise ValueError(f"erasing must be one of {', '.join((*ERASING, 'none'))}, got {erasing!r}")
        self.height, self.width = height, width
        self.flip_probability, self.padding = flip_probability, padding
        self.erasing, self.erasing_probability = erasing, erasing_probability

    @property
    def steps(self) -> list[str]:
        """What happens to an image, in order; "resize" is done while loading."""
        used = {
            "resize": True,
            "flip": self.flip_probability > 0,
            "pad_crop": self.padding > 0,
            "normalize": True,
            "erase": self.erasing != "none" and self.erasing_probability > 0,
        }
        return [name for name, on in used.items() if on]

    def draw(self, batch: int, generator: torch.Generator) -> Augmentation:
        """What is done to each of `batch` images."""
        steps = self.steps
        flip = torch.zeros(batch, dtype=torch.bool)
        corner = torch.full((batch, 2), self.padding)
        box = torch.zeros((batch, 4), dtype=torch.int64)
        if "flip" in steps:
            flip = torch.rand(batch, generator=generator) < self.flip_probability
        if "pad_crop" in steps:
            corner = torch.randint(2 * self.padding + 1, (batch, 2), generator=generator)
        if "erase" in steps:
            erase = torch.rand(batch, generator=generator) < self.erasing_probability
            box = erasing_boxes(self.erasing, batch, self.height, self.width, generator) * erase.view(-1, 1)
        return Augmentation(flip, corner, box)

    def __call__(
        self, images: torch.Tensor, generator: torch.Generator, share: slice | None = None, batch: int | None = None
    ) -> torch.Tensor:
        """The augmented images, on the device of `images`; drawing is the CPU's, so that devices agree.

        share, batch: `images` are this share of a batch of that many images, and get what they would in the whole.
        """
        count = images.shape[0]
        if images.dtype != torch.uint8 or tuple(images.shape) != (count, 3, self.height, self.width):
            wanted = f"uint8 [B, 3, {self.height}, {self.width}]"
            raise ValueError(f"images must be {wanted}, got {images.dtype} {[*images.shape]}")
        whole = self.draw(count if batch is None else batch, generator)
        flip, corner, box = (each[share or slice(None)] for each in whole)
        if len(flip) != count:
            raise ValueError(f"share must have an image of the batch for each of {count} images, got {len(flip)}")
        pad, crops = self.padding, []
        padded = functional.pad(images, (pad,) * 4) if pad else images
        for image, mirrored, (y, x) in zip(padded, flip.tolist(), corner.tolist(), strict=True):
            x = 2 * pad - x if mirrored else x  # the crop of the mirror image is the mirrored crop at the other side
            crop = image[:, y : y + self.height, x : x + self.width]
            crops.append(crop.flip(2) if mirrored else crop)
        # Slices: one gather over the batch, or masks, would take several times as long on a CPU.
        images = torch.stack(crops)
        out = normalize(images)
        for image, (top, left, h, w) in zip(out, box.tolist(), strict=True):
            if h:
                image[:, top : top + h, left : left + w] = 0
        return out
