"""Feature extraction: order, flip averaging, eval mode, precision, unreadable images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sabmn_ext.data.images import UnreadableImageError
from sabmn_ext.data.loader import image_batches
from sabmn_ext.data.records import ImageRecord
from sabmn_ext.retrieval.features import extract_features


class Columns(nn.Module):
    """Means of the image's columns, so that a mirrored image has mirrored features; halves them in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.dtypes: list[torch.dtype] = []

    def forward(self, images: Tensor) -> Tensor:
        product = images.flatten(1) @ torch.eye(images[0].numel())[:, :4]
        self.dtypes.append(product.dtype)
        features = self.frozen(self.norm(images)).mean(dim=(1, 2))
        return features / 2 if self.training else features


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(7):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (12, 6, 3), dtype=np.uint8)).save(path)
        made.append(ImageRecord(str(path), i, 0))
    return made


SIZE = {"height": 12, "width": 6, "batch_size": 3, "device": "cpu", "progress": False}


def test_features_are_the_models_in_the_records_order(records: list[ImageRecord]) -> None:
    model = Columns().train()
    model.frozen.eval()
    features = extract_features(model, records, **SIZE)
    images = torch.cat([batch for batch, _ in image_batches(records, height=12, width=6, batch_size=7)])
    assert (features.shape, features.dtype) == ((7, 6), torch.float32)
    torch.testing.assert_close(features, Columns().eval()(images).detach())
    assert not features.requires_grad
    assert (model.training, model.norm.training, model.frozen.training) == (True, True, False)  # as before
    assert torch.equal(model.norm.running_mean, torch.zeros(3))
    assert torch.equal(extract_features(model, records, **SIZE | {"batch_size": 7}), features)


def test_flip_averages_with_the_mirror_image(records: list[ImageRecord]) -> None:
    plain = extract_features(Columns(), records, **SIZE)
    torch.testing.assert_close(extract_features(Columns(), records, flip=True, **SIZE), (plain + plain.flip(1)) / 2)


def test_precision_is_autocast_and_features_stay_float32(records: list[ImageRecord]) -> None:
    model = Columns()
    assert extract_features(model, records, precision="bf16", **SIZE).dtype == torch.float32
    assert set(model.dtypes) == {torch.bfloat16}
    with pytest.raises(ValueError, match="'tf32' is unknown; expected one of fp32, bf16, fp16"):
        extract_features(model, records, precision="tf32", **SIZE)


def test_unreadable_images_stop_or_are_left_out(records: list[ImageRecord]) -> None:
    whole = extract_features(Columns(), records, **SIZE)
    Path(records[4].path).write_bytes(b"no image")
    model = Columns().train()
    with pytest.raises(UnreadableImageError, match=r"4\.png"):
        extract_features(model, records, **SIZE)
    assert model.training
    indices: list[int] = []
    with pytest.warns(UserWarning, match=r"4\.png"):
        features = extract_features(Columns(), records, on_error="skip", indices=indices, **SIZE)
    assert indices == [0, 1, 2, 3, 5, 6]
    assert torch.equal(features, whole[indices])
    with (
        pytest.raises(ValueError, match="none of the 1 images could be read"),
        pytest.warns(UserWarning, match=r"4\.png"),
    ):
        extract_features(Columns(), records[4:5], on_error="skip", **SIZE)
    with pytest.raises(ValueError, match="there are no images"):
        extract_features(Columns(), [], **SIZE)
