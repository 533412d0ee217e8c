"""Extractor: one picture has one feature, in whatever form it comes; anything else is refused and named."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_checkpoint import write_checkpoint, write_images

import sabmn_ext
from sabmn_ext.data.images import UnreadableImageError
from sabmn_ext.data.records import ImageRecord
from sabmn_ext.retrieval.features import extract_features
from sabmn_ext.training.checkpoint import FORMAT, load_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_files_as_the_evaluation_has_them(extractor: sabmn_ext.Extractor, tmp_path: Path) -> None:
    paths = write_images(tmp_path, [f"{i}.png" for i in range(10)])
    model, config = load_model(extractor.checkpoint)
    records = [ImageRecord(str(path), 0, 0) for path in paths]
    for flip in (False, True):
        options: dict[str, Any] = {"height": 32, "width": 16, "batch_size": 4, "device": "cpu", "flip": flip}
        expected = extract_features(model, records, progress=False, **options)
        found = sabmn_ext.Extractor(extractor.checkpoint, device="cpu", flip=flip)(paths)
        assert (found.shape, found.dtype, found.requires_grad) == ((10, 16), torch.float32, False)
        assert torch.equal(found, expected)
    assert (extractor.height, extractor.width, extractor.feature_dim) == (32, 16, 16)
    assert (extractor.metric, extractor.flip) == (config["evaluation"]["metric"], False)
    assert not torch.equal(found, extractor(paths))


def test_one_picture_in_every_form(extractor: sabmn_ext.Extractor, tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, ["a.png"])
    image = Image.open(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = extractor(path)
    assert expected.shape == (1, 16)
    transparent = np.concatenate((array, np.full((*array.shape[:2], 1), 255, np.uint8)), axis=2)
    forms = [str(path), [path], image, (array,), array[None], tensor, tensor[None], tensor.float() / 255]
    forms += [array / 255, np.asfortranarray(array), tensor.double() / 255, (x for x in [image]), transparent]
    for form in forms:
        assert torch.equal(extractor(form), expected), type(form)
    assert image.mode == "RGB"  # untouched
    mixed = extractor([tensor, str(path), image, array, path])
    assert torch.allclose(mixed, expected.expand(5, -1), atol=1e-5)
    gray = array[:, :, 0]
    three = np.repeat(gray[:, :, None], 3, axis=2)
    for form in (gray, gray[:, :, None], torch.from_numpy(gray.copy())[None], Image.fromarray(gray)):
        assert torch.equal(extractor(form), extractor(three))


def test_nothing_gives_no_rows(extractor: sabmn_ext.Extractor) -> None:
    assert extractor([]).shape == (0, 16)
    assert extractor(torch.empty(0, 3, 8, 8)).shape == (0, 16)


def test_a_batch_of_any_size(extractor: sabmn_ext.Extractor) -> None:
    images = torch.rand(9, 3, 40, 33)
    found = extractor(images)
    one_by_one = torch.cat([extractor(image) for image in images])
    assert torch.allclose(found, one_by_one, atol=1e-5)
    assert not torch.allclose(found[:1], found[1:2], atol=1e-3)


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (3, TypeError, "image 1: a int is no image; expected a path, a PIL image"),
        (None, TypeError, "image 1: a NoneType is no image"),
        (np.zeros((8, 8, 5), np.uint8), ValueError, r"image 1: shape \[8, 8, 5\] is no image"),
        (torch.zeros(8, 8, 3), ValueError, r"image 1: shape \[8, 8, 3\] is no image"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, r"image 1: shape \[0, 8, 3\]"),
        (np.full((8, 8, 3), 200.0), ValueError, "floating pixels from 200 to 200; expected 0 to 1"),
        (torch.randn(3, 8, 8), ValueError, "not normalised"),
        (torch.full((3, 8, 8), torch.nan), ValueError, "floating pixels from nan"),
        (np.zeros((8, 8, 3), np.int64), TypeError, "image 1: pixels of dtype int64; expected uint8"),
    ],
)
def test_what_is_no_image(extractor: sabmn_ext.Extractor, item: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        extractor([np.zeros((8, 8, 3), np.uint8), item])


def test_damaged_and_missing_files(extractor: sabmn_ext.Extractor, tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, ["a.png"])
    for data in (b"", b"no image", path.read_bytes()[:60]):
        path.write_bytes(data)
        with pytest.raises(UnreadableImageError, match=r"a\.png"):
            extractor(path)
    with pytest.raises(UnreadableImageError, match=r"missing\.png"):
        extractor(tmp_path / "missing.png")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code from a checkpoint ran",)


def test_foreign_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "foreign.pt"
    with pytest.raises(FileNotFoundError, match=r"foreign\.pt: no such file"):
        sabmn_ext.Extractor(file)
    for harmful in (lambda: file.write_bytes(pickle.dumps(Harmful())), lambda: torch.save(Harmful(), file)):
        harmful()
        with pytest.raises(ValueError, match=r"foreign\.pt is not a whole checkpoint of sabmn_ext"):
            sabmn_ext.Extractor(file)
    assert "ran" not in capsys.readouterr().out
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, file)
    with pytest.raises(ValueError, match=r"foreign\.pt is a torch file but not a checkpoint of this sabmn_ext"):
        sabmn_ext.Extractor(file)
    whole = torch.load(write_checkpoint(tmp_path / "last.pt"), weights_only=True)
    for changes in ({"model": {}}, {"model_config": {"depth": 3}}, {"config": 1}, {"config": {"image": {}}}, None):
        torch.save({"format": FORMAT} if changes is None else whole | changes, file)
        with pytest.raises(ValueError, match=r"foreign\.pt .*incomplete or of another version"):
            sabmn_ext.Extractor(file)


def test_options(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "last.pt")
    with pytest.raises(ValueError, match="batch_size is 0; expected 1 or more"):
        sabmn_ext.Extractor(file, batch_size=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device cuda: there is no GPU"):
            sabmn_ext.Extractor(file, device="cuda")
