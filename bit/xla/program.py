"""What a program compiled for a TPU says of itself: cycles by kind, memory, sums over devices.

Read off the optimized, scheduled HLO text. Cycles are the compiler's own estimates, one a fusion or
copy, which it chooses by; collectives have none. They are no measurement.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

KINDS = ("convolutions", "normalisation", "standardization", "update", "copies", "other")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\(")
_CALLS = re.compile(r"(?:calls|to_apply|body)=%([\w.-]+)")
_COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
_COPIES = {"copy", "copy-start", "transpose", "broadcast", "pad", "bitcast", "reshape", "slice"}
# Scopes of bit_kernels.xla, as they stand in op_name.
_SCOPES = {
    "standardize_weight": "standardization",
    "sgd": "update",
    "group_norm_relu": "normalisation",
}


@dataclass(frozen=True)
class Collective:
    """Data of one type that goes from device to device.

    what: "sum", or "gather": to every device what each has a part of. how: the instruction that it
    was compiled to; a gather may be an all-reduce of what is zero on all devices but one. nbytes: of
    the whole array.
    """

    what: str
    how: str
    dtype: str
    nbytes: int

    @property
    def sent(self) -> int:
        """Bytes that a device of a large ring sends: an all-reduce scatters sums, then gathers."""
        return self.nbytes * (2 if self.how == "all-reduce" else 1)


@dataclass(frozen=True)
class Program:
    """cycles: estimated, by kind. collectives: added up by what and type. peak: bytes a device."""

    cycles: dict[str, int]
    collectives: tuple[Collective, ...]
    peak: int
    arguments: int
    temporaries: int

    @property
    def total_cycles(self) -> int:
        return sum(self.cycles.values())

    @property
    def summed_in(self) -> dict[str, int]:
        """Bytes that are summed over the devices, by type."""
        return self._bytes("sum")

    @property
    def gathered_in(self) -> dict[str, int]:
        """Bytes that are sent to all devices, by type."""
        return self._bytes("gather")

    def _bytes(self, what: str) -> dict[str, int]:
        found = Counter()
        for one in self.collectives:
            if one.what == what:
                found[one.dtype] += one.nbytes
        return dict(found)


def from_dict(tree: dict) -> Program:
    """Rebuild from `dataclasses.asdict`, by way of JSON or not."""
    return Program(**tree | {"collectives": tuple(Collective(**c) for c in tree["collectives"])})


def read(compiled) -> Program:
    """Read a `jax.stages.Compiled` for TPUs."""
    memory = compiled.memory_analysis()
    cycles, collectives = _walk(_computations(compiled.as_text()))
    return Program(
        cycles={kind: cycles[kind] for kind in KINDS},
        collectives=tuple(Collective(*key, n) for key, n in sorted(collectives.items())),
        peak=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
    )


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation, by name; the entry's is ''."""
    found, lines = {}, []
    for line in text.splitlines():
        if (match := _COMPUTATION.match(line)) is not None:
            lines = found["" if line.startswith("ENTRY") else match[1]] = []
        elif _INSTRUCTION.match(line):
            lines.append(line)
    return found


def _walk(computations: dict[str, list[str]]) -> tuple[Counter, Counter]:
    """Cycles by kind, and bytes by (what, how, dtype), of the entry and the loops that it runs."""
    multiplies: dict[str, bool] = {}

    def has_convolution(name: str) -> bool:
        if name not in multiplies:
            lines = computations.get(name, [])
            multiplies[name] = any(
                " convolution(" in line or " dot(" in line or any(map(has_convolution, calls(line)))
                for line in lines
            )
        return multiplies[name]

    cycles, moved = Counter(), Counter()

    def run(name: str, times: int) -> None:
        for line in computations[name]:
            _, shape, opcode = _INSTRUCTION.match(line).groups()
            if opcode == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                run(re.search(r"body=%([\w.-]+)", line)[1], times * int(trips[1] if trips else 1))
            elif opcode == "call":
                run(calls(line)[0], times)
            if (estimate := re.search(r'"estimated_cycles":"(\d+)"', line)) is not None:
                convolves = opcode in ("convolution", "dot") or any(
                    map(has_convolution, calls(line))
                )
                fused = [inner for name in calls(line) for inner in computations.get(name, [])]
                kind = "convolutions" if convolves else _kind(opcode, [line, *fused])
                cycles[kind] += times * int(estimate[1])
            for moving in [line, *begun_in(line)]:
                _, shape, opcode = _INSTRUCTION.match(moving).groups()
                if (how := opcode.removesuffix("-start")) in _COLLECTIVES:
                    for dtype, nbytes in _arrays(shape, opcode, moving).items():
                        moved[_what(how, moving), how, dtype] += times * nbytes

    def calls(line: str) -> list[str]:
        return _CALLS.findall(line)

    def begun_in(line: str) -> list[str]:
        """Of a fusion that begins a collective; those that carry it on repeat its line."""
        fused = [inner for name in calls(line) for inner in computations.get(name, [])]
        return fused if any("AsyncCollectiveStart" in inner for inner in fused) else []

    run("", 1)
    return cycles, moved


def _kind(opcode: str, lines: list[str]) -> str:
    """What an instruction that multiplies nothing is for, from its lines and those that it fuses.

    A pass that updates weights and standardizes them at once is the update's.
    """
    innermost = {_innermost(line) for line in lines}
    for scope in ("sgd", "standardize_weight", "group_norm_relu"):
        if scope in innermost:
            return _SCOPES[scope]
    return "copies" if opcode in _COPIES else "other"


def _innermost(line: str) -> str | None:
    """The last of our scopes in an instruction's op_name."""
    name = line.partition('op_name="')[2].partition('"')[0]
    return next((s for s in reversed(re.findall(r"\w+", name)) if s in _SCOPES), None)


def _what(how: str, line: str) -> str:
    gathers = "all_gather" in line.partition('op_name="')[2].partition('"')[0]
    return "gather" if gathers or how == "all-gather" else "sum"


def _arrays(shape: str, opcode: str, line: str) -> dict[str, int]:
    """Bytes of the arrays that a collective makes or sums, by type."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        arrays = [array for array in arrays if array != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]  # what goes in, then what comes out
    parts = _group(line) if opcode.startswith("reduce-scatter") else 1
    found = Counter()
    for dtype, dimensions in arrays:
        sizes = [int(n) for n in dimensions.split(",") if n]
        found[dtype] += parts * BYTES[dtype] * math.prod(sizes)
    return found


def _group(line: str) -> int:
    """How many devices a collective is among.

    replica_groups={{0,1,...},...}, [groups,size]<=... or axes of a mesh, or of a part of one:
    mesh['data'=8] {'data':(1)2}.
    """
    if (listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line)) is not None:
        return listed[1].count(",") + 1
    if (counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line)) is not None:
        return int(counted[1])
    if (named := re.search(r"replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}", line)) is not None:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    raise ValueError(f"a collective doesn't say among which devices it is: {line.strip()}")
