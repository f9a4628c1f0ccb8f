"""Memory passes of the kernels, and that they touch their tensors alone and each element once."""

import pytest
import torch
import triton
import triton.language as tl
from checking import INTERPRETED, LAYOUTS

if not INTERPRETED:
    pytest.skip("looks at the interpreter's addresses: BIT_KERNELS_INTERPRET=1", True)

from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from bit_kernels.triton import group_norm_relu as gpu
from bit_kernels.triton import passes
from bit_kernels.triton.cases import cases

# Passes of each of group_norm_relu's kernels; one more where it reads grad_skip.
PLANNED = {
    "forward_held_kernel": 2,
    "backward_held_kernel": 3,
    "forward_swept_kernel": 3,  # of which it reads one from the cache
    "backward_swept_kernel": 5,  # of which it reads two from the cache
    "statistics_kernel": 1,
    "apply_kernel": 2,
    "gradient_sums_kernel": 2,
    "input_gradient_kernel": 3,
}
READS_SKIP = ("backward_held_kernel", "backward_swept_kernel", "input_gradient_kernel")
# Bytes of parameters, statistics and partial sums, over those of activations, which have 49 pixels
# at least.
REST = 0.2
# Those that are interpreted in seconds.
COUNTED = [case for case in cases() if case.few is not None and case.few_elements < 310_000]


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_passes_are_those_planned(case):
    seen = passes.count(case)
    if case.op == "group_norm_relu":
        for launch in seen.launches:
            planned = PLANNED.get(launch.kernel, 0)
            planned += case.part == "backward and skip" and launch.kernel in READS_SKIP
            planned += 2 * (case.part == "add" and launch.kernel == "statistics_kernel")
            assert passes.case_passes(case, launch) == planned, launch.kernel
    # Those that are split or swept read again; all others make the ideal passes alone.
    names = " ".join(launch.kernel for launch in seen.launches)
    if case.op != "group_norm_relu" or "held" in names or case.part in ("apply", "add"):
        assert seen.passes(case.few_elements, case.few_least) == pytest.approx(case.ideal, 1e-12)
    assert seen.rest(case.few_least or case.few_elements) < REST


# ---- group_norm_relu's three ways, whatever the size would choose

WAYS = {
    # way: (elements that may be held, multiprocessors)
    "held": (1 << 30, 1),
    "swept": (0, 0),
    "split": (0, 1 << 20),
}
SHAPES = {
    "odd": ((3, 6, 7, 5), 3),
    "padded_groups": ((2, 20, 5, 5), 4),
    "one_pixel": ((4, 64, 1, 1), 32),
    "channels_past_a_tile": ((2, 72, 3, 3), 3),
    "many_pixels": ((1, 4, 41, 43), 2),
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    held, multiprocessors = WAYS[request.param]
    for name in ("_HELD_FORWARD", "_HELD_BACKWARD", "_HELD_UNALIGNED"):
        monkeypatch.setattr(gpu, name, held)
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: multiprocessors)
    if request.param == "split":
        monkeypatch.setattr(gpu._Shape, "swept", lambda self: None)
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sample", SHAPES)
def test_nothing_else_is_touched_and_all_is_written(way, sample, layout):
    shape, groups = SHAPES[sample]
    x, other, grad, skip = (torch.randn(shape, dtype=torch.float16) for _ in range(4))
    x, w, b = LAYOUTS[layout](x), torch.randn(shape[1]), torch.randn(shape[1])
    with passes.watch() as seen:
        written = list(gpu.forward(x, groups, w, b, 1e-5, True))
        output, mean, rstd = written
        written.append(gpu.apply(x, mean, rstd, w, b, True))
        written += gpu.backward(grad, x, mean, rstd, w, b, True, skip)
        written += gpu.add(x, other, groups, 1e-5)
        if layout in ("contiguous", "channels_last"):  # used as it lies
            written.append(x)
    assert len(seen.launches) >= 5
    assert all(seen.fully_written(tensor) for tensor in written)
    assert not seen.fully_written(w)


# ---- that a fault is found


@triton.jit
def _copy_kernel(x, y, count, step, shift, BLOCK: tl.constexpr):
    place = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place + shift, mask=place < count), mask=place < count)


@triton.jit
def _shift_kernel(x, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + place + BLOCK, tl.load(x + place))


@triton.jit
def _atomic_kernel(x):
    tl.atomic_add(x + tl.arange(0, 4), 1.0)


def copy(x, y, *, count=32, step=16, shift=0):
    with passes.watch() as seen:
        _copy_kernel[(2,)](x, y, count, step, shift, BLOCK=16)
    return seen


