"""What compilers make of the Triton kernels stays within bounds, on targets that nobody has here.

Plainly each kernel as one case launches it, for two targets; with STATIC=full (make test-gpu-static)
every shape, batch, dtype and layout, for all targets.
"""

import os
import re
import shutil
import subprocess

import pytest
import torch
from checking import DEVICE, INTERPRETED

if INTERPRETED or DEVICE != "cpu":
    pytest.skip("compiles for GPUs: in the plain run alone", allow_module_level=True)
pytest.importorskip("triton", reason="needs Triton, which compiles")

from bit import models
from bit_kernels import GroupNorm
from bit_kernels.triton import cases as all_cases
from bit_kernels.triton import machine_code, static
from bit_kernels.triton.cases import Case, cases
from bit_kernels.triton.group_norm_relu_kernels import apply_kernel
from bit_kernels.triton.occupancy import occupancy, programs

FULL = os.environ.get("STATIC") == "full"
full = pytest.mark.skipif(not FULL, reason="minutes: make test-gpu-static")

# What a multiprocessor must have asked for so that memory is never idle: bandwidth x latency, as
# 3.35 TB/s x 0.7 us / 132 = 18 KiB for an H100, 8 TB/s x 0.6 us / 148 = 32 KiB for a B200, 2 TB/s
# x 0.6 us / 108 = 11 KiB for an A100 and 5.3 TB/s x 0.8 us / 304 = 14 KiB for an MI300X.
IN_FLIGHT = {"sm_80": 24 << 10, "sm_90": 24 << 10, "sm_100": 32 << 10, "gfx942": 16 << 10}
# Kernels that read partial results alone: their time is a launch's.
OF_PARTS = re.compile("combine|parameter_gradients|coefficients|norm_kernel")
# The bytes that mixup reads and the fused convolution's pipeline have tests of their own.
APART = ("mixup", "norm_relu_conv")
# So that one program's loads hide behind another's arithmetic; the fused convolution has a pipeline.
PROGRAMS = 2
# ptxas may put a few registers away, once, where that makes room for one more program: in bytes.
STACK = 16


def check(row: static.Row) -> None:
    code = row.compiled
    what = f"{row.case}, launch {row.launch}: {code}"
    assert code.stack <= STACK and code.spills <= STACK // 2, f"spills: {what}"
    assert not any(kind == "atomic" for kind, _ in code.widths), f"atomics: {what}"
    op = row.case.split()[0]
    if not row.aligned or OF_PARTS.search(code.kernel):
        return
    # The longest rows that are held take a program of 16 warps, and half of the registers.
    least = 1 if op == "norm_relu_conv" or code.warps == 16 else PROGRAMS
    assert code.programs >= least, f"alone on a multiprocessor: {what}"
    # A half of what is float32 beside it is 64 bits; on AMD threads, being 64 a warp, have no more.
    narrow = code.narrow(row.activations, 64 if code.target == "gfx942" else 128)
    assert not narrow, f"{narrow}: {what}"
    if op not in APART:
        reads = code.in_flight(row.activations)
        assert reads >= IN_FLIGHT[code.target], f"{reads} bytes in flight: {what}"


# ---- every kernel once


def first_launches() -> dict[str, tuple[Case, static.Launch]]:
    """Each kernel as the first case that launches it does."""
    found = {}
    for case in cases():
        for launch in static.launches_of(case):
            found.setdefault((case.op, launch.kernel.__name__), (case, launch))
    return found


FIRST = first_launches()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("op, kernel", FIRST, ids=lambda part: part)
def test_within_bounds(op, kernel, target):
    case, launch = FIRST[op, kernel]
    row = static.row(case, 0, launch, target)
    check(row)
    compiled = row.compiled
    # The trace from instructions back to arguments must lose none of these.
    assert set(row.activations) <= {access.name for access in compiled.accesses}
    assert row.activations or OF_PARTS.search(kernel)
    # The PTX's widths are the machine code's.
    assert {(a.kind, a.bits) for a in compiled.accesses} == set(compiled.widths)


@full
@pytest.mark.parametrize("target", static.TARGETS)
def test_every_specialisation_within_bounds(target, compiled_in_processes):
    rows = compiled_in_processes[target]
    assert len(rows) > 1000
    failures = {}
    for row in rows:
        try:
            check(row)
        except AssertionError as error:
            failures[row.compiled.kernel, str(error).partition(":")[0]] = str(error)
    assert not failures, "\n".join(failures.values())


@pytest.fixture(scope="module")
def compiled_in_processes():
    return static.in_processes(static.TARGETS, full=True)


# ---- that the bounds can be missed


def apply_launch() -> tuple[Case, static.Launch]:
    case = next(case for case in cases() if case.part == "apply")
    (launch,) = static.launches_of(case)
    assert launch.kernel is apply_kernel
    return case, launch


def test_an_unaligned_tensor_is_seen():
    """The specialisation is of the tensors' very addresses."""
    case, launch = apply_launch()
    x = torch.empty(case.elements + 1, dtype=torch.bfloat16, device="meta")[1:]
    compiled = static.compile_launch(launch._replace(args=(x, *launch.args[1:])), "sm_90")
    assert {access.name for access in compiled.narrow(["x", "y"])} == {"x"}


def test_a_number_that_16_does_not_divide_is_seen():
    case, launch = apply_launch()
    channels = launch.kernel.arg_names.index("C")
    args = list(launch.args)
    args[channels] -= 1
    compiled = static.compile_launch(launch._replace(args=tuple(args)), "gfx942")
    assert {access.name for access in compiled.narrow(["x", "y"])} == {"x", "y"}


