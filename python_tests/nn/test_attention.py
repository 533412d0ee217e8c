"""SelfAttention2d: forms, state dicts, the copied GAN module, tracing, and the hint for callers that unpack."""

import copy

import pytest
import torch
from sagan_module import CopiedAttention
from torch import Tensor, nn

from sabmn_ext.nn import attention as module
from sabmn_ext.nn.attention import SelfAttention2d
from sabmn_ext.ops import dispatch, reference


def block(channels: int = 16, seed: int = 0, **options: object) -> SelfAttention2d:
    torch.manual_seed(seed)
    made = SelfAttention2d(channels, **({"reduction": 4} | options))
    nn.init.constant_(made.gamma, 0.8)
    return made


def image(seed: int = 0, batch: int = 2, channels: int = 16) -> Tensor:
    return torch.randn(batch, channels, 5, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"value_channels": 7}, {"out_proj": False, "bias": True}])
def test_forms(options: dict[str, object], seed: int) -> None:
    attention, x = block(seed=seed, **options), image(seed)
    y, beta = attention(x, return_attention=True)
    parameters = dict(attention.named_parameters())
    weights = [parameters.get(f"{name}.weight") for name in ("query", "key", "value", "out")]
    biases = {f"b_{name}": parameters.get(f"{name}.bias") for name in ("query", "key", "value", "out")}
    torch.testing.assert_close(y, reference.self_attention2d(x, *weights, attention.gamma, **biases))
    assert torch.equal(attention(x), y)
    assert beta.shape == (2, 15, 15)
    torch.testing.assert_close(beta.sum(-1), torch.ones(2, 15))
    (y.square().sum() + beta.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for name, p in parameters.items() if name != "key.bias")


def test_starts_as_the_identity() -> None:
    x = image()
    assert torch.equal(SelfAttention2d(16)(x), x)
    assert SelfAttention2d(16).gamma.shape == ()
    torch.manual_seed(3)
    convolution = nn.Conv2d(16, 2, 1, bias=False)
    torch.manual_seed(3)
    assert torch.equal(SelfAttention2d(16).query.weight, convolution.weight)


