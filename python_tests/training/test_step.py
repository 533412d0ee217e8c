"""How a step is computed changes nothing but rounding: in parts, in two processes, fused, compiled, NCHW or NHWC."""

import copy

import forked
import pytest
import torch
from command_errors import error_of
from torch import nn

import sabmn_ext
from sabmn_ext.data.records import load_data
from sabmn_ext.train import build_config, build_parser, main
from sabmn_ext.training import loop
from sabmn_ext.training.checkpoint import load_checkpoint, load_model
from sabmn_ext.training.interrupt import StopRequest
from sabmn_ext.training.loop import train_step


class Small(nn.Module):
    """Normalised convolutions and two classifiers, without a batch norm."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1))
        self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))

    def forward(self, images):
        feature = self.convolutions(images).flatten(1)
        return [head(feature) for head in self.heads]


def small(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    network = sabmn_ext.spectral_norm_model(Small().to(dtype), preserve_eval=False).train()
    return network, torch.randn(12, 3, 9, 7, dtype=dtype), torch.randint(0, 4, (12,))


def outcome(network, images, labels, rate=0.1, **options):
    """Loss, hits, gradients and what the network holds after one step."""
    model = getattr(network, "module", network)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    loss, correct = train_step(network, images, labels, optimizer, **options)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return loss, correct, gradients, {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(ours, expected):
    torch.testing.assert_close(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    for a, b in zip(ours[2:], expected[2:], strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert value.norm() > 0
            assert (a[name] - value).norm() <= 1e-6 * value.norm(), name


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_parts_have_the_gradients_of_the_whole(parts, seed):
    network, images, labels = small(seed)
    expected = outcome(copy.deepcopy(network), images, labels, label_smoothing=0.1, loss_factor=2.0)
    ours = outcome(copy.deepcopy(network), images, labels, label_smoothing=0.1, loss_factor=2.0, accumulate=parts)
    assert_same(ours, expected)
    before = network.state_dict()
    changed = [name for name, value in expected[3].items() if not torch.equal(value, before[name])]
    assert sum(name.endswith(("._u", "._v")) for name in changed) == 4, "one power iteration, whatever the parts"


def test_parts_with_a_scaler(seed):
    network, images, labels = small(seed, torch.float32)
    results = []
    for parts in (1, 3):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        each = outcome(
            copy.deepcopy(network), images, labels, precision="fp16", scaler=scaler, accumulate=parts, rate=0.0
        )
        results.append(each)
    for name, value in results[0][2].items():
        assert (results[1][2][name] - value).norm() <= 2e-2 * value.norm(), name


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_parts_in_two_processes(tmp_path, seed):
    """Gradients are averaged once, after the last part."""
    network, images, labels = small(seed)
    expected = outcome(copy.deepcopy(network), images, labels)

    def process(rank):
        torch.distributed.init_process_group("gloo")
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(network))
        calls = []
        wrapped.register_comm_hook(calls, counted)
        share = slice(6 * rank, 6 * rank + 6)
        found = outcome(wrapped, images[share], labels[share], accumulate=3)
        return found, len(calls)

    outcomes = forked.run_forked(2, process, tmp_path)
    assert [each.code for each in outcomes] == [0, 0], "\n".join(each.printed for each in outcomes)
    assert [each.value[1] for each in outcomes] == [1, 1], "one bucket, reduced once"
    (first, _), (second, _) = (each.value for each in outcomes)
    loss, correct = (first[0] + second[0]) / 2, first[1] + second[1]
    for found in (first, second):
        assert_same((loss, correct, *found[2:]), expected)


def counted(calls, bucket):
    calls.append(1)
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    return allreduce_hook(torch.distributed.group.WORLD, bucket)


def trainer(arguments, tmp_path):
    config = build_config(build_parser().parse_args(arguments))
    return loop.Trainer(config, load_data(config.data.path), tmp_path, None, StopRequest(tmp_path))


def test_a_step_is_fused_and_in_channels_last(options, tmp_path, monkeypatch):
    """The same three steps as with the plain optimiser and in NCHW, up to rounding."""
    small = [*options, "--image-size", "32x16", "--set", "model.dropout=0"]
    found = {}
    sgd = torch.optim.SGD
    for name, more in {"ours": [], "plain": ["--no-channels-last"]}.items():
        if name == "plain":
            monkeypatch.setattr(torch.optim, "SGD", lambda *args, fused, **keys: sgd(*args, **keys))
        run = trainer([*small, *more], tmp_path)
        weight = next(p for p in run.model.backbone.parameters() if p.dim() == 4 and min(p.shape[2:]) > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last) == (name == "ours")
        fused = [group["fused"] for group in run.optimizer.param_groups]
        assert fused == ([True] * 2 if name == "ours" else [None] * 2)
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-3
        torch.manual_seed(1)
        run.network.train()
        for _ in range(2):
            train_step(run.network, torch.randn(8, 3, 32, 16), torch.arange(8), run.optimizer)
        found[name] = run.model.state_dict()
    for name, value in found["plain"].items():
        if value.is_floating_point():
            assert (found["ours"][name] - value).norm() <= 1e-3 * value.norm() + 1e-5, name


@pytest.mark.heavy
def test_compiled_steps(options, tmp_path, monkeypatch, capsys):
    """The names in a checkpoint are those of the network itself. (Traced, and run eagerly: for time.)"""
    compiled = []

    def compile_eagerly(model):
        compiled.append(model)
        return torch._dynamo.optimize("eager")(model)

    monkeypatch.setattr(loop.torch, "compile", compile_eagerly)
    small = [*options, "--image-size", "32x16", "--max-steps", "2", "--out"]
    assert main([*small, str(tmp_path / "eager")]) == 0
    assert not compiled
    assert main([*small, str(tmp_path / "compiled"), "--compile"]) == 0
    assert len(compiled) == 1
    eager, ours = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("eager", "compiled"))
    assert list(eager) == list(ours)
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4)
    load_model(tmp_path / "compiled" / "last.pt")
    message = error_of(main, capsys, "--out", tmp_path / "compiled", "--resume", "--no-compile")
    assert "run.compile: True -> False" in message


@pytest.mark.heavy
@pytest.mark.parametrize("parts", [1, 2])
def test_steps_by_the_compiler(parts, seed):
    network, images, labels = small(seed, torch.float32)
    twin = copy.deepcopy(network)
    compiled = torch.compile(network)
    for _ in range(3):
        losses = []
        for each, model in ((compiled, network), (twin, twin)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            losses.append(train_step(each, images, labels, optimizer, accumulate=parts)[0])
        torch.testing.assert_close(*losses)
    assert list(network.state_dict()) == list(twin.state_dict())
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_parts_that_are_not_equal(options, tmp_path, capsys):
    message = error_of(main, capsys, *options, "--out", tmp_path / "run", "--set", "train.accumulate=3")
    assert "train.accumulate = 3: expected a divisor of the 8 images that train.batch_size takes a step" in message
