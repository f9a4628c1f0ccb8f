"""Is the native library there, and if not, why, in one sentence."""

import importlib
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  its libraries must be loaded before ours


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("bit_kernels._native"), None
    except ModuleNotFoundError as error:
        if error.name != "bit_kernels._native":
            raise
    except ImportError as error:
        return None, (
            f"the native library was built but does not load ({error}); "
            "build it again: pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    root = Path(__file__).parent.parent
    if (root / "csrc").is_dir():
        return None, (
            "the native library was never built in this checkout; with a C++ compiler installed, "
            "run: make setup"
        )
    return None, (
        "this installation was made without a C++ compiler; install one and run: "
        "pip install --no-build-isolation --force-reinstall --no-deps ."
    )


native, why_not = _load()
