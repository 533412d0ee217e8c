"""A 3×3 convolution by Winograd's products: the transforms of csrc/winograd, and between them those of csrc/products.

Images [B, C, H, W] and weights [O, C, 3, 3] are channels_last, float32 or bfloat16. Planes are float32
[16, tiles, channels]; a tile is 2×2 positions of the output.
"""

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch
from sabmn_ext.ops.cpu.images import empty, empty_image
from sabmn_ext.ops.cpu.products import multiply

# The codes of csrc/winograd/winograd.h.
_TRANSFORMS = ("input", "input_gradient", "output", "output_gradient", "weight", "weight_gradient")

# Values of one of the 16 planes that go through the products at a time: 4 MB of planes on either side were the fastest
# on a processor with 2 MB of cache for each core, and a batch of any size needs no more memory.
_PLANE = 1 << 16


def _transform(name: str, image: Tensor, planes: Tensor) -> Tensor:
    """``image`` into its planes, or ``planes`` into an image; the result."""
    assert _native.module is not None
    batch, channels, height, width = image.shape
    status = _native.module.winograd(
        _TRANSFORMS.index(name),
        (dispatch.DTYPE_CODES[image.dtype], batch, height, width, channels),
        image.data_ptr(),
        planes.data_ptr(),
        torch.get_num_threads(),
    )
    dispatch.check_status(status, f"winograd {name}", image)
    return planes if name in ("input", "output_gradient", "weight") else image


def _tiles(image: Tensor) -> int:
    batch, _, height, width = image.shape
    return batch * ((height + 1) // 2) * ((width + 1) // 2)


def _parts(x: Tensor, weight: Tensor) -> list[slice]:
    """Images that go through the products together: in planes that a cache holds, but no smaller than the weight's."""
    rows, columns = weight.shape[:2]
    image = _tiles(x[:1]) * max(rows, columns)
    count = max(_PLANE, rows * columns) // image + 1
    return [slice(begin, begin + count) for begin in range(0, x.shape[0], count)]


class _Planes:
    """Of the images of a part, [16, tiles, channels] in memory that all parts share."""

    def __init__(self, images: int, image: Tensor) -> None:
        self._memory = empty(images, 16, _tiles(image[:1]), image.shape[1])

    def of(self, part: Tensor) -> Tensor:
        return self._memory[: part.shape[0]].view(16, _tiles(part), part.shape[1])


def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, O, H, W], and the weight's planes [16, O, C], which the backward pass needs."""
    rows, columns = weight.shape[:2]
    weights = _transform("weight", weight, empty(16, rows, columns))
    y = empty_image((x.shape[0], rows, *x.shape[2:]), x.dtype)
    parts = _parts(x, weight)
    inputs, products = (_Planes(min(x.shape[0], parts[0].stop), image) for image in (x, y))
    for part in parts:
        planes = _transform("input", x[part], inputs.of(x[part]))
        multiply(planes, weights.mT, products.of(y[part]))
        _transform("output", y[part], products.of(y[part]))
    return y, weights


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, weights: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight that are wanted; ``weights``: the weight's planes."""
    grad_x = empty_image(x.shape, x.dtype) if needs_x else None
    products = empty(16, *weight.shape[:2]) if needs_weight else None
    parts = _parts(x, weight)
    inputs, gradients = (_Planes(min(x.shape[0], parts[0].stop), image) for image in (x, grad_y))
    for part in parts:
        planes = gradients.of(grad_y[part])
        _transform("output_gradient", grad_y[part], planes)
        if products is not None:
            right = _transform("input", x[part], inputs.of(x[part]))
            multiply(planes.mT, right, products, add=part.start > 0)
        if grad_x is not None:
            found = multiply(planes, weights, inputs.of(x[part]))
            _transform("input_gradient", grad_x[part], found)
    if products is None:
        return grad_x, None
    return grad_x, _transform("weight_gradient", empty_image(weight.shape, weight.dtype), products)
