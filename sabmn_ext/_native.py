"""Loads the native module ``_sabmn_ext``, or says why it is not there.

torch is imported first: it brings the OpenMP pool that the native code then shares.
"""

import functools
import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (before the native module, see above)

from sabmn_ext._fingerprint import source_fingerprint

module: ModuleType | None = None
missing_reason: str = ""


def _load() -> None:
    global module, missing_reason
    try:
        native = importlib.import_module("_sabmn_ext")
    except ImportError as error:
        missing_reason = f"the native module is not installed or does not load ({error}); run: pip install ."
        return
    root = Path(__file__).resolve().parent.parent
    expected = source_fingerprint(root)
    if expected != native.FINGERPRINT:
        raise ImportError(
            f"the sources {root} (fingerprint {expected}) and the compiled module {native.__file__} "
            f"(fingerprint {native.FINGERPRINT}) do not belong together; run: pip install ."
        )
    if hasattr(native, "BUILD_ERROR"):
        missing_reason = f"the native module was not built: {native.BUILD_ERROR}"
        return
    module = native


@functools.cache
def build_info() -> dict[str, Any]:
    """How the module was built; made once, since every call of an operation looks at it."""
    assert module is not None
    return module.build_info()  # type: ignore[no-any-return]


_load()
if missing_reason:
    # pip hides what a build says, so this is where the user hears of it.
    warnings.warn(f"{missing_reason}; operations run through plain torch", stacklevel=2)
