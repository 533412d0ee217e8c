"""The paper's recipe on a made-up Market-1501 of the true counts: steps, a stop, a resume, and the whole evaluation."""

import json
import os
import signal

from fake_data import make_fake_market

from sabmn_ext.train import main
from sabmn_ext.training import loop
from sabmn_ext.training.checkpoint import load_checkpoint


def test_twenty_steps_through_resume_and_evaluation(tmp_path, monkeypatch, capsys):
    root, out = make_fake_market(tmp_path / "market", full=True), tmp_path / "run"
    small = ["--backbone", "resnet18", "--image-size", "16x8", "--set", "model.feature_dim=16"]
    more = ["--weights", "none", "--device", "cpu", "--max-steps", "20", "--set", "evaluation.batch_size=512"]
    more += ["--cache", "off"]
    real_step, shapes = loop.train_step, []

    def step(model, images, labels, *args, **kwargs):
        shapes.append(tuple(images.shape))
        if len(shapes) == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(model, images, labels, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step)
    assert main(["--data", root, *small, *more, "--out", str(out)]) == 143
    state = load_checkpoint(out / "last.pt")
    assert state["config"]["recipe"] == "market1501", "chosen by the data"
    assert state["step"] == 11
    assert state["model_config"]["num_classes"] == 751
    assert main(["--out", str(out), "--resume"]) == 0
    assert shapes == [(64, 3, 16, 8)] * 20
    assert "note:" not in capsys.readouterr().out, "the counts are the published ones"
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 20
    for figures in (result, result["untrained"]):
        assert figures["num_queries"] == figures["num_valid_queries"] == 3368
        assert figures["num_gallery"] == 19732
        assert 0 < figures["map_trapezoid"] < figures["map"] < 1
        assert 0 < figures["chance_map"] < 0.01
    assert result["chance_map"] == result["untrained"]["chance_map"]
    assert (out / "log.txt").read_text().startswith("epoch 1/260  step 20  loss ")
