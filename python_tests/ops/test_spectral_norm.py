"""Spectral normalisation of a batch of weights: against float64, through every transformation of torch."""

import threading
from collections.abc import Iterator

import pytest
import torch
from float64_rule import assert_close_to_float64
from instruction_sets import ISAS, instruction_set, needs_native
from torch import Tensor

from sabmn_ext.ops import dispatch, reference
from sabmn_ext.ops.cpu.buffers import KEPT_CALLS, Buffers, release
from sabmn_ext.ops.spectral_norm import spectral_norm

SHAPES = [(1, 1), (3, 5), (7, 1, 3, 3), (1, 17), (19, 1), (65, 33), (130, 3, 5, 5), (31, 129)]
LONG = [(701, 37, 3, 3), (2, 150_001)]  # several blocks of rows, and rows longer than a block
# of the weights and of the normalised weights
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def draw(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    def unit(n: int) -> Tensor:
        vector = torch.randn(n, generator=generator, dtype=torch.float64)
        return (vector / vector.norm()).to(dtype)

    return weights, [unit(w.shape[0]) for w in weights], [unit(w[0].numel()) for w in weights]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "torch"])
@pytest.mark.parametrize(("dtype", "out"), DTYPES)
def test_forward_and_backward_against_float64(
    dtype: torch.dtype, out: torch.dtype, backend: str, iterations: int, seed: int
) -> None:
    shapes = SHAPES + LONG * (seed == 0)
    weights, u, v = draw(shapes, dtype, seed)
    # Near the singular vectors, as in a network: with others σ may vanish, and everything is ill-conditioned.
    iterated = [reference.spectral_norm(*matrix, 2) for matrix in zip(weights, u, v, strict=True)]
    u, v = [left for _, left, _, _ in iterated], [right for _, _, right, _ in iterated]
    weights = [w.requires_grad_() for w in weights]
    with dispatch.record() as calls:
        normalized, u_new, v_new, sigma = spectral_norm(
            weights, u, v, n_power_iterations=iterations, dtype=out, backend=backend
        )
        cotangents, *_ = draw(shapes, out, seed + 1000)
        gradients = torch.autograd.grad(normalized, weights, cotangents)
    assert calls == [("spectral_norm_forward", backend), ("spectral_norm_backward", backend)]

    for i, weight in enumerate(weights):
        exact_weight = weight.detach().double().requires_grad_()
        exact = reference.spectral_norm(exact_weight, u[i].double(), v[i].double(), iterations)
        (exact_gradient,) = torch.autograd.grad(exact[0], exact_weight, cotangents[i].double())
        plain_weight = weight.detach().clone().requires_grad_()
        plain = reference.spectral_norm(plain_weight, u[i], v[i], iterations, dtype=out)
        (plain_gradient,) = torch.autograd.grad(plain[0], plain_weight, cotangents[i])
        ours = (normalized[i], u_new[i], v_new[i], sigma[i])
        for our_part, plain_part, exact_part in zip(ours, plain, exact, strict=True):
            assert_close_to_float64(our_part.detach(), plain_part.detach(), exact_part.detach())
        assert_close_to_float64(gradients[i], plain_gradient, exact_gradient)
        assert gradients[i].abs().max() > 0 or weight.numel() == 1


@pytest.fixture(params=[pytest.param(isa, marks=needs_native) for isa in ISAS[:-1]])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instruction_set(request.param):
        yield request.param


