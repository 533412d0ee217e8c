"""Augmentation: exact where it is fixed, by its distribution (fixed seeds) where it is random."""

from __future__ import annotations

import math

import pytest
import torch

from sabmn_ext.data import TrainTransform, normalize
from sabmn_ext.data.transforms import ERASING, erasing_boxes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(batch: int, height: int = 16, width: int = 8) -> torch.Tensor:
    return torch.randint(256, (batch, 3, height, width), generator=generator(7), dtype=torch.uint8)


def test_normalize_is_imagenets() -> None:
    images = random_images(2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert normalize(images).dtype == torch.float32
    torch.testing.assert_close(normalize(images).double(), expected, rtol=1e-5, atol=1e-5)


def test_steps_name_what_is_done_in_order() -> None:
    assert TrainTransform(16, 8).steps == ["resize", "flip", "normalize", "erase"]
    assert TrainTransform(16, 8, padding=2).steps == ["resize", "flip", "pad_crop", "normalize", "erase"]
    assert TrainTransform(16, 8, flip_probability=0, erasing="none").steps == ["resize", "normalize"]
    assert TrainTransform(16, 8, erasing_probability=0).steps == ["resize", "flip", "normalize"]


def test_nothing_on_is_normalize_alone_and_leaves_the_input() -> None:
    images = random_images(4)
    before = images.clone()
    plain = TrainTransform(16, 8, flip_probability=0, erasing="none")
    assert torch.equal(plain(images, generator()), normalize(images))
    TrainTransform(16, 8, padding=2, flip_probability=1, erasing_probability=1)(images, generator())
    assert torch.equal(images, before)


def test_flip_is_of_whole_images_left_to_right_with_the_given_probability() -> None:
    images = random_images(2000)
    out = TrainTransform(16, 8, flip_probability=0.3, erasing="none")(images, generator())
    kept = (out == normalize(images)).flatten(1).all(1)
    flipped = (out == normalize(images.flip(3))).flatten(1).all(1)
    assert torch.equal(kept, ~flipped)
    assert abs(flipped.float().mean().item() - 0.3) < 3 * math.sqrt(0.3 * 0.7 / 2000)


def test_pad_and_crop_reaches_every_offset_evenly() -> None:
    images = random_images(1).expand(2500, -1, -1, -1)
    out = TrainTransform(16, 8, flip_probability=0, padding=2, erasing="none")(images, generator())
    padded = torch.zeros(1, 3, 20, 12, dtype=torch.uint8)
    padded[:, :, 2:18, 2:10] = images[:1]
    counts = [
        (out == normalize(padded[:, :, y : y + 16, x : x + 8])).flatten(1).all(1).sum().item()
        for y in range(5)
        for x in range(5)
    ]
    assert sum(counts) == 2500  # 25 offsets, each seen about 100 times
    assert 60 < min(counts) <= max(counts) < 140


@pytest.mark.parametrize(
    ("kind", "area", "aspect"),
    [("field", (0.02, 0.4), (0.3, 1 / 0.3)), ("torchvision", (0.02, 0.33), (0.3, 3.3))],
)
def test_erasing_geometry(kind: str, area: tuple[float, float], aspect: tuple[float, float]) -> None:
    height = width = 400  # square and large: hardly a box is rejected, and rounding is small
    boxes = erasing_boxes(kind, 4000, height, width, generator())
    top, left, h, w = boxes.double().T
    assert h.min() > 0, "each image has a box"
    assert min(top.min(), left.min()) >= 0
    assert max((top + h - height).max(), (left + w - width).max()) <= 0
    share, ratio = h * w / (height * width), h / w
    assert area[0] * 0.95 < share.min() < area[0] * 1.2
    assert area[1] * 0.95 < share.max() < area[1] * 1.02
    assert aspect[0] * 0.95 < ratio.min() < aspect[0] * 1.1
    assert aspect[1] * 0.9 < ratio.max() < aspect[1] * 1.05
    # Below the areas where tall and wide boxes are rejected, the law of the ratio shows undisturbed: uniform
    # for "field" (median (0.3 + 3.33) / 2), log-uniform for "torchvision" (median sqrt(0.3 · 3.3)).
    expected = sum(aspect) / 2 if kind == "field" else math.sqrt(aspect[0] * aspect[1])
    assert abs(ratio[share < 0.25].median().item() / expected - 1) < 0.06
    free = (top / (height - h))[(h < 200) & (w < 200)]  # places are uniform over those that fit
    assert abs(free.mean().item() - 0.5) < 0.03
    assert abs(free.std().item() - math.sqrt(1 / 12)) < 0.02


def test_boxes_that_do_not_fit_are_drawn_again() -> None:
    # In a 100 × 10 image a box of aspect near 0.3 is wider than the image for nearly all areas.
    boxes = erasing_boxes("field", 500, 100, 10, generator())
    assert ((boxes[:, 2:] > 0) & (boxes[:, 2:] < torch.tensor([100, 10]))).all()
    assert not erasing_boxes("torchvision", 3, 1000, 1, generator()).any()  # every box is wider than 2


def boxes_one_by_one(kind: str, batch: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """The first box that fits of each image, by its definition."""
    (low, high), (narrow, tall), logarithmic, tries = ERASING[kind]
    draws = torch.rand((batch, tries, 4), generator=generator(), dtype=torch.float64).tolist()
    found = []
    for image in draws:
        box = (0, 0, 0, 0)
        for a, b, c, d in image:
            area = (low + (high - low) * a) * height * width
            aspect = narrow * (tall / narrow) ** b if logarithmic else narrow + (tall - narrow) * b
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                box = (int(c * (height - h + 1)), int(d * (width - w + 1)), h, w)
                break
        found.append(box)
    return found


@pytest.mark.parametrize("kind", ["field", "torchvision"])
def test_boxes_are_the_first_that_fit(kind: str) -> None:
    for height, width in ((100, 10), (33, 17)):  # in the narrow one many images need more than the first tries
        found = erasing_boxes(kind, 300, height, width, generator())
        assert list(map(tuple, found.tolist())) == boxes_one_by_one(kind, 300, height, width)


def test_a_batch_is_augmented_as_its_images_are_one_by_one() -> None:
    images = random_images(40, 17, 9)
    transform = TrainTransform(17, 9, padding=3, erasing_probability=0.7)
    out = transform(images, generator(3))
    flips, corners, boxes = transform.draw(40, generator(3))
    assert 5 < flips.sum() < 35
    for i in range(40):
        image = images[i].flip(2) if flips[i] else images[i]
        y, x = corners[i].tolist()
        expected = normalize(torch.nn.functional.pad(image, (3,) * 4)[None, :, y : y + 17, x : x + 9])[0]
        top, left, h, w = boxes[i].tolist()
        expected[:, top : top + h, left : left + w] = 0
        assert torch.equal(out[i], expected), i


def test_shares_of_a_batch_are_augmented_as_the_whole() -> None:
    images, transform = random_images(12), TrainTransform(16, 8, padding=2)
    whole = transform(images, generator(5))
    shares = [slice(0, 4), slice(4, 8), slice(8, 12)]
    parts = [transform(images[share], generator(5), share, 12) for share in shares]
    assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(ValueError, match="for each of 12 images, got 4"):
        transform(images, generator(5), slice(0, 4))


@pytest.mark.parametrize("kind", ["field", "torchvision"])
def test_erased_pixels_are_zero_and_the_rest_is_untouched(kind: str) -> None:
    images = random_images(1500, 32, 16)
    transform = TrainTransform(32, 16, flip_probability=0, erasing=kind, erasing_probability=0.4)
    out, plain = transform(images, generator()), normalize(images)
    changed = (out != plain).any(1)  # [B, H, W]; normalised noise is never exactly 0
    assert (out.movedim(1, -1)[changed] == 0).all()
    share = changed.flatten(1).any(1).double().mean().item()
    assert abs(share - 0.4) < 3 * math.sqrt(0.4 * 0.6 / 1500)
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    assert torch.equal(changed.sum((1, 2)), rows * columns)  # one full box


def test_the_generator_alone_decides() -> None:
    images, transform = random_images(8), TrainTransform(16, 8, padding=2)
    torch.manual_seed(1)
    first = transform(images, generator(5))
    torch.manual_seed(2)
    assert torch.equal(first, transform(images, generator(5)))
    assert not torch.equal(first, transform(images, generator(6)))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, 16, 8\], got torch.uint8 \[1, 3, 8, 16\]"):
        TrainTransform(16, 8)(random_images(1, 8, 16), generator())
    with pytest.raises(ValueError, match="field, torchvision, none, got 'random'"):
        TrainTransform(16, 8, erasing="random")
    with pytest.raises(ValueError, match="padding must be 0 or more pixels, got -1"):
        TrainTransform(16, 8, padding=-1)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1.5 and 0.5"):
        TrainTransform(16, 8, flip_probability=1.5)
