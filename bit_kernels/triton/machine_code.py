"""Reads off a compiled kernel what decides its speed: registers, spills, how it accesses memory.

For NVIDIA the machine code is disassembled by the tools that come with Triton; which pointer an
access goes through is in the PTX, whose loads and stores have the widths of the machine's. AMD's
assembly has it all. Both name the source line of an instruction, and the calls that led to it.
"""

import ast
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from triton import knobs

from bit_kernels.triton.occupancy import occupancy, programs

WARP = {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 64}  # threads


class Access(NamedTuple):
    """An instruction that reads or writes global memory."""

    kind: str  # "load", "store" or "atomic"
    name: str  # the kernel's argument that its address comes from, or a variable's name
    bits: int


class Compiled(NamedTuple):
    """One specialisation of a kernel, compiled for one target."""

    kernel: str
    target: str
    warps: int
    registers: int  # of a thread
    stack: int  # bytes of a thread
    spills: int  # instructions that access the stack
    shared: int  # bytes of a program
    accesses: Counter[Access]  # instructions in the code, each counted once, in loops too
    widths: Counter[tuple[str, int]]  # the same by kind and bits alone, from the machine code

    @property
    def programs(self) -> int:
        """On a multiprocessor at once."""
        return programs(self.target, self.warps, self.registers, self.shared)

    @property
    def occupancy(self) -> float:
        return occupancy(self.target, self.warps, self.registers, self.shared)

    def widest(self, kind: str) -> int:
        return max((bits for each, bits in self.widths if each == kind), default=0)

    def of(self, names: Iterable[str]) -> dict[Access, int]:
        """The accesses through these pointers, and how many of each."""
        return {access: n for access, n in self.accesses.items() if access.name in names}

    def narrow(self, names: Iterable[str], wanted: int = 128) -> list[Access]:
        """Accesses through these pointers of fewer bits than wanted, though the thread has more of the
        same tensor to load or store."""
        bits = Counter()
        for access, number in self.of(names).items():
            bits[access.kind, access.name] += access.bits * number
        return [
            access
            for access in self.of(names)
            if access.bits < min(wanted, bits[access.kind, access.name])
        ]

    def in_flight(self, names: Iterable[str]) -> int:
        """Bytes of these tensors that a multiprocessor's threads load before they wait for one.

        That is if all loads in the code, in a loop of one time around, come before their first use.
        """
        loads = self.of(names).items()
        bits = sum(access.bits * number for access, number in loads if access.kind == "load")
        return bits // 8 * self.warps * WARP[self.target] * self.programs


def read(code, kernel, target: str) -> Compiled:
    """What `code`, a triton.compiler.CompiledKernel, has of `kernel`, the function that it is of."""
    of = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, stack, spills, accesses, widths = of(code, Path(kernel.fn.__code__.co_filename))
    return Compiled(
        kernel.fn.__name__.strip("_"),
        target,
        code.metadata.num_warps,
        registers,
        stack,
        spills,
        code.metadata.shared,
        accesses,
        widths,
    )


# ---- NVIDIA

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
# Global memory and, LDL and STL, a thread's stack; the width is among the suffixes.
_SASS = re.compile(r"\b(LDGSTS|LDG|STG|LDL|STL|REDG?|ATOMG?)\b((?:\.\w+)*)")
_SASS_KINDS = {"LDG": "load", "LDGSTS": "load", "STG": "store"}
_PTX = re.compile(r"\b(ld|st|atom|red)\.global((?:[.:]+\w+)*)\.[bfsu](\d+)\b")
_PTX_KINDS = {"ld": "load", "st": "store"}
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S* [^,]+, [^,]+, (0x[0-9a-f]+|\d+)")


def _read_nvidia(code, file: Path):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(code.asm["cubin"])
        cubin.flush()
        resources = _tool(knobs.nvidia.cuobjdump, "--dump-resource-usage", cubin.name)
        sass = _tool(knobs.nvidia.nvdisasm, "-c", cubin.name)
    registers, stack = map(int, _RESOURCES.search(resources).groups())
    widths, spills = Counter(), 0
    for name, suffixes in _SASS.findall(sass):
        if name in ("LDL", "STL"):
            spills += 1
        else:
            widths[_SASS_KINDS.get(name, "atomic"), _sass_bits(suffixes.split("."))] += 1
    accesses = Counter()
    for row, calls in _located(code.asm["ptx"]):
        if found := _PTX.search(row):
            vector = re.search(r"\.v(\d)\b", found[2])
            bits = int(found[3]) * (int(vector[1]) if vector else 1)
            kind = _PTX_KINDS.get(found[1], "atomic")
            accesses[Access(kind, _pointer(file, calls), bits)] += 1
        elif found := _PTX_COPY.search(row):
            accesses[Access("load", _pointer(file, calls), 8 * int(found[1], 0))] += 1
    return registers, stack, spills, accesses, widths


def _sass_bits(suffixes: list[str]) -> int:
    for bits in (256, 128, 64, 16, 8):
        if {str(bits), f"U{bits}", f"S{bits}"} & set(suffixes):
            return bits
    return 32


