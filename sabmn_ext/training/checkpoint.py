"""Checkpoints: a kill while one is written leaves the one before it whole; reading never runs code."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from sabmn_ext.nn.sabmn import SABMN

FORMAT = "sabmn_ext checkpoint 1"


def write_atomically(path: str | Path, write: Any, previous: str | None = None) -> None:
    """Call ``write(file)`` on a new file, bring it to the disk, then let it take the place of ``path``.

    previous: the name, in the same folder, that the file which was there so far keeps.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves behind is overwritten
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            _keep(path, path.with_name(previous))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is either, depending on who noticed it
        temporary.unlink(missing_ok=True)
        raise RuntimeError(f"could not write {path} ({error}); an earlier file there is unchanged") from error
    if os.name == "posix":  # the renaming itself must reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _keep(path: Path, previous: Path) -> None:
    """Give the file a second name, so that there is none of its first name missing at any moment."""
    link = previous.with_name(f".{previous.name}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links
        shutil.copyfile(path, link)
    os.replace(link, previous)


def save_checkpoint(path: str | Path, state: dict[str, Any], previous: str | None = None) -> None:
    """Write ``state`` (tensors and plain values in dicts and lists) to ``path``, as write_atomically does."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file), previous)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint; never runs code from it.

    Raises a FileNotFoundError if there is none, a ValueError if the file is damaged or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, pickle.UnpicklingError) as error:
        # Of a pickle that it refuses torch says how to run its code all the same.
        reason = "" if isinstance(error, pickle.UnpicklingError) else str(error).strip().split("\n")[0][:120]
        raise ValueError(
            f"{path} is not a whole checkpoint of sabmn_ext: it is cut off, damaged or of another kind"
            + (f" ({reason})" if reason else "")
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is a torch file but not a checkpoint of this sabmn_ext ({FORMAT})")
    return state


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[SABMN, dict[str, Any]]:
    """The network of a checkpoint in eval mode, and its run's configuration as a nested dict.

    Its weights have the memory format of the run, so that its features are those of the run to the last bit.

    Example::

        model, config = load_model("runs/demo/last.pt")
        config["image"]["height"]   # the size of the images it was trained on
    features = model(images)    # images: [B, 3, H, W], normalised → [B, feature_dim]
    """
    state = load_checkpoint(path, device)
    model = SABMN(**state["model_config"], weights="none")
    model.load_state_dict(state["model"])
    model.to(device).eval()
    if state["config"]["run"]["channels_last"]:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, state["config"]
