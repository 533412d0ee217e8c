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
) -> tuple[Tensor, list[int]]:
    """The features of the images, and which images they are.

    Args:
        model: maps float32 [B, 3, height, width] to [B, D]; put in eval mode on ``device``'s behalf and restored.
        records: the images.
        flip: average the features of each image and its mirror image.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        on_error: ``"stop"`` raises at an unreadable image, ``"skip"`` leaves it out.
        progress: a progress bar on stderr.

    Returns:
        float32 [n, D] on the CPU, and the n indices into ``records``; all of them but for skipped images.
    """
    from tqdm import tqdm

    from sabmn_ext.data.loader import image_batches

    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}' is unknown; expected one of {', '.join(PRECISIONS)}")
    device = torch.device(device)
    dtype = PRECISIONS[precision]
    training = {module: module.training for module in model.modules()}
    parts: list[Tensor] = []
    kept: list[int] = []
    model.eval()
    try:
        batches = image_batches(
            records, height=height, width=width, batch_size=batch_size, workers=workers, on_error=on_error
        )
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
            tqdm(total=len(records), unit="image", desc="features", disable=not progress, leave=False) as bar,
        ):
            for images, indices in batches:
                images = images.to(device)
                features = model(images).float()
                if flip:
                    features = (features + model(images.flip(3)).float()) / 2
                parts.append(features.cpu())
                kept += indices
                bar.update(len(indices))
    finally:
        for module, mode in training.items():
            module.training = mode
    if not parts:
        raise ValueError(f"none of the {len(records)} images could be read" if records else "there are no images")
    return torch.cat(parts), kept
