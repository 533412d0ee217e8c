"""Identity sampling: batches of P identities with K images each (Hermans, Beyer and Leibe, 2017, arXiv:1703.07737)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_identity_batches(labels: Sequence[int], batch_size: int, images_per_identity: int) -> None:
    """A ValueError where no batch of that size can hold whole identities, all of them different."""
    if batch_size % images_per_identity:
        raise ValueError(
            f"batch_size {batch_size} is no multiple of images_per_identity {images_per_identity}:"
            " a batch holds P identities with K images each and is P·K large"
        )
    wanted, there = batch_size // images_per_identity, len(set(labels))
    if wanted > there:
        raise ValueError(
            f"batch_size {batch_size} with images_per_identity {images_per_identity} asks for {wanted} identities a"
            f" batch, and there are {there}: give a smaller batch or more images of each"
        )


def identity_order(
    labels: Sequence[int], batch_size: int, images_per_identity: int, steps: int, generator: torch.Generator
) -> list[int]:
    """The indices of ``steps`` batches, one after the other, each with the images of an identity side by side.

    All identities have their turn, in random order, before one comes again (but for fewer than P, which a pass leaves
    over: drawn anew in each); so have all images of an identity, in groups of K, the last of which is filled up from
    the first. An identity with fewer than K images repeats them.
    """
    check_identity_batches(labels, batch_size, images_per_identity)
    images: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        images.setdefault(label, []).append(index)
    identities = sorted(images)
    whole = len(identities) - len(identities) % (batch_size // images_per_identity)
    waiting: dict[int, list[list[int]]] = {label: [] for label in identities}
    order: list[int] = []
    while len(order) < steps * batch_size:
        for which in torch.randperm(len(identities), generator=generator)[:whole].tolist():
            label = identities[which]
            if not waiting[label]:
                own = images[label]
                shuffled = [own[i] for i in torch.randperm(len(own), generator=generator).tolist()]
                starts = range(0, len(own), images_per_identity)
                waiting[label] = [
                    [shuffled[(start + i) % len(own)] for i in range(images_per_identity)] for start in starts
                ]
            order += waiting[label].pop()
    return order[: steps * batch_size]
