"""What nvcc makes of the kernels, and the library of them. None of this needs a GPU."""

import os
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from on_host import ROOT

from bit_kernels import _library
from bit_kernels.ops import _cuda  # noqa: F401  whose schemas the library implements

NVCC = shutil.which(os.environ.get("NVCC") or os.environ.get("CUDA_HOME", "") + "/bin/nvcc")
NVCC = NVCC or shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc in NVCC, CUDA_HOME or PATH")

ARCHITECTURES = ("80", "90a", "100")
SOURCES = ("group_norm_relu", "sgd")
# Most registers of a thread with which as many blocks share a multiprocessor as the cuts are made
# for: two of 512 threads forward, two of 256 backward; of a step one of 1024 or more of the others.
REGISTERS = {"forward": 64, "backward": 128, "reduce_samples": 64}
REGISTERS |= {"step_rows": 64, "square_rows": 64, "add_rows": 64, "step_plain": 64}
REGISTERS["compiled_as_this_file"] = 16  # which does nothing, and is asked what it was compiled for


class Kernel(NamedTuple):
    name: str
    mangled: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    shared: int


def name_of(mangled: str) -> str:
    """The function's own name in a mangled one."""
    found = [name for name in REGISTERS if re.search(rf"{len(name)}{name}[IE]", mangled)]
    assert len(found) == 1, mangled
    return found[0]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What ptxas says of every kernel for every architecture, and the PTX for Hopper."""
    folder = tmp_path_factory.mktemp("nvcc")
    kernels, ptx, started = [], {}, []
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    for source in SOURCES:
        command = [NVCC, "-O3", "-std=c++20", *targets, "-Xptxas", "-v", "-c"]
        command += [str(ROOT / f"csrc/cuda/{source}.cu"), "-o", str(folder / f"{source}.o")]
        command += ["--keep", "--keep-dir", str(folder)]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in started:
        said = process.communicate()[1]
        assert process.returncode == 0, said
        kernels += parse(said)
    for file in folder.glob("*compute_90a.ptx"):
        ptx |= bodies(file.read_text())
    return kernels, ptx


def parse(said: str) -> list[Kernel]:
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
    )
    return [
        Kernel(
            name_of(mangled),
            mangled,
            architecture,
            int(registers),
            int(stack),
            int(stored) + int(loaded),
            int(shared or 0),
        )
        for mangled, architecture, stack, stored, loaded, registers, shared in re.findall(
            pattern, said, re.DOTALL
        )
    ]


def bodies(ptx: str) -> dict[str, str]:
    """The instructions of each kernel, by its mangled name."""
    return dict(re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", ptx, re.DOTALL))


@needs_nvcc
def test_no_spills_and_few_enough_registers(compiled):
    kernels, _ = compiled
    assert {(k.name, k.architecture) for k in kernels} == {
        (name, architecture) for name in REGISTERS for architecture in ARCHITECTURES
    }
    # 3 types in vectors or not; 3 teams and rows too long for shared memory, in vectors or not.
    for name, number in dict(forward=6, backward=6, step_rows=8, square_rows=8).items():
        of_name = [k for k in kernels if k.name == name]
        assert len(of_name) == number * len(ARCHITECTURES), name
    for kernel in kernels:
        assert kernel.stack == 0 and kernel.spilled == 0, kernel
        assert kernel.registers <= REGISTERS[kernel.name], kernel
        assert kernel.shared <= 1024, kernel  # all but what the system takes is asked for at launch


def is_vector(mangled: str) -> bool:
    return re.search(r"Li[48]E", mangled) is not None


@needs_nvcc
def test_accesses_are_as_wide_as_they_can_be(compiled):
    """128 bits of global and shared memory where elements lie so."""
    seen = 0
    for mangled, body in compiled[1].items():
        name = name_of(mangled)
        async_copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", body)
        widths = {int(width, 0) for width in async_copies}
        stores = len(re.findall(r"st\.global\.v4\.[bfu]32", body))
        reads = len(re.findall(r"ld\.shared\.v4\.[bfu]32", body))
        if name in ("forward", "backward"):
            if is_vector(mangled):
                assert widths == {16} and stores > 0 and reads > 0, mangled
                # The skip gradient is read where it lies.
                assert name == "forward" or re.search(r"ld\.global(\.nc)?\.v4", body), mangled
            else:
                assert 16 not in widths and stores == 0, mangled
            seen += 1
        elif name == "step_rows" and is_vector(mangled):
            fits = "Lb1E" in mangled
            assert (widths == {16} if fits else not widths) and stores > 0, mangled
            assert reads > 0 if fits else re.search(r"ld\.global(\.nc)?\.v4", body), mangled
            seen += 1
        elif name == "step_plain" and is_vector(mangled):
            assert stores > 0 and re.search(r"ld\.global(\.nc)?\.v4", body), mangled
            seen += 1
        # Integers may be: a compiler that moves the kernel's table would put it there.
        assert ".local" not in body, mangled
    assert seen == 12 + 4 + 1


@needs_nvcc
def test_clusters_read_each_other(compiled):
    """Through distributed shared memory, and without atomics."""
    for mangled, body in compiled[1].items():
        assert not re.search(r"\b(atom|red)\.", body), mangled
        if name_of(mangled) in ("forward", "backward"):
            assert "barrier.cluster.arrive" in body and "barrier.cluster.wait" in body, mangled
            assert "mapa" in body, mangled


# ---- the library, as setup.py makes it where there is nvcc


def test_library_is_there_or_says_why():
    assert (_library.cuda is None) == (_library.why_not_cuda is not None)
    if NVCC is not None and os.environ.get("BIT_KERNELS_CUDA") != "0" and _library.native:
        assert _library.cuda is not None, _library.why_not_cuda


@pytest.mark.skipif(_library.cuda is None, reason=str(_library.why_not_cuda))
def test_library_serves_the_ops_on_cuda():
    for op in ("group_norm_relu", "group_norm_relu_backward", "sgd", "sgd_gradient_norm"):
        name = f"bit_kernels::{op}_cuda"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
    assert re.fullmatch(r"\w+(\+PTX)?(;\w+(\+PTX)?)*", _library.cuda.architectures())
    assert re.fullmatch(r"\d+\.\d+", _library.cuda.compiler())


def test_without_the_library(tmp_path):
    """A checkout whose CUDA kernels were never built says so and works."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "bit_kernels", tmp_path / "bit_kernels", ignore=ignore)
    code = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
from bit_kernels import _library
from bit_kernels.ops import _cuda
print(_library.cuda, _library.why_not_cuda)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("None the CUDA kernels were not built, which takes nvcc")
