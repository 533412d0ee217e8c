"""The attention operation against a literal module in float64; its derivatives, transforms, threads and errors."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import (
    NAMES,
    SHARP_DRAWS,
    Inputs,
    call,
    check,
    draw,
    literal,
    peak_of_first_step,
    sharp,
    with_gradients,
)
from instruction_sets import ISAS, instruction_set, needs_native
from peak_memory import fresh_process
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sabmn_ext import _native
from sabmn_ext.functional import attention_map
from sabmn_ext.ops import dispatch, reference

BACKENDS = [pytest.param("cpu", marks=needs_native), "torch"]

# B, C, H, W, key width, value width, biases, output projection; around tiles of 64 positions and chunks of 128 rows.
SIZES = [
    (2, 16, 5, 7, 3, 4, True, True),
    (1, 70, 13, 17, 9, 70, True, False),
    (3, 8, 1, 1, 1, 1, False, True),
    (2, 33, 65, 1, 5, 7, False, True),
    (1, 131, 9, 15, 129, 130, True, True),
    (2, 24, 16, 8, 24, 24, False, False),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced channels_last"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients(backend: str, dtype: torch.dtype, sizes: tuple[int, ...], layout: str, seed: int) -> None:
    draws = [draw(sizes, 10 * seed + i, dtype, layout) for i in range(3)]
    y, grad_x, *_ = check(draws, backend)
    if sizes[1] > 1 and sizes[2] * sizes[3] > 1:
        memory_format = torch.channels_last if "channels_last" in layout else torch.contiguous_format
        assert y.is_contiguous(memory_format=memory_format)
        assert grad_x.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("repetition", range(5))
def test_output_and_gradients_of_random_sizes(repetition: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 * seed + repetition)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    channels, projection = pick(2, 150), pick(0, 1)
    value_width = pick(1, 150) if projection else channels
    height, width, d, biases = pick(1, 20), pick(1, 20), pick(1, 150), pick(0, 1)
    sizes = (pick(1, 3), channels, height, width, d, value_width, biases == 1, projection == 1)
    backend = "torch" if _native.module is None else "cpu"
    check([draw(sizes, 10 * seed + i, torch.float32) for i in range(3)], backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend: str, sizes: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> None:
    check([draw(sizes, 10 * seed + i, dtype, layout) for i in range(8)], backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@needs_native
def test_every_instruction_set(isa: str, dtype: torch.dtype, seed: int) -> None:
    with instruction_set(isa):
        # bfloat16 in pairs rounds as plain torch does: few numbers would say little about either's mean error.
        wide_draws = 16 if isa == "avx512_bf16" else 3
        for sizes, draws in ((SIZES[0], SHARP_DRAWS), (SIZES[4], wide_draws)):
            for make in (draw, sharp):
                check([make(sizes, 100 * seed + i, dtype) for i in range(draws)], "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_a_thousand(backend: str, dtype: torch.dtype, seed: int) -> None:
    draws = [sharp(SIZES[0], 100 * seed + i, dtype) for i in range(SHARP_DRAWS)]
    one_hot = [(attention_map(*inputs[:3]).amax(-1) > 0.999).float().mean() for inputs in draws]
    assert min(one_hot) > 0.5, "most rows are meant to be one-hot"
    check(draws, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gamma_zero_is_the_identity(backend: str, layout: str, seed: int) -> None:
    inputs = draw(SIZES[0], seed, torch.float32, layout)
    inputs[5] = torch.zeros(())
    grad_y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed))
    y, *grads = with_gradients(lambda t: call(t, backend), inputs, grad_y)
    assert torch.equal(y, inputs[0])
    by_name = dict(zip(NAMES, grads, strict=True))
    assert torch.equal(by_name.pop("x"), grad_y)
    assert by_name.pop("gamma").abs() > 0
    assert all(not grad.any() for grad in by_name.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    inputs = draw((0, 8, 3, 5, 2, 3, True, True), 0, torch.float32)
    y, *grads = with_gradients(lambda t: call(t, backend), inputs, torch.zeros(0, 8, 3, 5))
    assert y.shape == (0, 8, 3, 5)
    for grad, given in zip(grads, inputs, strict=True):
        assert grad.shape == given.shape
        assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_tensors(backend: str, seed: int) -> None:
    """An x of stride 0, and the expanded gradient that a sum sends back."""
    inputs = draw(SIZES[0], seed)
    inputs[0] = inputs[0][:1].expand(3, -1, -1, -1)
    results = []
    for function in (lambda t: call(t, backend), literal):
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        results.append(torch.autograd.grad(function(leaves).sum(), leaves))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_native
def test_threads_do_not_change_a_bit(seed: int) -> None:
    before = torch.get_num_threads()
    inputs = draw(SIZES[1], seed, torch.float32)
    grad_y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed))
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(lambda t: call(t, "cpu"), inputs, grad_y))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_call_from_a_fresh_thread(seed: int) -> None:
    inputs = draw(SIZES[1], seed, torch.float32)
    expected, results = call(inputs, "cpu"), []
    thread = threading.Thread(target=lambda: results.append(call(inputs, "cpu")))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


@needs_native
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_call_in_a_forked_child(seed: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        inputs = draw(SIZES[1], seed, torch.float32)
        grad_y = torch.ones_like(inputs[0])
        expected = with_gradients(lambda t: call(t, "cpu"), inputs, grad_y)  # starts the parent's threads
        child = os.fork()
        if child == 0:
            torch.set_num_threads(2)
            ours = with_gradients(lambda t: call(t, "cpu"), inputs, grad_y)[0]
            os._exit(0 if torch.equal(ours, expected[0]) else 3)
        deadline = time.monotonic() + 60
        while (result := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                pytest.fail("the child hangs")
            time.sleep(0.02)
        assert os.waitstatus_to_exitcode(result[1]) == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_needed_gradients(backend: str, seed: int) -> None:
    """Every single input alone, and none but that one: the same gradient as with all of them."""
    inputs = draw(SIZES[0], seed)
    grad_y = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    _, *together = with_gradients(lambda t: call(t, backend), inputs, grad_y)
    for i, grad in enumerate(together):
        alone = [t.detach().requires_grad_(j == i) for j, t in enumerate(inputs)]
        call(alone, backend).backward(grad_y)
        torch.testing.assert_close(alone[i].grad, grad, rtol=1e-12, atol=1e-12)
        assert all(t.grad is None for j, t in enumerate(alone) if j != i)


def test_convolution_weights_and_gamma_of_one_element(seed: int) -> None:
    inputs = draw(SIZES[0], seed)
    expected = call(inputs)
    as_modules_hold_them = [inputs[0], *(w[:, :, None, None] for w in inputs[1:5]), inputs[5].reshape(1), *inputs[6:]]
    assert torch.equal(call(as_modules_hold_them), expected)
    biases = dict(zip(NAMES[6:], inputs[6:], strict=True))
    torch.testing.assert_close(reference.self_attention2d(*as_modules_hold_them[:6], **biases), expected)


def test_reference_in_many_blocks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_MAP_ELEMENTS", 500)
    check([draw(SIZES[0], seed)], "torch")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
@pytest.mark.parametrize(
    ("backend", "sizes", "times"),
    [
        pytest.param("cpu", (4, 256, 64, 32, 32, 32, False, True), 8, marks=needs_native),  # stage 1 of a ResNet-50
        ("torch", (2, 8, 96, 64, 2, 2, False, True), 4),  # it holds blocks of 32 MB of the map of 300
    ],
)
def test_the_map_is_stored_nowhere(backend: str, sizes: tuple[int, ...], times: int) -> None:
    """The eager module's peak in a training step is several times ours, and the same measure sees its maps."""
    peaks = {}
    for name in (backend, "eager"):
        with fresh_process() as process:
            peaks[name] = process.submit(peak_of_first_step, name, sizes).result()
    batch, channels, height, width = sizes[:4]
    image, one_map = 4 * batch * channels * height * width, 4 * batch * (height * width) ** 2
    assert peaks["eager"] > 3 * one_map, "attention, its gradient, the gradient of the logits and more"
    assert peaks[backend] > 2 * image, "y and the gradient of x at least"
    assert times * peaks[backend] < peaks["eager"], peaks