def test_spills_are_seen():
    _, launch = apply_launch()
    launch = launch._replace(options=launch.options | {"maxnreg": 24})
    compiled = static.compile_launch(launch, "sm_90")
    assert compiled.registers <= 24 and compiled.stack > STACK and compiled.spills > STACK
    large = {"BP": 1024, "BC": 64}
    _, launch = apply_launch()
    launch = launch._replace(
        constexprs=launch.constexprs | large, options=launch.options | {"num_warps": 1}
    )
    compiled = static.compile_launch(launch, "gfx942")
    assert compiled.stack > STACK and compiled.spills > STACK


def test_refuses_where_kernels_are_interpreted(monkeypatch):
    _, launch = apply_launch()
    monkeypatch.setattr(static.triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="BIT_KERNELS_INTERPRET"):
        static.compile_launch(launch, "sm_90")


# ---- occupancy

OCCUPANCY_MAIN = r"""
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int major, warps, registers;
  size_t shared;
  while (std::scanf("%d %d %d %zu", &major, &warps, &registers, &shared) == 4) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = 0;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 2048;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 49152;
    device.sharedMemPerMultiprocessor = (major == 8 ? 164 : 228) << 10;
    device.sharedMemPerBlockOptin = device.sharedMemPerMultiprocessor - 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 100;
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = 1024;
    function.numRegs = registers;
    function.sharedSizeBytes = 0;
    function.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, 32 * warps,
                                                shared) != CUDA_OCC_SUCCESS) return 1;
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def _toolkit_include() -> str | None:
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    roots += [os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))] if nvcc else []
    for root in filter(None, roots):
        for include in ("include", "targets/x86_64-linux/include"):
            if os.path.isfile(f"{root}/{include}/cuda_occupancy.h"):
                return f"{root}/{include}"
    return None


def test_occupancy_is_the_toolkits(tmp_path):
    include = _toolkit_include()
    if include is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and the CUDA toolkit's cuda_occupancy.h")
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(OCCUPANCY_MAIN)
    subprocess.run(["g++", "-w", f"-I{include}", source, "-o", program], check=True)
    asked = [
        (target, warps, registers, shared)
        for target in ("sm_80", "sm_90", "sm_100")
        for warps in (1, 2, 3, 4, 7, 8, 12, 16, 32)
        for registers in (16, 17, 24, 32, 33, 40, 64, 65, 77, 80, 96, 97, 128, 129, 168, 255)
        for shared in (0, 16, 127, 1024, 7168, 8193, 16384, 49152, 100000, 163000)
    ]
    lines = "\n".join(f"{int(t[3:]) // 10} {w} {r} {s}" for t, w, r, s in asked)
    run = subprocess.run([program], input=lines, check=True, capture_output=True, text=True)
    theirs = [int(line) for line in run.stdout.split()]
    ours = [programs(*each) for each in asked]
    assert len(theirs) == len(asked)
    wrong = [row for row in zip(asked, ours, theirs, strict=True) if row[1] != row[2]]
    assert not wrong, wrong[:10]


def test_occupancy_of_amd_is_llvms():
    """LLVM writes into the assembly how many waves of a kernel fit each of the four schedulers."""
    compared = 0
    for _, launch in FIRST.values():
        code = static.machine_code_of(launch, "gfx942")
        waves = int(re.search(r"; Occupancy: (\d+)", code.asm["amdgcn"])[1])
        compiled = machine_code.read(code, launch.kernel, "gfx942")
        # LLVM counts registers alone, as if programs of one warp and without shared memory.
        ours = occupancy("gfx942", 1, compiled.registers, 0)
        assert ours == waves / 8, (compiled, waves)
        compared += 1
    assert compared > 10


# ---- what is compiled is what networks launch


@pytest.mark.parametrize("name, width", [("R50x1", 1), ("R152x4", 4)])
def test_shapes_are_the_networks(name, width, monkeypatch):
    seen = set()

    def note(x):
        seen.add((x.shape[1], x.shape[2]))

    original = models.norm_relu_conv
    monkeypatch.setattr(
        models, "norm_relu_conv", lambda x, *args, **more: (note(x), original(x, *args, **more))[1]
    )
    with torch.device("meta"):
        network = models.create(name, num_classes=10)
    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(lambda module, args: note(args[0]))
    with torch.no_grad():
        network(torch.empty(1, 3, 224, 224, device="meta"))
    shapes = all_cases.R50X1 if width == 1 else all_cases.R152X4
    assert seen == set(shapes)


# ---- the table


def test_table_is_of_these_kernels():
    """Its names and targets; numbers move with the compilers' versions."""
    text = static.PAGE.read_text()
    compiled = set(re.findall(r"^\| (\w+) (\w+) \| (\w+) \|", text, re.MULTILINE))
    expected = {
        (op, kernel.strip("_"), target) for op, kernel in FIRST for target in static.TARGETS
    }
    assert compiled == expected, "run: python -m bit_kernels.triton.static --write"
    counted = re.findall(r"^\| ([^|]+) \| (\d+) \| [^|]+ \| [\d.]+ / \d+ \|", text, re.MULTILINE)
    launches = [
        (str(case), str(len(static.launches_of(case)))) for case in cases() if case.few is not None
    ]
    assert counted == launches, "run: python -m bit_kernels.triton.static --write"
