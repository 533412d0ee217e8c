"""P x K batches: whole identities, every image in its turn, and all that holds for plain batches too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from fake_data import write_image

from sabmn_ext.data import ImageDataset, ImageRecord, TrainTransform, cache_images, steps_per_epoch, train_batches
from sabmn_ext.data.identities import check_identity_batches, identity_order

SIZES = (7, 1, 4, 8, 3, 4, 2)  # images of each identity
LABELS = [label for label, size in enumerate(SIZES) for _ in range(size)]


def order(steps: int, seed: int = 0, labels: list[int] = LABELS, p: int = 3, k: int = 4) -> list[int]:
    return identity_order(labels, p * k, k, steps, torch.Generator().manual_seed(seed))


def test_a_batch_holds_p_identities_with_k_images_each(seed: int) -> None:
    shuffled = [LABELS[i] for i in torch.randperm(len(LABELS)).tolist()]  # identities need not lie together
    found = order(50, seed, shuffled)
    assert len(found) == 50 * 12
    for step in range(50):
        groups = [found[12 * step + 4 * i : 12 * step + 4 * (i + 1)] for i in range(3)]
        identities = [{shuffled[i] for i in group} for group in groups]
        assert all(len(each) == 1 for each in identities)
        assert len(set.union(*identities)) == 3, "an identity twice in a batch"
        for group, (label,) in zip(groups, identities, strict=True):
            assert len(set(group)) == min(4, SIZES[label]), "repeated only where there are fewer than K"
            assert max(Counter(group).values()) == -(-4 // SIZES[label])


def test_all_have_their_turn_before_one_comes_again(seed: int) -> None:
    found = order(2 * 60, seed)
    passes = [found[24 * i : 24 * (i + 1)] for i in range(60)]  # two batches: six of seven identities
    identities = [[LABELS[i] for i in each[::4]] for each in passes]
    assert all(len(set(each)) == 6 for each in identities)
    left_over = {label for each in identities for label in set(range(7)) - set(each)}
    assert left_over == set(range(7)), "not always the same one"
    assert len({tuple(each) for each in identities}) > 1
    for label, size in enumerate(SIZES):
        groups = [found[i : i + 4] for i in range(0, len(found), 4) if LABELS[found[i]] == label]
        rounds = -(-size // 4)
        for first in range(0, len(groups) // rounds * rounds, rounds):
            seen = {index for group in groups[first : first + rounds] for index in group}
            assert seen == {i for i, each in enumerate(LABELS) if each == label}


def test_a_function_of_the_generator_alone() -> None:
    assert order(20, 1) == order(20, 1)
    assert order(20, 1)[: 5 * 12] == order(5, 1)
    assert order(20, 1) != order(20, 2)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"batch_size 10 is no multiple of images_per_identity 4: .*P·K"):
        check_identity_batches(LABELS, 10, 4)
    with pytest.raises(ValueError, match=r"batch_size 32 with .* 4 asks for 8 identities a batch, and there are 7"):
        check_identity_batches(LABELS, 32, 4)
    check_identity_batches(LABELS, 28, 4)


@pytest.fixture
def dataset(tmp_path: Path) -> ImageDataset:
    records = [ImageRecord(str(write_image(tmp_path / f"{i:02d}.png", i)), label, 1) for i, label in enumerate(LABELS)]
    return ImageDataset(records, LABELS, 8, 4)


def test_workers_memory_processes_and_first_step_give_the_same_batches(dataset: ImageDataset) -> None:
    def batches(seed: int = 3, **options: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        settings = {"batch_size": 8, "images_per_identity": 2, "seed": seed, "epoch": 2} | options
        return list(train_batches(dataset, transform=TrainTransform(8, 4, padding=1), **settings))

    def same(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        pairs = zip(a, b, strict=True)
        return all(torch.equal(x, y) for one, other in pairs for x, y in zip(one, other, strict=True))

    state = torch.get_rng_state()
    whole = batches()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(whole) == steps_per_epoch(dataset, 8, 2) == len(LABELS) // 8 == 3
    assert all(sorted(Counter(labels.tolist()).values()) == [2] * 4 for _, labels in whole)
    assert same(batches(workers=2), whole)
    assert same(batches(first_step=1), whole[1:])
    assert not same(batches(seed=4), whole)
    assert not same(batches(epoch=3), whole)
    assert cache_images(dataset, "ram") is None
    assert same(batches(), whole)
    shares = [batches(rank=rank, processes=4) for rank in range(4)]
    joined = [tuple(torch.cat(parts) for parts in zip(*step, strict=True)) for step in zip(*shares, strict=True)]
    assert same(joined, whole)
    with pytest.raises(ValueError, match="no multiple of images_per_identity 3"):
        steps_per_epoch(dataset, 8, 3)
