"""Are the native libraries and Triton there, and if not, why, in one sentence.

`native` holds torch's ops, `data` what takes NumPy arrays, `cuda` the kernels in CUDA C++; None where
`why_not`, `why_not_data` or `why_not_cuda` says why. `why_not_triton` says why GPUs have no kernels
in Triton.
"""

import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  its libraries must be loaded before ours

_AGAIN = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"bit_kernels.{name}"), None
    except ModuleNotFoundError as error:
        if error.name != f"bit_kernels.{name}":
            raise
    except ImportError as error:
        return None, (
            f"the native library was built but does not load ({error}); build it again: {_AGAIN}"
        )
    root = Path(__file__).parent.parent
    if (root / "csrc").is_dir():
        return None, (
            "the native library was never built in this checkout; with a C++ compiler installed, "
            "run: make setup"
        )
    return None, (
        f"this installation was made without a C++ compiler; install one and run: {_AGAIN}"
    )


# Triton's interpreter takes the CPU's place: the GPU's kernels run on tensors of the CPU, slowly, to
# be tested. Triton reads its own variable when it is imported.
interpreted = os.environ.get("BIT_KERNELS_INTERPRET") == "1"
if interpreted:
    os.environ["TRITON_INTERPRET"] = "1"

why_not_triton = None
if importlib.util.find_spec("triton") is None:
    why_not_triton = (
        "Triton, which GPU kernels are written in, is not installed: pip install triton"
    )

if interpreted:
    native, why_not = None, "with BIT_KERNELS_INTERPRET=1 Triton's interpreter takes its place"
else:
    native, why_not = _load("_native")
data, why_not_data = _load("_data")
if native is None:  # whose threads it works on
    data, why_not_data = None, why_not
elif data is None:
    why_not_data = (
        "bit_kernels._data was built without pybind11 or for another Python; run: "
        f"pip install pybind11, then {_AGAIN}"
    )


def _load_cuda() -> tuple[ModuleType | None, str | None]:
    if torch.version.hip is not None:
        return None, "the CUDA kernels are NVIDIA's; this torch is built for AMD GPUs"
    try:
        return importlib.import_module("bit_kernels._cuda"), None
    except ModuleNotFoundError as error:
        if error.name != "bit_kernels._cuda":
            raise
        return None, (
            "the CUDA kernels were not built, which takes nvcc; with the CUDA toolkit installed and "
            f"NVCC or CUDA_HOME set, run: {_AGAIN}"
        )
    except ImportError as error:
        return None, (
            f"the CUDA kernels were built but do not load ({error}); build them again: {_AGAIN}"
        )


# The library loads without a GPU and with a torch that has no CUDA, which then never calls it.
cuda, why_not_cuda = _load_cuda()
