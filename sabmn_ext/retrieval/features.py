"""Features of images: a model in eval mode over image records, in order."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sabmn_ext.data.records import ImageRecord

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def extract_features(
    model: nn.Module,
    records: Sequence["ImageRecord"],
    *,
    height: int,
    width: int,
    batch_size: int,
    device: str | torch.device,
    workers: int = 0,
    flip: bool = False,
    precision: str = "fp32",
    on_error: str = "stop",
    progress: bool = True,
    indices: list[int] | None = None,
) -> Tensor:
    """The features of images.

    Args:
        model: maps float32 [B, 3, height, width] to [B, D], on ``device``; in eval mode meanwhile, then as it was.
        records: the images.
        flip: average the features of each image and its mirror image.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        on_error: ``"stop"`` raises at an unreadable image, ``"skip"`` leaves it out.
        progress: a progress bar, where stderr is a terminal.
        indices: takes up the index into ``records`` of each row that is returned; needed with ``"skip"``.

    Returns:
        float32 [n, D] on the CPU, in the order of ``records``.

    Raises:
        UnreadableImageError: an image cannot be read; names the file.
        ValueError: an unknown precision, no images, or none that can be read.
    """
    from tqdm import tqdm

    from sabmn_ext.data.loader import image_batches

    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}' is unknown; expected one of {', '.join(PRECISIONS)}")
    device = torch.device(device)
    dtype = PRECISIONS[precision]
    training = {module: module.training for module in model.modules()}
    parts: list[Tensor] = []
    kept = indices if indices is not None else []
    model.eval()
    try:
        batches = image_batches(
            records, height=height, width=width, batch_size=batch_size, workers=workers, on_error=on_error
        )
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
            tqdm(
                total=len(records), unit="image", desc="features", disable=None if progress else True, leave=False
            ) as bar,
        ):
            for images, batch_indices in batches:
                images = images.to(device)
                features = model(images).float()
                if flip:
                    features = (features + model(images.flip(3)).float()) / 2
                parts.append(features.cpu())
                kept += batch_indices
                bar.update(len(batch_indices))
    finally:
        for module, mode in training.items():
            module.training = mode
    if not parts:
        raise ValueError(f"none of the {len(records)} images could be read" if records else "there are no images")
    return torch.cat(parts)
