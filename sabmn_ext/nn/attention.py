"""Self-attention over a feature map as a module: the block of SAGAN (Zhang et al., 2019) and of SABMN.

    y = γ·a + x,  a_j = w_out Σ_i softmax_i(key_i · query_j) value_i        (``sabmn_ext.functional.self_attention2d``)
"""

import builtins
import dis
import sys
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sabmn_ext.functional import attention_map, self_attention2d
from sabmn_ext.nn.spectral_norm import spectral_norm_model

torch.fx.wrap("self_attention2d")  # symbolic tracing keeps the operation whole
torch.fx.wrap("attention_map")


class SelfAttention2d(nn.Module):
    """Every position of a feature map gathers from all others, weighted by how well its query fits their keys.

    Args:
        in_channels: C, the channels of x and y.
        reduction: query and key have C / reduction channels.
        value_channels: channels of the value; by default C / reduction, or C where there is no output projection.
        out_proj: whether a last 1×1 convolution maps the value's channels back to C. False is the form of the widely
            copied GAN module.
        bias: whether the convolutions have biases.
        spectral_norm: normalise the convolutions' weights (``sabmn_ext.spectral_norm``).
        backend: of the operation; None for the best that there is.

    ``query``, ``key``, ``value`` and ``out`` are 1×1 convolutions, so that code which initialises or normalises
    convolutions finds them; the operation reads their weights, hooks on them do not run. They start as PyTorch's
    convolutions do (Kaiming-uniform, a = √5), and with them the copied module's. ``gamma``, one number, starts at 0:
    a block that is put into a trained network leaves it as it was.

    Shape:
        x [B, C, H, W] → y [B, C, H, W]; with ``return_attention=True`` also the map [B, N, N], N = H·W, whose rows j
        sum to 1 over i (computed a second time, in plain torch; it is the only thing here of N² size).

    Raises:
        ValueError: channels that do not divide, or an unknown combination.

    >>> block = sabmn_ext.SelfAttention2d(64)
    >>> block(torch.randn(2, 64, 16, 8)).shape
    torch.Size([2, 64, 16, 8])
    """

    def __init__(
        self,
        in_channels: int,
        reduction: int = 8,
        *,
        value_channels: int | None = None,
        out_proj: bool = True,
        bias: bool = False,
        spectral_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if reduction < 1 or in_channels < 1 or in_channels % reduction:
            raise ValueError(
                f"in_channels is {in_channels} and reduction {reduction}; expected a reduction that divides in_channels"
            )
        width = in_channels // reduction
        if value_channels is None:
            value_channels = width if out_proj else in_channels
        if value_channels < 1 or not (out_proj or value_channels == in_channels):
            raise ValueError(
                f"value_channels is {value_channels}; expected at least 1, and in_channels ({in_channels}) where "
                "out_proj is False, since nothing else brings the value to the width of x"
            )
        self.backend = backend
        self.query = nn.Conv2d(in_channels, width, 1, bias=bias)
        self.key = nn.Conv2d(in_channels, width, 1, bias=bias)
        self.value = nn.Conv2d(in_channels, value_channels, 1, bias=bias)
        self.out = nn.Conv2d(value_channels, in_channels, 1, bias=bias) if out_proj else None
        self.gamma = nn.Parameter(torch.zeros(()))
        if spectral_norm:
            spectral_norm_model(self, preserve_eval=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("return_attention", args[1] if len(args) > 1 else False)
        if not asked and not torch.compiler.is_compiling() and _is_unpacked(sys._getframe(1)):
            raise TypeError(
                "SelfAttention2d returns one tensor, but the caller unpacks it, as users of modules that return "
                "(output, attention) do. Write y = block(x), or y, attention = block(x, return_attention=True); to "
                "split y along the batch, block(x).unbind(0)"
            )
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        w_query, w_key = self.query.weight, self.key.weight
        b_query, b_key = self.query.bias, self.key.bias
        w_out, b_out = (None, None) if self.out is None else (self.out.weight, self.out.bias)
        y = self_attention2d(
            x, w_query, w_key, self.value.weight, w_out, self.gamma,
            b_query=b_query, b_key=b_key, b_value=self.value.bias, b_out=b_out, backend=self.backend,
        )  # fmt: skip
        return (y, attention_map(x, w_query, w_key, b_query=b_query, b_key=b_key)) if return_attention else y

    def load_sagan_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the copied GAN module's weights: ``query_conv``, ``key_conv``, ``value_conv`` with biases, ``gamma`` [1].

        The block must have that module's form: ``SelfAttention2d(C, reduction, out_proj=False, bias=True)``. Weights
        that were spectrally normalised there (``weight_orig``, ``weight_u``, ``weight_v``) are divided by their σ,
        unless this block is normalised too and takes them as they are.

        Raises:
            ValueError: keys or shapes that do not belong to such a block.
        """
        renamed = {}
        for key, tensor in state_dict.items():
            if key != "gamma" and key.split(".")[0] not in ("query_conv", "key_conv", "value_conv"):
                raise ValueError(
                    f"state_dict has the key '{key}'; expected those of query_conv, key_conv, value_conv and gamma. "
                    "Of a whole generator's state dict pass the attention module's part, without the prefix"
                )
            renamed[key.replace("_conv.", ".", 1)] = tensor
        for name in ("query", "key", "value"):
            if f"{name}.weight_orig" in renamed and not is_parametrized(getattr(self, name)):
                weight, u, v = (renamed.pop(f"{name}.weight_{part}", None) for part in ("orig", "u", "v"))
                if weight is None or u is None or v is None:
                    raise ValueError(f"state_dict has {name}_conv.weight_orig, but not its weight_u and weight_v")
                renamed[f"{name}.weight"] = weight / torch.dot(u, weight.flatten(1) @ v)
        try:
            self.load_state_dict(renamed)
        except RuntimeError as error:
            raise ValueError(
                "state_dict does not fit this block, which should be SelfAttention2d(C, reduction, out_proj=False, "
                f"bias=True) with the C and the reduction of the module that the state dict comes from. {error}"
            ) from None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        gamma = state_dict.get(f"{prefix}gamma")
        if gamma is not None and tuple(gamma.shape) == (1,):
            state_dict[f"{prefix}gamma"] = gamma.reshape(())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return "" if self.backend is None else f"backend={self.backend!r}"


# ---- the hint for `out, attention = block(x)` ----
#
# The copied module returns a pair. Here a caller that unpacks would get torch's unhelpful error, or, for a batch of
# two, none at all: out would be the first image. A tensor cannot know that it will be unpacked, but the caller's
# bytecode does: the instruction after the call is UNPACK_SEQUENCE. Each call site is looked at once, then remembered.
# A wrapper that calls the block (Sequential, DistributedDataParallel) is a caller that does not unpack: no hint there.

_call_sites: dict[tuple[int, int], tuple[CodeType, bool]] = {}  # the code is held, so that its id stays its own


def _is_unpacked(frame: FrameType) -> bool:
    key = (id(frame.f_code), frame.f_lasti)
    if key not in _call_sites:
        if len(_call_sites) >= 4096:
            _call_sites.clear()
        _call_sites[key] = (frame.f_code, _unpacks_result(frame.f_code, frame.f_lasti))
    return _call_sites[key][1]


def _unpacks_result(code: CodeType, offset: int) -> bool:
    """Whether the call at ``offset`` is followed by unpacking, in a statement that names no builtin function.

    With a builtin, as in ``a, b = list(map(block, pair))``, it may be the builtin's result that is unpacked.
    """
    instructions = list(dis.get_instructions(code))
    index = next((i for i, instruction in enumerate(instructions) if instruction.offset == offset), None)
    if index is None or index + 1 == len(instructions):
        return False
    if not (instructions[index].opname.startswith("CALL") and instructions[index + 1].opname.startswith("UNPACK_")):
        return False
    for instruction in reversed(instructions[:index]):
        if instruction.opname.startswith(("STORE_", "POP_", "RESUME")):
            break
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and hasattr(builtins, str(instruction.argval)):
            return False
    return True
