"""The training loop: one position (``step``), no hidden random state, and a checkpoint that can go on exactly.

Order and augmentation of the images are a function of (seed, epoch, step), dropout one of (seed, step) and the rates
one of (step, epoch). A checkpoint therefore holds weights, optimiser and step, and no state of any generator.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabmn_ext.data.images import ImageDataset
from sabmn_ext.data.loader import steps_per_epoch, train_batches
from sabmn_ext.data.records import ReidData, load_data
from sabmn_ext.data.transforms import TrainTransform
from sabmn_ext.nn.sabmn import SABMN
from sabmn_ext.training.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from sabmn_ext.training.config import Config, config_from_dict, differences, load_recipe, to_toml
from sabmn_ext.training.figures import features_of, final_figures, retrieval, score
from sabmn_ext.training.interrupt import StopRequest, TrainingInterrupted
from sabmn_ext.training.run_report import write_run_report
from sabmn_ext.training.schedule import rate_factor

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    label_smoothing: float = 0.0,
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimisation step: the cross-entropies of all classifiers summed.

    Args:
        model: any module in train mode that returns a list of logits [B, num_classes].
        images: [B, ...], on the model's device.
        labels: [B], int64, on the same device.
        label_smoothing: of every cross-entropy.
        precision: "fp32", or "bf16" or "fp16" for autocast; the losses are computed in float32.
        scaler: the gradient scaler that fp16 needs.

    Returns:
        The loss and the number of images whose summed logits name the right class: 0-dim, detached, on the
        device (so that reading them is the caller's decision, and the device is not waited for).
    """
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, dtype=_DTYPES[precision], enabled=precision != "fp32"):
        logits = [each.float() for each in model(images)]
    losses = [F.cross_entropy(each, labels, label_smoothing=label_smoothing) for each in logits]
    loss = torch.stack(losses).sum()
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    correct = (torch.stack([each.detach() for each in logits]).sum(0).argmax(1) == labels).sum()
    return loss.detach(), correct


def step_seed(seed: int, step: int) -> int:
    """The seed of torch's generators during one step, below 2^63."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:8], "big") >> 1


def split_identities(data: ReidData, share: float, seed: int) -> tuple[ReidData, ReidData | None]:
    """Hold out a share of the training identities: (data to train on, data with the held-out train list)."""
    if not share:
        return data, None
    pids = sorted({record.pid for record in data.train})
    count = max(2, round(share * len(pids)))
    if len(pids) - count < 2:
        raise ValueError(f"evaluation.val_ids = {share} holds out {count} of {len(pids)} identities: too few remain")
    held = set(random.Random(seed).sample(pids, count))
    return (
        dataclasses.replace(data, train=[r for r in data.train if r.pid not in held]),
        dataclasses.replace(data, train=[r for r in data.train if r.pid in held]),
    )


def _fingerprint(data: ReidData) -> str:
    """Identifies the images by name, identity and order, wherever the folder lies."""
    lists = ((os.path.relpath(r.path, data.root), r.pid, r.camid) for r in data.train + data.query + data.gallery)
    return hashlib.sha256("\n".join(map(str, lists)).encode()).hexdigest()


def pick_device(name: str) -> torch.device:
    """'auto' is a GPU if there is one; a device that is not here is a ValueError."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"run.device = '{name}': expected auto, cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"run.device = '{name}': torch sees {torch.cuda.device_count()} CUDA devices")
    return device


