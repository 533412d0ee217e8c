"""The network of a checkpoint as a file that runs without sabmn_ext: an ONNX model or a program of torch.export.

The weights are those after spectral normalisation, self-attention is plain torch, and the averaging with the mirror
image, where the checkpoint's evaluation does it, is part of the network. float32, any number of images a batch.
"""

import copy
import importlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sabmn_ext import __version__
from sabmn_ext.data.transforms import MEAN, STD, normalize
from sabmn_ext.nn.attention import SelfAttention2d
from sabmn_ext.nn.sabmn import SABMN
from sabmn_ext.nn.spectral_norm import remove_spectral_norm
from sabmn_ext.ops import reference
from sabmn_ext.retrieval.extractor import Extractor

METADATA_FILE = "metadata.json"  # within a file of torch.export
# A share of the largest feature. The roundings of float32 come to about 1e-6 of it; an operator that means something
# else in the file changes features by about as much as they are.
TOLERANCE = 1e-4
_TRACED_BATCH = 2
_CHECKED_BATCHES = (1, 3)


class PlainAttention(nn.Module):
    """``SelfAttention2d`` with the same parameters, by its definition in plain torch operators."""

    def __init__(self, block: SelfAttention2d) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = block.query, block.key, block.value, block.out
        self.gamma = block.gamma

    def forward(self, x: Tensor) -> Tensor:
        w_out, b_out = (None, None) if self.out is None else (self.out.weight, self.out.bias)
        return reference.self_attention2d(
            x, self.query.weight, self.key.weight, self.value.weight, w_out, self.gamma,
            b_query=self.query.bias, b_key=self.key.bias, b_value=self.value.bias, b_out=b_out,
        )  # fmt: skip


class PlainNetwork(nn.Module):
    """A copy of a network for its features alone: images [B, 3, H, W], normalised → features [B, D]."""

    def __init__(self, model: SABMN, flip: bool) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        remove_spectral_norm(self.model)
        if self.model.attention is not None:
            self.model.add_module("attention", PlainAttention(self.model.attention))
        del self.model.classifiers  # used in training only: the file need not hold them
        if not self.model.bn_neck:
            del self.model.feature_norm
        self.flip = flip

    def forward(self, images: Tensor) -> Tensor:
        if not self.flip:
            return self.model(images)  # type: ignore[no-any-return]
        features = self.model(torch.cat((images, images.flip(3))))  # one pass: the file holds each layer once
        return features.view(2, images.shape[0], -1).mean(0)  # type: ignore[no-any-return]


def metadata(extractor: Extractor) -> dict[str, Any]:
    """What a program that runs the network must know: how images are prepared and how features are compared."""
    return {
        "producer": f"sabmn_ext {__version__}",
        "backbone": extractor.model.config["backbone"],
        "input": "images: float32 [batch, 3, height, width], (pixel - mean) / std of pixels from 0 to 255",
        "output": "features: float32 [batch, feature_dim]",
        "height": extractor.height,
        "width": extractor.width,
        "channel_order": "RGB",
        "interpolation": "bilinear, antialiased (Pillow's BILINEAR)",
        "mean": [round(value, 6) for value in MEAN],
        "std": [round(value, 6) for value in STD],
        "flip": extractor.flip,  # whether the network itself averages with the mirror image
        "metric": extractor.metric,
        "feature_dim": extractor.feature_dim,
    }


def _save_onnx(program: torch.export.ExportedProgram, path: str, notes: dict[str, Any]) -> None:
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["images"], output_names=["features"]
    )
    assert exported is not None
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in notes.items()}
    exported.model.metadata_props.update(texts)
    exported.save(path, external_data=False)


def _load_onnx(path: str) -> Callable[[Tensor], Tensor]:
    session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def _save_torch(program: torch.export.ExportedProgram, path: str, notes: dict[str, Any]) -> None:
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(notes, indent=1)})


def _load_torch(path: str) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


class Format(NamedTuple):
    ending: str
    packages: tuple[str, ...]
    save: Callable[[torch.export.ExportedProgram, str, dict[str, Any]], None]
    load: Callable[[str], Callable[[Tensor], Tensor]]


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _save_onnx, _load_onnx),
    "torch-export": Format(".pt2", (), _save_torch, _load_torch),
}


def export_checkpoint(checkpoint: str | Path, out: str | Path, format: str) -> float:
    """Write the network of a checkpoint to ``out``, run what was written and compare the features.

    The file gets its name only once they are the checkpoint's, for one image and for three.

    Args:
        checkpoint: a file that ``python -m sabmn_ext.train`` has written.
        out: ends in .onnx or .pt2; a file that is there is replaced.
        format: "onnx" or "torch-export".

    Returns:
        the largest difference from the checkpoint's features, both in float32 on the CPU, as a share of the largest
        feature.

    Raises:
        ValueError, FileNotFoundError: ``format``, ``out`` or ``checkpoint`` is not as above; says how.
        RuntimeError: a package that the format needs is missing, or the features differ by more than roundings.

    >>> export_checkpoint("runs/demo/last.pt", "network.pt2", "torch-export")    # doctest: +SKIP
    """
    out = Path(out)
    if format not in FORMATS:
        raise ValueError(f"format '{format}' is unknown; expected {' or '.join(FORMATS)}")
    chosen = FORMATS[format]
    if out.suffix != chosen.ending:
        raise ValueError(f"{out} does not end in {chosen.ending}, as files of the format {format} do")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write {out.name} into")
    for package in chosen.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise RuntimeError(
                f"the format {format} needs {package}, which cannot be imported ({error}): "
                f"pip install {' '.join(chosen.packages)}; the format torch-export needs torch alone"
            ) from None
    extractor = Extractor(checkpoint, device="cpu")
    extractor.precision = "fp32"

    network = PlainNetwork(extractor.model, extractor.flip)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(network, (_images(extractor, _TRACED_BATCH),), dynamic_shapes=shapes)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        path = str(Path(folder) / out.name)
        chosen.save(program, path, metadata(extractor))
        difference = _largest_difference(extractor, chosen.load(path))
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{out} was not written: its features would differ from the checkpoint's by {difference:.1e} of the "
                f"largest one, more than roundings do ({TOLERANCE:.0e})"
            )
        os.replace(path, out)
    return difference


def _images(extractor: Extractor, batch: int) -> Tensor:
    """Random pixels, normalised: [batch, 3, height, width]."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 3, extractor.height, extractor.width)
    return normalize(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))


def _largest_difference(extractor: Extractor, run: Callable[[Tensor], Tensor]) -> float:
    largest = torch.zeros(())
    for batch in _CHECKED_BATCHES:
        images = _images(extractor, batch)
        expected = extractor.features_of_normalized(images)
        with torch.no_grad():
            found = run(images)
        largest = torch.maximum(largest, (found - expected).abs().max() / expected.abs().max())  # keeps a NaN
    return float(largest)
