"""Golden test: what the running trainer really does under the paper's two recipes."""

import pytest
import torch

from sabmn_ext.train import main
from sabmn_ext.training import loop


@pytest.mark.parametrize("recipe", ["market1501", "dukemtmc"])
def test_the_running_trainer_follows_the_paper(recipe, large_enough_market, tmp_path, monkeypatch):
    trainers, seen = [], {}

    class Watched(loop.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            trainers.append(self)

    def step(model, images, labels, optimizer, **options):
        """Reads the step off instead of computing it, and jumps to the next epoch of interest."""
        trainer = trainers[0]
        assert model.training
        seen[trainer.step + 1] = {
            "groups": [
                {key: group[key] for key in ("name", "lr", "momentum", "weight_decay", "nesterov", "dampening")}
                for group in optimizer.param_groups
            ],
            "parameters": [{id(p) for p in group["params"]} for group in optimizer.param_groups],
            "images": tuple(images.shape),
            "labels": tuple(labels.shape),
            "logits": len(model.classifiers),
            "options": options,
        }
        trainer.step = {1: 158, 161: 258}.get(trainer.step + 1, trainer.step)
        return torch.zeros(()), torch.zeros((), dtype=torch.int64)

    monkeypatch.setattr(loop, "Trainer", Watched)
    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(loop, "save_checkpoint", lambda *_: None)  # 200 MB each
    figures = {"map": 0.0, "chance_map": 0.0, "num_queries": 0, "num_valid_queries": 0, "num_gallery": 0}
    monkeypatch.setattr(loop, "retrieval", lambda *_: type("Untrained", (), {"to_dict": lambda self: figures})())
    monkeypatch.setattr(loop, "final_figures", lambda *_: ({**figures, "gamma": None, "map_gamma_zero": None}, {}))
    options = ["--recipe", recipe, "--data", str(large_enough_market), "--weights", "none", "--device", "cpu"]
    options += ["--set", "run.report=false"]
    assert main([*options, "--out", str(tmp_path / "run")]) == 0

    trainer = trainers[0]
    assert trainer.steps_per_epoch == 1, "so that a step's number is its epoch's"
    assert list(seen) == [1, 160, 161, 260]
    for epoch, rate in {1: 1.0, 160: 1.0, 161: 0.1, 260: 0.1}.items():
        record = seen[epoch]
        assert [group.pop("name") for group in record["groups"]] == ["backbone", "added"]
        rates = [group.pop("lr") for group in record["groups"]]
        assert rates == pytest.approx([0.001 * rate, 0.01 * rate], rel=1e-12)
        plain = {"momentum": 0.9, "weight_decay": 1e-5, "nesterov": False, "dampening": 0}
        assert record["groups"] == [plain, plain]
        assert record["images"] == (64, 3, 256, 128)
        assert record["labels"] == (64,)
        assert record["logits"] == 4
        assert record["options"] == {
            **{"label_smoothing": 0.0, "triplet": 0.0, "triplet_margin": None, "loss_factor": 1.0},
            **{"precision": "fp32", "scaler": None, "accumulate": 1},
        }

    model = trainer.model
    backbone, added = seen[1]["parameters"]
    assert backbone == {id(p) for p in model.backbone.parameters()}
    assert added == {id(p) for p in model.parameters()} - backbone
    assert id(model.attention.gamma) in added
    assert sum(key.endswith("weight.original") for key in model.state_dict()) == 58
    assert trainer.transform.steps == ["resize", "flip", "normalize", "erase"]
    assert trainer.total_steps == 260


def test_the_attention_moves_to_the_backbones_rate(small_market, tmp_path, options):
    from sabmn_ext.data.records import load_data
    from sabmn_ext.train import build_config, build_parser
    from sabmn_ext.training.interrupt import StopRequest

    config = build_config(build_parser().parse_args([*options, "--set", "train.attention_rate=backbone"]))
    trainer = loop.Trainer(config, load_data(str(small_market)), tmp_path, None, StopRequest(tmp_path))
    groups = {group["name"]: {id(p) for p in group["params"]} for group in trainer.optimizer.param_groups}
    assert {id(p) for p in trainer.model.attention.parameters()} <= groups["backbone"]
    assert not groups["backbone"] & groups["added"]
    assert groups["backbone"] | groups["added"] == {id(p) for p in trainer.model.parameters()}
