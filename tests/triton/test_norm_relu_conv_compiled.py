"""What the compilers make of the fused convolution for GPUs that are not here: R50x1's, in bfloat16."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from checking import INTERPRETED

if INTERPRETED:
    pytest.skip("an interpreted kernel is not compiled", allow_module_level=True)

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bit_kernels.triton import norm_relu_conv as gpu
from bit_kernels.triton._launch import recording
from bit_kernels.triton.norm_relu_conv import DEFAULT, TILES

KIB = 1024
# target, shared memory that a program may have, instructions of the tensor cores.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB, r"mma\.sync\.\S*f32\.bf16\.bf16\.f32"),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB, r"wgmma\.mma_async\.\S*f32\.bf16\.bf16"),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB, r"tcgen05\.mma\S*kind::f16"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB, r"v_mfma_f32_\d+x\d+x\d+_bf16"),
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
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def launched(shape, tile):
    """The launch of the convolution itself, as 8 images make it."""
    C_in, C_out, kernel, stride, side, full = shape

    def make(*sizes, dtype=torch.bfloat16):
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


def compile(launch, target):
    """Ahead of time, specialised as a launch with aligned tensors is."""
    names, signature, constants, attributes = launch.kernel.arg_names, {}, {}, {}
    for at, (name, arg) in enumerate(zip(names, launch.args)):
        if arg is None or isinstance(arg, int) and arg == 1:
            signature[name], constants[at,] = "constexpr", arg
        else:
            tensor = isinstance(arg, torch.Tensor)
            signature[name] = TYPES[arg.dtype] if tensor else "i32"
            if tensor or arg % 16 == 0:
                attributes[at,] = [["tt.divisibility", 16]]
    for name, value in launch.constexprs.items():
        signature[name], constants[names.index(name),] = "constexpr", value
    source = ASTSource(
        fn=launch.kernel,
        signature={name: signature[name] for name in names},
        constexprs=constants,
        attrs=attributes,
    )
    return triton.compile(source, target=target, options=launch.options)


def tool(name, *arguments):
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    command = [folder / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def check(shape, tile, target, tmp_path):
    of_target, shared, tensor_cores = TARGETS[target]
    compiled = compile(launched(shape, tile), of_target)
    assert compiled.metadata.shared <= shared
    if of_target.backend == "hip":
        code = compiled.asm["amdgcn"]
        assert re.search(tensor_cores, code)
        for count in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
            assert int(re.search(rf"\.{count}:\s+(\d+)", code)[1]) == 0, count
        assert "global_load_dwordx4" in code
        return
    code = compiled.asm["ptx"]
    assert re.search(tensor_cores, code)
    # Everything that is loaded comes 128 bits at a time: the operands, past the registers, in
    # cp.async's 16 bytes, and the residual. Of what is written only the statistics don't.
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)[,;]", code)
    assert copies and {int(size, 0) for size in copies} == {16}
    loads, stores = (re.findall(rf"{kind}\.global[.\w:]*", code) for kind in ("ld", "st"))
    assert all(load.endswith((".v4.b32", ".v2.b64")) for load in loads)
    assert bool(loads) == shape[-1]
    narrow = [store for store in stores if not store.endswith((".v4.b32", ".v2.b64"))]
    assert len(narrow) < len(stores) and (not narrow or shape[-1])
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    usage = tool("cuobjdump", "--dump-resource-usage", tmp_path / "kernel.cubin")
    assert re.search(r"STACK:(\d+)", usage)[1] == "0", usage
    assert not re.search(r"\b(LDL|STL)\b", tool("nvdisasm", "-c", tmp_path / "kernel.cubin"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_default_tile(shape, target, tmp_path):
    check(SHAPES[shape], DEFAULT, target, tmp_path)


@pytest.mark.parametrize("shape", ["conv2", "conv3"])
@pytest.mark.parametrize("tile", TILES[1:], ids=str)
def test_every_tile_on_hopper(tile, shape, tmp_path):
    check(SHAPES[shape], tile, "sm_90", tmp_path)


def test_more_than_32_bits_of_offsets(tmp_path):
    """A sample of 2^31 elements."""
    launch = launched((4096, 4096, 1, 1, 800, False), DEFAULT)
    assert launch.constexprs["WIDE"]
    assert compile(launch, TARGETS["sm_90"][0]).asm["ptx"]
    assert not launched(SHAPES["conv3"], DEFAULT).constexprs["WIDE"]
