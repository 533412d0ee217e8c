"""Features of images of any kind and size, by a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

KINDS = "a path, a PIL image, an array [H, W, 3] or a tensor [3, H, W], either uint8 or floating from 0 to 1"


class Extractor:
    """The network of a checkpoint, as a function from images to features.

    Images are treated as in training's evaluation: upright RGB, resized (bilinear, antialiased) to the checkpoint's
    size, normalised. So a picture has the same feature as a file, as a PIL image, as an array and as a tensor.

    Args:
        checkpoint: a file that ``python -m sabmn_ext.train`` has written; reading it never runs code from it.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        batch_size: images a step; None: the checkpoint's.
        flip: average the features of each image and its mirror image; None: as in the checkpoint's evaluation.

    Attributes:
        feature_dim, height, width, metric, flip: the features' dimension, the network's image size, the distance that
            the features are made for, whether mirror images are averaged.

    Raises:
        FileNotFoundError, ValueError: there is no such file; it is cut off, damaged or no checkpoint of sabmn_ext.

    >>> extractor = sabmn_ext.Extractor("runs/demo/last.pt")            # doctest: +SKIP
    >>> extractor(["a.jpg", PIL.Image.open("b.png"), array]).shape      # doctest: +SKIP
    torch.Size([3, 1024])
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: str | torch.device = "auto",
        batch_size: int | None = None,
        flip: bool | None = None,
    ) -> None:
        from sabmn_ext.training.checkpoint import load_model

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {device}: there is no GPU that torch can use here")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        self.checkpoint = Path(checkpoint)
        try:
            self.model, self.config = load_model(checkpoint, self.device)
            evaluation = self.config["evaluation"]
            self.feature_dim: int = self.model.config["feature_dim"]
            self.height, self.width = self.config["image"]["height"], self.config["image"]["width"]
            self.metric: str = evaluation["metric"]
            self.flip: bool = evaluation["flip"] if flip is None else flip
            self.precision: str = self.config["run"]["precision"]
            self.batch_size: int = batch_size or evaluation["batch_size"]
        except (KeyError, TypeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise ValueError(f"{checkpoint} is incomplete or of another version of sabmn_ext ({reason})") from None

    def __call__(self, images: Any) -> Tensor:
        """[B, feature_dim] float32 on the CPU: the features of one image (B = 1), of a sequence of them, or of a batch.

        Args:
            images: a path, a PIL image, an array [H, W, 3] or [H, W] (gray) or [H, W, 4], a tensor [3, H, W] or
                [1, H, W] or [4, H, W] (uint8, or floating from 0 to 1; not normalised), or a sequence of such, of any
                sizes; or an array [B, H, W, 3], or a tensor [B, 3, H, W].

        Raises:
            UnreadableImageError: a file that cannot be decoded; names it.
            TypeError, ValueError: something else than an image; names its place in the sequence.
        """
        from sabmn_ext.data.transforms import normalize

        single = isinstance(images, str | Path | np.ndarray | Tensor) or hasattr(images, "convert")
        batched = isinstance(images, np.ndarray | Tensor) and images.ndim == 4
        items: Sequence[Any] = [images] if single and not batched else list(images)
        parts = [torch.empty(0, self.feature_dim)]
        for first in range(0, len(items), self.batch_size):
            batch = items[first : first + self.batch_size]
            decoded = [self._image(item, first + i) for i, item in enumerate(batch)]
            parts.append(self.features_of_normalized(normalize(torch.stack(decoded))))
        return torch.cat(parts)

    def features_of_normalized(self, images: Tensor) -> Tensor:
        """[B, feature_dim] float32 on the CPU, of float32 [B, 3, height, width] as ``image_batches`` makes them."""
        from sabmn_ext.retrieval.features import PRECISIONS

        dtype = PRECISIONS[self.precision]
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            images = images.to(self.device)
            features = self.model(images).float()
            if self.flip:
                features = (features + self.model(images.flip(3)).float()) / 2
        return features.cpu()

    def _image(self, item: Any, index: int) -> Tensor:
        """uint8 [3, height, width]."""
        from sabmn_ext.data.images import load_image, to_rgb

        if isinstance(item, str | Path):
            return load_image(str(item), self.height, self.width)
        try:
            image = to_rgb(item.copy() if hasattr(item, "convert") else as_picture(item))
        except (TypeError, ValueError, OSError) as error:
            raise type(error)(f"image {index}: {error}") from None
        resized = image.resize((self.width, self.height), 2)  # PIL.Image.Resampling.BILINEAR, as load_image
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def as_picture(item: Any) -> "Image.Image":
    """A PIL image of an array [H, W] or [H, W, 1, 3 or 4], or of a tensor [1, 3 or 4, H, W]."""
    from PIL import Image

    pixels: np.ndarray
    if isinstance(item, Tensor):
        upright = item.detach().cpu().movedim(0, -1) if item.dim() == 3 else item.detach().cpu()
        pixels = (upright.float() if upright.is_floating_point() else upright).numpy()
    elif isinstance(item, np.ndarray):
        pixels = item
    else:
        raise TypeError(f"a {type(item).__name__} is no image; expected {KINDS}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if 0 in pixels.shape or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ValueError(f"shape {list(item.shape)} is no image; expected {KINDS}")
    if pixels.dtype.kind == "f":
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            given = f"floating pixels from {pixels.min():g} to {pixels.max():g}"
            raise ValueError(f"{given}; expected 0 to 1 (not normalised, not 0 to 255)")
        pixels = np.round(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels of dtype {pixels.dtype}; expected uint8, or floating from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(pixels))
