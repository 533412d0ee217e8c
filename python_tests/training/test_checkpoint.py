"""Checkpoint files: atomic, loaded without running code, one clear error for anything else."""

import pickle

import pytest
import torch

from sabmn_ext.training import checkpoint
from sabmn_ext.training.checkpoint import load_checkpoint, load_model, save_checkpoint, write_atomically


def test_round_trip_and_no_leftovers(tmp_path):
    path = tmp_path / "last.pt"
    state = {"step": 3, "model": {"weight": torch.randn(3, 5)}, "log": ["one"], "best": None, "seconds": 1.5}
    save_checkpoint(path, state)
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"].pop("weight"), state["model"].pop("weight"))
    assert loaded == {**state, "format": checkpoint.FORMAT}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_failed_write_leaves_the_earlier_file(tmp_path, error):
    path = tmp_path / "last.pt"
    path.write_text("earlier")

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(RuntimeError, match=r"could not write .*last\.pt.*unchanged"):
        write_atomically(path, write)
    assert path.read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


class Harmful:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, share):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": {"weight": torch.randn(100, 100)}})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"last\.pt is not a whole checkpoint"):
        load_checkpoint(path)


def test_foreign_files(tmp_path, capsys):
    path = tmp_path / "foreign.pt"
    path.write_text("not a checkpoint\n" * 50)
    with pytest.raises(ValueError, match=r"foreign\.pt is not a whole checkpoint"):
        load_model(path)
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)
    with pytest.raises(ValueError, match=r"foreign\.pt is a torch file but not a checkpoint"):
        load_model(path)
    torch.save({"format": checkpoint.FORMAT, "model": Harmful()}, path)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_model(path)
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_model(path)
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(tmp_path / "missing.pt")
