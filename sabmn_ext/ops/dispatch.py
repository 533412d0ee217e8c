"""Which backend serves an operation: the compiled or Triton GPU kernels, the C++ CPU kernels, or plain torch.

``auto`` takes the first backend of ``BACKENDS`` that can serve the device and the dtype, but where another one was
measured to be faster (``prefer``). The environment variable
``SABMN_BACKEND`` or an argument ``backend=`` asks for one by name; one that cannot serve is an error, never a silent
fallback. What ran is recorded: see ``record``.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sabmn_ext import _native

BACKENDS = ("cuda", "triton", "cpu", "torch")

# The codes of csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# operation → backend → why that backend cannot serve (device, dtype), or None where it can. torch always can.
WhyNot = Callable[[torch.device, torch.dtype], str | None]
_operations: dict[str, dict[str, WhyNot]] = {}

# operation → the backend that comes first for (device, dtype), or None.
Preferred = Callable[[torch.device, torch.dtype], str | None]
_preferred: dict[str, Preferred] = {}

_records: list[list[tuple[str, str]]] = []


def register(operation: str, **backends: WhyNot) -> None:
    """Declare an operation and the backends that it has besides plain torch."""
    _operations[operation] = backends


def prefer(operation: str, preferred: Preferred) -> None:
    """Declare which backend ``auto`` takes before the others, where it can serve."""
    _preferred[operation] = preferred


def order(operation: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends in the order in which ``auto`` asks them."""
    first = _preferred[operation](device, dtype) if operation in _preferred else None
    return sorted(BACKENDS, key=lambda name: name != first)


def triton_on_hopper(*dtypes: torch.dtype) -> Preferred:
    """Triton's kernels first, in the given dtypes: theirs are wgmma's products, the compiled ones mma's."""

    def preferred(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda" or dtype not in dtypes or torch.version.hip is not None:
            return None
        return "triton" if torch.cuda.get_device_capability(device)[0] == 9 else None

    return preferred


def operations() -> list[str]:
    """The names of the declared operations."""
    return list(_operations)


def native_cpu(*dtypes: torch.dtype) -> WhyNot:
    """The rule of a C++ CPU kernel that serves tensors on the CPU in the given dtypes."""

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        if _native.module is None:
            return _native.missing_reason
        if device.type != "cpu":
            return f"it serves tensors on the CPU, not on {device.type}"
        if dtype not in dtypes:
            return f"it serves {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {dtype}"
        return None

    return why_not


def native_cuda(*dtypes: torch.dtype) -> WhyNot:
    """The rule of a compiled CUDA kernel that serves tensors on an NVIDIA GPU in the given dtypes."""

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        if _native.module is None:
            return _native.missing_reason
        build = _native.build_info()
        if not build["cuda_targets"]:
            return f"the native module was built without CUDA: {build['cuda_missing']}"
        if device.type != "cuda" or torch.version.cuda is None:
            return f"it serves tensors on an NVIDIA GPU, not on {device.type}"
        if dtype not in dtypes:
            return f"it serves {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {dtype}"
        capability = torch.cuda.get_device_capability(device)
        if not any(runs_on(target, capability) for target in build["cuda_targets"]):
            return f"it was compiled for {', '.join(build['cuda_targets'])}, not for a GPU of capability {capability}"
        return None

    return why_not


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``target`` runs on a GPU: ``sm_80`` on 8.0 and later 8.x, ``compute_80`` on all that is newer.

    The suffix a (``sm_90a``) is for the one capability, f for its family.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", target)
    if match is None:
        raise ValueError(f"target '{target}' is no CUDA architecture; expected a name such as sm_90 or compute_120")
    built = divmod(int(match[2]), 10)
    if match[3] == "a":
        return built == capability
    if match[3] == "f" or match[1] == "sm":
        return built[0] == capability[0] and built[1] <= capability[1]
    return built <= capability


def triton(*dtypes: torch.dtype) -> WhyNot:
    """The rule of a Triton kernel that serves tensors on an NVIDIA GPU in the given dtypes.

    With ``TRITON_INTERPRET=1`` in the environment Triton interprets its kernels, and they serve tensors on the CPU too.
    """

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "cuda":
            if torch.version.hip is not None:  # whose devices are called cuda, too
                return "it serves NVIDIA GPUs, not AMD's"
            capability = torch.cuda.get_device_capability(device)
            if capability < (8, 0):
                return f"it serves compute capability 8.0 and newer, not {capability[0]}.{capability[1]}"
        elif device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
            return f"it serves tensors on a CUDA device, not on {device.type}"
        if dtype not in dtypes:
            return f"it serves {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {dtype}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; run: pip install triton"
        return None

    return why_not


def why_not(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot serve ``operation`` on this device and dtype; None where it can."""
    if backend == "torch":
        return None
    rule = _operations[operation].get(backend)
    return f"there is no {backend} kernel for this operation" if rule is None else rule(device, dtype)


def choose(operation: str, backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves this call, recorded.

    Args:
        operation: a registered name.
        backend: one of ``BACKENDS``, ``"auto"``, or None for what ``SABMN_BACKEND`` says (auto where it is not set).

    Raises:
        ValueError: an unknown backend.
        RuntimeError: the backend that was asked for cannot serve the call; says why.
    """
    asked = backend or os.environ.get("SABMN_BACKEND") or "auto"
    if asked == "auto":
        names = order(operation, device, dtype)
        taken = next(name for name in names if why_not(operation, name, device, dtype) is None)
    elif asked in BACKENDS:
        reason = why_not(operation, asked, device, dtype)
        if reason is not None:
            raise RuntimeError(
                f"backend '{asked}' cannot serve {operation} for {dtype} on {device}: {reason}. "
                "Ask for another one, or for 'auto'"
            )
        taken = asked
    else:
        raise ValueError(f"backend '{asked}' is unknown; expected auto, {', '.join(BACKENDS)}")
    for listener in _records:
        listener.append((operation, taken))
    return taken


@contextmanager
def record() -> Iterator[list[tuple[str, str]]]:
    """Collects ``(operation, backend)`` for every call inside the ``with`` block, in order.

    >>> with record() as calls:
    ...     _ = sabmn_ext.functional.self_attention2d(x, w, w, w, None, gamma)
    >>> calls
    [('attention_forward', 'cpu')]
    """
    calls: list[tuple[str, str]] = []
    _records.append(calls)
    try:
        yield calls
    finally:
        # By identity: two open blocks may hold equal lists.
        _records[:] = [other for other in _records if other is not calls]


# The meaning of a native function's status: csrc/common/dtype.h.
_STATUS = {1: "there is no kernel for these dtypes", 2: "2³¹ rows or columns are too many"}
_CUDA_ERROR = 1000


def check_status(status: int, operation: str, *tensors: torch.Tensor) -> None:
    """Turn the status of a native call into an error that says why, and names the operation and its shapes."""
    if status:
        if status >= _CUDA_ERROR and _native.module is not None:
            reason = f"CUDA says: {_native.module.cuda_error(status)}"
        else:
            reason = _STATUS.get(status, f"status {status}")
        shapes = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors)
        raise RuntimeError(f"the native {operation} failed for tensors {shapes}: {reason}")