@pytest.mark.parametrize(("dtype", "out"), DTYPES)
def test_every_instruction_set(isa: str, dtype: torch.dtype, out: torch.dtype) -> None:
    test_forward_and_backward_against_float64(dtype, out, "cpu", 1, seed=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_exact(isa: str, dtype: torch.dtype) -> None:
    def divided_by_one(row: Tensor, out: torch.dtype) -> Tensor:
        # The first element is 1, and with u = 1 and v = (1, 0, …) it is σ.
        v = torch.zeros_like(row)
        v[0] = 1
        weight = torch.cat([torch.ones_like(row[:1]), row[1:]])[None]
        ones = torch.ones_like(row[:1])
        return spectral_norm([weight], [ones], [v], n_power_iterations=0, dtype=out, backend="cpu")[0][0][0, 1:]

    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    assert torch.equal(divided_by_one(every, dtype).view(torch.int16), every[1:].view(torch.int16))
    # All values, all halfway points, and their float32 neighbours; then what overflows and what vanishes.
    values = every.double().sort().values
    halfway = torch.cat([values, (values + values.roll(-1)) / 2]).float()
    far = torch.tensor([65519.9, 65520.0, 65536.0, 1e30, 1e-30, 2.98e-8, 2.9802322e-8, 5.96e-8, 1e-45])
    row = torch.cat([halfway, torch.nextafter(halfway, halfway + 1), torch.nextafter(halfway, halfway - 1), far, -far])
    row = row[row.isfinite() & (row.abs() < torch.finfo(torch.float32).max / 2)]
    assert torch.equal(divided_by_one(row, dtype).view(torch.int16), row[1:].to(dtype).view(torch.int16))


@needs_native
def test_threads_do_not_change_a_bit() -> None:
    weights, u, v = draw(SHAPES * 3 + LONG, torch.float32, 3)
    gradients, *_ = draw(SHAPES * 3 + LONG, torch.float32, 103)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            weights = [w.detach().requires_grad_() for w in weights]
            normalized, u_new, v_new, sigma = spectral_norm(weights, u, v, n_power_iterations=2, backend="cpu")
            weight_gradients = torch.autograd.grad(normalized, weights, gradients)
            results.append([*normalized, *u_new, *v_new, sigma, *weight_gradients])
    finally:
        torch.set_num_threads(threads)
    for one, two, five in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, five)


@needs_native
def test_a_fresh_python_thread_may_call() -> None:
    weights, u, v = draw(SHAPES, torch.float32, 4)
    expected = spectral_norm(weights, u, v, backend="cpu")[3]
    results = []
    thread = threading.Thread(target=lambda: results.append(spectral_norm(weights, u, v, backend="cpu")[3]))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


LAYOUTS = {
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda w: torch.cat([w, w], dim=1)[:, : w.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "torch"])
def test_any_layout_of_weights_and_gradients(backend: str, layout: str) -> None:
    weights, u, v = draw([(6, 5, 3, 2), (130, 33, 3, 3)], torch.float32, 5)
    cotangents, *_ = draw([(6, 5, 3, 2), (130, 33, 3, 3)], torch.float32, 6)
    expected_inputs = [w.clone().requires_grad_() for w in weights]
    expected = spectral_norm(expected_inputs, u, v, n_power_iterations=2, backend=backend)
    expected_gradients = torch.autograd.grad(expected[0], expected_inputs, cotangents)
    inputs = [LAYOUTS[layout](w).requires_grad_() for w in weights]
    ours = spectral_norm(inputs, u, v, n_power_iterations=2, backend=backend)
    for i, cotangent in enumerate(cotangents):
        assert not inputs[i].is_contiguous()
        assert ours[0][i].stride() == torch.empty_like(inputs[i]).stride()
        for mine, theirs in zip((ours[0][i], ours[1][i], ours[2][i]), (expected[k][i] for k in range(3)), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6)
        for given in (cotangent, LAYOUTS[layout](cotangent)):
            (gradient,) = torch.autograd.grad(ours[0][i], inputs[i], given, retain_graph=True)
            assert torch.allclose(gradient, expected_gradients[i], atol=1e-6)


@needs_native
def test_channels_last_3d_weights() -> None:
    weights, u, v = draw([(6, 5, 3, 2, 4)], torch.float64, 7)
    last = weights[0].to(memory_format=torch.channels_last_3d)
    ours, expected = (spectral_norm([w], u, v, backend="cpu") for w in (last, weights[0]))
    for k in range(3):
        assert torch.allclose(ours[k][0], expected[k][0], atol=1e-14)


@needs_native
def test_outputs_use_the_memory_of_released_ones() -> None:
    shape = (301, 257)  # of no other test
    weights, u, v = draw([shape], torch.float32, 8)
    weight = weights[0].requires_grad_()

    def run() -> Tensor:
        return spectral_norm([weight], u, v, backend="cpu")[0][0]

    first, second = run(), run()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)
    kept = second.detach()  # the memory stays in use when the graph is gone
    addresses = {first.data_ptr(), second.data_ptr()}
    del second
    loss = first.square().sum()  # saves `first` in the graph
    address = first.data_ptr()
    del first
    third = run()
    assert third.data_ptr() not in addresses
    loss.backward()
    del loss
    assert run().data_ptr() == address
    assert torch.equal(kept, third)


