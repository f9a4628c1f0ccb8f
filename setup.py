"""Builds the native libraries with the C++ compiler, and with nvcc where there is one.

bit_kernels/_native holds torch's ops. One build serves torch 2.11 and newer: it uses PyTorch's
stable ABI and Python's limited API. bit_kernels/_data takes NumPy arrays, by pybind11, which has no
limited API: it serves the Python that built it, and so does a wheel of both. bit_kernels/_cuda holds
the CUDA kernels; it is built as _native is, with neither a GPU nor a torch that knows CUDA, and loads
with any torch.

Each instruction set is a compilation of its own of csrc/cpu/isa_build.cpp or mixup_build.cpp; the
processor picks one when the library is loaded. Without a C++ compiler the packages install without
the libraries and run on plain PyTorch.

Environment:
    CXX                     the C++ compiler
    BIT_KERNELS_NATIVE=0    leave all libraries out
    BIT_KERNELS_CUDA=0      leave the CUDA kernels out
    NVCC, CUDA_HOME         where nvcc is, if not on PATH
    BIT_KERNELS_CUDA_ARCHS  what to compile them for, "80;90a;100+PTX" if not given
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
    "cpu/convolution.cpp",
    "cpu/group_norm_relu.cpp",
    "cpu/norm_relu_conv.cpp",
    "cpu/sgd.cpp",
    "cpu/standardize_weight.cpp",
]

CUDA_SOURCES = ["cuda/bindings.cpp", "cuda/ops.cpp", "cuda/group_norm_relu.cu", "cuda/sgd.cu"]


# Ampere, Hopper, Blackwell; the last one's PTX serves what comes after.
CUDA_ARCHS = "80;90a;100+PTX"
CUDA_FLAGS = ["-O3", "-std=c++20", "-Xcompiler -fPIC,-fvisibility=hidden", "-cudart static"]


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


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    found = os.environ.get("NVCC") or (home and f"{home}/bin/nvcc") or "nvcc"
    return shutil.which(found)


def why_no_cuda() -> str | None:
    if os.environ.get("BIT_KERNELS_CUDA") == "0":
        return "BIT_KERNELS_CUDA=0"
    if sys.platform != "linux":
        return "they are built on Linux"
    if nvcc() is None:
        return "there is no nvcc in NVCC, CUDA_HOME or PATH"
    return None


def cuda_architectures() -> list[str]:
    """BIT_KERNELS_CUDA_ARCHS, or what this nvcc knows of the usual ones."""
    chosen = os.environ.get("BIT_KERNELS_CUDA_ARCHS")
    if chosen:
        return chosen.replace(",", ";").replace(" ", ";").strip(";").split(";")
    listed = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = listed.stdout.split()
    archs = [a for a in CUDA_ARCHS.split(";") if f"sm_{a.removesuffix('+PTX').strip('a')}" in known]
    return archs if archs[-1].endswith("+PTX") else [*archs[:-1], archs[-1] + "+PTX"]


def gencode(architecture: str) -> str:
    number = architecture.removesuffix("+PTX").replace(".", "").removeprefix("sm_")
    if not number.rstrip("af").isdigit():
        raise SystemExit(
            f"BIT_KERNELS_CUDA_ARCHS has {architecture!r}; it may have numbers as in {CUDA_ARCHS!r}"
        )
    flag = f"-gencode arch=compute_{number},code=sm_{number}"
    if architecture.endswith("+PTX"):
        flag += f" -gencode arch=compute_{number},code=compute_{number}"
    return flag


class BuildWithNinja(build_ext):
    """setuptools compiles every source with one set of flags and knows nothing of headers."""

    def build_extension(self, extension):
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / extension.name
        folder.mkdir(parents=True, exist_ok=True)
        rules = {
            "bit_kernels._native": native_library,
            "bit_kernels._data": data_library,
            "bit_kernels._cuda": cuda_library,
        }
        (folder / "build.ninja").write_text(rules[extension.name](library))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)


def native_library(library: Path) -> str:
    torch = torch_folder()
    flags = STABLE_ABI + [f'-isystem "{torch / "include"}"']
    links = [f'"-L{torch / "lib"}"', "-ltorch_cpu", "-lc10"]
    return ninja_file(library, PLAIN_SOURCES, "cpu/isa_build.cpp", flags, links)


def data_library(library: Path) -> str:
    import pybind11

    flags = [f'-isystem "{pybind11.get_include()}"']
    return ninja_file(library, ["cpu/mixup.cpp"], "cpu/mixup_build.cpp", flags, [])


def cuda_library(library: Path) -> str:
    torch = torch_folder()
    archs = cuda_architectures()
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True)
    version = version.stdout.split("release ")[-1].split(",")[0]
    flags = STABLE_ABI + [
        f'-isystem "{torch / "include"}"',
        "-DBIT_KERNELS_CUDA",
        f'-DBIT_KERNELS_CUDA_ARCHS="\\"{";".join(archs)}\\""',
        f'-DBIT_KERNELS_NVCC="\\"{version}\\""',
    ]
    # libtorch leads to libtorch_cuda where there is one. Nothing here names a symbol of it that must
    # be there, so a linker that keeps only what is needed would leave it out.
    links = [f'"-L{torch / "lib"}"', "-Xlinker --no-as-needed", "-ltorch_cpu", "-lc10", "-ltorch"]
    lines = cxx_rule(flags) + [
        f"nvcc = {escape(nvcc())}",
        f"nvcc_flags = {' '.join(CUDA_FLAGS)} {' '.join(map(gencode, archs))}",
        "rule compile_cuda",
        "  command = $nvcc $nvcc_flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = $nvcc -shared -cudart static $in {' '.join(links)} -o $out",
        "  description = link $out",
    ]
    objects = []
    for source in CUDA_SOURCES:
        rule = "compile_cuda" if source.endswith(".cu") else "compile"
        objects.append(f"{Path(source).stem}.o")
        lines.append(f"build {objects[-1]}: {rule} {escape(ROOT / 'csrc' / source)}")
    lines.append(f"build {escape(library)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def escape(path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def cxx_rule(own_flags: list[str]) -> list[str]:
    flags = FLAGS + own_flags + [f'-isystem "{sysconfig.get_path("include")}"']
    return [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {' '.join(flags)}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
    ]


def ninja_file(
    library: Path, sources: list[str], isa_source: str, own_flags: list[str], links: list[str]
) -> str:
    # On macOS Python's own symbols are found when the library is loaded.
    shared = (
        ["-undefined", "dynamic_lookup", "-bundle"] if sys.platform == "darwin" else ["-shared"]
    )
    units = [(source, Path(source).stem, []) for source in sources]
    units += [
        (isa_source, isa, [f"-DBIT_KERNELS_ISA={isa}", *extra]) for isa, extra in ISAS.items()
    ]
    lines = cxx_rule(own_flags) + [
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


extensions = []
reason = why_no_native()
if reason is not None:
    print(f"bit-kernels: building without the native libraries: {reason}", file=sys.stderr)
else:
    extensions.append(Extension("bit_kernels._native", sources=[], py_limited_api=True))
    if importlib.util.find_spec("pybind11"):
        extensions.append(Extension("bit_kernels._data", sources=[]))
    else:
        print("bit-kernels: building without mixup's kernel: no pybind11 here", file=sys.stderr)
    if (reason := why_no_cuda()) is None:
        extensions.append(Extension("bit_kernels._cuda", sources=[], py_limited_api=True))
    else:
        print(f"bit-kernels: building without the CUDA kernels: {reason}", file=sys.stderr)

setup(ext_modules=extensions, cmdclass={"build_ext": BuildWithNinja})