def test_attention_map(seed: int) -> None:
    inputs = draw(SIZES[0], seed)
    x, w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value, b_out = inputs
    beta = attention_map(x, w_query, w_key, b_query=b_query, b_key=b_key)  # [B, N, N]
    torch.testing.assert_close(beta.sum(-1), torch.ones_like(beta[..., 0]))
    value = w_value @ x.flatten(2) + b_value[:, None]
    a = w_out @ torch.einsum("bji,bdi->bdj", beta, value) + b_out[:, None]
    torch.testing.assert_close((gamma * a).view(x.shape) + x, call(inputs))
    assert attention_map(x.bfloat16(), w_query.bfloat16(), w_key.bfloat16()).dtype == torch.float32


# ---- derivatives and transforms ----

SMALL = [(2, 4, 3, 2, 2, 3, True, True), (2, 3, 2, 3, 2, 3, True, False), (1, 3, 1, 4, 1, 2, False, True)]


def tensors_of(inputs: Inputs) -> tuple[list[Tensor], object, object]:
    """The inputs that are there, and ours and the literal as functions of them alone."""
    here = [t is not None for t in inputs]

    def full(tensors: tuple[Tensor, ...]) -> Inputs:
        left = iter(tensors)
        return [next(left) if present else None for present in here]

    return [t for t in inputs if t is not None], lambda *t: call(full(t)), lambda *t: literal(full(t))


