"""Batches for training and evaluation. Workers only decode; all that is random is drawn here."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .identities import check_identity_batches, identity_order
from .images import ImageDataset, UnreadableImageError, check_on_error, load_image
from .records import ImageRecord
from .transforms import TrainTransform, normalize

_ORDER, _AUGMENTATION = 1, 2  # keep the random streams of one seed apart


def _generator(*key: int) -> torch.Generator:
    """A generator whose seed is a hash of the key, so that neighbouring steps have nothing in common."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed >> 1)


def steps_per_epoch(dataset: ImageDataset, batch_size: int, images_per_identity: int = 0) -> int:
    """Whole batches in one pass (the last incomplete one is dropped); a ValueError if there is none.

    images_per_identity: as in train_batches; a ValueError too if no batch can be made of such groups.
    """
    if not 1 <= batch_size <= len(dataset):
        raise ValueError(f"batch_size must be in 1 … {len(dataset)}, the number of images; got {batch_size}")
    if images_per_identity:
        check_identity_batches(dataset.labels, batch_size, images_per_identity)
    return len(dataset) // batch_size


def train_batches(
    dataset: ImageDataset,
    *,
    batch_size: int,
    images_per_identity: int = 0,
    seed: int,
    epoch: int,
    first_step: int = 0,
    workers: int = 0,
    transform: TrainTransform,
    device: str | torch.device = "cpu",
    rank: int = 0,
    processes: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of (images float32 [B, 3, H, W], labels int64 [B]), shuffled, incomplete last batch dropped.

    Order and augmentation are functions of (seed, epoch, step) alone: any number of workers gives the same
    batches, with images in memory (cache_images) or without, on any device; first_step leaves the earlier ones out
    without decoding them, and torch's global generator is neither read nor moved. seed, epoch and first_step are 0
    or more.

    images_per_identity: 0 for a plain shuffle, else K of identity sampling (identity_order): as many batches, each of
        batch_size / K labels with K images of each side by side.
    device: where images are augmented, and where they and the labels end up.
    rank, processes: of every batch only this process's share, the rank-th of `processes` equal parts, in order.
    """
    steps = steps_per_epoch(dataset, batch_size, images_per_identity)
    if min(seed, epoch, first_step) < 0:
        raise ValueError(f"seed, epoch and first_step must be 0 or more, got {seed}, {epoch}, {first_step}")
    if batch_size % processes or not 0 <= rank < processes:
        raise ValueError(f"batch_size {batch_size} cannot be shared equally by {processes} processes (rank {rank})")
    size = batch_size // processes
    share = slice(rank * size, (rank + 1) * size)
    generator = _generator(_ORDER, seed, epoch)
    if images_per_identity:
        order = identity_order(dataset.labels, batch_size, images_per_identity, steps, generator)
    else:
        order = torch.randperm(len(dataset), generator=generator).tolist()
    batches = [order[step * batch_size : (step + 1) * batch_size][share] for step in range(first_step, steps)]
    device = torch.device(device)
    items: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    if dataset.pixels is not None:  # a worker would copy them once more
        items = map(dataset.batch, batches)
    else:
        items = DataLoader(dataset, batch_sampler=batches, num_workers=workers, generator=torch.Generator())
    for step, (images, labels, indices) in enumerate(items, first_step):
        for wanted, given in zip(batches[step - first_step], indices.tolist(), strict=True):
            if wanted != given:
                paths = dataset.records[wanted].path, dataset.records[given].path
                warnings.warn(f"skipped unreadable image {paths[0]}, took {paths[1]} instead", stacklevel=2)
        if device.type == "cuda":  # the copy to the device then runs beside the computation there
            images, labels = images.pin_memory(), labels.pin_memory()
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        yield transform(images, _generator(_AUGMENTATION, seed, epoch, step), share, batch_size), labels


class _EvaluationImages(Dataset[tuple[torch.Tensor | str, int]]):
    """Item i is (image uint8 [3, H, W], i), or (what is wrong, i) if unreadable images are skipped."""

    def __init__(self, records: Sequence[ImageRecord], height: int, width: int, on_error: str) -> None:
        self.records, self.size, self.on_error = records, (height, width), on_error

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | str, int]:
        try:
            return load_image(self.records[index].path, *self.size), index
        except UnreadableImageError as error:
            if self.on_error == "stop":
                raise
            return str(error), index


def image_batches(
    records: Sequence[ImageRecord],
    *,
    height: int,
    width: int,
    batch_size: int,
    workers: int = 0,
    on_error: str = "stop",
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """All images in order as (normalised float32 [B, 3, height, width], their indices in `records`).

    on_error: "stop" raises UnreadableImageError; "skip" leaves the image out, so that its index never
    appears, and warns with the file's name.
    """
    check_on_error(on_error)
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    dataset = _EvaluationImages(list(records), height, width, on_error)
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=list,
                        generator=torch.Generator())  # fmt: skip
    for items in loader:
        images, indices = [], []
        for image, index in items:
            if isinstance(image, str):
                warnings.warn(f"skipped: {image}", stacklevel=2)
            else:
                images.append(image)
                indices.append(index)
        if images:
            yield normalize(torch.stack(images)), indices
