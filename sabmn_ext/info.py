"""``python -m sabmn_ext.info``: versions, what was compiled, the backend of each operation here, and why not others."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from typing import Any

import torch

import sabmn_ext
from sabmn_ext import _native
from sabmn_ext.ops import dispatch


def collect() -> dict[str, Any]:
    """Everything that the command prints, as plain values that JSON can hold."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "versions": _versions(),
        "native": _native_module(),
        "cuda": _cuda(),
        "environment": {
            name: os.environ[name] for name in ("SABMN_BACKEND", "SABMN_ISA", "OMP_NUM_THREADS") if name in os.environ
        },
        "threads": torch.get_num_threads(),
        "device": str(device),
        "operations": {name: _backends(name, device) for name in dispatch.operations()},
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "sabmn_ext": sabmn_ext.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
    }
    for package in ("numpy", "triton"):
        found = importlib.util.find_spec(package) is not None
        versions[package] = importlib.metadata.version(package) if found else None
    return versions


def _native_module() -> dict[str, Any]:
    if _native.module is None:
        return {"available": False, "why_not": _native.missing_reason}
    return {
        "available": True,
        "file": _native.module.__file__,
        "fingerprint": _native.module.FINGERPRINT,
        "isa": _native.module.isa(),
        **_native.build_info(),
    }


def _cuda() -> dict[str, Any]:
    """What the native module's own CUDA runtime finds; empty where there is no CUDA part."""
    if _native.module is None or not hasattr(_native.module, "cuda_info"):
        return {}
    return dict(_native.module.cuda_info())


def _backends(operation: str, device: torch.device) -> dict[str, Any]:
    """The backend that ``auto`` takes for float32 on ``device``, and the reasons against those before it."""
    order = dispatch.order(operation, device, torch.float32)
    reasons = {name: dispatch.why_not(operation, name, device, torch.float32) for name in order}
    taken = next(name for name, reason in reasons.items() if reason is None)
    return {"taken": taken, "why_not": {name: reason for name, reason in reasons.items() if reason}}


def render(info: dict[str, Any]) -> str:
    """The readable form of ``collect``'s result."""
    lines = [f"{name:<14} {value or 'not installed'}" for name, value in info["versions"].items()]
    native = info["native"]
    lines.append("")
    if native["available"]:
        lines.append(f"native module  {native['file']}")
        lines.append(f"  fingerprint  {native['fingerprint']}, compiled by {native['compiler']}")
        lines.append(f"  CPU          {', '.join(native['isas'])}; taken here: {native['isa']}")
        if native["cuda_targets"]:
            lines.append(f"  CUDA         {' '.join(native['cuda_targets'])}")
        else:
            lines.append(f"  CUDA         not compiled: {native['cuda_missing']}")
    else:
        lines.append(f"native module  none: {native['why_not']}")
    cuda = info["cuda"]
    if cuda:
        lines.append(f"  CUDA runtime {_version(cuda['runtime_version'])}, driver {_version(cuda['driver_version'])}")
        for index, device in enumerate(cuda["devices"]):
            major, minor = device["capability"]
            runs = device["problem"] or "runs this binary"
            lines.append(f"  device {index}     {device['name']} (sm_{major}{minor}): {runs}")
        if not cuda["devices"]:
            lines.append(f"  devices      none: {cuda['problem'] or 'no GPU'}")
    lines += ["", f"operations for float32 on {info['device']}, {info['threads']} threads"]
    width = max(map(len, info["operations"]))
    for name, choice in info["operations"].items():
        lines.append(f"  {name:<{width}}  {choice['taken']}")
        lines += [f"  {'':<{width}}    not {backend}: {reason}" for backend, reason in choice["why_not"].items()]
    for name, value in info["environment"].items():
        lines.append(f"{name}={value}")
    return "\n".join(lines)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "not found"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sabmn_ext.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else render(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
