"""Augmentation of whole batches by one torch.Generator: the same state of it gives the same batch."""

from __future__ import annotations

import math

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


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W] → float32 [B, 3, H, W]: (x − mean) / std with ImageNet's values."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.to(torch.float32) - mean) / std


def erasing_boxes(
    kind: str, batch: int, height: int, width: int, generator: torch.Generator
) -> list[tuple[int, int, int, int] | None]:
    """For each image a box to erase (top, left, height, width); None if none fitted in the allowed tries."""
    (low, high), (narrow, tall), logarithmic, tries = ERASING[kind]
    draws = torch.rand((batch, tries, 4), generator=generator, dtype=torch.float64)
    area = (low + (high - low) * draws[..., 0]) * height * width
    if logarithmic:
        aspect = torch.exp(math.log(narrow) + math.log(tall / narrow) * draws[..., 1])
    else:
        aspect = narrow + (tall - narrow) * draws[..., 1]
    h, w = torch.sqrt(area * aspect).round().long(), torch.sqrt(area / aspect).round().long()
    fits = (h < height) & (w < width)
    first = fits.to(torch.uint8).argmax(dim=1)
    boxes: list[tuple[int, int, int, int] | None] = []
    for i, k in enumerate(first.tolist()):
        if not fits[i, k]:
            boxes.append(None)
            continue
        bh, bw = int(h[i, k]), int(w[i, k])
        top, left = int(draws[i, k, 2] * (height - bh + 1)), int(draws[i, k, 3] * (width - bw + 1))
        boxes.append((top, left, bh, bw))
    return boxes


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

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        batch = images.shape[0]
        if images.dtype != torch.uint8 or tuple(images.shape) != (batch, 3, self.height, self.width):
            wanted = f"uint8 [B, 3, {self.height}, {self.width}]"
            raise ValueError(f"images must be {wanted}, got {images.dtype} {[*images.shape]}")
        steps = self.steps
        if "flip" in steps:
            flip = torch.rand(batch, generator=generator) < self.flip_probability
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
        if "pad_crop" in steps:
            padded = functional.pad(images, (self.padding,) * 4)
            corner = torch.randint(2 * self.padding + 1, (batch, 2), generator=generator).tolist()
            images = torch.stack(
                [padded[i, :, y : y + self.height, x : x + self.width] for i, (y, x) in enumerate(corner)]
            )
        out = normalize(images)
        if "erase" in steps:
            erase = torch.rand(batch, generator=generator) < self.erasing_probability
            boxes = erasing_boxes(self.erasing, batch, self.height, self.width, generator)
            for i, box in enumerate(boxes):
                if box is not None and erase[i]:
                    top, left, h, w = box
                    out[i, :, top : top + h, left : left + w] = 0
        return out
