"""Self-attention by the Triton kernels against float64: on a GPU, or with TRITON_INTERPRET=1 on the CPU.

Triton reads the variable when it is imported: ``test_triton_attention.py`` runs this file in a process of its own.
"""

import functools
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton.language as tl
from attention_cases import (
    NAMES,
    SHARP_DRAWS,
    TF32_DRAWS,
    Inputs,
    call,
    check,
    draw,
    literal_in_tf32,
    sharp,
    with_gradients,
)  # fmt: skip
from triton.runtime import interpreter

from sabmn_ext.ops import dispatch
from sabmn_ext.ops.triton import attention as launches

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cpu":

    @functools.cache
    def patch_language(function: object) -> None:
        interpreter._patch_lang(function)

    def call_in_kernel(self: interpreter.InterpretedFunction, *arguments: object, **named: object) -> object:
        patch_language(self.fn)
        return self.rewrite()(*arguments, **named)

    def cast(self: interpreter.InterpreterBuilder, source: object, to: object) -> object:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(rounded.numpy().view(np.uint16), to.scalar)
        return truncating_cast(self, source, to)

    # Triton's interpreter replaces parts of its language at every call of a function in a kernel, which takes most of
    # its time; once is enough. And it cuts bfloat16 off, where a GPU rounds.
    interpreter.InterpretedFunction.__call__ = call_in_kernel
    truncating_cast = interpreter.InterpreterBuilder.cast_impl
    interpreter.InterpreterBuilder.cast_impl = cast
