"""What the compilers make of the fused convolution for GPUs that are not here: R50x1's, in bfloat16."""

import re

import pytest
import torch
from checking import INTERPRETED

if INTERPRETED:
    pytest.skip("an interpreted kernel is not compiled", allow_module_level=True)

pytest.importorskip("triton")

from bit_kernels.triton import norm_relu_conv as gpu
from bit_kernels.triton import static
from bit_kernels.triton._launch import recording
from bit_kernels.triton.norm_relu_conv import DEFAULT, TILES

KIB = 1024
# Shared memory that a program may have, instructions of the tensor cores.
TARGETS = {
    "sm_80": (163 * KIB, r"mma\.sync\.\S*f32\.bf16\.bf16\.f32"),
    "sm_90": (227 * KIB, r"wgmma\.mma_async\.\S*f32\.bf16\.bf16"),
    "sm_100": (227 * KIB, r"tcgen05\.mma\S*kind::f16"),
    "gfx942": (64 * KIB, r"v_mfma_f32_\d+x\d+x\d+_bf16"),
}
# (C_in, C_out, kernel, stride, H, with residual and statistics)
SHAPES = {
    "conv1": (256, 64, 1, 1, 56, False),
    "projection": (256, 512, 1, 2, 56, False),
    "conv2": (256, 256, 3, 1, 14, False),
    "conv2_strided": (128, 128, 3, 2, 56, False),
    "conv3": (64, 256, 1, 1, 56, True),
    "last_conv3": (512, 2048, 1, 1, 7, True),  # less than a tile of pixels
}


def launched(shape, tile, dtype=torch.bfloat16):
    """The launch of the convolution itself, as 8 images make it."""
    C_in, C_out, kernel, stride, side, full = shape

    def make(*sizes, dtype=dtype):
        tensor = torch.empty(sizes, dtype=dtype, device="meta")
        return tensor.to(memory_format=torch.channels_last) if len(sizes) == 4 else tensor

    out = (side - 1) // stride + 1
    with recording() as launches:
        gpu.convolve(
            make(8, C_in, side, side), make(2, 8, C_in, dtype=torch.float32),
            make(C_in, dtype=torch.float32), True, make(C_out, C_in, kernel, kernel), None,
            (stride, stride), (kernel // 2, kernel // 2), (1, 1), tile,
            make(8, C_out, out, out) if full else None, (32, 1e-5) if full else None,
        )  # fmt: skip
    return launches[0]


def check(shape, tile, target):
    launch = launched(shape, tile)
    shared, tensor_cores = TARGETS[target]
    compiled = static.compile_launch(launch, target)
    assert compiled.shared <= shared
    assert compiled.stack == compiled.spills == 0
    asm = static.machine_code_of(launch, target).asm
    assert re.search(tensor_cores, asm["ptx" if target.startswith("sm") else "amdgcn"])
    # The operands, past the registers by cp.async where a GPU can, the residual and the result.
    maps = ["x", "weight", "y"] + ["residual"] * shape[-1]
    of = compiled.of(maps)
    assert {access.name for access in of} == set(maps)
    if target.startswith("sm"):
        assert {access.bits for access in of} == {128}, of
    else:  # whose matrix cores take 4 elements at a time
        assert {access.bits for access in of} <= {64, 128}, of


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_default_tile(shape, target):
    check(SHAPES[shape], DEFAULT, target)


@pytest.mark.parametrize("shape", ["conv2", "conv3"])
@pytest.mark.parametrize("tile", TILES[1:], ids=str)
def test_every_tile_on_hopper(tile, shape):
    check(SHAPES[shape], tile, "sm_90")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_float32_as_tf32(target, monkeypatch):
    """As a GPU multiplies it where torch's convolutions may."""
    monkeypatch.setattr(gpu, "_precision", lambda dtype, device: "tf32")
    for shape in ("conv2", "conv3"):
        launch = launched(SHAPES[shape], DEFAULT, torch.float32)
        compiled = static.compile_launch(launch, target)
        assert compiled.stack <= 8 and compiled.spills <= 2  # Ampere's assembler puts two away
        assert compiled.shared <= TARGETS[target][0]
        assert "tf32" in static.machine_code_of(launch, target).asm["ptx"]


def test_more_than_32_bits_of_offsets():
    """A sample of 2^31 elements."""
    launch = launched((4096, 4096, 1, 1, 800, False), DEFAULT)
    assert launch.constexprs["WIDE"]
    assert static.compile_launch(launch, "sm_90").stack == 0
    assert not launched(SHAPES["conv3"], DEFAULT).constexprs["WIDE"]
