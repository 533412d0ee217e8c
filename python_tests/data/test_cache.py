"""Images in memory: the same as decoded ones, only where they fit, shared with workers, unreadable ones named."""

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
    cache,
    cache_images,
    train_batches,
)

PLAIN = TrainTransform(8, 4)


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    return [ImageRecord(str(write_image(tmp_path / f"{i:02d}.png", i)), i // 2, 1) for i in range(9)]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_decoded_once(records: list[ImageRecord], workers: int, monkeypatch) -> None:
    monkeypatch.setattr(cache, "_BATCH", 4)
    decoded = ImageDataset(records, None, 8, 4)
    expected = [decoded[i][0] for i in range(9)]
    dataset = ImageDataset(records, None, 8, 4)
    assert cache_images(dataset, "ram", workers=workers) is None
    assert dataset.pixels is not None
    assert dataset.pixels.dtype == torch.uint8
    assert torch.equal(dataset.pixels, torch.stack(expected))
    for record in records:  # from now on nothing is read
        Path(record.path).unlink()
    images, labels, indices = dataset.batch([7, 2, 7])
    assert torch.equal(images, torch.stack([expected[i] for i in (7, 2, 7)]))
    assert labels.tolist() == [3, 1, 3]
    assert indices.tolist() == [7, 2, 7]


def test_auto_keeps_half_of_the_memory_free(records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 9 * 3 * 8 * 4
    for available, sharers, fits in ((2 * needed, 1, True), (2 * needed - 1, 1, False), (5 * needed, 3, False)):
        monkeypatch.setattr(cache, "available_memory", lambda available=available: available)
        dataset = ImageDataset(records, None, 8, 4)
        note = cache_images(dataset, sharers=sharers)
        assert (note is None) == (dataset.pixels is not None) == fits
        assert fits or "more than half of the" in note
    assert cache_images(dataset, "ram") is None
    assert dataset.pixels is not None
    dataset = ImageDataset(records, None, 8, 4)
    assert cache_images(dataset, "off") is None
    assert dataset.pixels is None
    with pytest.raises(RuntimeError, match="call cache_images first"):
        dataset.batch([0])
    with pytest.raises(ValueError, match="one of auto, ram, off, got 'disk'"):
        cache_images(dataset, "disk")


def test_available_memory_is_within_a_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cache.available_memory()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(cache, "_LIMIT", limit)
    limit.write_text("12345\n")
    assert cache.available_memory() == (12345 if whole else 0)
    limit.write_text("max\n")
    assert (cache.available_memory() > 0) == (whole > 0)


def test_unreadable_images_stop_or_are_replaced_and_named(records: list[ImageRecord]) -> None:
    Path(records[5].path).write_bytes(b"broken")
    dataset = ImageDataset(records, None, 8, 4)
    with pytest.raises(UnreadableImageError, match=r"05\.png"):
        cache_images(dataset, "ram")
    assert dataset.pixels is None
    in_memory, decoded = (ImageDataset(records, list(range(9)), 8, 4, on_error="skip") for _ in range(2))
    cache_images(in_memory, "ram")
    found = []
    for kind in (in_memory, decoded):
        with pytest.warns(UserWarning, match=r"skipped unreadable image .*05\.png, took .*06\.png instead"):
            found += list(train_batches(kind, batch_size=9, seed=0, epoch=1, transform=PLAIN))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert sorted(found[0][1].tolist()) == [0, 1, 2, 3, 4, 6, 6, 7, 8]
