"""Measures, on the GPU that is here, where norm_relu_conv is faster as one kernel, and notes it.

    python -m bit_kernels.triton.tune --model R50x1 --size 224 --batch 256 --dtype bfloat16

For each convolution of the network: the kernels of the separate way, PyTorch's convolution among
them, and the fused kernel with every tile. What is not as close to float64 as the separate kernels are
gets no figure. Into norm_relu_conv.csv, which `norm_relu_conv.choose` decides by, beside what is there
of other GPUs and shapes. Exit status: 0, 1 where a tile was wrong, 2 where there is no GPU.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bit_kernels import reference
from bit_kernels.triton import group_norm_relu
from bit_kernels.triton import norm_relu_conv as fused
from bit_kernels.triton._launch import cache_bytes, device_name
from bit_kernels.triton.norm_relu_conv import TABLE, TILES, Case, Tile

UNITS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EPS = 1e-5
ROUNDS = 25

# Seconds that each of some functions takes.
Clock = Callable[[list[Callable[[], object]]], list[float]]


def network_cases(model: str, size: int, batch: int, dtype: str) -> list[Case]:
    """The convolutions of a Big Transfer network's units for square images, each once.

    model: "R50x1" and the like; ValueError for another.
    """
    match = re.fullmatch(r"R(\d+)x(\d+)", model)
    if match is None or int(match[1]) not in UNITS or int(match[2]) == 0:
        raise ValueError(f"model is {model!r}; it may be R50x1, R101x3, R152x4 and the like")
    base, found = 64 * int(match[2]), {}

    def add(C_in, C_out, kernel, stride, side, residual=False):
        case = Case(
            dtype, fused.batch_class(batch), C_in, C_out, kernel, stride, kernel // 2, side, side,
            residual,
        )  # fmt: skip
        found[case] = None

    side, channels = -(-size // 4), base
    for block, units in enumerate(UNITS[int(match[1])]):
        middle = base << block
        for unit in range(units):
            stride = 2 if block > 0 and unit == 0 else 1
            if unit == 0:
                add(channels, 4 * middle, 1, stride, side)
            add(channels, middle, 1, 1, side)
            add(middle, middle, 3, stride, side)
            side, channels = -(-side // stride), 4 * middle
            add(middle, channels, 1, 1, side, residual=True)
    return list(found)


class _Inputs(NamedTuple):
    """What a case convolves: random, channels_last, of `batch` samples."""

    x: Tensor
    gamma: Tensor
    beta: Tensor
    weight: Tensor
    residual: Tensor | None
    case: Case

    @classmethod
    def of(cls, case: Case, batch: int, device: torch.device) -> "_Inputs":
        dtype = getattr(torch, "float32" if case.dtype == "tf32" else case.dtype)

        def draw(*shape):
            drawn = torch.randn(shape, device=device).to(dtype)
            return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn

        weight = draw(case.C_out, case.C_in, case.kernel, case.kernel).float()
        sides = ((n + 2 * case.padding - case.kernel) // case.stride + 1 for n in (case.H, case.W))
        return cls(
            draw(batch, case.C_in, case.H, case.W),
            1 + 0.1 * draw(case.C_in).float(),
            0.1 * draw(case.C_in).float(),
            reference.standardize_weight(weight, dtype=dtype),
            draw(batch, case.C_out, *sides) if case.residual else None,
            case,
        )

    def groups(self, channels: int) -> int:
        return max(g for g in range(1, 33) if channels % g == 0)

    def ways(self, tiles: tuple[Tile, ...]) -> dict[str, Callable[[], object]]:
        """By the names that the table knows them by. The fused ones give the output and its
        statistics, which cost them next to nothing, "convolution" only where it adds a residual."""
        x, gamma, beta, weight, residual, case = self
        groups = self.groups(case.C_in)
        next_norm = (self.groups(case.C_out), EPS)
        normal, mean, rstd = group_norm_relu.forward(x, groups, gamma, beta, EPS, True)
        stride, padding = (case.stride, case.stride), (case.padding, case.padding)

        def convolution():
            output = torch.conv2d(normal, weight, None, stride, padding)
            if residual is None:
                return (output,)
            return output, *group_norm_relu.add(output, residual, *next_norm)

        def tiled(tile: Tile):
            def run():
                scaled = fused.coefficients(mean, rstd, gamma, case.C_in)
                return fused.convolve(
                    x, scaled, beta, True, weight, None, stride, padding, (1, 1), tile, residual,
                    next_norm,
                )  # fmt: skip

            return run

        return {
            "group_norm_relu": lambda: group_norm_relu.forward(x, groups, gamma, beta, EPS, True),
            "group_norm_relu_apply": lambda: group_norm_relu.apply(
                x, mean, rstd, gamma, beta, True
            ),
            "statistics": lambda: group_norm_relu.statistics(x, groups, EPS),
            "convolution": convolution,
        } | {str(tile): tiled(tile) for tile in tiles}

    def truth(self) -> Tensor:
        x, gamma, beta, weight, residual, case = (
            v.double() if isinstance(v, Tensor) else v for v in self
        )
        normal = reference.group_norm_relu(x, self.groups(case.C_in), gamma, beta, EPS)
        output = torch.conv2d(normal, weight, None, case.stride, case.padding)
        return output if residual is None else output + residual


def fault(result: tuple[Tensor, ...], separate: Tensor, truth: Tensor) -> str | None:
    """What is wrong with an output and its statistics, if something is.

    The output may be off by twice what the separate kernels are, and two roundings; statistics are
    those of the output as it is.
    """
    output, *found = result
    error, rival = ((y.double() - truth).abs().max().item() for y in (output, separate))
    bound = 2 * (rival + torch.finfo(output.dtype).eps * truth.abs().max().item())
    if not error <= bound:  # so NaN is wrong
        return f"error {error:.3g}, at most {bound:.3g}"
    if not found:
        return None
    mean, rstd = found
    var, center = torch.var_mean(output.double().reshape(*mean.shape, -1), 2, correction=0)
    for name, ours, right in (("mean", mean, center), ("rstd", rstd, (var + EPS).rsqrt())):
        if not (ours - right).abs().max() <= 1e-4 * (right.abs().max() + right.std()):
            return f"{name} of the result off by {(ours - right).abs().max().item():.3g}"
    return None


def measure(
    case: Case, batch: int, device: torch.device, clock: Clock, tiles: tuple[Tile, ...] = TILES
) -> tuple[dict[str, float], list[str]]:
    """Seconds of each way that is right and fits the GPU; and what was wrong with others."""
    small = _Inputs.of(case, min(batch, 2), device)  # tiles lie within samples: 2 are like many
    ways, faults, right = small.ways(tiles), [], []
    # What is done once isn't tuned; TF32 stays as it is, since the fused kernel goes by it, too.
    allow_tf32 = torch.backends.cudnn.allow_tf32
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=allow_tf32):
        truth, separate = small.truth(), ways["convolution"]()
    for tile in tiles:
        try:
            found = fault(ways[str(tile)](), separate[0], truth)
        except OutOfResources:  # of this GPU's shared memory
            continue
        if found is None:
            right.append(tile)
        else:
            faults.append(f"{tile}: {found}")
    ways = _Inputs.of(case, batch, device).ways(tuple(right))
    return dict(zip(ways, clock(list(ways.values())), strict=True)), faults


def gpu_clock(device: torch.device) -> Clock:
    """Medians between events, the functions in turn, so that all meet the same clock rates.

    Before each, memory of several times the L2 cache is written: its contents favour nobody, and it
    takes longer than Python takes to launch a function's kernels.
    """
    flush = torch.empty(max(256 << 20, 4 * cache_bytes(device)), dtype=torch.int8, device=device)

    def clock(functions):
        events = [[] for _ in functions]
        for turn in range(ROUNDS + 2):  # two to warm up
            for function, of_function in zip(functions, events, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                start.record()
                function()
                end.record()
                if turn >= 2:
                    of_function.append((start, end))
        torch.cuda.synchronize(device)
        return [
            statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3
            for pairs in events
        ]

    return clock


def report(case: Case, ways: dict[str, float]) -> str:
    """One line: the separate way and the best tile, in microseconds, statistics being known."""
    separate = ways["group_norm_relu_apply"] + ways["convolution"]
    best = min((way for way in ways if way not in fused.PARTS), key=ways.get, default=None)
    at = f"{case.C_in:5} to {case.C_out:5}, {case.kernel}x{case.kernel} / {case.stride}, {case.H:3}"
    answer = "no tile" if best is None else f"{1e6 * ways[best]:8.1f} us with {best}"
    return f"{at} px{' + residual' * case.residual:11}: separate {1e6 * separate:8.1f} us, {answer}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="R50x1", help="R50x1, R101x3, R152x4 ...")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=256, help="images on the GPU at a time")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--output", type=Path, default=TABLE, help="the table to add to")
    options = parser.parse_args(arguments)
    if options.size < 1 or options.batch < 1:
        parser.error("--size and --batch must be at least 1")
    available = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device() if available else 0)
    dtype = fused.dtype_name(getattr(torch, options.dtype), device)
    try:
        cases = network_cases(options.model, options.size, options.batch, dtype)
    except ValueError as error:
        parser.error(f"--{error}")
    if not available:
        print("tune: there is no GPU here that torch can use; nothing measured", file=sys.stderr)
        return 2
    measured = fused.read(options.output) if options.output.exists() else {}
    torch.backends.cudnn.benchmark = True  # as training has it, for the separate way
    clock, wrong = gpu_clock(device), False
    for case in cases:
        ways, faults = measure(case, options.batch, device, clock)
        measured[device_name(device), case] = ways
        fused.write(options.output, measured)  # after each: what is cut off keeps what it has
        print(report(case, ways), *faults, sep="\n    ", flush=True)
        wrong = wrong or bool(faults)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