def test_copy_is_two_passes():
    x, y = torch.zeros(32), torch.zeros(32)
    seen = copy(x, y)
    assert seen.passes(32) == 2 and seen.rest(32) == 0
    assert seen.fully_written(y) and not seen.fully_written(x)
    assert copy(x, y, count=31).passes(32) == 62 / 32
    assert not copy(x, y, count=31).fully_written(y)


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(count=32, shift=1), "is in no tensor"),
        (dict(count=32, shift=-1), "is in no tensor"),
        (dict(count=32, step=15), "writes an element of y a second time"),
    ],
    ids=str,
)
def test_finds(how, message):
    memory = torch.zeros(96)  # so that what is next to x is nobody's
    with pytest.raises(InterpreterError, match=message):
        copy(memory[32:64], torch.zeros(32), **how)


def test_finds_elements_between_those_of_a_slice():
    x = torch.zeros(64)[::2]
    with pytest.raises(InterpreterError, match="is between elements of x"):
        copy(x, torch.zeros(32))


# Interpreted one after the other, programs give a result; on a GPU it would depend.


def test_finds_a_store_to_what_another_program_reads():
    x = torch.zeros(64)
    with passes.watch(), pytest.raises(InterpreterError, match="another program has read"):
        _copy_kernel[(2,)](x, x, 48, 16, 16, BLOCK=16)


def test_finds_a_load_of_what_another_program_writes():
    with passes.watch(), pytest.raises(InterpreterError, match="another program has written"):
        _shift_kernel[(2,)](torch.zeros(64), BLOCK=16)


def test_finds_atomics():
    with passes.watch(), pytest.raises(InterpreterError, match="atomics"):
        _atomic_kernel[(1,)](torch.zeros(4))


# ---- addresses past 2^31 elements


@pytest.fixture
def last_program_alone(monkeypatch):
    """Of each launch, so that tensors of gigabytes stay virtual: what nobody touches takes no memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    launched = []
    program_id = interpreter.InterpreterBuilder.create_get_program_id

    def launch(kernel, grid, *args, num_warps=4, **constexprs):
        if "parameter_gradients" in kernel.__name__:  # reads the sums of all samples
            return
        launched.append(kernel.__name__)

        def last(self, axis):
            handle = program_id(self, axis)
            handle.data[:] = grid[axis] - 1 if axis < len(grid) else 0
            return handle

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", last)
            kernel[(1,)](*args, **constexprs)

    monkeypatch.setattr(gpu, "launch", launch)
    # It copies a tensor's whole memory onto itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    return launched


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_samples(way, layout, last_program_alone):
    """The last sample's last group, past 2^31 elements."""
    shape, groups = ((1 << 19) + 1, 64, 8, 8), 32
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, grad = (torch.empty(shape, dtype=torch.float16, memory_format=format) for _ in range(2))
    assert x.numel() > 1 << 31
    x[-1], grad[-1] = torch.randn(shape[1:]), torch.randn(shape[1:])
    w, b = torch.rand(64), torch.rand(64)
    output, mean, rstd = gpu.forward(x, groups, w, b, 1e-5, True)
    gradient = gpu.backward(grad, x, mean, rstd, w, b, True)[0]
    leaf = x[-1:].double().requires_grad_()
    truth = torch.relu(torch.nn.functional.group_norm(leaf, groups, w.double(), b.double()))
    (right,) = torch.autograd.grad(truth, leaf, grad[-1:].double())
    assert (output[-1, -2:].double() - truth[0, -2:]).abs().max() < 5e-3
    assert (gradient[-1, -2:].double() - right[0, -2:]).abs().max() < 2e-2
    taken = {"held": "forward_held", "swept": "forward_swept", "split": "apply"}[way]
    assert f"{taken}_kernel" in last_program_alone


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_samples(monkeypatch, layout, last_program_alone):
    """One sample of 2^31 elements and more, whose last pixels are normalised as they should be."""
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 1 << 20)
    shape = (1, 2, 1 << 15, (1 << 15) + 8)
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, grad = (torch.empty(shape, dtype=torch.float16, memory_format=format) for _ in range(2))
    last = x[0, :, -1, -5:], grad[0, :, -1, -5:]
    for tensor in last:
        tensor.copy_(torch.randn(2, 5))
    mean, rstd = torch.tensor([[0.5, -0.25]]), torch.tensor([[2.0, 3.0]])
    output = gpu.apply(x, mean, rstd, None, None, False)
    expected = (last[0].float() - mean.T) * rstd.T
    written = output[0, 1, -1, -5:]  # the last program's, in both layouts
    assert (written - expected[1]).abs().max() < 5e-3
    gpu.backward(grad, x, mean, rstd, None, None, False)
    other = torch.empty(shape, dtype=torch.float16, memory_format=format)
    other[0, :, -1, -5:] = 1
    before = last[0].clone()
    gpu.add(x, other, 2, 1e-5)
    assert torch.equal(last[0][1], before[1] + 1)
    assert last_program_alone.count("statistics_kernel") == 1