def test_every_map_shape_and_backend_is_passed_on() -> None:
    attention, x = block(), image()
    for shaped in (x, x[..., :1, :], x[..., :1, :1], x[:0], x.mT):
        assert attention(shaped).shape == shaped.shape
    attention.backend = "torch"
    with dispatch.record() as calls:
        attention(x)
    assert calls == [("attention_forward", "torch")]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((12,), {}, "in_channels is 12 and reduction 8; expected a reduction that divides"),
        ((4,), {}, "in_channels is 4 and reduction 8"),
        ((16, 0), {}, "reduction 0"),
        ((16,), {"value_channels": 0}, "value_channels is 0"),
        ((16,), {"value_channels": 2, "out_proj": False}, r"value_channels is 2; expected .* in_channels \(16\)"),
    ],
)
def test_impossible_widths(arguments: tuple[int, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfAttention2d(*arguments, **options)


def test_state_dict_and_copies() -> None:
    attention, x = block(), image()
    other = block(seed=1)
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(x), attention(x))
    assert torch.equal(copy.deepcopy(attention)(x), attention(x))
    one_element = attention.state_dict() | {"gamma": torch.full((1,), 0.25)}
    nested = nn.Sequential(block(seed=2))
    nested.load_state_dict({f"0.{key}": value for key, value in one_element.items()})
    assert nested[0].gamma.shape == ()
    assert nested[0].gamma == 0.25


def test_bfloat16_block_keeps_its_dtype() -> None:
    attention = block().bfloat16()
    assert attention(image().bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert block()(image()).dtype == torch.bfloat16


# ---- the copied module ----


def copied(seed: int, channels: int = 16) -> CopiedAttention:
    torch.manual_seed(seed)
    made = CopiedAttention(channels)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.constant_(made.gamma, -0.7)
    return made


def test_the_copied_module_and_its_gradients(seed: int) -> None:
    theirs = copied(seed).double()
    ours = SelfAttention2d(16, out_proj=False, bias=True).double()
    ours.load_sagan_state_dict(theirs.state_dict())
    x = image(seed).double()
    y, beta = ours(x, return_attention=True)
    expected, expected_beta = theirs(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(beta, expected_beta)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name in ("query", "key", "value"):
        for part in ("weight", "bias"):
            expected_grad = getattr(getattr(theirs, f"{name}_conv"), part).grad
            torch.testing.assert_close(getattr(getattr(ours, name), part).grad, expected_grad)
    torch.testing.assert_close(ours.gamma.grad, theirs.gamma.grad.reshape(()))


@pytest.mark.parametrize("normalized", [False, True])
def test_a_spectrally_normalised_copied_module(normalized: bool, seed: int) -> None:
    theirs = copied(seed)
    for convolution in (theirs.query_conv, theirs.key_conv, theirs.value_conv):
        nn.utils.spectral_norm(convolution)
    theirs.double().eval()
    ours = SelfAttention2d(16, out_proj=False, bias=True, spectral_norm=normalized).double().eval()
    ours.load_sagan_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(image(seed).double()), theirs(image(seed).double())[0])


def test_a_state_dict_that_does_not_fit() -> None:
    state = copied(0).state_dict()
    fitting = SelfAttention2d(16, out_proj=False, bias=True)
    with pytest.raises(ValueError, match=r"key 'attn1\.gamma'; expected those of query_conv"):
        fitting.load_sagan_state_dict({f"attn1.{key}": value for key, value in state.items()})
    with pytest.raises(ValueError, match=r"(?s)does not fit this block.*out\.weight"):
        SelfAttention2d(16, bias=True, value_channels=16).load_sagan_state_dict(state)
    with pytest.raises(ValueError, match=r"(?s)does not fit this block.*size mismatch"):
        SelfAttention2d(32, out_proj=False, bias=True).load_sagan_state_dict(state)
    state["query_conv.weight_orig"] = state.pop("query_conv.weight")
    with pytest.raises(ValueError, match="not its weight_u and weight_v"):
        fitting.load_sagan_state_dict(state)


# ---- spectral normalisation ----


def test_spectral_norm(seed: int) -> None:
    attention, x = block(channels=32, seed=seed, spectral_norm=True, bias=True), image(seed, channels=32)
    for _ in range(30):
        attention(x)
    attention.eval()
    for convolution in (attention.query, attention.key, attention.value, attention.out):
        assert torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)
    assert torch.equal(copy.deepcopy(attention)(x), attention(x))


# ---- the hint ----


def unpack(attention: nn.Module, x: Tensor) -> None:
    _out, _map = attention(x)


def unpack_with_rest(attention: nn.Module, x: Tensor) -> None:
    _first, *_rest = attention(x)


def unpack_a_keyword_call(attention: nn.Module, x: Tensor) -> None:
    _out, _map = attention(x=x, return_attention=False)


class Unpacking(nn.Module):
    """A generator's way of calling it."""

    def __init__(self, attention: SelfAttention2d) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        out, _map = self.attention(x.relu())
        return out


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("caller", [unpack, unpack_with_rest, unpack_a_keyword_call, lambda a, x: Unpacking(a)(x)])
def test_unpacking_names_return_attention(caller: object, batch: int) -> None:
    attention = block()
    attention.register_forward_hook(lambda *_: None)
    attention.register_forward_pre_hook(lambda *_: None)
    for _ in range(2):  # the second time from the remembered call site
        with pytest.raises(TypeError, match=r"y, attention = block\(x, return_attention=True\)"):
            caller(attention, image(batch=batch))


def test_what_is_not_unpacking() -> None:
    attention, x = block(), image()
    y, _beta = attention(x, return_attention=True)
    y, _beta = attention(x, True)
    first, second = attention(x).unbind(0)
    assert torch.equal(first, y[0])
    first, second = list(map(attention, (x, x)))
    first, second = attention(x), attention(x)
    first, second = [attention(t) for t in (x, x)]
    (y,) = (attention(x),)
    for first, second in ((attention(x), 1),):
        assert torch.equal(first, y)
        assert second == 1


def test_a_call_site_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hint costs: one look at the bytecode for each place of the program, however often it runs."""
    looks = []
    inspect = module._unpacks_result
    monkeypatch.setattr(module, "_unpacks_result", lambda *site: looks.append(site) or inspect(*site))
    attention, x = block(), image()
    for _ in range(10):
        attention(x)
    assert len(looks) == 1


# ---- tracing ----


def test_compile_trace_and_export() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 1), block(), nn.ReLU())
    x = image()
    expected = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    traced = torch.fx.symbolic_trace(model)
    assert any(node.target.__name__ == "self_attention2d" for node in traced.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.compiler.reset()
