"""Launches of the Triton kernels of the spectral normalisation: groups of weights, their records and workspaces."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import triton.language as tl
from torch import Tensor

from sabmn_ext.ops.triton import spectral_norm_kernels as kernels

Tensors = Sequence[Tensor]

_BLOCK_ROWS, _GROUP, _CODE_OF_ZERO = (
    constant.value for constant in (kernels.BLOCK_ROWS, kernels.GROUP, kernels.CODE_OF_ZERO)
)
_TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def forward(
    weights: Tensors,
    u: Tensors,
    v: Tensors,
    normalized: Tensors,
    u_new: Tensors,
    v_new: Tensors,
    inner: Sequence[int],
    sigma: Tensor,
    n_power_iterations: int,
    eps: float,
) -> None:
    """Fill ``normalized``, ``u_new``, ``v_new`` and ``sigma``: three launches an iteration for a group of weights.

    Args:
        weights: dense in memory as [rows, columns], one dtype.
        u, v: [rows] and [columns] each, contiguous, in the weights' dtype.
        normalized: as ``weights``, in the weights' dtype or a narrower one. u_new, v_new: as u and v.
        inner: memory column m of a weight is element (m mod inner)·(columns/inner) + m div inner of its v.
        sigma: [len(weights)] float32, or float64 where the weights are.
        n_power_iterations: updates of u and v; with 0 they are copied.
        eps: the smallest length that a vector is divided by.
    """
    weight_type, normalized_type, sum_type = (_TRITON_TYPES[t.dtype] for t in (weights[0], normalized[0], sigma))
    power, options = int(n_power_iterations > 0), kernels.LAUNCH_OPTIONS
    between = v_new  # the v of one iteration for the next
    if n_power_iterations > 1 and sigma.dtype != weights[0].dtype:
        between = [torch.empty_like(t, dtype=sigma.dtype) for t in v_new]
    with torch.cuda.device_of(sigma):
        for group in _groups(u, v, inner, sigma, _forward_bytes):
            for iteration in range(max(n_power_iterations, 1)):
                last = iteration + 1 >= n_power_iterations
                right, right_type = (v, weight_type) if iteration == 0 else (between, sum_type)
                right_new, right_new_type = (v_new, weight_type) if last else (between, sum_type)
                records = group.records(weights, right, u, sigma.unbind(), normalized, u_new, right_new)
                table = torch.empty(len(records) * _GROUP, dtype=torch.int64, device=sigma.device)
                kernels.spectral_norm_forward_products_kernel[group.grid](
                    records, table, power, weight_type, right_type, sum_type, **options
                )
                kernels.spectral_norm_forward_sums_kernel[group.grid](
                    table, group.count, power, eps, weight_type, sum_type, **options
                )
                types = (weight_type, normalized_type, right_new_type, sum_type)
                kernels.spectral_norm_forward_scale_kernel[group.grid](
                    table, group.count, power, int(last), eps, *types, **options
                )


def backward(
    gradients: Tensors,
    weights: Tensors,
    u: Tensors,
    v: Tensors,
    inner: Sequence[int],
    sigma: Tensor,
    weight_gradients: Tensors,
) -> None:
    """Fill ``weight_gradients`` with (G − ⟨G, W⟩/σ·uvᵀ)/σ in two launches for a group of weights.

    Args:
        gradients: G, in memory like ``weights``, in the dtype of the normalised weights.
        weights, u, v, inner, sigma: as in ``forward``; u, v and σ are those that it ended with.
        weight_gradients: as ``weights``.
    """
    types = [_TRITON_TYPES[t.dtype] for t in (weights[0], gradients[0], sigma)]
    with torch.cuda.device_of(sigma):
        for group in _groups(u, v, inner, sigma, _backward_bytes):
            records = group.records(weights, gradients, u, v, sigma.unbind(), weight_gradients)
            table = torch.empty(len(records) * _GROUP, dtype=torch.int64, device=sigma.device)
            kernels.spectral_norm_backward_dots_kernel[group.grid](records, table, *types, **kernels.LAUNCH_OPTIONS)
            kernels.spectral_norm_backward_gradient_kernel[group.grid](
                table, group.count, *types, **kernels.LAUNCH_OPTIONS
            )


def _forward_bytes(blocks: int, columns: int, element_size: int) -> int:
    """Bytes of what the kernels' ``_workspace`` lays out."""
    return 8 * (2 * blocks + columns) + element_size * blocks * (_BLOCK_ROWS + columns + 1)


def _backward_bytes(blocks: int, columns: int, element_size: int) -> int:
    """Bytes of one double for each block."""
    return 8 * blocks


class _Group:
    """Up to GROUP weights that share their launches: their sizes, their workspace and the grid."""

    def __init__(
        self,
        indices: Sequence[int],
        u: Tensors,
        v: Tensors,
        inner: Sequence[int],
        sigma: Tensor,
        workspace_bytes: Callable[[int, int, int], int],
    ) -> None:
        self.indices, self.count = indices, len(indices)
        rows, columns = [u[i].numel() for i in indices], [v[i].numel() for i in indices]
        blocks = [max(1, _ceil_div(n, _BLOCK_ROWS)) for n in rows]
        # Whole 16 bytes each: the starts are aligned for the widest loads.
        sizes = [
            _ceil_div(workspace_bytes(b, c, sigma.element_size()), 16) * 16
            for b, c in zip(blocks, columns, strict=True)
        ]
        *first, programs = itertools.accumulate(blocks, initial=0)
        *offsets, size = itertools.accumulate(sizes, initial=0)
        self.grid = (programs,)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=sigma.device)
        starts = [self._workspace.data_ptr() + offset for offset in offsets]
        first += [programs] * (_GROUP - self.count)  # where no program comes
        self._sizes = [first, rows, columns, [inner[i] for i in indices], starts]

    def records(self, *tensors: Tensors) -> tuple[tuple[int, ...], ...]:
        """The fields of the weights' records as the kernels take them: the sizes, then the addresses of ``tensors``."""
        fields = [*self._sizes, *([t[i].data_ptr() for i in self.indices] for t in tensors)]
        return tuple(
            tuple(2 * value + _CODE_OF_ZERO for value in field + [0] * (_GROUP - len(field))) for field in fields
        )


def _groups(
    u: Tensors, v: Tensors, inner: Sequence[int], sigma: Tensor, workspace_bytes: Callable[[int, int, int], int]
) -> Iterator[_Group]:
    """The weights in groups, the largest weights first: the last programs of a launch are short ones."""
    order = sorted(range(len(u)), key=lambda i: -u[i].numel() * v[i].numel())
    for start in range(0, len(order), _GROUP):
        yield _Group(order[start : start + _GROUP], u, v, inner, sigma, workspace_bytes)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
