"""How ops/cuda calls the CUDA kernels of self-attention: on a GPU, and without one against a stand-in for them.

The kernels themselves are tested in the harness (python_tests/simt). The stand-in gets what they get, addresses, sizes
and strides, and computes by the reference what they would, so that a wrong address or stride is a wrong result.
"""

from collections.abc import Callable
from typing import Any

import native_stand_in
import pytest
import torch
from attention_cases import TF32_DRAWS, check, draw, literal, literal_in_tf32
from native_stand_in import DTYPES, at
from torch import Tensor

from sabmn_ext.ops import dispatch, reference
from sabmn_ext.ops.cuda import attention as cuda_attention

NAMES = ("w_query", "w_key", "w_value", "w_out", "gamma", "b_query", "b_key", "b_value", "b_out")


def dense(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    return at(address, shape, dtype) if address else None


class StandIn:
    """The functions of the native module that csrc/bindings.cpp defines for attention_cuda.h."""

    calls: int = 0

    @staticmethod
    def attention_backward_cuda_workspace(*sizes: int) -> int:
        assert len(sizes) == 6
        return 512

    @staticmethod
    def arguments(dtype: int, sizes: Any, x: Any, parameters: Any, saved: Any) -> tuple[list[Any], list[Any], Any]:
        batch, channels, positions, width, value_width = sizes
        t, wide = DTYPES[dtype], reference.wide(DTYPES[dtype])
        image = at(x[0], (batch, channels, positions, 1), t, (*x[1:], 1))
        shapes: list[tuple[int, ...]] = [(width, channels)] * 2 + [(value_width, channels), (channels, value_width), ()]
        shapes += [(width,), (width,), (value_width,), (channels,)]
        tensors = [dense(a, s, wide if n == "gamma" else t) for a, s, n in zip(parameters, shapes, NAMES, strict=True)]
        kept = [dense(a, (batch, w, positions), t) for a, w in zip(saved, (width, width, value_width), strict=False)]
        out = dense(saved[3], (reference.out_parts(t), batch, value_width, positions), t)
        return [image, *tensors], [*kept, out, dense(saved[4], (batch, 2, positions), wide)], t

    def attention_forward_cuda(
        self, dtype: int, tf32: bool, sizes: Any, x: Any, parameters: Any, saved: Any, y: Any, stream: int
    ) -> int:
        inputs, kept, t = self.arguments(dtype, sizes, x, parameters, saved)
        results = reference.self_attention2d_forward(*inputs[:6], **dict(zip(NAMES[5:], inputs[6:], strict=True)))
        outputs = [at(y[0], inputs[0].shape, t, (*y[1:], 1)), *kept]
        for output, result in zip(outputs, results, strict=True):
            output.copy_(result)
        self.calls += 1
        return 0

    def attention_backward_cuda(
        self, dtype: int, tf32: bool, sizes: Any, x: Any, parameters: Any, saved: Any, grad_y: Any, grad_x: Any,
        gradients: Any, inner: Any, workspace: int, stream: int,
    ) -> int:  # fmt: skip
        inputs, kept, t = self.arguments(dtype, sizes, x, parameters, saved)
        _, channels, _, width, value_width = sizes
        dy = at(grad_y[0], inputs[0].shape, t, (*grad_y[1:], 1))
        # The sums over images and positions are the caller's: the stand-in leaves grad_query and grad_value.
        wanted = reference.self_attention2d_backward(dy, *inputs[:6], *kept, b_out=inputs[9])
        shapes: list[tuple[int, ...]] = [(width, channels)] * 2 + [(value_width, channels), (channels, value_width), ()]
        for i, (address, shape) in enumerate(zip(gradients, shapes, strict=True)):
            output = dense(address, shape, inputs[5].dtype if i == 4 else t)
            if output is not None:
                output.copy_(wanted[i + 1])
        if grad_x[0]:
            at(grad_x[0], inputs[0].shape, t, (*grad_x[1:], 1)).copy_(wanted[0])
        for address, saved_as, bias in ((inner[1], kept[0], wanted[6]), (inner[3], kept[2], wanted[8])):
            grad = dense(address, tuple(saved_as.shape), t)
            if grad is not None:
                grad.zero_()
                grad[0, :, 0] = bias
        context = dense(inner[0], tuple(kept[2].shape), t)
        assert context is not None
        if parameters[3] == 0:
            assert torch.equal(context, dy.flatten(2))
        self.calls += 1
        return 0


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    native = StandIn()
    native_stand_in.install(monkeypatch, native, ("attention_forward", "attention_backward"))
    return native


def randn(*shape: int) -> Tensor:  # float64, for an exact comparison
    return torch.randn(*shape, dtype=torch.float64)


def images() -> dict[str, Tensor]:
    x = randn(2, 12, 5, 3)
    wide = randn(2, 12, 5, 8)
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "channels of a larger one": randn(2, 20, 5, 3)[:, 4:16],
        "cropped": wide[..., 2:5],  # its rows do not follow one another
        "one image": randn(4, 12, 5, 3)[1:2],
        "one row": randn(2, 12, 1, 7),
    }


