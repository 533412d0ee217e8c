"""Importing the package: torch and numpy are all it needs, and the public names are there."""

import subprocess
import sys

import sabmn_ext


def test_only_torch_and_numpy_are_needed() -> None:
    """The operations run where pillow, tqdm and tensorboard cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('PIL', 'tqdm', 'tensorboard', 'matplotlib', 'torchvision', 'triton'): sys.modules[name] = None\n"
        "import torch, sabmn_ext\n"
        "block = sabmn_ext.spectral_norm_model(sabmn_ext.SelfAttention2d(16), preserve_eval=False)\n"
        "block(torch.randn(2, 16, 3, 5)).sum().backward()\n"
        "features = torch.eye(4)\n"
        "print(sabmn_ext.evaluate_retrieval(features, features, [0, 0, 1, 1], [0, 0, 1, 1], exclude_self=True).map)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert 0 < float(result.stdout) <= 1


def test_public_names() -> None:
    for name in sabmn_ext.__all__:
        assert getattr(sabmn_ext, name) is not None
