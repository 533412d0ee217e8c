"""Each counterfactual against its definition, with the map written out; nothing else of the network changes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.utils.parametrize import is_parametrized

import sabmn_ext
from sabmn_ext.functional import attention_map
from sabmn_ext.retrieval.counterfactuals import Counterfactuals
from sabmn_ext.training.figures import AttentionShare


def small_network(seed: int, **options: Any) -> sabmn_ext.SABMN:
    """In float64, with an attention that matters, after stage 2: 6 × 4 positions for images of 48 × 32."""
    torch.manual_seed(seed)
    network = sabmn_ext.SABMN(
        3, **({"backbone": "resnet18", "weights": "none", "feature_dim": 8, "attention_stage": 2} | options)
    )
    if network.attention is not None:
        network.attention.gamma.data.fill_(0.7)
    return network.double().eval()


def with_rows(network: sabmn_ext.SABMN, change: Any) -> sabmn_ext.SABMN:
    """A copy whose attention block computes y = x + γ·a by a map [B, N, N] that ``change`` has changed."""
    network = copy.deepcopy(network)

    def changed(block: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        x = inputs[0]
        beta = change(attention_map(x, block.query.weight, block.key.weight))
        value = conv2d(x, block.value.weight).flatten(2)  # [B, d, N]
        out = torch.einsum("bji,bdi->bdj", beta, value).unflatten(2, x.shape[2:])
        return x + block.gamma * conv2d(out, block.out.weight)

    network.attention.register_forward_hook(changed)
    return network


def test_each_is_what_its_name_says(seed: int) -> None:
    network = small_network(seed)
    images = torch.randn(3, 3, 48, 32, dtype=torch.float64)
    counterfactuals = Counterfactuals(network).eval()
    assert counterfactuals.names == ("trained", "gamma_zero", "uniform", "shuffled", "folded")
    with torch.inference_mode():
        found = counterfactuals.split(counterfactuals(images))
        trained = network(images)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
        expected = {
            "trained": trained,
            "uniform": with_rows(network, lambda beta: torch.full_like(beta, 1 / beta.shape[-1]))(images),
            "shuffled": with_rows(network, lambda beta: beta[:, order])(images),
            "folded": trained,
        }
        without = copy.deepcopy(network)
        without.attention.gamma.data.zero_()
        expected["gamma_zero"] = without(images)
        torch.testing.assert_close(with_rows(network, lambda beta: beta)(images), trained, rtol=1e-11, atol=1e-11)
    for name, features in found.items():
        torch.testing.assert_close(features, expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("gamma_zero", "uniform", "shuffled"):
        assert (found[name] - trained).abs().max() > 1e-3 * trained.abs().max(), name
    assert (found["uniform"] - found["shuffled"]).abs().max() > 1e-6


def test_the_network_stays_as_it_was_and_its_first_layers_run_once(seed: int) -> None:
    network = small_network(seed).float()
    before = copy.deepcopy(network.state_dict())
    counterfactuals = Counterfactuals(network).eval()
    assert not any(is_parametrized(module) for module in counterfactuals.folded.modules())
    batches: list[int] = []
    for stage in network.backbone.stages:
        stage.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    images = torch.randn(2, 3, 48, 32)
    with torch.inference_mode():
        features = counterfactuals(images)
        assert batches == [2, 2, 8, 8]
        assert torch.equal(network(images), features[:, 0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(RuntimeError):
        counterfactuals(images[:, :2])
    assert not network.attention._forward_hooks


def test_the_share_of_the_attention_is_that_of_the_trained_network(seed: int) -> None:
    network, images = small_network(seed), torch.randn(2, 3, 48, 32, dtype=torch.float64)
    counterfactuals = Counterfactuals(network).eval()
    shares = []
    for module in (network, counterfactuals):
        with torch.inference_mode(), AttentionShare(network.attention) as share:
            module(images)
        shares.append(share.ratio())
    assert shares[0] == shares[1] > 0


def test_only_what_is_there_is_taken_out() -> None:
    plain = small_network(0, attention_stage=None, spectral_norm=False)
    images = torch.randn(2, 3, 32, 16, dtype=torch.float64)
    for counterfactuals in (Counterfactuals(plain), Counterfactuals(small_network(0), wanted=False)):
        assert counterfactuals.names == ("trained",)
        with torch.inference_mode():
            features = counterfactuals.eval()(images)
            assert features.shape == (2, 1, 8)
            assert torch.equal(features[:, 0], counterfactuals.model(images))
    assert Counterfactuals(small_network(0, attention_stage=None)).names == ("trained", "folded")
    assert Counterfactuals(small_network(0, spectral_norm=False)).names[-1] == "shuffled"