@needs_native
def test_unused_memory_is_given_back() -> None:
    buffers = Buffers()
    large, small = torch.empty(300, 301), torch.empty(5, 5)
    alive = buffers.empty_like([large, small], torch.float32)
    assert alive[0].data_ptr() % 64 == 0
    buffers.empty_like([large], torch.float32)
    assert len(buffers) == 2
    for _ in range(KEPT_CALLS):
        buffers.empty_like([small], torch.float32)
    assert len(buffers) == 1  # the one that is alive
    del alive
    buffers.empty_like([small], torch.float32)
    assert len(buffers) == 0


def test_memory_is_released_on_request() -> None:
    buffers = Buffers()
    alive = buffers.empty_like([torch.empty(300, 301), torch.empty(301, 301)], torch.float32)
    release()
    assert len(buffers) == 2
    alive.pop()
    release()
    assert len(buffers) == 1


def test_gradcheck_and_gradgradcheck() -> None:
    weights, u, v = draw([(3, 4), (2, 2, 2, 1)], torch.float64, 7)

    def function(*ws: Tensor) -> tuple[Tensor, ...]:
        # Without an update: u and v move with the weight otherwise, and are constants of the gradient by definition.
        return tuple(spectral_norm(ws, u, v, n_power_iterations=0)[0])

    inputs = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_groups_are_nodes_of_their_own() -> None:
    weights, u, v = draw([(3, 4), (5, 2), (2, 6), (4, 4)], torch.float64, 20)
    weights = [w.requires_grad_() for w in weights]
    order = []
    for i, weight in enumerate(weights):
        weight.register_hook(lambda gradient, i=i: order.append(i))
    with dispatch.record() as calls:
        normalized, u_new, _, sigma = spectral_norm(weights, u, v, group_bytes=8 * 24)  # 12 + 10, 12, 16 values
        arrived = []
        for i in (0, 2):
            normalized[i].register_hook(lambda gradient, i=i: arrived.append((i, list(order))))
        # The graph runs backwards from the last weight; a group's gradients are there before the next ones are used.
        x = torch.ones(())
        for n in normalized:
            x = (x * n).sum().sin()
        x.backward()
    assert [name for name, _ in calls] == ["spectral_norm_forward"] * 3 + ["spectral_norm_backward"] * 3
    assert arrived == [(2, [3]), (0, [3, 2])]
    exact = [w.detach().clone().requires_grad_() for w in weights]
    one = spectral_norm(exact, u, v)
    x = torch.ones(())
    for n in one[0]:
        x = (x * n).sum().sin()
    x.backward()
    for i in range(4):
        assert torch.allclose(weights[i].grad, exact[i].grad, atol=1e-14)
        assert torch.equal(u_new[i], one[1][i])
    assert torch.equal(sigma, one[3])


def test_unused_weights_have_no_gradient() -> None:
    weights, u, v = draw([(3, 4), (5, 2), (2, 6)], torch.float64, 8)
    weights = [w.requires_grad_() for w in weights]
    weights[2].requires_grad_(False)
    normalized, *_ = spectral_norm(weights, u, v)
    normalized[1].square().sum().backward()
    assert weights[0].grad is None
    assert weights[2].grad is None
    exact = weights[1].detach().clone().requires_grad_()
    reference.spectral_norm(exact, u[1], v[1])[0].square().sum().backward()
    assert torch.allclose(weights[1].grad, exact.grad)


def test_torch_func() -> None:
    weights, u, v = draw([(3, 4)], torch.float64, 9)

    def ours(w: Tensor) -> Tensor:
        return spectral_norm([w], u, v)[0][0]

    def plain(w: Tensor) -> Tensor:
        return reference.spectral_norm(w, u[0], v[0])[0]

    for transform in (
        torch.func.jacrev,
        lambda f: torch.func.grad(lambda w: f(w).pow(3).sum()),
        lambda f: torch.func.jacrev(torch.func.grad(lambda w: f(w).pow(3).sum())),
    ):
        assert torch.allclose(transform(ours)(weights[0]), transform(plain)(weights[0]), atol=1e-10)
    batch = torch.stack([weights[0], 2 * weights[0].roll(1, 0), weights[0].cos()])
    assert torch.allclose(torch.vmap(ours)(batch), torch.stack([plain(w) for w in batch]))


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "torch"])
def test_opcheck(backend: str) -> None:
    weights, u, v = draw([(3, 4), (5, 2, 3, 3)], torch.float32, 10)
    ops = torch.ops.sabmn_ext
    torch.library.opcheck(ops.spectral_norm_forward, (weights, u, v, 1, 1e-12, ["a", "b"], None, backend))
    gradients = [torch.randn_like(w) for w in weights]
    sigma = torch.rand(2) + 1
    torch.library.opcheck(ops.spectral_norm_backward, (gradients, weights, torch.cat(u), torch.cat(v), sigma, backend))


