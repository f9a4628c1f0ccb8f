"""How many programs of a kernel fit a multiprocessor at once, by the vendors' rules.

NVIDIA's are those of cuda_occupancy.h in the CUDA toolkit (tests/triton/test_static.py compares),
AMD's those of LLVM's AMDGPU backend. Theoretical: what is resident if there is work enough.
"""

from typing import NamedTuple


class _Limits(NamedTuple):
    """Of one multiprocessor (compute unit), whose warps are dealt out to 4 schedulers."""

    warps: int
    programs: int
    registers: int  # for a thread's place in each scheduler: of all its warps together
    register_unit: int  # a thread's registers are rounded up to these
    most_registers: int  # of a thread
    shared: int  # bytes
    shared_unit: int
    shared_reserved: int  # by the system, for each program
    programs_without_barrier: int  # those of a single warp need none


_SCHEDULERS = 4
# 65536 registers for 4 schedulers of 32 threads; an allocation is 256 for a warp, 8 for a thread.
_NVIDIA = dict(warps=64, programs=32, registers=512, register_unit=8, most_registers=256,
               shared_unit=128, shared_reserved=1024, programs_without_barrier=32)  # fmt: skip
_LIMITS = {
    "sm_80": _Limits(shared=164 << 10, **_NVIDIA),
    "sm_90": _Limits(shared=228 << 10, **_NVIDIA),
    "sm_100": _Limits(shared=228 << 10, **_NVIDIA),
    "gfx942": _Limits(warps=32, programs=16, registers=512, register_unit=8, most_registers=512,
                      shared=64 << 10, shared_unit=512, shared_reserved=0,
                      programs_without_barrier=32),
}  # fmt: skip


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def programs(target: str, warps: int, registers: int, shared: int) -> int:
    """Of `warps` warps each, resident on a multiprocessor; 0 if even one does not fit.

    target: "sm_80", "sm_90", "sm_100" or "gfx942".
    registers: of a thread. shared: bytes of a program.
    """
    limits = _LIMITS[target]
    registers = _round_up(max(registers, 1), limits.register_unit)
    places = min(limits.warps, limits.registers // registers * _SCHEDULERS)
    if registers > limits.most_registers or _round_up(warps, _SCHEDULERS) > places:
        return 0
    shared = _round_up(shared + limits.shared_reserved, limits.shared_unit)
    most = limits.programs_without_barrier if warps == 1 else limits.programs
    by_shared = limits.shared // shared if shared else most
    return min(places // warps, by_shared, most)


def occupancy(target: str, warps: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's places for warps that are taken, 0 to 1."""
    return programs(target, warps, registers, shared) * warps / _LIMITS[target].warps
