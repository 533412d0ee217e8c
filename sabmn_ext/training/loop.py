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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabmn_ext.data.cache import cache_images
from sabmn_ext.data.images import ImageDataset
from sabmn_ext.data.loader import steps_per_epoch, train_batches
from sabmn_ext.data.records import ReidData, load_data
from sabmn_ext.data.transforms import TrainTransform
from sabmn_ext.nn.sabmn import SABMN
from sabmn_ext.nn.spectral_norm import without_updates
from sabmn_ext.training.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from sabmn_ext.training.config import Config, config_from_dict, differences, load_recipe, to_toml
from sabmn_ext.training.figures import features_of, final_figures, retrieval, score
from sabmn_ext.training.folder import only_run_in, repair
from sabmn_ext.training.interrupt import StopRequest, TrainingInterrupted
from sabmn_ext.training.precision import DTYPES, slow_precision
from sabmn_ext.training.processes import ALONE, Job, is_lost
from sabmn_ext.training.run_report import write_run_report
from sabmn_ext.training.schedule import rate_factor
from sabmn_ext.training.triplet import batch_hard_triplet_loss


def train_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    label_smoothing: float = 0.0,
    triplet: float = 0.0,
    triplet_margin: float | None = None,
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
    loss_factor: float = 1.0,
    accumulate: int = 1,
) -> tuple[Tensor, Tensor]:
    """One optimisation step: the cross-entropies of all classifiers summed, and the triplet loss.

    Args:
        model: any module in train mode that returns a list of logits [B, num_classes], or for ``triplet`` a pair: that
            list, and features [B, D].
        images: [B, ...], on the model's device.
        labels: [B], int64, on the same device.
        label_smoothing: of every cross-entropy.
        triplet: weight of ``batch_hard_triplet_loss``; 0: none.
        triplet_margin: its margin; None for the soft one.
        precision: "fp32", or "bf16" or "fp16" for autocast; the losses are computed in float32.
        scaler: the gradient scaler that fp16 needs.
        loss_factor: what the loss is multiplied by.
        accumulate: equal parts that the batch goes through the model in, one after the other, for less memory. The
            gradients are those of the whole batch, but for batch norm, which takes the statistics of each part. u and v
            of spectral normalisation are updated once, by the first part.

    Returns:
        The loss and the number of images whose summed logits name the right class: 0-dim, detached, on the
        device (so that reading them is the caller's decision, and the device is not waited for).
    """
    optimizer.zero_grad(set_to_none=True)
    total, correct = labels.new_zeros((), dtype=torch.float32), labels.new_zeros(())
    parts = zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True)
    for number, (part, names) in enumerate(parts, start=1):
        with ExitStack() as held:
            if number > 1:
                held.enter_context(without_updates(model))
            if number < accumulate and hasattr(model, "no_sync"):  # DDP averages gradients once, at the end
                held.enter_context(model.no_sync())  # type: ignore[operator]
            with torch.autocast(images.device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
                outputs = model(part)
            heads, feature = outputs if triplet else (outputs, None)
            logits = [each.float() for each in heads]
            losses = [F.cross_entropy(each, names, label_smoothing=label_smoothing) for each in logits]
            if feature is not None:
                losses.append(triplet * batch_hard_triplet_loss(feature.float(), names, triplet_margin))
            loss = torch.stack(losses).sum() * (loss_factor / accumulate)
            (loss if scaler is None else scaler.scale(loss)).backward()
        total += loss.detach()
        correct += (torch.stack([each.detach() for each in logits]).sum(0).argmax(1) == names).sum()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return total, correct


class TrainingDiverged(RuntimeError):
    """The loss or a weight is not finite. ``step`` is the first such step, of ``total_steps``."""

    def __init__(self, message: str, step: int, total_steps: int) -> None:
        super().__init__(message)
        self.step, self.total_steps = step, total_steps


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of torch's generators during one step in one of the processes, below 2^63."""
    key = f"{seed}:{step}" + f":{rank}" * (rank > 0)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


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


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """'auto' is a GPU if there is one; a device that is not here is a ValueError.

    local_rank: this process's number among those of its machine, each of which takes a GPU of its own.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"run.device = '{name}': expected auto, cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and local_rank is not None:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"run.device = '{name}': torch sees {torch.cuda.device_count()} CUDA devices")
    return device


class Trainer:
    """One run: the network, its optimiser, the position, and the files in the output folder.

    Args:
        state: a checkpoint's content to go on from, or None to start.
        job: the processes that train together, each with an equal share of every batch.
    """

    def __init__(
        self,
        config: Config,
        data: ReidData,
        out: Path,
        state: dict[str, Any] | None,
        stop: StopRequest,
        job: Job = ALONE,
    ) -> None:
        self.config, self.out, self.stop, self.job = config, out, stop, job
        self.device = pick_device(config.run.device, job.local_rank if job.size > 1 else None)
        self._check_processes(state)
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
        self._check_triplets()
        self.steps_per_epoch = steps_per_epoch(self.dataset, config.train.batch_size, config.train.images_per_identity)
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.total_steps = min(self.total_steps, config.train.max_steps or self.total_steps)

        torch.manual_seed(config.run.seed)
        keys = dataclasses.asdict(config.model)
        if state:  # the weights come from the checkpoint: nothing to download
            keys["weights"] = "none"
        self.model = SABMN(self.data.num_train_identities, **keys).to(self.device)
        self.model.with_feature = config.train.triplet > 0
        if config.train.sync_bn and job.size > 1:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
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
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.scaler = torch.amp.GradScaler(self.device.type) if config.run.precision == "fp16" else None
        self.network: nn.Module = self.model
        if job.size > 1:  # gradients are averaged; buffers, those of spectral normalisation too, are the first one's
            gpus = [self.device] if self.device.type == "cuda" else None
            self.network = nn.parallel.DistributedDataParallel(self.model, device_ids=gpus)
        if config.run.compile:  # checkpoints and evaluation keep to self.model
            self.network = torch.compile(self.network)  # type: ignore[assignment]

        self.step = self.saved_step = 0
        self.seconds = 0.0
        self.epoch_sums = {"steps": 0, "images": 0, "correct": 0, "loss": 0.0}  # of the epoch under way
        self.epoch_loss: float | None = None  # of the last whole one
        self.log: list[str] = []
        self.best: dict[str, Any] | None = None
        self.untrained: dict[str, Any] | None = None
        self.pending: list[tuple[Tensor, Tensor, int]] = []  # loss and hits, still on the device, and images
        if state:
            self._restore(state)
        self.bar: Any = None
        self.curves: Any = None

    def _check_processes(self, state: dict[str, Any] | None) -> None:
        """A ValueError where this number of processes cannot train as the settings and the run so far say."""
        size, batch = self.job.size, self.config.train.batch_size
        before = state.get("processes", 1) if state else size
        if before != size:
            raise ValueError(
                f"the run in {self.out} has trained with {before} process{'es' * (before > 1)} and cannot go on with"
                f" {size}: batch norm takes the statistics of each one's share of a batch, and each has dropout of its"
                f" own, so that the result would be that of neither. Start {before} again, or give a new --out"
            )
        if batch % size:
            raise ValueError(
                f"train.batch_size = {batch}, all processes together, cannot be shared equally by {size} processes:"
                f" give a multiple of {size}"
            )
        if batch % (size * self.config.train.accumulate):
            raise ValueError(
                f"train.accumulate = {self.config.train.accumulate}: expected a divisor of the {batch // size} images"
                f" that {'each process takes' if size > 1 else 'train.batch_size takes'} a step, since parts are equal"
            )
        if self.config.train.sync_bn and self.device.type != "cuda" and size > 1:
            raise ValueError(
                "train.sync_bn = true: torch's SyncBatchNorm needs a GPU for each process, and this run is on the"
                f" {self.device.type}. Without it, batch norm takes the statistics of each process's share,"
                f" {batch // size} images"
            )

    def _check_triplets(self) -> None:
        """A ValueError where the images that go through the network at once do not hold the loss's triplets."""
        size, keys = self.job.size, self.config.train
        images, parts = keys.images_per_identity, size * keys.accumulate
        share = keys.batch_size // parts
        if keys.triplet and (images < 2 or share % images or share == images):
            given = f"train.batch_size = {keys.batch_size}"
            if parts > 1:
                given += f", {share} at once (processes: {size}, train.accumulate = {keys.accumulate})"
            raise ValueError(
                f"train.triplet = {keys.triplet} with train.images_per_identity = {images} and {given}: the triplet"
                " loss needs 2 or more images of each identity, and 2 or more whole identities at once"
            )

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved_step = state["step"]
        self.seconds, self.epoch_sums = state["seconds"], state["epoch_sums"]
        self.log, self.best, self.untrained = state["log"], state["best"], state["untrained"]
        self.epoch_loss = state.get("epoch_loss")

    def save(self, name: str = "last.pt") -> None:
        """Write ``last.pt``, or ``best.pt``, which has no optimiser; refuses weights that are not finite.

        Every process calls it, the first one writes. The checkpoint before ``last.pt`` stays as ``previous.pt``.
        """
        self._settle()
        self._check_weights()
        if name == "last.pt":
            self.saved_step, self.saved_at = self.step, time.monotonic()
        if self.job.rank > 0:
            return
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
                "epoch_loss": self.epoch_loss,
                "log": self.log,
                "best": self.best,
                "untrained": self.untrained,
                "fingerprint": self.fingerprint,
                "processes": self.job.size,
            }
            if self.curves is not None:
                self.curves.flush()  # so that no point before the checkpoint is missing after a kill
        save_checkpoint(self.out / name, state, "previous.pt" if name == "last.pt" else None)

    def _check_weights(self) -> None:
        for key, value in self.model.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise self._not_finite(f"{key} has values that are not finite", self.step)

    def _not_finite(self, what: str, step: int) -> TrainingDiverged:
        message = (
            f"{what} at step {step} (epoch {(step - 1) // self.steps_per_epoch + 1}): the training diverged."
            f" The last good checkpoint is {self.out / 'last.pt'}, after step {self.saved_step}. Start again with"
            " lower rates (train.rate_backbone, train.rate_added), a warm-up (schedule.warmup_steps)"
            + (" or --precision fp32" if self.config.run.precision != "fp32" else "")
        )
        return TrainingDiverged(message, step, self.total_steps)

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def run(self) -> None:
        """Train from the present step to the last one, and leave ``last.pt`` behind."""
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        config = self.config
        self.started = self.settled_at = time.monotonic()
        self.write_log()
        if self.job.rank == 0:
            self.curves = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.step + 1)
        batch = config.train.batch_size
        self.bar = tqdm(
            total=self.total_steps * batch, initial=self.step * batch, unit=" images", dynamic_ncols=True,
            disable=None if config.run.progress and self.job.rank == 0 else True,
        )  # fmt: skip
        try:
            self.stop.at_once = False
            self.save()  # before the first step too, so that there is always something to go on from
            while self.step < self.total_steps:
                self.run_epoch(self.step // self.steps_per_epoch + 1)
            self.job.copy_buffers(self.model)
        finally:
            self.stop.at_once = True
            self.bar.close()
            if self.curves is not None:
                self.curves.close()
            self.seconds = self._seconds()

    def run_epoch(self, epoch: int) -> None:
        """The steps of one epoch that are left, its line in the log, and a checkpoint."""
        config = self.config
        self.network.train()
        batches: Iterable[tuple[Tensor, Tensor]] = train_batches(
            self.dataset,
            batch_size=config.train.batch_size,
            images_per_identity=config.train.images_per_identity,
            seed=config.run.seed,
            epoch=epoch,
            first_step=self.step % self.steps_per_epoch,
            workers=config.data.workers,
            transform=self.transform,
            device=self.device,
            rank=self.job.rank,
            processes=self.job.size,
        )
        self.bar.set_description(f"epoch {epoch}/{config.train.epochs}", refresh=False)
        signum = 0
        for images, labels in batches:
            self._one_step(images, labels, epoch)
            every, minutes = config.run.checkpoint_steps, config.run.checkpoint_minutes
            due = every > 0 and self.step % every == 0
            late = minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
            # All processes stop, and save, after the same step.
            signum, save = self.job.largest(self.stop.signum or 0, due or late)
            if signum or self.step % self.steps_per_epoch == 0 or self.step == self.total_steps:
                break  # the epoch's end has a checkpoint of its own
            if save:
                self.save()
        if self.step % self.steps_per_epoch == 0 or self.step == self.total_steps:
            self._end_epoch(epoch)
        self.save()
        if signum:
            where = f"after step {self.step} of {self.total_steps}, which is saved"
            raise TrainingInterrupted(signum, self.out, where)

    def _one_step(self, images: Tensor, labels: Tensor, epoch: int) -> None:
        config = self.config
        torch.manual_seed(step_seed(config.run.seed, self.step, self.job.rank))
        factor = rate_factor(self.step, epoch, self.total_steps, **dataclasses.asdict(config.schedule))
        for group in self.optimizer.param_groups:
            group["lr"] = self.full_rates[group["name"]] * factor
        if config.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        try:
            outcome = train_step(
                self.network,
                images,
                labels,
                self.optimizer,
                label_smoothing=config.train.label_smoothing,
                triplet=config.train.triplet,
                triplet_margin=config.train.triplet_margin,
                precision=config.run.precision,
                scaler=self.scaler,
                loss_factor=config.train.loss_factor,
                accumulate=config.train.accumulate,
            )
        except RuntimeError:  # spectral normalisation refuses weights that are not finite: name the cause, not it
            if self.job.size == 1:  # else it would wait for processes that have no such error
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
        sums = torch.cat((torch.stack(loss_tensors).double(), torch.stack(hits).sum().double()[None]))
        *losses, correct = self.job.exchange.add(sums.cpu().numpy()).tolist()
        losses = [loss / self.job.size for loss in losses]  # shares are equal: this is the whole batch's
        correct, images = int(correct), sum(sizes) * self.job.size
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
        for name, value in points.items() if self.curves is not None else ():
            self.curves.add_scalar(name, value, self.step)
        self.bar.set_postfix(loss=f"{points['loss']:.3f}", accuracy=f"{points['accuracy']:.1%}", refresh=False)

    def _end_epoch(self, epoch: int) -> None:
        self._settle()
        sums = self.epoch_sums
        self.epoch_loss = sums["loss"] / sums["steps"]
        line = (
            f"epoch {epoch}/{self.config.train.epochs}  step {self.step}  loss {self.epoch_loss:.4f}"
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
        if self.job.rank == 0:
            self.bar.write(line)
        sys.stdout.flush()  # a line an epoch, also where the output is a file

    def _validate(self, epoch: int) -> float:
        """Leave-one-out mAP on the held-out identities; keeps ``best.pt``."""
        assert self.held_out is not None
        self.job.copy_buffers(self.model)
        features = features_of(self.model, self.held_out.train, self.config, self.device, self.job)
        result = score(features, features, self.held_out.has_cameras, self.config, self.job)
        if self.curves is not None:
            self.curves.add_scalar("held_out_map", result.map, self.step)
        if self.best is None or result.map > self.best["held_out_map"]:
            self.best = {"epoch": epoch, "step": self.step, "held_out_map": float(result.map)}
            self.save("best.pt")
        return float(result.map)

    def write_log(self) -> None:
        """``log.txt`` is written whole each time: a resumed run has each line once."""
        if self.job.rank == 0:
            text = "".join(f"{line}\n" for line in self.log).encode()
            write_atomically(self.out / "log.txt", lambda file: file.write(text))


def train(config: Config, out: str | Path, resume: bool = False, job: Job = ALONE) -> dict[str, Any]:
    """Train by ``config`` into the folder ``out``, evaluate, and return what ``result.json`` holds.

    Writes ``config.toml``, ``last.pt``, ``previous.pt`` (the checkpoint before it), ``log.txt``, ``tensorboard/``,
    ``result.json``, ``report/`` and, where identities are held out, ``best.pt``. Nothing of query or gallery influences
    any of them but ``result.json`` and the report, whose figures are those of the last step.

    Args:
        resume: go on with the run that is in ``out``; its settings must be the same.
        job: the processes that train together (``processes.joined``); all of them call this and get the same result.

    Raises:
        ValueError: a run is in ``out`` already and ``resume`` is false; the settings, the data or the number of
            processes differ from those of the run to resume; settings that do not fit the data; another process trains
            in ``out`` at this moment.
        FileNotFoundError: there is nothing in ``out`` to resume.
        TrainingDiverged: the loss or a weight is not finite (names the step and the last good checkpoint).
        RuntimeError: another process of the job has ended.
        TrainingInterrupted: SIGINT or SIGTERM; all that was done is saved.
    """
    out = Path(out)
    with StopRequest(out) as stop, ExitStack() as held:

        def enter() -> None:
            if resume and not _holds_run(out):
                raise FileNotFoundError(f"nothing to resume in {out}: it holds no run (no config.toml, no last.pt)")
            if job.rank == 0:
                held.enter_context(only_run_in(out))
                if _holds_run(out) and not resume:
                    raise ValueError(f"{out} holds a run already: go on with it by --resume, or name another --out")
                if damage := repair(out):
                    print(f"note: {damage}", flush=True)

        try:
            job.run(enter)
            return _train(config, out, resume, job, stop)
        except TrainingDiverged:
            raise
        except RuntimeError as error:
            if job.size == 1 or not is_lost(error):
                raise
            raise RuntimeError(
                f"another of the {job.size} processes has ended or cannot be reached, and the run cannot go on without"
                f" it (its own message says why, unless it was killed; here: {str(error).strip().splitlines()[0]})."
                f" Start all of them again with --out {out} --resume: it goes on from the last checkpoint"
            ) from error


def _holds_run(out: Path) -> bool:
    return any((out / name).exists() for name in ("config.toml", "last.pt"))


def _train(config: Config, out: Path, resume: bool, job: Job, stop: StopRequest) -> dict[str, Any]:
    def say(text: str) -> None:
        if job.rank == 0:
            print(text, flush=True)

    last = out / "last.pt"
    state = job.run(lambda: load_checkpoint(last) if last.exists() else None)
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
        say(f"the run in {out} is finished; its result:")
        return json.loads((out / "result.json").read_text())
    path, keys = config.data.path, config.data
    data = job.first(lambda: load_data(path, format=keys.format, cameras=keys.cameras, with_val=keys.with_val))
    for note in data.notes:
        say(f"note: {note}")
    trainer = Trainer(config, data, out, state, stop, job)
    progress = config.run.progress and job.rank == 0
    too_large = job.run(
        lambda: cache_images(
            trainer.dataset, keys.cache, workers=keys.workers, sharers=job.local_size, progress=progress
        )
    )
    for remark in (too_large, slow_precision(config.run.precision, trainer.device)):
        if remark:
            say(f"note: {remark}")
    if resume:
        say(f"going on after step {trainer.step} of {trainer.total_steps}")
    if job.rank == 0:
        write_atomically(out / "config.toml", lambda file: file.write(to_toml(config).encode()))
    if trainer.untrained is None:
        say("retrieval before training ...")
        trainer.untrained = retrieval(trainer.model, data, config, trainer.device, job).to_dict()
    trainer.run()
    say("retrieval after training ...")
    figures, drawn = final_figures(trainer.model, data, config, trainer.device, job)
    result = {
        **figures,
        "seconds": round(trainer.seconds, 2),
        "steps": trainer.step,
        "loss": trainer.epoch_loss,
        "recipe": config.recipe,
        "data": data.name,
        "untrained": trainer.untrained,
        "best": trainer.best,
    }
    if job.rank == 0:
        write_atomically(out / "result.json", lambda file: file.write(json.dumps(result, indent=2).encode()))
        if config.run.report:
            write_run_report(out, config, trainer.model, trainer.device, result, drawn)
    return result
