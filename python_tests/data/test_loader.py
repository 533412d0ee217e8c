"""Batches are functions of (seed, epoch, step): workers, resuming and global random state change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_data import write_image

from sabmn_ext.data import (
    ImageDataset,
    ImageRecord,
    TrainTransform,
    UnreadableImageError,
    cache_images,
    image_batches,
    load_image,
    normalize,
    steps_per_epoch,
    train_batches,
)

TRANSFORM = TrainTransform(8, 4, padding=1)
PLAIN = TrainTransform(8, 4, flip_probability=0, erasing="none")
Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    return [ImageRecord(str(write_image(tmp_path / f"{i:02d}.png", i)), i // 2, 1) for i in range(22)]


def batches(dataset: ImageDataset, transform: TrainTransform = TRANSFORM, **options: int) -> Batches:
    settings = {"batch_size": 4, "seed": 3, "epoch": 2} | options
    return list(train_batches(dataset, transform=transform, **settings))


def same(a: Batches, b: Batches) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True)
    )


def test_an_epoch_is_a_shuffle_without_the_incomplete_batch(records: list[ImageRecord]) -> None:
    dataset = ImageDataset(records, list(range(22)), 8, 4)
    assert steps_per_epoch(dataset, 4) == 5
    found = batches(dataset, PLAIN)
    assert [images.shape for images, _ in found] == [(4, 3, 8, 4)] * 5
    labels = torch.cat([labels for _, labels in found])
    assert labels.dtype == torch.int64
    assert len(set(labels.tolist())) == 20
    assert labels.tolist() != sorted(labels.tolist())
    for images, which in found:  # images and labels belong together
        expected = torch.stack([load_image(records[i].path, 8, 4) for i in which.tolist()])
        assert torch.equal(images, normalize(expected))


def test_workers_and_global_random_state_change_nothing(records: list[ImageRecord]) -> None:
    dataset = ImageDataset(records, None, 8, 4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = batches(dataset)
    assert torch.equal(torch.get_rng_state(), before)  # dropout's stream, for one, is not disturbed
    torch.manual_seed(1)
    assert same(first, batches(dataset, workers=2))
    assert same(first, batches(dataset, workers=1))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_images_in_memory_and_shares_give_the_same_batches(records: list[ImageRecord], processes: int) -> None:
    dataset, in_memory = (ImageDataset(records, list(range(22)), 8, 4) for _ in range(2))
    assert cache_images(in_memory, "ram") is None
    whole = batches(dataset, first_step=1)
    for kind in (dataset, in_memory):
        shares = [batches(kind, first_step=1, rank=rank, processes=processes) for rank in range(processes)]
        joined = [
            (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))
            for parts in zip(*shares, strict=True)
        ]
        assert same(joined, whole)


def test_first_step_goes_on_exactly_and_decodes_nothing_before(records: list[ImageRecord]) -> None:
    dataset = ImageDataset(records, None, 8, 4)
    whole = batches(dataset)
    decoded: list[int] = []

    class Counting(ImageDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
            decoded.append(index)
            return super().__getitem__(index)

    assert same(whole[3:], batches(Counting(records, None, 8, 4), first_step=3))
    assert len(decoded) == 8
    assert same(whole[3:], batches(dataset, first_step=3, workers=2))
    assert batches(dataset, first_step=5) == []


def test_seed_epoch_and_step_each_matter(records: list[ImageRecord]) -> None:
    dataset = ImageDataset(records, None, 8, 4)
    whole = batches(dataset)
    assert same(whole, batches(dataset))
    assert not same(whole, batches(dataset, seed=4))
    assert not same(whole, batches(dataset, epoch=3))
    # The same 4 images in every batch: only the augmentation can differ, and it does, from step to step.
    four = ImageDataset([records[0]] * 16, None, 8, 4)
    steps = [images for images, _ in batches(four)]
    assert not any(torch.equal(a, b) for i, a in enumerate(steps) for b in steps[:i])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_training_images_stop_or_are_replaced_and_named(
    records: list[ImageRecord], workers: int
) -> None:
    Path(records[5].path).write_bytes(b"broken")
    with pytest.raises(UnreadableImageError, match=r"05\.png"):
        batches(ImageDataset(records, None, 8, 4), batch_size=22, workers=workers)
    dataset = ImageDataset(records, list(range(22)), 8, 4, on_error="skip")
    with pytest.warns(UserWarning, match=r"skipped unreadable image .*05\.png, took .*06\.png instead"):
        ((_, labels),) = batches(dataset, batch_size=22, workers=workers)
    assert sorted(labels.tolist()) == [0, 1, 2, 3, 4, 6, 6, *range(7, 22)]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_keeps_the_order_and_every_image(records: list[ImageRecord], workers: int) -> None:
    found = list(image_batches(records, height=8, width=4, batch_size=5, workers=workers))
    assert [indices for _, indices in found] == [list(range(i, min(i + 5, 22))) for i in range(0, 22, 5)]
    expected = normalize(torch.stack([load_image(record.path, 8, 4) for record in records]))
    assert torch.equal(torch.cat([images for images, _ in found]), expected)


def test_evaluation_stops_at_an_unreadable_image_or_leaves_it_out(records: list[ImageRecord]) -> None:
    for i in (1, 2, 3, 7):
        Path(records[i].path).write_bytes(b"broken")
    with pytest.raises(UnreadableImageError, match=r"01\.png"):
        list(image_batches(records, height=8, width=4, batch_size=3))
    with pytest.warns(UserWarning, match=r"skipped: cannot read image .*\.png") as warned:
        found = list(image_batches(records[1:8], height=8, width=4, batch_size=3, on_error="skip"))
    assert [indices for _, indices in found] == [[3, 4, 5]]  # the first and the last batch are empty
    assert len(warned) == 4


def test_arguments_are_checked(records: list[ImageRecord]) -> None:
    dataset = ImageDataset(records, None, 8, 4)
    for size in (0, 23):
        with pytest.raises(
            ValueError, match=f"batch_size must be in 1 … 22, the number of images; got {size}"
        ):
            steps_per_epoch(dataset, size)
    with pytest.raises(ValueError, match="0 or more, got -1, 2, 0"):
        batches(dataset, seed=-1)
    for rank, processes in ((0, 3), (2, 2)):
        with pytest.raises(ValueError, match=f"cannot be shared equally by {processes} processes"):
            batches(dataset, rank=rank, processes=processes)
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        list(image_batches(records, height=8, width=4, batch_size=0))
    with pytest.raises(ValueError, match="'stop' or 'skip'"):
        list(image_batches(records, height=8, width=4, batch_size=1, on_error="drop"))
