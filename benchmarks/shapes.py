"""What passes through a Big Transfer network, by arithmetic: shapes that suites measure.

ResNet-v2 with pre-activation bottlenecks (paper, section 3.1 and its release): root 7x7 stride 2
and 3x3 pool stride 2, then four blocks of units; the stride is on the 3x3 of a block's first unit.
"""

import re
from dataclasses import dataclass

UNITS = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def parse(name: str) -> tuple[int, float]:
    """Depth and width of "R{depth}x{width}"; ValueError for a name that isn't one."""
    match = re.fullmatch(r"R(\d+)x(\d+(?:\.\d+)?)", name)
    if match is None or int(match[1]) not in UNITS or 64 * float(match[2]) % 4:
        raise ValueError(
            f"name is {name!r}; it may be R<depth>x<width>, with a depth of "
            f"{', '.join(map(str, UNITS))} and a width that is a multiple of 1/16"
        )
    return int(match[1]), float(match[2])


@dataclass(frozen=True)
class NetworkShapes:
    """In network order, with repetitions.

    norm_inputs: (C, H, W) of what enters each GroupNorm.
    kernels: (C_out, C_in, kH, kW) of each standardized convolution.
    """

    norm_inputs: tuple[tuple[int, int, int], ...]
    kernels: tuple[tuple[int, int, int, int], ...]


def network_shapes(depth: int = 50, width: int = 1, image: int = 224) -> NetworkShapes:
    """Shapes inside R{depth}x{width} for square images with sides of `image` pixels."""
    norms, kernels = [], [(64 * width, 3, 7, 7)]
    size = _halved(_halved(image))
    channels = 64 * width
    for block, units in enumerate(UNITS[depth]):
        middle = 64 * width * 2**block
        out = 4 * middle
        for unit in range(units):
            before = size
            if unit == 0:
                size = _halved(size) if block > 0 else size
                kernels.append((out, channels, 1, 1))
            kernels += [(middle, channels, 1, 1), (middle, middle, 3, 3), (out, middle, 1, 1)]
            norms += [(channels, before, before), (middle, before, before), (middle, size, size)]
            channels = out
    norms.append((channels, size, size))
    return NetworkShapes(tuple(norms), tuple(kernels))


def distinct(shapes: tuple) -> tuple:
    """Each shape once, in the order of first appearance."""
    return tuple(dict.fromkeys(shapes))


def _halved(size: int) -> int:
    return (size + 1) // 2
