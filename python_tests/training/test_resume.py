"""A run that was stopped or killed and resumed ends as the undisturbed one, bit for bit on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import environment

from sabmn_ext.train import main
from sabmn_ext.training import loop
from sabmn_ext.training.checkpoint import load_checkpoint
from sabmn_ext.training.interrupt import StopRequest, TrainingInterrupted


def run_and_kill(moment, arguments):
    """Start the trainer in a process of its own, which kills itself at ``moment``: its exit code and stderr."""
    script = Path(__file__).with_name("killed_run.py")
    done = subprocess.run(
        [sys.executable, str(script), moment, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr


def assert_same_end(out, other):
    a, b = load_checkpoint(out / "last.pt"), load_checkpoint(other / "last.pt")
    assert a["step"] == b["step"] == 12
    assert a["model"].keys() == b["model"].keys()
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    momenta = [[s["momentum_buffer"] for s in each["optimizer"]["state"].values()] for each in (a, b)]
    assert len(momenta[0]) == len(momenta[1]) > 60
    assert all(torch.equal(x, y) for x, y in zip(*momenta, strict=True))
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, other)]
    for result in results:
        assert result.pop("seconds") > 0
    assert results[0] == results[1]
    logs = [
        [line.rsplit("  ", 1)[0] for line in (folder / "log.txt").read_text().splitlines()] for folder in (out, other)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3


def scalars(out, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "tensorboard"))
    reader.Reload()
    return {name: [event.step for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}[tag]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small_market):
    cache: dict[str, Path] = {}

    def run(options):
        if not cache:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            assert main([*options, "--out", str(out)]) == 0
            cache["out"] = out
        return cache["out"]

    return run


def test_killed_anywhere_and_resumed(options, undisturbed, tmp_path):
    out = tmp_path / "run"
    arguments = [*options, "--out", str(out), "--set", "run.checkpoint_steps=3"]
    moments = [
        ("write:1", None),  # the very first checkpoint, before the first step
        ("step:3", 0),
        ("step:6", 4),
        ("replace:2", 4),
        ("write:3", 6),
        ("result", 12),
    ]
    for i, (moment, saved) in enumerate(moments):
        code, errors = run_and_kill(moment, arguments + ["--resume"] * (i > 0))
        assert code == -signal.SIGKILL, (moment, code, errors)
        if saved is None:
            assert not (out / "last.pt").exists()
        else:
            assert load_checkpoint(out / "last.pt")["step"] == saved, moment
        assert not (out / "result.json").exists()
    assert main([*arguments, "--resume", "--workers", "1", "--cache", "off"]) == 0
    assert_same_end(undisturbed(options), out)
    steps = scalars(out, "loss")
    assert steps == sorted(set(steps)), "a resume must not leave a step twice"
    assert steps[-1] == 12


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(signum, code, options, undisturbed, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    real_step = loop.train_step
    calls = []

    def train_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signum)  # arrives inside the step: the step is finished first
        return real_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", train_step)
    before = signal.getsignal(signum)
    assert main([*options, "--out", str(out)]) == code
    assert signal.getsignal(signum) is before
    message = capsys.readouterr().err
    assert "step 6 of 12" in message
    assert f"--out {out} --resume" in message
    assert load_checkpoint(out / "last.pt")["step"] == 6
    monkeypatch.undo()
    assert main(["--out", str(out), "--resume"]) == 0, "the settings come from the run itself"
    assert_same_end(undisturbed(options), out)


def test_ctrl_c_with_workers(options, undisturbed, tmp_path):
    """A terminal sends SIGINT to the workers too, which must not take the step under way with them."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sabmn_ext.train", *options, "--workers", "2", "--cache", "off", "--out", str(out)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        deadline = time.monotonic() + 200
        while run.poll() is None and not (out / "log.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGINT)
        _, errors = run.communicate(timeout=200)
    assert run.returncode == 130, errors
    assert "Traceback" not in errors
    assert main(["--out", str(out), "--resume", "--workers", "0"]) == 0
    assert_same_end(undisturbed(options), out)


def test_a_second_signal_ends_at_once_but_not_within_a_second(tmp_path, monkeypatch):
    """A terminal's Ctrl-C reaches the processes of torchrun twice: from the terminal and from torchrun."""
    now = [100.0]
    monkeypatch.setattr("sabmn_ext.training.interrupt.time.monotonic", lambda: now[0])
    with StopRequest(tmp_path) as stop:
        stop.at_once = False
        for now[0] in (100.0, 100.2, 100.9):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGINT
        now[0] = 101.1
        with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM twice"):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("where", ["training.figures.extract_features", "data.images.to_rgb"])
def test_a_signal_outside_the_steps_leaves_at_once(options, tmp_path, monkeypatch, capsys, where):
    def stopped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal must end the evaluation, and is no image that cannot be read")

    monkeypatch.setattr(f"sabmn_ext.{where}", stopped)
    assert main([*options, "--out", str(tmp_path / "run")]) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err


def test_finished_runs_and_occupied_folders(options, undisturbed, tmp_path, capsys):
    out = undisturbed(options)
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert main(["--out", str(out), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "finished" in printed
    assert "untrained" in printed
    assert main([*options, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "--resume" in message
    assert "--out" in message
    assert main([*options, "--out", str(tmp_path / "nothing"), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert main(["--resume"]) == 2
    assert "--out" in capsys.readouterr().err
    assert files == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_changed_settings_are_refused(options, undisturbed, capsys):
    out = undisturbed(options)
    changed = ["--epochs", "4", "--set", "train.momentum=0.8", "--set", "model.attention_stage=none", "--workers", "2"]
    assert main([*options, *changed, "--out", str(out), "--resume"]) == 2
    message = capsys.readouterr().err
    for part in ("train.epochs: 3 -> 4", "train.momentum: 0.9 -> 0.8", "model.attention_stage: 3 -> None"):
        assert part in message
    assert "workers" not in message


def test_changed_images_are_refused(options, tmp_path, small_market, monkeypatch, capsys):
    import shutil

    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small_market, data)
    arguments = [*options, "--data", str(data), "--out", str(out), "--max-steps", "2"]

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "final_figures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    monkeypatch.undo()
    next((data / "bounding_box_train").iterdir()).unlink()
    assert main([*arguments, "--resume"]) == 2
    assert "the images are not those" in capsys.readouterr().err