@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_gradcheck(sizes: tuple[int, ...], seed: int) -> None:
    tensors, ours, _ = tensors_of(draw(sizes, seed))
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(ours, tensors)
    assert torch.autograd.gradgradcheck(ours, tensors)


@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_opcheck(sizes: tuple[int, ...], seed: int) -> None:
    for dtype, layout in ((torch.float32, "contiguous"), (torch.float64, "channels_last"), (torch.bfloat16, "sliced")):
        inputs = draw(sizes, seed, dtype, layout)
        inputs[5] = inputs[5].to(reference.wide(dtype))
        operations = torch.ops.sabmn_ext
        torch.library.opcheck(operations.attention_forward.default, (*inputs, None))
        y, *saved = operations.attention_forward(*inputs, None)
        needs = [t is not None for t in inputs]
        for wanted in (needs, [need and i % 2 == 0 for i, need in enumerate(needs)]):
            arguments = (torch.randn_like(y), *inputs, *saved, wanted, None)
            torch.library.opcheck(operations.attention_backward.default, arguments)


def test_torch_func(seed: int) -> None:
    tensors, ours, theirs = tensors_of(draw(SMALL[0], seed))
    assert_same = torch.testing.assert_close
    everything = tuple(range(len(tensors)))
    cotangent = torch.randn_like(tensors[0])

    def of_square(function: object) -> object:
        return lambda *t: function(*t).square().sum()

    both = [of_square(ours), of_square(theirs)]
    assert_same(*(torch.func.grad(f, everything)(*tensors) for f in both))
    assert_same(*(torch.func.vjp(f, *tensors)[1](cotangent) for f in (ours, theirs)))
    assert_same(*(torch.func.jacrev(f, (0, 1, 4))(*tensors) for f in (ours, theirs)))
    for i in (0, 2, 5):  # gradient of a function of a gradient
        penalties = [lambda *t, f=f, i=i: torch.func.grad(f, i)(*t).square().sum() for f in both]
        assert_same(*(torch.func.grad(penalty, everything)(*tensors) for penalty in penalties))


