"""Builds bit_kernels/_native, the native library, with the C++ compiler and torch's headers.

One library serves torch 2.11 and newer: it uses PyTorch's stable ABI and Python's limited API.
Each instruction set is a compilation of its own of csrc/cpu/isa_build.cpp; the processor picks one
when the library is loaded. Without a C++ compiler the packages install without the library and
run on plain PyTorch.

Environment: CXX (the compiler), BIT_KERNELS_NATIVE=0 (leave the library out).
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# torch 2.11: the first release whose stable ABI has all that is used here.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030b0000"]
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = AVX2
    # GCC's own AVX-512 headers trip its warnings about uninitialised values.
    ISAS["avx512"] = AVX2 + [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ]

PLAIN_SOURCES = [
    "bindings.cpp",
    "cpu/isa.cpp",
    "cpu/group_norm_relu.cpp",
    "cpu/norm_relu_conv.cpp",
    "cpu/sgd.cpp",
    "cpu/standardize_weight.cpp",
]


def torch_folder() -> Path | None:
    # Found, not imported: importing torch takes seconds and is not needed to read its headers.
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def why_no_native() -> str | None:
    if os.environ.get("BIT_KERNELS_NATIVE") == "0":
        return "BIT_KERNELS_NATIVE=0"
    if sys.platform == "win32":
        return "the kernels are written for GCC and Clang"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return f"there is no C++ compiler ({os.environ.get('CXX', 'c++')})"
    if torch_folder() is None:
        return "torch is not installed where this is built"
    return None


class BuildWithNinja(build_ext):
    """setuptools compiles every source with one set of flags and knows nothing of headers."""

    def build_extension(self, extension):
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(library))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)


def escape(path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(library: Path) -> str:
    torch = torch_folder()
    includes = [torch / "include", sysconfig.get_path("include")]
    flags = FLAGS + STABLE_ABI + [f'-isystem "{path}"' for path in includes]
    links = [f'"-L{torch / "lib"}"', "-ltorch_cpu", "-lc10"]
    # On macOS Python's own symbols are found when the library is loaded.
    shared = (
        ["-undefined", "dynamic_lookup", "-bundle"] if sys.platform == "darwin" else ["-shared"]
    )
    units = [(source, Path(source).stem, []) for source in PLAIN_SOURCES]
    units += [
        ("cpu/isa_build.cpp", isa, [f"-DBIT_KERNELS_ISA={isa}", *extra])
        for isa, extra in ISAS.items()
    ]
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {' '.join(flags)}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = $cxx {' '.join(shared)} $in {' '.join(links)} -o $out",
        "  description = link $out",
    ]
    for source, name, extra in units:
        lines.append(f"build {name}.o: compile {escape(ROOT / 'csrc' / source)}")
        lines.append(f"  extra = {' '.join(extra)}")
    objects = " ".join(f"{name}.o" for _, name, _ in units)
    lines.append(f"build {escape(library)}: link {objects}")
    return "\n".join(lines) + "\n"


reason = why_no_native()
if reason is not None:
    print(f"bit-kernels: building without the native library: {reason}", file=sys.stderr)

setup(
    ext_modules=[]
    if reason is not None
    else [Extension("bit_kernels._native", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildWithNinja},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
