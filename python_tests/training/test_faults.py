"""What goes wrong around a run: a full disk, a damaged checkpoint, a broken image, two runs in one folder."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import forked
import pytest
import torch

from sabmn_ext.train import main
from sabmn_ext.training import checkpoint, folder, loop
from sabmn_ext.training.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from sabmn_ext.training.folder import only_run_in, repair


@pytest.fixture
def few(options):
    """Two epochs of two steps each."""
    small = ["--image-size", "32x16", "--batch-size", "16", "--epochs", "2"]
    return [*options, *small, "--set", "model.spectral_norm=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def undisturbed(few, runs):
    """The folder of a finished run, one for all tests."""
    if not (runs / "run").exists():
        assert main([*few, "--out", str(runs / "run")]) == 0
    return runs / "run"


def assert_same_end(out: Path, other: Path) -> None:
    a, b = (load_checkpoint(each / "last.pt") for each in (out, other))
    assert a["step"] == b["step"]
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    results = [json.loads((each / "result.json").read_text()) for each in (out, other)]
    assert all(result.pop("seconds") > 0 for result in results)
    assert results[0] == results[1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_ends_the_run_and_the_earlier_checkpoint_stays(
    few, undisturbed, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    real_step, calls = loop.train_step, []

    def train_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # from now on what is written to the new file meets a full device
            (out / ".last.pt.tmp").symlink_to("/dev/full")
        return real_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", train_step)
    assert main([*few, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert f"could not write {out / 'last.pt'}" in message
    assert "Traceback" not in message
    assert load_checkpoint(out / "last.pt")["step"] == 2
    monkeypatch.undo()
    assert main(["--out", str(out), "--resume"]) == 0
    assert_same_end(out, undisturbed)


def test_a_truncated_last_falls_back_to_the_one_before(few, undisturbed, tmp_path, capsys):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    (out / "result.json").unlink()  # a run of which only the end is missing
    assert load_checkpoint(out / "previous.pt")["step"] == 2
    whole = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert main(["--out", str(out), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "last.pt is not a whole checkpoint" in printed
    assert "goes on from the checkpoint before it, step 2" in printed
    assert "going on after step 2 of 4" in printed
    assert (out / "last.damaged.pt").read_bytes() == whole[: len(whole) // 2]
    assert load_checkpoint(out / "previous.pt")["step"] == 2, "not the damaged one"
    assert_same_end(out, undisturbed)


def test_repair(tmp_path, capsys):
    assert repair(tmp_path) is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "last.pt", {"step": step}, "previous.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert [load_checkpoint(tmp_path / f"{name}.pt")["step"] for name in ("previous", "last")] == [2, 3]
    assert repair(tmp_path) is None
    for name in ("last", "previous"):
        (tmp_path / f"{name}.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"last\.pt is not a whole checkpoint"):
        repair(tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == b"damaged"


def test_the_one_before_is_kept_where_there_are_no_links(tmp_path, monkeypatch):
    def link(*names):
        raise OSError("links are not supported")

    monkeypatch.setattr(checkpoint.os, "link", link)
    for text in (b"one", b"two"):
        write_atomically(tmp_path / "a", lambda file, text=text: file.write(text), "b")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "b").read_bytes() == b"one"


def test_an_image_that_becomes_unreadable(few, undisturbed, small_market, tmp_path, monkeypatch, capsys):
    """In the second epoch: where it is decoded again it ends the run, by name; repaired, the run goes on."""
    import shutil

    data, out = tmp_path / small_market.name, tmp_path / "run"
    shutil.copytree(small_market, data)
    images = {path: path.read_bytes() for path in (data / "bounding_box_train").iterdir()}
    real_step, calls = loop.train_step, []

    def train_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            for path, content in images.items():
                path.write_bytes(content[:100])
        return real_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", train_step)
    assert main([*few, "--data", str(data), "--out", str(out), "--cache", "off"]) == 2
    assert f"cannot read image {data / 'bounding_box_train'}" in capsys.readouterr().err
    assert load_checkpoint(out / "last.pt")["step"] == 2
    for path, content in images.items():
        path.write_bytes(content)
    assert main(["--out", str(out), "--resume"]) == 0
    assert_same_end(out, undisturbed)


# ---- two runs in one folder ----


@pytest.mark.skipif(folder.fcntl is None, reason="needs POSIX")
def test_two_runs_in_one_folder_are_refused(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder, "WAIT", 0.3)
    out = tmp_path / "run"
    with only_run_in(out):  # as another process would: the lock belongs to the open folder, not to the process
        for more in ([], ["--resume"]):
            (out / "config.toml").write_text("")
            assert main([*few, "--out", str(out), *more]) == 2
            assert f"another process trains in {out} now" in capsys.readouterr().err
        (out / "config.toml").unlink()
    assert not out.exists(), "nothing was left in it"


@pytest.mark.skipif(folder.fcntl is None, reason="needs POSIX")
def test_a_killed_process_holds_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "WAIT", 0.3)

    def hold(ready):
        with only_run_in(tmp_path / "run"):
            ready.set()
            time.sleep(600)

    context = get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(ready,))
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ValueError, match="another process trains in"), only_run_in(tmp_path / "run"):
            pass
    finally:
        process.kill()
        process.join()
    with only_run_in(tmp_path / "run"):
        pass


# ---- killed again and again ----


def die_at(moment: str, number: int) -> None:
    """SIGKILL before the number-th step, or with the number-th checkpoint half written or not yet in its place."""
    counts = {"step": 0, "write": 0, "replace": 0}
    real = loop.train_step, torch.save, os.replace

    def reached(name: str) -> bool:
        counts[name] += 1
        return name == moment and counts[name] == number

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def train_step(*args, **kwargs):
        if reached("step"):
            die()
        return real[0](*args, **kwargs)

    def save(state, file):
        real[1](state, file)
        if reached("write"):
            file.truncate(file.tell() // 2)
            die()

    def replace(source, target):
        if Path(target).name in ("last.pt", "previous.pt") and reached("replace"):
            die()
        real[2](source, target)

    loop.train_step, torch.save, os.replace = train_step, save, replace


@pytest.mark.heavy
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_twenty_times_at_random_moments(options, tmp_path, seed):
    """Half of the kills strike a step or the writing of a checkpoint, half any moment at all; the end is exact."""
    small = [*options, "--image-size", "32x16", "--batch-size", "4", "--set", "run.checkpoint_steps=1"]
    small += ["--max-steps", "4", "--set", "model.spectral_norm=false", "--set", "train.momentum=0"]
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    start = time.monotonic()
    assert main([*small, "--out", str(undisturbed)]) == 0
    seconds = time.monotonic() - start
    draw = random.Random(seed)
    arguments = [*small, "--out", str(out)]
    killed = 0

    def child(moment: str | None, number: int) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        if moment:
            die_at(moment, number)
        resume = ["--resume"] * any((out / name).exists() for name in ("config.toml", "last.pt"))
        os._exit(main([*arguments, *resume]))

    while killed < 20:
        moment = draw.choice(["step", "write", "replace", None, None, None])
        process = get_context("fork").Process(target=child, args=(moment, draw.randint(1, 2)))
        process.start()
        process.join(None if moment else draw.uniform(0, 0.3 * seconds))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        killed += process.exitcode != 0
        if process.exitcode == 0:  # at its end already: once more from the start
            assert_same_end(out, undisturbed)
            for path in sorted(out.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        elif (out / "last.pt").exists():
            load_checkpoint(out / "last.pt")
    resume = ["--resume"] * (out / "config.toml").exists()
    assert main([*arguments, *resume]) == 0
    assert_same_end(out, undisturbed)


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_torchrun_ends_when_a_process_is_killed_and_goes_on(few, tmp_path):
    """The command itself: SIGKILL to one of two processes ends the job with a message; then it goes on to its end."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "sabmn_ext.train", *few, "--out", str(out), "--epochs", "10", "--set", "run.checkpoint_steps=1"]
    with subprocess.Popen(
        command, env=forked.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as job:
        deadline = time.monotonic() + 120
        while not (out / "previous.pt").exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "another of the 2 processes has ended" in errors or "stopped by SIGTERM" in errors, errors
    assert "--resume" in errors
    step = load_checkpoint(out / "last.pt")["step"]
    assert 1 <= step < 20
    again = subprocess.run([*command, "--resume"], env=forked.environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(f"going on after step {step} of 20") == 1, "the first process alone speaks"
    assert json.loads((out / "result.json").read_text())["steps"] == 20
