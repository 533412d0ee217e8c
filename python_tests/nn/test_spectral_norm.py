"""The public functions: which weights they normalise, in one call, and how the normalisation comes off again."""

import copy

import pytest
import torch
from spectral_norm_twins import images, network, singular_vectors
from torch import nn
from torch.nn.utils import parametrizations

from sabmn_ext.nn.attention import SelfAttention2d
from sabmn_ext.nn.spectral_norm import is_normalized, remove_spectral_norm, spectral_norm, spectral_norm_model
from sabmn_ext.ops import dispatch


def test_one_update_for_all_weights_per_forward_of_the_root() -> None:
    model = spectral_norm_model(network(), preserve_eval=False)
    u = [module.parametrizations.weight[0]._u for module in (model[0], model[3], model[4])]
    before = [t.clone() for t in u]
    with dispatch.record() as calls, torch.no_grad():
        model(images())
    assert [name for name, _ in calls] == ["spectral_norm_forward"]
    # In the registered buffers themselves.
    assert not any(torch.equal(now, then) for now, then in zip(u, before, strict=True))
    frozen = [t.clone() for t in u]
    model.eval()(images())
    assert all(torch.equal(now, then) for now, then in zip(u, frozen, strict=True))


def test_idempotent_and_skips_what_torch_normalised() -> None:
    model = network()
    parametrizations.spectral_norm(model[4])
    spectral_norm_model(model, preserve_eval=False)
    keys = list(model.state_dict())
    spectral_norm_model(model, preserve_eval=False)
    assert list(model.state_dict()) == keys
    assert len(model[4].parametrizations.weight) == 1
    assert all(is_normalized(model[i]) for i in (0, 3, 4))
    assert len(model._forward_pre_hooks) == 1


def test_exclude_and_types() -> None:
    model = network()
    spectral_norm_model(model, exclude=["3", model[4]], types=(nn.Conv2d, nn.ConvTranspose2d), preserve_eval=False)
    assert [is_normalized(m) for m in (model[0], model[3], model[4])] == [True, False, False]
    with pytest.raises(ValueError, match="exclude names 'layer9'"):
        spectral_norm_model(network(), exclude=["layer9"])


def test_remove_bakes_the_weight_in() -> None:
    model = spectral_norm_model(network(), preserve_eval=False).eval()
    x = images()
    expected = model(x)
    plain_keys = list(network().state_dict())
    remove_spectral_norm(model.train())
    assert sorted(model.state_dict()) == sorted(plain_keys)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert torch.allclose(model.eval()(x), expected, atol=1e-12)
    plain = network()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(x), plain.eval()(x))


def test_remove_from_a_part_leaves_the_rest() -> None:
    model = spectral_norm_model(network(), preserve_eval=False)
    remove_spectral_norm(model[0])
    assert [is_normalized(m) for m in (model[0], model[3], model[4])] == [False, True, True]
    u = model[3].parametrizations.weight[0]._u.clone()
    model(images()).sum().backward()
    assert not torch.equal(u, model[3].parametrizations.weight[0]._u)
    assert model[0].weight.grad is not None
    (group,) = {hook.__self__ for hook in model._forward_pre_hooks.values()}
    assert [member.layer.name for member in group.members] == ["3.weight", "4.weight"]


def test_clear_errors() -> None:
    with pytest.raises(ValueError, match="Linear has no parameter 'kernel'"):
        spectral_norm(nn.Linear(3, 3), "kernel")
    with pytest.raises(ValueError, match="n_power_iterations is 0"):
        spectral_norm(nn.Linear(3, 3), n_power_iterations=0)
    with pytest.raises(ValueError, match="dim is 2"):
        spectral_norm(nn.Linear(3, 3), dim=2)


def test_removing_from_a_copy_leaves_the_original() -> None:
    model = spectral_norm_model(network(), preserve_eval=False)
    deployed = remove_spectral_norm(copy.deepcopy(model))
    x = images()
    assert torch.allclose(deployed.eval()(x), copy.deepcopy(model).eval()(x), atol=1e-12)
    before = singular_vectors(model)
    model.train()(x).sum().backward()
    assert not any(torch.equal(t, before[key]) for key, t in singular_vectors(model).items())
    assert isinstance(deployed[0].weight, nn.Parameter)


def test_a_block_that_is_normalised_already_keeps_its_own_root() -> None:
    block = SelfAttention2d(8, 2, spectral_norm=True)
    model = spectral_norm_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), block), preserve_eval=False)
    assert len(block.query.parametrizations.weight) == 1
    with dispatch.record() as calls:
        model(torch.randn(2, 3, 6, 5))
    assert [name for name, _ in calls] == ["spectral_norm_forward", "spectral_norm_forward", "attention_forward"]
    assert all(is_normalized(m) for m in model.modules() if isinstance(m, nn.Conv2d))