def test_compile_fullgraph() -> None:
    weights, u, v = draw([(3, 4), (5, 2, 3, 3)], torch.float32, 11)
    weights = [w.requires_grad_() for w in weights]

    def function(ws: list[Tensor]) -> Tensor:
        return sum(n.pow(3).sum() for n in spectral_norm(ws, u, v)[0])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(weights), weights)
    for ours, theirs in zip(torch.autograd.grad(compiled(weights), weights), expected, strict=True):
        assert torch.allclose(ours, theirs)


def test_clear_errors() -> None:
    weights, u, v = draw([(3, 4), (5, 2)], torch.float32, 12)
    with pytest.raises(ValueError, match="weights is empty"):
        spectral_norm([], [], [])
    with pytest.raises(ValueError, match="2, 1 and 2 tensors"):
        spectral_norm(weights, u[:1], v)
    with pytest.raises(ValueError, match=r"u has \[3\] and v \[4\] elements; given \[5\] and \[2\]"):
        spectral_norm(weights, u[::-1], v[::-1])
    with pytest.raises(ValueError, match=r"conv2.*torch.float64"):
        spectral_norm([weights[0], weights[1].double()], u, v, names=["conv1", "conv2"])
    with pytest.raises(ValueError, match="two dimensions or more"):
        spectral_norm([torch.ones(3)], [torch.ones(3)], [torch.ones(1)])
    with pytest.raises(RuntimeError, match=r"singular value of conv2 is 0"):
        spectral_norm([weights[0], torch.zeros(5, 2)], u, v, names=["conv1", "conv2"])
    with pytest.raises(RuntimeError, match=r"singular value of conv1 is nan"):
        spectral_norm([weights[0] * float("nan"), weights[1]], u, v, names=["conv1", "conv2"])
    with pytest.raises(ValueError, match=r"dtype is torch.float16 for weights of torch.float64"):
        spectral_norm([weights[0].double()], [u[0].double()], [v[0].double()], dtype=torch.float16)
    with pytest.raises(ValueError, match="backend 'gpu' is unknown"):
        spectral_norm(weights, u, v, backend="gpu")


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "torch"])
def test_scales_far_from_one(backend: str, dtype: torch.dtype, scale: float) -> None:
    # Below eps torch clamps, so the results are not those of scale 1; float64 has the same clamp.
    weights, u, v = draw([(33, 65), (701, 37, 3, 3)], dtype, 13)
    weights = [(w * scale).requires_grad_() for w in weights]
    cotangents, *_ = draw([(33, 65), (701, 37, 3, 3)], dtype, 14)
    normalized, u_new, v_new, sigma = spectral_norm(weights, u, v, backend=backend)
    gradients = torch.autograd.grad(normalized, weights, cotangents)
    for i, weight in enumerate(weights):
        exact_weight = weight.detach().double().requires_grad_()
        exact = reference.spectral_norm(exact_weight, u[i].double(), v[i].double())
        (exact_gradient,) = torch.autograd.grad(exact[0], exact_weight, cotangents[i].double())
        ours = (normalized[i], u_new[i], v_new[i], sigma[i], gradients[i])
        for mine, theirs in zip(ours, (*exact, exact_gradient), strict=True):
            theirs = theirs.detach()
            assert (mine.detach() - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@needs_native
@pytest.mark.heavy
def test_random_shapes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def size(largest: int) -> int:
        return int(torch.randint(1, largest + 1, (), generator=generator))

    for case in range(60):
        shapes = [tuple(size(90) for _ in range(size(3) + 1)) for _ in range(size(4))]
        shapes = [shape[:2] + tuple(min(n, 5) for n in shape[2:]) for shape in shapes]
        dtype = (torch.float32, torch.float64)[case % 2]
        weights, u, v = draw(shapes, dtype, seed + case)
        normalized, *_, sigma = spectral_norm(weights, u, v, n_power_iterations=case % 3, backend="cpu")
        for i, weight in enumerate(weights):
            plain = reference.spectral_norm(weight, u[i], v[i], case % 3)
            exact = reference.spectral_norm(weight.double(), u[i].double(), v[i].double(), case % 3)
            if exact[3].abs() > 0.5:  # smaller: orthogonal vectors, no iteration; then σ itself is ill-conditioned
                assert_close_to_float64(normalized[i], plain[0], exact[0])
                assert_close_to_float64(sigma[i], plain[3], exact[3])