@pytest.mark.parametrize("format", images())
@pytest.mark.parametrize("w_out", [True, False], ids=["w_out", "no w_out"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_addresses_and_strides(stand_in: StandIn, format: str, w_out: bool, biases: bool) -> None:
    import sabmn_ext

    x = images()[format].requires_grad_()
    value_width = 6 if w_out else 12
    parameters = [randn(4, 12), randn(4, 12), randn(value_width, 12)]
    parameters += [randn(12, value_width) if w_out else None, torch.tensor(0.7, dtype=torch.float64)]
    parameters += [randn(n) for n in (4, 4, value_width)] if biases else [None] * 3
    parameters += [randn(12) if biases and w_out else None]
    given = [None if p is None else p.requires_grad_() for p in parameters]

    def call(backend: str) -> tuple[Tensor, list[Tensor | None]]:
        with dispatch.record() as calls:
            y = sabmn_ext.functional.self_attention2d(
                x, *given[:5], **dict(zip(NAMES[5:], given[5:], strict=True)), backend=backend
            )
            tensors = [t for t in (x, *given) if t is not None]
            grads = torch.autograd.grad(y, tensors, torch.linspace(-1, 1, y.numel()).view_as(y))
        assert calls == [("attention_forward", backend), ("attention_backward", backend)]
        return y, list(grads)

    y, grads = call("cuda")
    assert stand_in.calls == 2
    expected, expected_grads = call("torch")
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_what_is_needed_is_asked_for(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(stand_in, "attention_backward_cuda", lambda **given: seen.update(given) or 0)
    x, w = torch.randn(1, 8, 2, 2), torch.randn(3, 8)
    parameters = [w, w, w, torch.randn(8, 3), torch.tensor(0.5), None, None, None, None]
    saved = [torch.randn(1, 3, 4)] * 4 + [torch.randn(1, 2, 4)]
    needs = [False] * 5 + [True] + [False] * 4  # gamma's only
    gradients = [torch.zeros(0)] * 5 + [torch.zeros(())] + [torch.zeros(0)] * 4
    cuda_attention.backward(torch.randn_like(x), x, parameters, saved, needs, gradients)
    assert seen["gradients"] == [0, 0, 0, 0, gradients[5].data_ptr()]
    assert seen["grad_x"][0] == 0
    assert seen["inner"][1:] == [0, 0, 0]


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_follows_the_switch_of_torchs_products(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    seen: list[bool] = []
    for name in ("attention_forward_cuda", "attention_backward_cuda"):
        monkeypatch.setattr(stand_in, name, lambda **given: seen.append(given["tf32"]) or 0)
    x, w = torch.randn(1, 8, 2, 2), torch.randn(3, 8)
    parameters = [w, w, w, torch.randn(8, 3), torch.tensor(0.5), None, None, None, None]
    saved = [torch.randn(1, 3, 4)] * 4 + [torch.randn(1, 2, 4)]
    gradients = [torch.zeros(0)] * 5 + [torch.zeros(())] + [torch.zeros(0)] * 4
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        cuda_attention.forward(x, parameters, torch.empty_like(x), saved)
        cuda_attention.backward(x, x, parameters, saved, [False] * 5 + [True] + [False] * 4, gradients)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [precision == "high"] * 2


def test_it_serves_no_float64() -> None:
    assert dispatch.why_not("attention_forward", "cuda", torch.device("cuda"), torch.float64) is not None


# batch, channels, height, width, d, value width, biases, projection
ON_A_GPU = [
    (3, 24, 1, 1, 1, 1, True, True),
    (3, 24, 7, 1, 17, 19, True, True),
    (2, 72, 7, 7, 32, 72, False, False),
    (2, 40, 127, 1, 40, 24, True, True),
    (2, 130, 16, 8, 128, 128, True, True),
    (2, 64, 43, 3, 200, 33, False, True),
    (1, 96, 32, 16, 256, 256, True, True),
    (1, 20, 16, 8, 320, 300, True, True),
    (1, 64, 89, 23, 64, 64, True, True),
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "tf32"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("sizes", ON_A_GPU, ids=str)
def test_on_a_gpu(
    sizes: tuple[int, ...], layout: str, kind: str, seed: int, fp32_precision: Callable[[str], None]
) -> None:
    tf32 = kind == "tf32"
    fp32_precision("tf32" if tf32 else "ieee")
    dtype = torch.float32 if tf32 else getattr(torch, kind)
    count = TF32_DRAWS if tf32 else 24
    draws = [[t if t is None else t.cuda() for t in draw(sizes, count * seed + i, dtype, layout)] for i in range(count)]
    check(draws, "cuda", literal_in_tf32 if tf32 else literal)
