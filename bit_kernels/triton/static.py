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
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bit_kernels.triton._launch import Launch, recording
from bit_kernels.triton.cases import Case, cases, maker
from bit_kernels.triton.machine_code import Compiled, read

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PAGE = Path(__file__).parents[2] / "docs" / "gpu-static.md"


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
    code = machine_code_of(launch, target)
    if (code.hash, target) not in _known:
        _known[code.hash, target] = read(code, launch.kernel, target)
    return _known[code.hash, target]


def machine_code_of(launch: Launch, target: str) -> triton.compiler.CompiledKernel:
    options = dict(launch.options)
    if TARGETS[target].backend == "hip":  # where `launch` doesn't say it either
        options.pop("maxnreg", None)
    with _compiling_for(target):
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constexprs, **options)


_known: dict[tuple[str, str], Compiled] = {}


def launches_of(case: Case) -> list[Launch]:
    with recording() as launches:
        case.call(maker("meta"))
    return launches


# ---- the table


class Row(NamedTuple):
    """One launch of a case, compiled for one target."""

    case: str
    launch: int  # which of the case's
    grid: tuple[int, ...]
    activations: tuple[str, ...]  # the kernel's names for tensors as large as the case's
    aligned: bool
    compiled: Compiled


def rows(target: str, full: bool = False) -> list[Row]:
    """Every launch of every case, each specialisation compiled once."""
    return [
        row(case, index, launch, target)
        for case in cases(full)
        for index, launch in enumerate(launches_of(case))
    ]


def row(case: Case, index: int, launch: Launch, target: str) -> Row:
    compiled = compile_launch(launch, target)
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    if "pointers" in arguments:  # the tensors of a table are variables of the kernel
        activations = {access.name for access in compiled.accesses} - arguments.keys()
    else:
        activations = {
            name
            for name, argument in arguments.items()
            if isinstance(argument, torch.Tensor)
            and argument.numel() >= (case.least or case.elements)
        }
    # Kernels that work on many tensors are told of each group's alignment.
    aligned = case.aligned and launch.constexprs.get("ALIGN") != 1
    return Row(str(case), index, launch.grid, tuple(sorted(activations)), aligned, compiled)


def in_processes(targets: Iterable[str], full: bool = False) -> dict[str, list[Row]]:
    """`rows` of each target, a process each."""
    targets = list(targets)
    with ProcessPoolExecutor(min(os.cpu_count(), len(targets)), get_context("spawn")) as pool:
        found = pool.map(functools.partial(rows, full=full), targets)
        return dict(zip(targets, found, strict=True))


def counted_passes() -> dict[str, list[tuple[str, float]]]:
    """Kernel and memory passes of each launch, of each case of the table; counted by Triton's
    interpreter, in a process of its own."""
    command = [sys.executable, "-m", "bit_kernels.triton.passes"]
    environment = {**os.environ, "BIT_KERNELS_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout)


_PAGE = """\
# The Triton kernels, without a GPU

Written by `python -m bit_kernels.triton.static --write` with Triton {triton} and torch {torch}; nobody
edits it. Nothing of this was measured on a device.

## What the compilers make of them

Each kernel as the cases below launch it, compiled ahead of time; "16 to 24" is the least and most
among the cases' specialisations. Spills are instructions that access a thread's stack. Widest are the
loads from and stores to global memory, in bits. Occupancy is theoretical, by the vendors' rules for
registers and shared memory. In flight are the bytes of activations that the threads of a
multiprocessor ask for before they wait.

{kernels}

## Memory passes

An activation's elements loaded and stored, counted from the addresses that the kernels access (at
batch 1; of a network's weights, for three of them, whose rows programs hold: rows of more than 8192
elements are read again, from the cache), over what any implementation must load and store.
Where a kernel is `swept`, a program reads its input twice, and finds much of it in the L2 cache the
second time: fewer passes reach memory.

{passes}
"""


def page(found: dict[str, list[Row]], passes: dict[str, list[tuple[str, float]]]) -> str:
    lines = [["kernel", "target", "warps", "registers", "spills", "widest load", "widest store",
              "shared bytes", "occupancy, %", "in flight, KiB"]]  # fmt: skip
    by_kernel: dict[tuple[str, str, str], list[Row]] = {}
    for target, compiled in found.items():
        for row in compiled:
            op = row.case.split()[0]
            by_kernel.setdefault((op, row.compiled.kernel, target), []).append(row)
    for (op, kernel, target), rows in sorted(by_kernel.items(), key=_in_order):
        of = [row.compiled for row in rows]
        loads = [row.compiled.in_flight(row.activations) for row in rows]
        lines.append([
            f"{op} {kernel}", target,
            _range(each.warps for each in of),
            _range(each.registers for each in of),
            _range(each.spills for each in of),
            _range(each.widest("load") for each in of),
            _range(each.widest("store") for each in of),
            _range(each.shared for each in of),
            _range(round(100 * each.occupancy) for each in of),
            _range(load >> 10 for load in loads) if any(loads) else "",
        ])  # fmt: skip
    counted = [["case", "launches", "passes", "passes / ideal"]]
    for case in cases():
        if case.few is None:
            continue
        by_name: Counter[str] = Counter()
        for kernel, each in passes[str(case)]:
            by_name[kernel] += each
        parts = " + ".join(f"{each:.4g} {kernel}" for kernel, each in by_name.items() if each)
        total = f"{sum(by_name.values()):.4g} / {case.ideal}"
        counted.append([str(case), str(len(launches_of(case))), parts, total])
    return _PAGE.format(
        triton=triton.__version__,
        torch=torch.__version__.split("+")[0],
        kernels=_table(lines),
        passes=_table(counted),
    )


def _in_order(item):
    (op, kernel, target), _ = item
    return op, kernel, list(TARGETS).index(target)


def _range(values: Iterable[int]) -> str:
    values = sorted(set(values))
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _table(lines: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "| " + " | ".join("---" for _ in lines[0]) + " |", *body])


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