def _tool(tool, *arguments: str) -> str:
    command = [tool.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---- AMD

_AMD = re.compile(r"^\s+(global|buffer|flat|scratch)_(load|store|atomic)_?(\w*)")
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def _read_amd(code, file: Path):
    text = code.asm["amdgcn"]
    accesses, widths, spills = Counter(), Counter(), _amd_number(text, "vgpr_spill_count")
    for row, calls in _located(text):
        if found := _AMD.match(row):
            if found[1] == "scratch":
                spills += 1
                continue
            access = Access(found[2], _pointer(file, calls), _amd_bits(found[3]))
            accesses[access] += 1
            widths[access.kind, access.bits] += 1
    registers, stack = (
        _amd_number(text, "vgpr_count"),
        _amd_number(text, "private_segment_fixed_size"),
    )
    return registers, stack, spills, accesses, widths


def _amd_number(text: str, key: str) -> int:
    return int(re.search(rf"^\s+\.{key}:\s+(\d+)", text, re.MULTILINE)[1])


def _amd_bits(suffix: str) -> int:
    for name, bits in _AMD_BITS.items():
        if suffix.startswith(name):
            return bits
    return 8 if "byte" in suffix else 16


# ---- from an instruction back to the kernel's argument

_PLACE = re.compile(r"([\w.]+\.py):(\d+):(\d+)")
_LOC = re.compile(r"^\s*\.loc\s+(\d+ \d+ \d+)(?:.*\binlined_at (\d+ \d+ \d+))?")


class _Place(NamedTuple):
    file: str
    line: int
    column: int


def _located(text: str) -> Iterator[tuple[str, list[_Place]]]:
    """Lines of assembly, each with its place in the source and the calls around that, innermost
    first.

    LLVM writes them behind .loc, as "a.py:3:7 @[ b.py:40:5 ]", or else newer ones name the call's
    place, whose own .loc came before, and number the lines within inline assembly, which begins at
    the place that counts.
    """
    places: list[_Place] = []
    known: dict[str, list[_Place]] = {}
    inline = 0  # rows since inline assembly began
    for row in text.splitlines():
        inline = 1 if "begin inline asm" in row else inline and inline + 1
        if "end inline asm" in row:
            inline = 0
        if found := _LOC.match(row):
            if inline > 2:
                continue
            places = [_Place(file, int(line), int(at)) for file, line, at in _PLACE.findall(row)]
            if found[2] is not None:
                places = places + known.get(found[2], [])
            known[found[1]] = places
        else:
            yield row, places


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text() if path.is_file() else "")


def _around(path: Path, place: _Place, kind) -> list:
    """The nodes of a kind that a place of the source is in, innermost first."""
    at = place.line, place.column - 1
    found = [
        node
        for node in ast.walk(_tree(path))
        if isinstance(node, kind)
        and (node.lineno, node.col_offset) <= at <= (node.end_lineno, node.end_col_offset)
    ]
    return sorted(found, key=lambda node: (node.lineno, node.col_offset), reverse=True)


_MEMORY = re.compile(r"tl\.(load|store|atomic_\w+)$")


def _pointer(file: Path, calls: list[_Place]) -> str:
    """The argument of the kernel that an access goes through, or the variable where a trace ends.

    The name that the address begins with is followed through assignments to the parameter of the
    function, and from the function's call on.
    """
    return _follow(file.parent, tuple(calls))


@functools.cache
def _follow(folder: Path, calls: tuple[_Place, ...]) -> str:
    name, function = "", None
    for place in calls:
        path = folder / place.file
        for call in _around(path, place, ast.Call):
            called = ast.unparse(call.func)
            if function is None and _MEMORY.match(called):
                value = call.args[0]
            elif function is not None and called.rpartition(".")[2] == function.name:
                parameters = [argument.arg for argument in function.args.args]
                given = dict(zip(parameters, call.args, strict=False))
                given |= {keyword.arg: keyword.value for keyword in call.keywords}
                value = given[name]
            else:
                continue
            break
        else:
            return name
        (function, *_) = _around(path, place, ast.FunctionDef)
        name = _origin(value, function)
        if name not in {argument.arg for argument in function.args.args}:
            return name
    return name


def _origin(value: ast.expr, function: ast.FunctionDef) -> str:
    """The variable that an address begins with, as far back as plain assignments go."""
    parameters = {argument.arg for argument in function.args.args}
    assigned = {
        node.targets[0].id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    name = _first_name(value)
    for _ in range(len(assigned)):
        before = _first_name(assigned.get(name))
        if name in parameters or before not in parameters | assigned.keys():
            break
        name = before
    return name


def _first_name(value: ast.expr | None) -> str:
    """Of an address, which Triton's code writes as pointer + offsets."""
    while isinstance(value, (ast.BinOp, ast.Call, ast.Attribute, ast.Subscript)):
        if isinstance(value, ast.BinOp):
            value = value.left
        elif isinstance(value, ast.Call):
            value = value.func
        else:
            value = value.value
    return value.id if isinstance(value, ast.Name) else ""