# batch, channels, height, width, d, value width, biases, projection. Tiles have 32, 64 or 128 positions, and up to 128
# channels of queries and keys and 256 of values; fewer in fp32.
SIZES = [
    (2, 5, 1, 1, 1, 1, True, True),
    (3, 24, 7, 1, 17, 19, True, True),
    (1, 12, 127, 1, 32, 12, False, False),  # the values are x's width: no output projection
    (1, 20, 6, 5, 200, 24, False, True),  # in slices of the queries and keys
    (1, 14, 43, 3, 40, 33, True, True),
    (1, 17, 13, 10, 128, 40, False, True),
    (1, 12, 7, 3, 320, 300, True, True),  # in slices of all
    (1, 270, 5, 4, 30, 270, True, False),  # in slices of the values
]
HEAVY = [
    (1, 16, 43, 12, 32, 32, True, True),
    (5, 140, 3, 3, 64, 64, True, True),
    (1, 12, 9, 5, 256, 256, True, True),  # whole slices
]
TURNS = [[0], [0, 1, 2], [0], [1], [1], [2], [1], [2]]  # of DTYPES, for SIZES: exact fp32 takes the interpreter longest
LAYOUTS = ["contiguous", "channels_last", "sliced", "sliced channels_last"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def on_device(inputs: Inputs) -> Inputs:
    return [None if t is None else t.to(DEVICE) for t in inputs]


def drawn(sizes: tuple[int, ...], seed: int, dtype: torch.dtype, layout: str = "contiguous") -> list[Inputs]:
    # Of 16 bits gamma's gradient, one number a draw, has an error above rounding: about 0.6 of plain torch's over many
    # draws, anything over two. Many channels make large logits, and then the error comes from the few rows that are not
    # quite one-hot, of which one draw has hardly any.
    count = 24 if dtype != torch.float32 else 6 if max(sizes[1], sizes[4]) > 256 else 2
    return [on_device(draw(sizes, 100 * seed + i, dtype, layout)) for i in range(count)]


def check_in_turn(sizes: tuple[int, ...], seed: int, turn: int) -> None:
    """One of the dtypes and one of the layouts: it depends on the seed which, and no two turns are the same."""
    dtype = DTYPES[(seed + turn) % 3]
    check(drawn(sizes, seed, dtype, LAYOUTS[(seed + turn) // 3 % 4]), "triton")


@pytest.mark.parametrize(("sizes", "turns"), list(zip(SIZES, TURNS, strict=True)), ids=str)
def test_output_and_gradients(sizes: tuple[int, ...], turns: list[int], seed: int) -> None:
    for turn in turns:
        check_in_turn(sizes, seed, turn)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("sizes", "turn"), [*((SIZES[i], TURNS[i][0] + 1) for i in (4, 5, 6, 7)), *zip(HEAVY, (0, 2, 1), strict=True)]
)
def test_more_of_them(sizes: tuple[int, ...], turn: int, seed: int) -> None:
    check_in_turn(sizes, seed, turn)


@pytest.mark.heavy
def test_2047_positions(seed: int) -> None:
    check(drawn((1, 8, 89, 23, 32, 16, True, True), seed, torch.float32), "triton")


@pytest.mark.parametrize("sizes", [SIZES[4]], ids=str)
def test_tf32(sizes: tuple[int, ...], seed: int, fp32_precision: Callable[[str], None]) -> None:
    fp32_precision("tf32")
    if DEVICE == "cpu":  # the interpreter multiplies exactly
        check(drawn(sizes, seed, torch.float32), "triton")
    else:
        draws = [on_device(draw(sizes, TF32_DRAWS * seed + i, torch.float32)) for i in range(TF32_DRAWS)]
        check(draws, "triton", functools.partial(literal_in_tf32, half=0))


def test_the_precision_switch_of_matmul_decides(fp32_precision: Callable[[str], None]) -> None:
    fp32_precision("tf32")
    assert launches._kind(torch.float32) == "tf32"
    fp32_precision("ieee")
    assert launches._kind(torch.float32) == "ieee"
    assert launches._kind(torch.bfloat16) == "half"


def test_rows_that_are_almost_one_hot(seed: int) -> None:
    draws = [on_device(sharp(SIZES[1], 100 * seed + i, torch.float32)) for i in range(SHARP_DRAWS)]
    check(draws, "triton")


def test_logits_far_below_those_of_padding(seed: int) -> None:
    """Beyond the edges logits are 0: here they are about -100 elsewhere, and exp(0 - lse) is infinite."""
    draws = drawn((1, 6, 5, 7, 4, 3, True, True), seed, torch.float32)
    for inputs in draws:
        inputs[6], inputs[7] = torch.full_like(inputs[6], 5.0), torch.full_like(inputs[7], -5.0)
    check(draws, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_at_gamma_0(dtype: torch.dtype) -> None:
    inputs = on_device(draw(SIZES[4], 0, dtype, "channels_last"))
    inputs[5] = torch.zeros_like(inputs[5])
    y = call(inputs, "triton")
    assert torch.equal(y, inputs[0])
    assert y.stride() == inputs[0].stride()


@pytest.mark.parametrize("wanted", [["x"], ["w_out", "gamma"], ["b_value", "b_out"], ["b_query"]])
def test_only_the_gradients_that_are_wanted(wanted: list[str]) -> None:
    inputs = on_device(draw(SIZES[1], 0, torch.float32))
    grad_y = torch.randn_like(inputs[0])
    expected = with_gradients(lambda t: call(t, "triton"), inputs, grad_y)
    leaves = [t.detach().requires_grad_(name in wanted) for name, t in zip(NAMES, inputs, strict=True)]
    y = call(leaves, "triton")
    grads = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], grad_y)
    for name, grad in zip([name for name in NAMES if name in wanted], grads, strict=True):
        assert torch.equal(grad, expected[1 + NAMES.index(name)])


def test_second_derivatives() -> None:
    inputs = on_device(draw(SIZES[1], 0, torch.float32))
    grad_y, weights = torch.randn_like(inputs[0]), [torch.randn_like(t) for t in inputs]

    def second(backend: str) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        grads = torch.autograd.grad(call(leaves, backend), leaves, grad_y, create_graph=True)
        return torch.autograd.grad(sum((g * w).sum() for g, w in zip(grads, weights, strict=True)), leaves)

    with dispatch.record() as calls:
        ours = second("triton")
    assert calls == [("attention_forward", "triton"), ("attention_backward", "triton")]
    for our, expected in zip(ours, second("torch"), strict=True):
        torch.testing.assert_close(our, expected, rtol=1e-4, atol=1e-4)


def test_empty_images() -> None:
    for shape in ((0, 6, 3, 3), (2, 6, 0, 3)):
        inputs = on_device(draw((1, 6, 3, 3, 2, 3, True, True), 0, torch.float32))
        inputs[0] = torch.zeros(shape, device=DEVICE)
        y, *grads = with_gradients(lambda t: call(t, "triton"), inputs, torch.zeros_like(inputs[0]))
        assert y.shape == shape
        assert all((grad == 0).all() for grad in grads)


def test_opcheck() -> None:
    inputs = on_device(draw((2, 6, 3, 5, 3, 4, True, True), 0, torch.float16, "channels_last"))
    inputs[5] = inputs[5].float()
    outputs = torch.ops.sabmn_ext.attention_forward(*inputs, "triton")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.sabmn_ext.attention_forward.default, (*inputs, "triton"), test_utils=tests)
    arguments = (torch.randn_like(inputs[0]), *inputs, *outputs[1:], [True] * 10, "triton")
    torch.library.opcheck(torch.ops.sabmn_ext.attention_backward.default, arguments, test_utils=tests)


def test_tuning_on_request_times_every_configuration(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the clock: the last of the configurations is the fastest."""
    from triton.runtime.autotuner import Autotuner

    if DEVICE == "cpu":
        times = iter(range(1000, 0, -1))

        def do_bench(call: object, quantiles: object = None) -> list[float]:
            call()
            return [float(next(times))] * 3

        monkeypatch.setattr(Autotuner, "do_bench", property(lambda self: do_bench))
    monkeypatch.setenv("SABMN_TRITON_AUTOTUNE", "1")
    launches._tuned.cache_clear()
    check(drawn(SIZES[0], seed, torch.float16), "triton")
    assert launches._tuned.cache_info().currsize >= 7, "not every kernel was tuned"
    options = launches._forward("half", values=16)
    frozen = tuple(tuple(configuration.items()) for configuration in options)
    best = launches._tuned(launches.kernels.attention_forward_kernel, frozen).best_config.all_kwargs()
    taken = {name: best[name] for name in options[0]}
    assert taken == options[-1] if DEVICE == "cpu" else taken in options


def test_an_image_that_32_bits_cannot_count_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="2³¹"):
        launches._check_extents(torch.empty((1, 2**16, 2**16), device="meta"))