class Trainer:
    """One run: the network, its optimiser, the position, and the files in the output folder.

    Args:
        state: a checkpoint's content to go on from, or None to start.
    """

    def __init__(
        self, config: Config, data: ReidData, out: Path, state: dict[str, Any] | None, stop: StopRequest
    ) -> None:
        self.config, self.out, self.stop = config, out, stop
        self.device = pick_device(config.run.device)
        self.data, self.held_out = split_identities(data, config.evaluation.val_ids, config.run.seed)
        self.fingerprint = _fingerprint(data)
        if state and state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{config.data.path}: the images are not those that the run in {out} began with"
                " (other files, names or identities); give the data set it began with, or a new --out"
            )
        size = (config.image.height, config.image.width)
        self.dataset = ImageDataset(self.data.train, self.data.train_labels(), *size, on_error=config.data.on_error)
        augment = config.augment
        self.transform = TrainTransform(
            *size,
            flip_probability=augment.flip,
            padding=augment.padding,
            erasing=augment.erasing,
            erasing_probability=augment.erasing_probability,
        )
        self.steps_per_epoch = steps_per_epoch(self.dataset, config.train.batch_size)
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.total_steps = min(self.total_steps, config.train.max_steps or self.total_steps)

        torch.manual_seed(config.run.seed)
        keys = dataclasses.asdict(config.model)
        if state:  # the weights come from the checkpoint: nothing to download
            keys["weights"] = "none"
        self.model = SABMN(self.data.num_train_identities, **keys).to(self.device)
        if config.run.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = self.model.parameter_groups()
        groups[config.train.attention_rate] = groups[config.train.attention_rate] + groups.pop("attention")
        self.full_rates = {"backbone": config.train.rate_backbone, "added": config.train.rate_added}
        self.optimizer = torch.optim.SGD(
            [{"params": groups[name], "name": name, "lr": rate} for name, rate in self.full_rates.items()],
            lr=0.0,
            momentum=config.train.momentum,
            weight_decay=config.train.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(self.device.type) if config.run.precision == "fp16" else None

        self.step = self.saved_step = 0
        self.seconds = 0.0
        self.epoch_sums = {"steps": 0, "images": 0, "correct": 0, "loss": 0.0}  # of the epoch under way
        self.log: list[str] = []
        self.best: dict[str, Any] | None = None
        self.untrained: dict[str, Any] | None = None
        self.pending: list[tuple[Tensor, Tensor, int]] = []  # loss and hits, still on the device, and images
        if state:
            self._restore(state)
        self.bar: Any = None
        self.curves: Any = None

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved_step = state["step"]
        self.seconds, self.epoch_sums = state["seconds"], state["epoch_sums"]
        self.log, self.best, self.untrained = state["log"], state["best"], state["untrained"]

    def save(self, name: str = "last.pt") -> None:
        """Write ``last.pt``, or ``best.pt``, which has no optimiser; refuses weights that are not finite."""
        self._settle()
        self._check_weights()
        state: dict[str, Any] = {
            "config": self.config.to_dict(),
            "model_config": self.model.config,
            "model": self.model.state_dict(),
            "step": self.step,
        }
        if name == "last.pt":
            state |= {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler else None,
                "seconds": self._seconds(),
                "epoch_sums": self.epoch_sums,
                "log": self.log,
                "best": self.best,
                "untrained": self.untrained,
                "fingerprint": self.fingerprint,
            }
            if self.curves is not None:
                self.curves.flush()  # so that no point before the checkpoint is missing after a kill
        save_checkpoint(self.out / name, state)
        if name == "last.pt":
            self.saved_step, self.saved_at = self.step, time.monotonic()

    def _check_weights(self) -> None:
        for key, value in self.model.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise self._not_finite(f"{key} has values that are not finite", self.step)

    def _not_finite(self, what: str, step: int) -> RuntimeError:
        return RuntimeError(
            f"{what} at step {step} (epoch {(step - 1) // self.steps_per_epoch + 1}): the training diverged."
            f" The last good checkpoint is {self.out / 'last.pt'}, after step {self.saved_step}. Start again with"
            " lower rates (train.rate_backbone, train.rate_added), a warm-up (schedule.warmup_steps)"
            + (" or --precision fp32" if self.config.run.precision != "fp32" else "")
        )

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def run(self) -> None:
        """Train from the present step to the last one, and leave ``last.pt`` behind."""
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        config = self.config
        self.started = self.settled_at = time.monotonic()
        self.write_log()
        self.curves = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.step + 1)
        batch = config.train.batch_size
        self.bar = tqdm(
            total=self.total_steps * batch, initial=self.step * batch, unit=" images", dynamic_ncols=True,
            disable=None if config.run.progress else True,
        )  # fmt: skip
        try:
            self.stop.at_once = False
            self.save()  # before the first step too, so that there is always something to go on from
            while self.step < self.total_steps:
                self.run_epoch(self.step // self.steps_per_epoch + 1)
        finally:
            self.stop.at_once = True
            self.bar.close()
            self.curves.close()
            self.seconds = self._seconds()

    def run_epoch(self, epoch: int) -> None:
        """The steps of one epoch that are left, its line in the log, and a checkpoint."""
        config = self.config
        self.model.train()
        batches: Iterable[tuple[Tensor, Tensor]] = train_batches(
            self.dataset,
            batch_size=config.train.batch_size,
            seed=config.run.seed,
            epoch=epoch,
            first_step=self.step % self.steps_per_epoch,
            workers=config.data.workers,
            transform=self.transform,
        )
        self.bar.set_description(f"epoch {epoch}/{config.train.epochs}", refresh=False)
        for images, labels in batches:
            self._one_step(images, labels, epoch)
            if self.stop.signum is not None:
                break
            if self.step % self.steps_per_epoch == 0 or self.step == self.total_steps:
                break  # the epoch's end has a checkpoint of its own
            due = config.run.checkpoint_steps and self.step % config.run.checkpoint_steps == 0
            minutes = config.run.checkpoint_minutes
            if due or (minutes and time.monotonic() - self.saved_at > 60 * minutes):
                self.save()
        if self.step % self.steps_per_epoch == 0 or self.step == self.total_steps:
            self._end_epoch(epoch)
        self.save()
        if self.stop.signum is not None:
            where = f"after step {self.step} of {self.total_steps}, which is saved"
            raise TrainingInterrupted(self.stop.signum, self.out, where)

    def _one_step(self, images: Tensor, labels: Tensor, epoch: int) -> None:
        config = self.config
        torch.manual_seed(step_seed(config.run.seed, self.step))
        factor = rate_factor(self.step, epoch, self.total_steps, **dataclasses.asdict(config.schedule))
        for group in self.optimizer.param_groups:
            group["lr"] = self.full_rates[group["name"]] * factor
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        if config.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        try:
            outcome = train_step(
                self.model,
                images,
                labels,
                self.optimizer,
                label_smoothing=config.train.label_smoothing,
                precision=config.run.precision,
                scaler=self.scaler,
            )
        except RuntimeError:  # spectral normalisation refuses weights that are not finite: name the cause, not it
            self._settle()
            self._check_weights()
            raise
        self.pending.append((*outcome, len(labels)))
        self.step += 1
        self.bar.update(len(labels))
        if self.step % config.run.log_steps == 0:
            self._settle()

    def _settle(self) -> None:
        """Fetch the pending losses, stop if one is not finite, add them to the epoch's sums and curves."""
        if not self.pending:
            return
        loss_tensors, hits, sizes = zip(*self.pending, strict=True)
        self.pending = []
        losses = torch.stack(loss_tensors).double().tolist()
        correct, images = int(torch.stack(hits).sum()), sum(sizes)
        for step, loss in enumerate(losses, self.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise self._not_finite(f"the loss is {loss}", step)
        for name, value in {"steps": len(losses), "images": images, "correct": correct, "loss": sum(losses)}.items():
            self.epoch_sums[name] += value
        now = time.monotonic()
        points = {
            "loss": sum(losses) / len(losses),
            "accuracy": correct / images,
            "images_per_second": images / max(now - self.settled_at, 1e-9),
        }
        self.settled_at = now
        for group in self.optimizer.param_groups:
            points[f"rate/{group['name']}"] = group["lr"]
        if self.model.attention is not None:
            points["gamma"] = float(self.model.attention.gamma.detach())
        for name, value in points.items():
            self.curves.add_scalar(name, value, self.step)
        self.bar.set_postfix(loss=f"{points['loss']:.3f}", accuracy=f"{points['accuracy']:.1%}", refresh=False)

    def _end_epoch(self, epoch: int) -> None:
        self._settle()
        sums = self.epoch_sums
        line = (
            f"epoch {epoch}/{self.config.train.epochs}  step {self.step}  loss {sums['loss'] / sums['steps']:.4f}"
            f"  accuracy {sums['correct'] / sums['images']:.2%}"
        )
        line += "".join(f"  rate {g['name']} {g['lr']:.2e}" for g in self.optimizer.param_groups)
        if self.model.attention is not None:
            line += f"  gamma {float(self.model.attention.gamma.detach()):+.4f}"
        self.epoch_sums = {"steps": 0, "images": 0, "correct": 0, "loss": 0.0}
        every = self.config.evaluation.val_every
        if self.held_out is not None and (epoch % every == 0 or self.step == self.total_steps):
            line += f"  held-out mAP {self._validate(epoch):.2%}"
        line += f"  {self._seconds():.0f} s"
        self.log.append(line)
        self.write_log()
        self.bar.write(line)
        sys.stdout.flush()  # a line an epoch, also where the output is a file

    def _validate(self, epoch: int) -> float:
        """Leave-one-out mAP on the held-out identities; keeps ``best.pt``."""
        assert self.held_out is not None
        features = features_of(self.model, self.held_out.train, self.config, self.device)
        result = score(features, features, self.held_out.has_cameras, self.config)
        self.curves.add_scalar("held_out_map", result.map, self.step)
        if self.best is None or result.map > self.best["held_out_map"]:
            self.best = {"epoch": epoch, "step": self.step, "held_out_map": float(result.map)}
            self.save("best.pt")
        return float(result.map)

    def write_log(self) -> None:
        """``log.txt`` is written whole each time: a resumed run has each line once."""
        write_atomically(self.out / "log.txt", lambda file: file.write("".join(f"{x}\n" for x in self.log).encode()))


def train(config: Config, out: str | Path, resume: bool = False) -> dict[str, Any]:
    """Train by ``config`` into the folder ``out``, evaluate, and return what ``result.json`` holds.

    Writes ``config.toml``, ``last.pt``, ``log.txt``, ``tensorboard/``, ``result.json``, ``report/`` and, where
    identities are held out, ``best.pt``. Nothing of query or gallery influences any of them but ``result.json`` and
    the report, whose figures are those of the last step.

    Args:
        resume: go on with the run that is in ``out``; its settings must be the same.

    Raises:
        ValueError: a run is in ``out`` already and ``resume`` is false; the settings or the data differ from
            those of the run to resume; settings that do not fit the data.
        FileNotFoundError: there is nothing in ``out`` to resume.
        RuntimeError: the loss or a weight is not finite (names the step and the last good checkpoint).
        TrainingInterrupted: SIGINT or SIGTERM; all that was done is saved.
    """
    out = Path(out)
    last = out / "last.pt"
    if (out / "config.toml").exists() or last.exists():
        if not resume:
            raise ValueError(f"{out} holds a run already: go on with it by --resume, or name another --out")
    elif resume:
        raise FileNotFoundError(f"nothing to resume in {out}: it holds no run (no config.toml, no last.pt)")
    with StopRequest(out) as stop:
        state = load_checkpoint(last) if last.exists() else None
        if resume:
            earlier = config_from_dict(state["config"]) if state else load_recipe(str(out / "config.toml"))
            if changed := differences(earlier, config):
                raise ValueError(
                    f"the run in {out} cannot go on under other settings: {'; '.join(changed)}."
                    " Leave them as they were, or give a new --out"
                )
        if not config.data.path:
            raise ValueError("data.path is not set: give a folder by --data PATH, or --data demo")
        if (out / "result.json").exists():
            print(f"the run in {out} is finished; its result:")
            return json.loads((out / "result.json").read_text())
        keys = config.data
        data = load_data(config.data.path, format=keys.format, cameras=keys.cameras, with_val=keys.with_val)
        for note in data.notes:
            print(f"note: {note}", flush=True)
        trainer = Trainer(config, data, out, state, stop)
        if resume:
            print(f"going on after step {trainer.step} of {trainer.total_steps}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "config.toml", lambda file: file.write(to_toml(config).encode()))
        if trainer.untrained is None:
            print("retrieval before training ...", flush=True)
            trainer.untrained = retrieval(trainer.model, data, config, trainer.device).to_dict()
        trainer.run()
        print("retrieval after training ...", flush=True)
        figures, drawn = final_figures(trainer.model, data, config, trainer.device)
        result = {
            **figures,
            "seconds": round(trainer.seconds, 2),
            "steps": trainer.step,
            "recipe": config.recipe,
            "data": data.name,
            "untrained": trainer.untrained,
            "best": trainer.best,
        }
        write_atomically(out / "result.json", lambda file: file.write(json.dumps(result, indent=2).encode()))
        if config.run.report:
            write_run_report(out, config, trainer.model, trainer.device, result, drawn)
        return result
