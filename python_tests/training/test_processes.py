"""Several processes train as one does: the same samples, gradients and figures; errors, signals and deaths end all."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import forked
import pytest
import torch
import torch.utils.tensorboard  # once, and not in every process
from torch.nn.modules.batchnorm import _BatchNorm

from sabmn_ext.data.records import load_data
from sabmn_ext.retrieval.shards import Alone
from sabmn_ext.train import build_config, build_parser, main
from sabmn_ext.training import loop
from sabmn_ext.training.checkpoint import load_checkpoint, load_model
from sabmn_ext.training.config import config_from_dict
from sabmn_ext.training.figures import final_figures
from sabmn_ext.training.interrupt import StopRequest
from sabmn_ext.training.processes import Job

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available() and hasattr(os, "fork")),
    reason="torch without gloo, or a system without fork",
)


@pytest.fixture
def few(options):
    """Two steps of six small images."""
    small = ["--image-size", "32x16", "--batch-size", "6", "--max-steps", "2", "--set", "evaluation.batch_size=4"]
    return [*options, *small, "--set", "run.log_steps=1"]


def record_steps(arguments):
    """Train with batch norm in eval mode (its statistics are of shares otherwise): its input and output."""
    steps = []
    real_step = loop.train_step

    def train_step(network, images, labels, *args, **kwargs):
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        loss, _ = real_step(network, images, labels, *args, **kwargs)
        model = getattr(network, "module", network)
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        vectors = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(("._u", "._v"))}
        steps.append({"images": images, "labels": labels, "gradients": gradients, "vectors": vectors, "loss": loss})
        return loss, torch.tensor(0)

    loop.train_step = train_step
    assert main(arguments) == 0
    return steps


@pytest.fixture(scope="module")
def of_one_process():
    """The steps of one process, once for all tests."""
    return {}


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.heavy)])
def test_samples_gradients_and_figures_are_those_of_one_process(few, tmp_path, size, of_one_process):
    arguments = [*few, "--set", "model.dropout=0"]
    if not of_one_process:
        (alone,) = forked.run_forked(
            1, lambda rank: record_steps([*arguments, "--out", str(tmp_path / "one")]), tmp_path / "alone"
        )
        assert alone.code == 0, alone.printed
        of_one_process["steps"] = alone.value
    out = tmp_path / "run"
    outcomes = forked.run_forked(
        size, lambda rank: record_steps([*arguments, "--out", str(out)]), tmp_path / "processes"
    )
    assert [each.code for each in outcomes] == [0] * size, "\n".join(each.printed for each in outcomes)
    for step, expected in enumerate(of_one_process["steps"]):
        shares = [each.value[step] for each in outcomes]
        for name in ("images", "labels"):
            assert torch.equal(torch.cat([share[name] for share in shares]), expected[name]), name
        assert sum(share["loss"] for share in shares).item() / size == pytest.approx(expected["loss"].item(), rel=1e-5)
        for share in shares:
            assert len(share["vectors"]) > 40
            for name, vector in share["vectors"].items():  # the power iteration of all of them
                assert torch.equal(vector, shares[0]["vectors"][name]), name
                torch.testing.assert_close(vector, expected["vectors"][name], rtol=0, atol=1e-6)
            assert torch.equal(share["gradients"], shares[0]["gradients"])
            ours, theirs = share["gradients"].double(), expected["gradients"].double()
            assert theirs.norm() > 0
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    # What all of them found together is, exactly, what one process finds with the same weights.
    result = json.loads((out / "result.json").read_text())
    model, config = load_model(out / "last.pt")
    data = load_data(config["data"]["path"])
    figures, _ = final_figures(model, data, config_from_dict(config), torch.device("cpu"))
    assert {name: result[name] for name in figures} == figures
    assert [each.printed.count("retrieval after training") for each in outcomes] == [1] + [0] * (size - 1)
    assert load_checkpoint(out / "last.pt")["processes"] == size


@pytest.mark.heavy
def test_identities_are_sampled_for_all_and_triplets_found_in_each_share(options, tmp_path):
    """With the triplet loss of one process taken from the halves of its batches, its gradients are those of two."""
    options = [*options, "--recipe", "strong", "--batch-size", "8", "--max-steps", "2", "--image-size", "32x16"]
    options += ["--set", "train.images_per_identity=2", "--set", "model.dropout=0", "--set", "run.log_steps=1"]

    def of_halves(rank):
        of_all = loop.batch_hard_triplet_loss
        halves = slice(4), slice(4, 8)
        loop.batch_hard_triplet_loss = lambda features, labels, margin: (
            sum(of_all(features[half], labels[half], margin) for half in halves) / 2
        )
        return record_steps([*options, "--out", str(tmp_path / "one")])

    (alone,) = forked.run_forked(1, of_halves, tmp_path / "alone")
    assert alone.code == 0, alone.printed
    outcomes = forked.run_forked(
        2, lambda rank: record_steps([*options, "--out", str(tmp_path / "run")]), tmp_path / "processes"
    )
    assert [each.code for each in outcomes] == [0, 0], "\n".join(each.printed for each in outcomes)
    for expected, *shares in zip(alone.value, *(each.value for each in outcomes), strict=True):
        assert all(torch.equal(*labels.view(2, 2).T) for labels in (share["labels"] for share in shares))
        for name in ("images", "labels"):
            assert torch.equal(torch.cat([share[name] for share in shares]), expected[name]), name
        ours, theirs = shares[0]["gradients"].double(), expected["gradients"].double()
        assert torch.equal(shares[1]["gradients"], shares[0]["gradients"])
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.heavy
def test_stopped_and_resumed(few, tmp_path):
    """A signal to one of the processes stops both after the same step; their run ends as the undisturbed one."""
    out, whole = tmp_path / "run", tmp_path / "whole"

    def run(*more, stops=False):
        def process(rank):
            real_step = loop.train_step

            def train_step(*args, **kwargs):
                if stops and rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return real_step(*args, **kwargs)

            loop.train_step = train_step
            return main([*few, *more])

        outcomes = forked.run_forked(2, process, tmp_path / "processes")
        return [each.value for each in outcomes], "\n".join(each.printed for each in outcomes)

    assert run("--out", str(whole))[0] == [0, 0]
    codes, printed = run("--out", str(out), stops=True)
    assert codes == [143, 143], printed
    assert "after step 1 of 2, which is saved" in printed
    state = load_checkpoint(out / "last.pt")
    assert state["step"] == 1
    for size, count in ((1, "2 processes and cannot go on with 1"), (3, "2 processes and cannot go on with 3")):
        with pytest.raises(ValueError, match=f"has trained with {count}"):
            trainer(few, out, size, state)
    codes, printed = run("--out", str(out), "--resume")
    assert codes == [0, 0], printed
    a, b = (load_checkpoint(folder / "last.pt")["model"] for folder in (whole, out))
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, out)]
    assert all(result.pop("seconds") > 0 for result in results)
    assert results[0] == results[1]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_the_groups_threads_end_with_the_command(few, tmp_path):
    """One that still frees a tensor when the interpreter ends would abort the process."""

    def process(rank):
        sys.modules.pop("torch.distributed.nn.functional", None)  # another test may have imported it
        assert main([*few, "--out", str(tmp_path / "run")]) == 0
        return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))

    for each in forked.run_forked(2, process, tmp_path / "processes"):
        assert each.code == 0, each.printed
        assert not [thread for thread in each.value if "gloo" in thread], each.value


def test_an_unreadable_image_is_named_by_all(few, small_market, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(small_market, data)
    broken = sorted((data / "bounding_box_test").iterdir())[-1]
    broken.write_bytes(b"broken")
    arguments = [*few, "--data", str(data), "--out", str(tmp_path / "run")]
    for each in forked.run_forked(2, lambda rank: main(arguments), tmp_path / "processes"):
        assert each.value == 2
        assert f"cannot read image {broken}" in each.printed


def trainer(arguments, out, size, state=None):
    config = build_config(build_parser().parse_args(arguments))
    data = load_data(config.data.path)
    return loop.Trainer(config, data, out, state, StopRequest(out), Job(Alone(), 0, size))


def test_settings_that_do_not_fit_the_processes(few, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size = 6, .* by 4 processes: .* multiple of 4"):
        trainer(few, tmp_path, 4)
    with pytest.raises(ValueError, match=r"SyncBatchNorm needs a GPU .* on the cpu.* each process's share, 3 images"):
        trainer([*few, "--set", "train.sync_bn=true"], tmp_path, 2)
    triplets = [*few, "--batch-size", "8", "--set", "train.triplet=1", "--set", "train.images_per_identity"]
    for images, size, parts, given in (
        *((0, 1, 1, "8:"), (1, 1, 1, "8:"), (8, 1, 1, "8:")),
        *((4, 2, 1, r"8, 4 at once \(processes: 2"), (4, 1, 2, r"8, 4 at once .*accumulate = 2\)")),
    ):
        settings = [*triplets[:-1], f"{triplets[-1]}={images}", "--set", f"train.accumulate={parts}"]
        with pytest.raises(ValueError, match=rf"per_identity = {images} and train.batch_size = {given}.* needs 2"):
            trainer(settings, tmp_path, size)
    trainer([*few, "--set", "train.sync_bn=true"], tmp_path, 1)  # one process: all statistics are its own


def test_parts_are_whole_batches_in_order():
    for count, batch, size in ((23, 4, 3), (3, 2, 3), (1, 8, 2), (0, 4, 2), (64, 8, 4)):
        parts = [list(dataclasses.replace(Job(Alone()), rank=r, size=size).part(count, batch)) for r in range(size)]
        assert [i for part in parts for i in part] == list(range(count))
        assert all(part[0] % batch == 0 for part in parts if part)
        assert max(map(len, parts)) <= batch * -(-count // (batch * size))
