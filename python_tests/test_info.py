"""The info command: what it prints is what the package does."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from sabmn_ext import _native, info
from sabmn_ext.ops import dispatch


def run(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "sabmn_ext.info", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return result.stdout


def test_json_and_text_agree() -> None:
    found = json.loads(run("--json"))
    text = run()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["torch"] in text
    assert set(found["operations"]) == set(dispatch.operations())
    for name, choice in found["operations"].items():
        assert name in text
        assert choice["taken"] in dispatch.BACKENDS
        for reason in choice["why_not"].values():
            assert reason in text


def test_every_operation_is_listed() -> None:
    listed = set(json.loads(run("--json"))["operations"])
    assert {"attention_forward", "attention_backward", "spectral_norm_forward", "spectral_norm_backward"} <= listed
    assert {"batch_norm_act_forward", "batch_norm_act_backward", "pair_distances", "count_nonmatches"} <= listed


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "module", None)
    monkeypatch.setattr(_native, "missing_reason", "the native module was not built: no C++ compiler found")
    found = info.collect()
    assert all(choice["taken"] == "torch" for choice in found["operations"].values() if found["device"] == "cpu")
    assert "native module  none: the native module was not built: no C++ compiler found" in info.render(found)


def test_devices_are_rendered() -> None:
    found: dict[str, Any] = json.loads(run("--json"))
    found["cuda"] = {
        "runtime_version": 13000,
        "driver_version": 12040,
        "problem": "",
        "devices": [{"name": "Old GPU", "capability": [7, 0], "problem": "no kernel image is available"}],
    }
    text = info.render(found)
    assert "CUDA runtime 13.0, driver 12.4" in text
    assert "Old GPU (sm_70): no kernel image is available" in text
