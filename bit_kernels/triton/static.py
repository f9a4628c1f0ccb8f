"""What the compilers make of every kernel that a network launches, read off without a GPU.

    python -m bit_kernels.triton.static            the table, on the screen
    python -m bit_kernels.triton.static --write    into docs/gpu-static.md

Launches are recorded with tensors of the meta device (bit_kernels/triton/cases.py), and each of
Triton's specialisations is compiled ahead of time for NVIDIA's sm_80, sm_90, sm_100 and AMD's gfx942.
From the machine code: registers, spills, the width of each access to global memory, by the line of
the source that makes it; from these, how many programs a multiprocessor holds at once. It is Triton's
own JIT that compiles, behind a driver of a device that isn't there, so that it specialises as it
would for a launch.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bit_kernels.triton.cases import Case, cases, maker
from bit_kernels.triton.occupancy import occupancy, programs
from bit_kernels.triton._launch import Launch, recording

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PAGE = Path(__file__).parents[2] / "docs" / "gpu-static.md"


class Access(NamedTuple):
    """Instructions of one width that a source line reads or writes global memory with."""

    kind: str  # "load", "store" or "atomic"
    name: str  # of the pointer, as the source line spells it
    bits: int


class Compiled(NamedTuple):
    """One specialisation of a kernel in the machine code of one target."""

    kernel: str
    target: str
    warps: int
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack
    spills: int  # instructions that access it
    shared: int  # bytes of a program
    accesses: Counter[Access]  # instructions in the code, each counted once, in loops too

    @property
    def programs(self) -> int:
        """On a multiprocessor at once."""
        return programs(self.target, self.warps, self.registers, self.shared)

    @property
    def occupancy(self) -> float:
        return occupancy(self.target, self.warps, self.registers, self.shared)

    def widest(self, kind: str) -> int:
        return max((access.bits for access in self.accesses if access.kind == kind), default=0)

    def narrowest(self, names: Iterable[str]) -> int:
        """Bits of the narrowest access to these pointers; 0 if there is none."""
        return min((access.bits for access in self.accesses if access.name in names), default=0)

    def in_flight(self, names: Iterable[str]) -> int:
        """Bytes of these pointers that a multiprocessor's threads ask for before they wait.

        That is if all loads in the code (in a loop: of one time around) come before their first use.
        """
        bits = sum(
            access.bits * number
            for access, number in self.accesses.items()
            if access.kind == "load" and access.name in names
        )
        return bits // 8 * self.warps * TARGETS[self.target].warp_size * self.programs


# ---- compiling


class _NoDevice:
    """Stands where Triton's driver of a GPU does, and knows what to compile for."""

    def __init__(self, target: str):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:  # by which a kernel keeps what it has compiled
        return self.target

    def get_current_stream(self, device) -> int:
        return 0


@contextmanager
def _compiling_for(target: str) -> Iterator[None]:
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "this process interprets Triton's kernels and can't compile them: BIT_KERNELS_INTERPRET "
            "and TRITON_INTERPRET must not be set"
        )
    before = driver._active
    driver.set_active(_NoDevice(target))
    try:
        yield
    finally:
        driver._active = before


def compile_launch(launch: Launch, target: str) -> Compiled:
    """The launch's kernel as Triton's JIT would specialise and compile it on a GPU of this kind."""
    with _compiling_for(target):
        code = launch.kernel.warmup(
            *launch.args, grid=launch.grid, **launch.constexprs, **launch.options
        )
    return _read(code.hash, code, launch.kernel, target)


_known: dict[tuple[str, str], Compiled] = {}


def _read(hash: str, code, kernel, target: str) -> Compiled:
    if (hash, target) not in _known:
        read = _read_nvidia if TARGETS[target].backend == "cuda" else _read_amd
        _known[hash, target] = read(code, kernel, target)
    return _known[hash, target]


def launches_of(case: Case) -> list[Launch]:
    with recording() as launches:
        case.call(maker("meta"))
    return launches


# ---- reading machine code

# NVIDIA's instructions for global memory and for a thread's stack; the width is among the suffixes.
_SASS = re.compile(r"\b(LDGSTS|LDG|STG|LDL|STL|REDG?|ATOMG?)((?:\.\w+)*)")
_SASS_KINDS = {"LDG": "load", "LDGSTS": "load", "STG": "store"}
_SASS_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_SASS_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")

_AMD = re.compile(r"^\s+(?:global|buffer|flat|scratch)_(load|store|atomic)_?(\w*)", re.MULTILINE)
_AMD_LINE = re.compile(r"^\s+\.loc\s+(\d+) (\d+)")
_AMD_FILE = re.compile(r'^\s+\.file\s+(\d+) (?:"[^"]*" )?"([^"]+)"')
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def _sass_bits(suffixes: str) -> int:
    parts = suffixes.split(".")
    for bits in (256, 128, 64):
        if str(bits) in parts:
            return bits
    return 16 if {"U16", "S16"} & set(parts) else 8 if {"U8", "S8"} & set(parts) else 32


