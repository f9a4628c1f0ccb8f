"""Many tensors in one launch: a table on the device says which there are, and where.

A tensor is rows of equally many elements that lie one after another: for a convolution's weight the
kernels of its output channels. A program works on one tile, BR rows x BK columns. Tensors whose rows
fit the same tile make a `Group`, which is one launch; rows that are too long for any are worked on
one at a time, in pieces of BK columns.

A group has a table of shapes (`_FIELDS` x WIDTH), all groups of a call one of pointers (tensors x
roles, the roles being weight, gradient and so on). Both are int64 and are uploaded where a call's
shapes or addresses differ from those of earlier ones, through pinned memory and without waiting:

- A table belongs to the stream that it was uploaded on, and is found again there only. So kernels
  read it after the upload, and where the cache drops it, its memory goes to later work of that stream.
- A CUDA graph that is captured reads its tables when it is replayed, and uploads them again from the
  same pinned memory. Those of a capture are therefore its own, and kept for good, since nobody tells
  when a graph ends: no later call finds, changes or frees them. They are some kB, but in the graph's
  pool of memory, of which they keep a block of 2 MiB for each capture.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bit_kernels.ops._layout import memory_format
from bit_kernels.triton._launch import ceil_div, check_memory, multiprocessors, power_of_2

HELD = 8192  # columns of the longest rows that a program holds in registers
TILE = 2048  # elements of the tiles of shorter rows, and columns of the pieces of longer ones
_PER_THREAD = 8  # elements of a tensor; twice as many in tiles of HELD elements
_CACHED = 256  # tables of either kind

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Of a tensor in its group's table: its first program, its rows and their elements, its first row
# among those of all tensors, its number in the table of pointers.
_FIELDS = 5
_NOT_YET = 1 << 62  # first program of what fills the table up to WIDTH


# ---- in kernels


@triton.jit
def find(shapes, BR: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    """This program's tensor, its first row there, how many of BR rows there are, columns, place.

    place: of the first row among the rows of all tensors.
    """
    program = tl.program_id(0)
    begun = (tl.load(shapes + tl.arange(0, WIDTH)) <= program).to(tl.int32)
    found = shapes + tl.sum(begun, 0) - 1
    row = (program - tl.load(found)) * BR
    rows = tl.minimum(tl.load(found + WIDTH) - row, BR).to(tl.int32)
    columns = aligned(tl.load(found + 2 * WIDTH).to(tl.int32), ALIGN)
    return tl.load(found + 4 * WIDTH), row, rows, columns, tl.load(found + 3 * WIDTH) + row


@triton.jit
def tensor(shapes, index, WIDTH: tl.constexpr):
    """Of one in its group by its index there: number, rows, place of the first."""
    found = shapes + index
    return tl.load(found + 4 * WIDTH), tl.load(found + WIDTH), tl.load(found + 3 * WIDTH)


@triton.jit
def aligned(number, ALIGN: tl.constexpr):
    """The number, a multiple of ALIGN, written so that the compiler sees it.

    (tl.multiple_of says it of a function's argument, and is lost where the function is inlined.)
    """
    return number // ALIGN * ALIGN


@triton.jit
def pointer(
    pointers, number, ROLE: tl.constexpr, ROLES: tl.constexpr, TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """The tensor that has a role for tensor `number`."""
    address = tl.load(pointers + number * ROLES + ROLE).to(tl.pointer_type(TYPE))
    if ALIGN > 1:
        return tl.multiple_of(address, 16)
    else:
        return address


# ---- launches


class Tile(NamedTuple):
    """How rows are cut for programs, as their constexprs BR, BK and WHOLE."""

    BR: int
    BK: int
    WHOLE: bool  # a tile has whole rows

    def options(self, align: int) -> dict[str, int | bool]:
        """Of the launch.

        Registers are bounded by what the tile takes: left to itself, the assembler may spill one for
        an occupancy that it prefers. Unaligned elements are masked one by one, which takes more.
        """
        warps = min(16, max(4, self.BR * self.BK // (32 * _PER_THREAD)))
        if align == 1 or self.BR * self.BK > 32 * _PER_THREAD * warps:
            registers = 128
        else:
            registers = 64 if self.WHOLE else 80
        return dict(num_warps=warps, registers=registers, contract=False)

    @classmethod
    def of(cls, columns: int) -> "Tile":
        BK = max(64, power_of_2(columns))
        return cls(max(1, TILE // BK), BK, True) if BK <= HELD else cls(1, TILE, False)


class Group(NamedTuple):
    """Tensors that are worked on in one launch of `programs`."""

    shapes: Tensor
    tensors: int
    programs: int
    constexprs: dict[str, int]  # BR, BK, WHOLE, WIDTH, ALIGN
    options: dict[str, int | bool]  # of the launch


class Table(NamedTuple):
    groups: list[Group]
    pointers: Tensor


def alignment(run: int, tensors: Sequence[Tensor]) -> int:
    """Of each `run` of elements, in elements, where 16 bytes can be accessed at a time; else 1."""
    elements = 16 // min(t.element_size() for t in tensors)
    starts = all(t.data_ptr() % 16 == 0 for t in tensors)
    return elements if starts and run % elements == 0 else 1


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of a weight (C_out, C_in, *kernel), which is dense in memory."""
    return tensor.shape[0], tensor.shape[1:].numel()


def lay_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory order of a weight `like`, whose rows are then dense."""
    return tensor.contiguous(memory_format=memory_format(like))


def table(roles: Sequence[Sequence[Tensor]], whole_rows: bool = True) -> Table:
    """Of tensors in their roles, each a list of dense tensors: weights, gradients and so on.

    whole_rows: the tensors are (C_out, C_in, *kernel) and a row is what belongs to an output channel;
        else each element is a row.
    """
    first = roles[0][0]
    shapes = []
    for tensors in zip(*roles):
        rows, columns = rows_of(tensors[0]) if whole_rows else (tensors[0].numel(), 1)
        shapes.append((rows, columns, alignment(columns if whole_rows else rows, tensors)))
    addresses = tuple(t.data_ptr() for tensors in zip(*roles) for t in tensors)
    device = first.device
    if 0 in addresses and device.type != "meta":
        for tensor in itertools.chain(*roles):
            check_memory(tensor)
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                made = _groups.__wrapped__(tuple(shapes), whole_rows, device, 0)
                uploaded = _pointers.__wrapped__(addresses, device, 0)
                _captured.append((made, uploaded))
                return Table(made[0], uploaded[0])
            stream = torch.cuda.current_stream().cuda_stream
    else:
        stream = 0
    return Table(
        _groups(tuple(shapes), whole_rows, device, stream)[0],
        _pointers(addresses, device, stream)[0],
    )


_captured: list[tuple] = []


def _upload(values: list[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """On the device, and the pinned memory that it is copied from."""
    if device.type == "meta":
        return torch.empty(len(values), dtype=torch.int64, device=device), None
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device), None
    source = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=True)
    return source.to(device, non_blocking=True), source


@functools.lru_cache(_CACHED)
def _pointers(addresses: tuple[int, ...], device: torch.device, stream: int):
    return _upload(list(addresses), device)


@functools.lru_cache(_CACHED)
def _groups(
    shapes: tuple[tuple[int, int, int], ...], whole_rows: bool, device: torch.device, stream: int
) -> tuple[list[Group], Tensor | None]:
    """The groups of tensors of rows x columns with an alignment, and their pinned memory."""
    places, place = [], 0
    for rows, _, _ in shapes:
        places.append(place)
        place += rows
    values, made = [], []
    for tile, align, members in _cut(shapes, whole_rows, multiprocessors(device)):
        width = max(64, power_of_2(len(members)))
        firsts, programs = [], 0
        for number in members:
            firsts.append(programs)
            programs += ceil_div(shapes[number][0], tile.BR)
        fields = (
            firsts,
            [shapes[number][0] for number in members],
            [shapes[number][1] for number in members],
            [places[number] for number in members],
            members,
        )
        for field in fields:
            values += field + [_NOT_YET] * (width - len(members))
        constexprs = dict(tile._asdict(), WIDTH=width, ALIGN=align)
        made.append((len(members), programs, constexprs, tile.options(align)))
    uploaded, source = _upload(values, device)
    groups, at = [], 0
    for tensors, programs, constexprs, options in made:
        end = at + _FIELDS * constexprs["WIDTH"]
        groups.append(Group(uploaded[at:end], tensors, programs, constexprs, options))
        at = end
    return groups, source


def _cut(shapes, whole_rows: bool, multiprocessors: int):
    """[tile, alignment, numbers of the tensors] of each group.

    Results don't depend on the tile (`_rows.row_sum`), so that tensors too few to keep the GPU busy
    join those of the next longer rows.
    """
    kinds: dict[tuple[int, Tile], list[int]] = {}
    for number, (rows, columns, align) in enumerate(shapes):
        if rows and columns:
            tile = Tile.of(columns) if whole_rows else Tile(TILE, 1, True)
            kinds.setdefault((align, tile), []).append(number)
    groups = []
    for (align, tile), members in sorted(
        kinds.items(), key=lambda kind: (kind[0][0], not kind[0][1].WHOLE, kind[0][1].BK)
    ):
        if groups and groups[-1][0].WHOLE and tile.WHOLE and groups[-1][1] == align:
            shorter = groups[-1][2]
            programs = sum(ceil_div(shapes[number][0], tile.BR) for number in shorter)
            if programs <= 2 * multiprocessors:
                members = shorter + members
                groups.pop()
        groups.append((tile, align, members))
    return groups