def test_vmap(seed: int) -> None:
    tensors, ours, _ = tensors_of(draw(SMALL[0], seed))
    for batched in ([0], [0, 1, 5], [3]):
        stacked = [torch.stack([t, 2 * t, -t], dim=-1) if i in batched else t for i, t in enumerate(tensors)]
        in_dims = tuple(-1 if i in batched else None for i in range(len(tensors)))
        single = [[t[..., n] if i in batched else t for i, t in enumerate(stacked)] for n in range(3)]
        for grad_mode in (torch.enable_grad, torch.no_grad):
            with grad_mode():
                found = torch.func.vmap(ours, in_dims)(*stacked)
            torch.testing.assert_close(found, torch.stack([ours(*t) for t in single]))
        gradient = torch.func.grad(lambda *t: ours(*t).square().sum(), (0, 1))
        expected = [torch.stack(parts) for parts in zip(*(gradient(*t) for t in single), strict=True)]
        torch.testing.assert_close(list(torch.func.vmap(gradient, in_dims)(*stacked)), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients(backend: str, sizes: tuple[int, ...], dtype: torch.dtype, mode: type, seed: int) -> None:
    """The same numbers, though nothing is kept for a backward pass; weights as modules hold them, any strides."""
    for i, layout in enumerate(["contiguous", "channels_last", "sliced", "sliced channels_last"]):
        inputs = draw(sizes, 10 * seed + i, dtype, layout)
        inputs = [t if t is None or t.dim() != 2 else t.t().contiguous().t()[:, :, None, None] for t in inputs]
        inputs[5] = inputs[5].reshape(1)
        expected = call([None if t is None else t.requires_grad_() for t in inputs], backend)
        assert expected.requires_grad
        with mode(), dispatch.record() as calls:
            y = call(inputs, backend)
        assert not y.requires_grad
        if backend == "cpu":
            assert torch.equal(y, expected)
        else:  # torch.matmul takes another way where a gradient is wanted
            tolerance = max(1e-4, 4 * torch.finfo(dtype).eps)
            torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        assert y.stride() == expected.stride()
        assert calls == [("attention_forward", backend)]


@needs_native
def test_modes_see_the_operation(seed: int) -> None:
    """Where nothing is differentiated, too: counters of operations, fake tensors and tracers are such modes."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[object] = []
    with torch.no_grad(), Names():
        call(draw(SIZES[0], seed, torch.float32))
    assert seen.count(torch.ops.sabmn_ext.attention_forward.default) == 1


def test_gradient_penalty(seed: int) -> None:
    """Grad of grad through the ordinary engine, as a gradient penalty does it."""
    results = []
    inputs = draw(SIZES[0], seed)
    for function in (lambda t: call(t), literal):
        leaves = [t.detach().requires_grad_() for t in inputs]
        (grad_x,) = torch.autograd.grad(function(leaves).square().sum(), leaves[0], create_graph=True)
        (grad_x.flatten(1).norm(dim=1) - 1).square().sum().backward()
        results.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check_compiled(dynamic: bool, compiler: str, seed: int) -> None:
    compiled = torch.compile(lambda t: call(t), fullgraph=True, dynamic=dynamic, backend=compiler)
    expected = "torch" if _native.module is None else "cpu"
    for sizes in (SMALL[0], (3, 4, 5, 4, 2, 3, True, True)):
        inputs = draw(sizes, seed)
        grad_y = torch.randn_like(inputs[0])
        with dispatch.record() as calls:
            ours = with_gradients(compiled, inputs, grad_y)
        assert calls == [("attention_forward", expected), ("attention_backward", expected)]
        for our, truth in zip(ours, with_gradients(literal, inputs, grad_y), strict=True):
            torch.testing.assert_close(our, truth)
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs), literal(inputs))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile(dynamic: bool, seed: int) -> None:
    check_compiled(dynamic, "aot_eager", seed)


# Groups of B, H, W: torch compiles once for all sizes above 1, and anew where one of them becomes 1. No size of the
# first of a group is another's or a weight's: torch would take them to be always equal.
MAP_SHAPES = [
    [(2, 3, 5), (7, 11, 4), (9, 6, 6), (3, 2, 31)],
    [(2, 1, 1), (5, 1, 1)],
    [(3, 1, 7), (6, 1, 4)],
    [(3, 7, 1), (2, 9, 1)],
    [(1, 4, 3), (1, 5, 9)],
]


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_once_for_many_shapes(seed: int) -> None:
    compiled = torch.compile(lambda t: call(t), fullgraph=True, dynamic=True, backend="aot_eager")
    for group in MAP_SHAPES:
        for i, (batch, height, width) in enumerate(group):
            inputs = draw((batch, 23, height, width, 13, 17, True, True), seed)
            grad_y = torch.randn_like(inputs[0])
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                ours = with_gradients(compiled, inputs, grad_y)
            for our, eager in zip(ours, with_gradients(call, inputs, grad_y), strict=True):
                torch.testing.assert_close(our, eager)


@pytest.mark.heavy
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_with_inductor(seed: int) -> None:
    check_compiled(False, "inductor", seed)
    check_compiled(True, "inductor", seed)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("fresh_dynamo")
def test_autocast(compiled: bool, seed: int) -> None:
    inputs = [None if t is None else t.float().requires_grad_() for t in draw(SIZES[0], seed)]

    def under_autocast(tensors: Inputs) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(tensors)

    function = torch.compile(under_autocast, fullgraph=True, backend="aot_eager") if compiled else under_autocast
    y = function(inputs)
    assert y.dtype == torch.bfloat16
    low = [t if t is None else t.detach().bfloat16() for t in inputs]
    low[5] = inputs[5].detach()
    assert torch.equal(y, call(low)), "autocast casts the inputs, and nothing inside"
    y.float().square().sum().backward()
    assert all(t is None or t.grad.dtype == torch.float32 for t in inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(draw(SIZES[0], seed)).dtype == torch.float64


# ---- errors and backends ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 3)}, ValueError, r"x has shape \[4, 3\]; expected a feature map"),
        ({"x": torch.zeros(2, 0, 3, 3)}, ValueError, "at least one channel"),
        ({"x": torch.zeros(2, 8, 3, 3, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"w_query": torch.zeros(2, 7)}, ValueError, r"w_query has shape \[2, 7\]; expected \[2, 8\]"),
        ({"w_query": torch.zeros(2, 8, 3, 3)}, ValueError, r"w_query has shape \[2, 8, 3, 3\]"),
        ({"w_query": torch.zeros(0, 8)}, ValueError, "any width d ≥ 1"),
        ({"w_key": torch.zeros(3, 8)}, ValueError, r"w_key has shape \[3, 8\]; expected \[2, 8\] \(w_query's rows"),
        ({"w_value": torch.zeros(3, 9)}, ValueError, "w_value has shape"),
        ({"w_value": torch.zeros(3, 8), "w_out": None, "b_out": None}, ValueError, "the values are as wide as x"),
        ({"w_out": torch.zeros(8, 4)}, ValueError, r"w_out has shape \[8, 4\]; expected \[8, 3\]"),
        ({"w_key": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "w_key has dtype torch.float64; expected"),
        ({"w_out": torch.zeros(8, 3, device="meta")}, ValueError, "w_out is on meta; expected cpu"),
        ({"b_key": torch.zeros(3)}, ValueError, r"b_key has shape \[3\]; expected \[2\]"),
        ({"w_out": None, "w_value": torch.zeros(8, 8), "b_value": None}, ValueError, "b_out is given, but w_out is"),
        ({"gamma": torch.zeros(2)}, ValueError, r"gamma is \[2\] torch.float32 on cpu; expected one float number"),
        ({"gamma": torch.zeros((), dtype=torch.int64)}, ValueError, "gamma is"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_errors(change: dict[str, Tensor | None], error: type[Exception], message: str) -> None:
    inputs = dict(zip(NAMES, draw((2, 8, 3, 3, 2, 3, True, True), 0, torch.float32), strict=True)) | change
    with pytest.raises(error, match=message):
        call(list(inputs.values()))


def test_backend_by_name_and_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(SIZES[0], 0, torch.float32)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve"):
        call(inputs, "triton")
    with pytest.raises(ValueError, match="backend 'fast' is unknown"):
        call(inputs, "fast")
    monkeypatch.setenv("SABMN_BACKEND", "torch")
    with dispatch.record() as calls:
        call(inputs)
    assert calls == [("attention_forward", "torch")]