def _read_nvidia(code, kernel, target: str) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        resources = _tool(knobs.nvidia.cuobjdump, "--dump-resource-usage", file.name)
        sass = _tool(knobs.nvidia.nvdisasm, "-c", "-g", file.name)
    registers, stack = map(int, _SASS_RESOURCES.search(resources).groups())
    accesses, spills, place = Counter(), 0, ("", 0)
    for text in sass.splitlines():
        if line := _SASS_LINE.search(text):
            place = line[1], int(line[2])
        elif found := _SASS.search(text):
            if found[1] in ("LDL", "STL"):
                spills += 1
            else:
                kind = _SASS_KINDS.get(found[1], "atomic")
                accesses[Access(kind, _pointer(kernel, *place), _sass_bits(found[2]))] += 1
    warps, shared = code.metadata.num_warps, code.metadata.shared
    return Compiled(_name(kernel), target, warps, registers, stack, spills, shared, accesses)


def _tool(tool, *arguments: str) -> str:
    command = [tool.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_amd(code, kernel, target: str) -> Compiled:
    text = code.asm["amdgcn"]
    number = functools.partial(_amd_number, text)
    files: dict[str, str] = {}
    accesses, spills, place = Counter(), 0, ("", 0)
    for row in text.splitlines():
        if file := _AMD_FILE.match(row):
            files[file[1]] = file[2]
        elif line := _AMD_LINE.match(row):
            place = files.get(line[1], ""), int(line[2])
        elif found := _AMD.match(row):
            if row.lstrip().startswith("scratch"):
                spills += 1
            else:
                accesses[Access(found[1], _pointer(kernel, *place), _amd_bits(found[2]))] += 1
    return Compiled(
        _name(kernel),
        target,
        code.metadata.num_warps,
        number("vgpr_count"),
        number("private_segment_fixed_size"),
        spills + number("vgpr_spill_count"),
        code.metadata.shared,
        accesses,
    )


def _amd_number(text: str, key: str) -> int:
    return int(re.search(rf"^\s+\.{key}:\s+(\d+)", text, re.MULTILINE)[1])


def _amd_bits(suffix: str) -> int:
    for name, bits in _AMD_BITS.items():
        if suffix.startswith(name):
            return bits
    return 8 if "byte" in suffix else 16


def _name(kernel) -> str:
    return kernel.fn.__name__.strip("_")


_POINTER = re.compile(r"\btl\.(?:load|store|atomic_\w+)\(\s*(\w+)")


def _pointer(kernel, file: str, line: int) -> str:
    """The name that a source line's access to memory begins with; "" where it has none."""
    path = Path(kernel.fn.__code__.co_filename).parent / Path(file).name
    lines = _source(path)
    if not 0 < line <= len(lines):
        return ""
    found = _POINTER.search(" ".join(lines[line - 1 : line + 1]))
    return found[1] if found else ""


@functools.cache
def _source(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


# ---- the table


class Row(NamedTuple):
    """One launch of a case, compiled for one target."""

    case: str
    launch: int  # which of the case's
    grid: tuple[int, ...]
    activations: tuple[str, ...]  # arguments as large as the case's activations
    aligned: bool
    compiled: Compiled


def rows(target: str, full: bool = False) -> list[Row]:
    """Every launch of every case, each specialisation compiled once."""
    return [
        Row(
            str(case),
            index,
            launch.grid,
            activations(launch, case.elements),
            case.aligned,
            compile_launch(launch, target),
        )
        for case in cases(full)
        for index, launch in enumerate(launches_of(case))
    ]


def activations(launch: Launch, elements: int) -> tuple[str, ...]:
    """Names of the kernel's arguments that are tensors of at least so many elements."""
    return tuple(
        name
        for name, arg in zip(launch.kernel.arg_names, launch.args, strict=False)
        if isinstance(arg, torch.Tensor) and arg.numel() >= elements
    )


def in_processes(targets: Iterable[str], full: bool = False) -> dict[str, list[Row]]:
    """`rows` of each target, a process each."""
    targets = list(targets)
    with ProcessPoolExecutor(min(os.cpu_count(), len(targets)), get_context("spawn")) as pool:
        found = pool.map(functools.partial(rows, full=full), targets)
        return dict(zip(targets, found, strict=True))


def counted_passes() -> dict[str, list[tuple[str, float]]]:
    """Kernel and memory passes of each launch of each case of the table, counted by Triton's
    interpreter in a process of its own."""
    command = [sys.executable, "-m", "bit_kernels.triton.passes"]
    environment = {**os.environ, "BIT_KERNELS_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name}")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # of the processes too: nothing compiled before
        text = page(in_processes(TARGETS), counted_passes())
    if write:
        PAGE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
