"""Spectral normalisation of a batch of weights: against float64, through every transformation of torch."""

import threading

import pytest
import torch
from float64_rule import assert_close_to_float64
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch, reference
from sabmn_ext.ops.spectral_norm import spectral_norm

SHAPES = [(1, 1), (3, 5), (7, 1, 3, 3), (1, 17), (65, 33), (130, 3, 5, 5), (31, 129)]
# of the weights and of the normalised weights
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
needs_native = pytest.mark.skipif(_native.module is None, reason=_native.missing_reason)


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
    weights, u, v = draw(SHAPES, dtype, seed)
    # Near the singular vectors, as in a network: with others σ may vanish, and everything is ill-conditioned.
    iterated = [reference.spectral_norm(*matrix, 2) for matrix in zip(weights, u, v, strict=True)]
    u, v = [left for _, left, _, _ in iterated], [right for _, _, right, _ in iterated]
    weights = [w.requires_grad_() for w in weights]
    with dispatch.record() as calls:
        normalized, u_new, v_new, sigma = spectral_norm(
            weights, u, v, n_power_iterations=iterations, dtype=out, backend=backend
        )
        cotangents, *_ = draw(SHAPES, out, seed + 1000)
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


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    native = _native.module
    before = native.isa()
    try:
        native.set_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for dtype, out in DTYPES:
            test_forward_and_backward_against_float64(dtype, out, "cpu", 1, seed=2)
    finally:
        native.set_isa(before)


@needs_native
def test_threads_do_not_change_a_bit() -> None:
    weights, u, v = draw(SHAPES * 3, torch.float32, 3)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(spectral_norm(weights, u, v, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*[result[0] for result in results], strict=True):
        assert torch.equal(one, two)


@needs_native
def test_a_fresh_python_thread_may_call() -> None:
    weights, u, v = draw(SHAPES, torch.float32, 4)
    expected = spectral_norm(weights, u, v, backend="cpu")[3]
    results = []
    thread = threading.Thread(target=lambda: results.append(spectral_norm(weights, u, v, backend="cpu")[3]))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "torch"])
def test_channels_last_weights_keep_their_format(backend: str) -> None:
    weights, u, v = draw([(6, 5, 3, 3)], torch.float32, 5)
    last = weights[0].to(memory_format=torch.channels_last).requires_grad_()
    ours = spectral_norm([last], u, v, backend=backend)[0][0]
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(ours, spectral_norm(weights, u, v, backend=backend)[0][0], atol=1e-6)
    (gradient,) = torch.autograd.grad(ours.square().sum(), last)
    assert gradient.stride() == last.stride()


def test_gradcheck_and_gradgradcheck() -> None:
    weights, u, v = draw([(3, 4), (2, 2, 2, 1)], torch.float64, 7)

    def function(*ws: Tensor) -> tuple[Tensor, ...]:
        # Without an update: u and v move with the weight otherwise, and are constants of the gradient by definition.
        return tuple(spectral_norm(ws, u, v, n_power_iterations=0)[0])

    inputs = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


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
    torch.library.opcheck(ops.spectral_norm_backward, (gradients, weights, u, v, sigma, backend))


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


@needs_native
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scales_far_from_one(scale: float) -> None:
    weights, u, v = draw([(33, 65)], torch.float32, 13)
    ours = spectral_norm([weights[0] * scale], u, v, backend="cpu")[0][0]
    exact = reference.spectral_norm(weights[0].double() * scale, u[0].double(), v[0].double())[0]
    assert torch.allclose(ours.double(), exact, atol=1e-6)


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
