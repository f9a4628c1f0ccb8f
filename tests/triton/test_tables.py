"""Many tensors in one launch: which program works on what, what is uploaded, what is compiled."""

import re
from collections import Counter

import pytest
import torch
from checking import BACKEND, DEVICE, INTERPRETED

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402

from bit_kernels.triton import _rows, _tables, sgd, standardize_weight, static  # noqa: E402
from bit_kernels.triton._launch import launch, recording  # noqa: E402

runs = pytest.mark.skipif(BACKEND != "triton", reason="BIT_KERNELS_INTERPRET=1 or a GPU runs them")
compiles = pytest.mark.skipif(INTERPRETED, reason="this process interprets and can't compile")

# Rows of few elements and of many, aligned and not, more than HELD, and none.
SHAPES = [(70, 3), (64, 64), (5, 147), (3, 256), (9, 72), (2, 2304), (0, 7), (3, 4608), (2, 9216)]
SHAPES += [(2, 9001), (4, 0), (1, 1)]
RULE = dict(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, nesterov=False)
RULE |= dict(maximize=False, fresh=False, project=True, eps=1e-6)


def make(shapes=SHAPES, kinds=4):
    random = torch.Generator().manual_seed(0)
    return [
        [torch.randn(shape, generator=random).to(DEVICE) for shape in shapes] for _ in range(kinds)
    ]


@runs
def test_many_tensors_give_the_bits_that_each_gives_alone():
    together, alone = make(), make()
    sgd.step(*together, **RULE)
    norms = sgd.gradient_norms(together[0], together[1], 1e-6)
    sgd.project_gradients(together[0], together[1], 1e-6)
    for number in range(len(SHAPES)):
        one = [[kind[number]] for kind in alone]
        sgd.step(*one, **RULE)
        norm = sgd.gradient_norms(one[0], one[1], 1e-6)
        sgd.project_gradients(one[0], one[1], 1e-6)
        assert torch.equal(norm, norms[number : number + 1])
        for kind, (single,) in zip(together, one, strict=True):
            assert torch.equal(kind[number], single), SHAPES[number]


@runs
def test_bits_are_those_of_unaligned_tensors():
    """Tensors that begin anywhere are worked on in launches of their own, to the same bits."""
    aligned, apart = make(), make()
    for kind, shift in zip(apart, (1, 0, 3, 2), strict=True):
        for i, tensor in enumerate(kind):
            buffer = torch.full((tensor.numel() + 8,), torch.nan, device=DEVICE)
            kind[i] = buffer[shift : shift + tensor.numel()].view(tensor.shape).copy_(tensor)
    assert _tables.alignment(64, [apart[0][1]]) == 1 and _tables.alignment(64, [aligned[0][1]]) == 4
    for kinds in (aligned, apart):
        sgd.step(*kinds, **RULE)
    for first, second in zip(aligned, apart, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


@runs
@pytest.mark.parametrize("columns", [3, 147, 2304, 4608, 9001])
def test_standardized_weights_have_the_bits_of_standardize_weight(columns):
    weights, grads, momenta, _ = make([(3, columns)])
    for dtype in (torch.float32, torch.float16):
        kept = [torch.empty_like(weights[0], dtype=dtype)]
        sgd.step(weights, grads, momenta, kept, **RULE)
        output, mean, rstd = standardize_weight.forward(weights[0], 1e-6, dtype)
        many, means, rstds = standardize_weight.forward_many(weights, 1e-6, dtype)
        assert torch.equal(output, kept[0]) and torch.equal(output, many[0])
        assert torch.equal(mean, means) and torch.equal(rstd, rstds)


@runs
def test_elements_that_are_not_there_stay_as_they_are():
    """Around each tensor, and between the tiles of rows that aren't full."""
    for shape in [(70, 3), (5, 147), (3, 4608), (2, 9001), (13,), (3001,)]:
        buffers = [torch.full((2, *shape), 7.0, device=DEVICE) for _ in range(4)]
        tensors = [[buffer[0]] for buffer in buffers]
        for (tensor,) in tensors:
            tensor.normal_()
        kept = tensors[3] if len(shape) > 1 else []
        sgd.step(*tensors[:3], kept, **RULE | dict(project=bool(kept)))
        for buffer in buffers:
            assert buffer[0].isfinite().all() and (buffer[1] == 7).all(), shape


@triton.jit
def _sum_kernel(x, y, columns, BK: tl.constexpr):
    column = tl.arange(0, BK)[None, :]
    value = tl.load(x + column, mask=column < columns, other=0.0)
    tl.store(y + tl.arange(0, 1), _rows.row_sum(value))


@runs
def test_a_sum_has_the_same_bits_in_any_tile():
    x = torch.randn(900, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sums = []
    for width in (1024, 2048, 8192):
        y = torch.empty(1, device=DEVICE)
        launch(_sum_kernel, (1,), x, y, len(x), BK=width)
        sums.append(y.item())
    assert sums[0] == sums[1] == sums[2]
    assert abs(sums[0] - x.double().sum().item()) < 1e-5


# ---- tables


def groups_of(shapes):
    return _tables.table([[torch.empty(shape, device="meta") for shape in shapes]]).groups


def test_each_row_is_one_programs():
    shapes = [(70, 3), (64, 64), (5, 147), (0, 7), (3, 4608), (2, 9216), (4, 0), (513, 256)]
    table = _tables.table([[torch.empty(shape) for shape in shapes]])
    done = set()
    for group in table.groups:
        width, rows_of_tile = group.constexprs["WIDTH"], group.constexprs["BR"]
        firsts, rows, columns, places, numbers = group.shapes.view(5, width).tolist()
        for program in range(group.programs):
            found = sum(first <= program for first in firsts) - 1  # as `find` does
            row = (program - firsts[found]) * rows_of_tile
            number = numbers[found]
            assert (rows[found], columns[found]) == shapes[number]
            assert places[found] == sum(shape[0] for shape in shapes[:number])
            here = {(number, r) for r in range(row, min(row + rows_of_tile, rows[found]))}
            assert here and not here & done
            done |= here
    assert done == {
        (n, r) for n, (rows, columns) in enumerate(shapes) for r in range(rows * bool(columns))
    }


def test_groups_fill_the_gpu_or_join():
    """One launch for each length of rows, where there is enough work for one."""
    R50 = [(64, 64), (256, 64), (256, 64), (64, 256), (64, 576), (512, 256), (1024, 1024)]
    R50 += [(512, 4608)] * 3 + [(2048, 512)] * 3 + [(512, 2048)] * 2 + [(256, 2304)] * 6
    groups = groups_of(R50)
    tiles = [group.constexprs["BK"] for group in groups]
    assert tiles == sorted(set(tiles)) and len(groups) <= 6
    assert len(groups_of([(8, 64), (8, 256), (8, 1024), (8, 8192)])) == 1
    assert len(groups_of([(8, 64), (8, 147), (8, 8196)])) == 3  # aligned, not, longer than any tile
    for group in groups_of([(1 << 14, 64), (1 << 12, 4096)]):
        assert group.programs >= 264 and group.tensors == 1


def test_any_number_of_tensors():
    (group,) = groups_of([(3, 64)] * 1000)
    assert group.constexprs["WIDTH"] == 1024 and group.tensors == 1000
    assert groups_of([(0, 64), (64, 0)]) == []


def test_uploads_happen_where_something_changed(monkeypatch):
    uploads = []
    upload = _tables._upload
    monkeypatch.setattr(_tables, "_upload", lambda v, d: uploads.append(len(v)) or upload(v, d))
    _tables._groups.cache_clear()
    _tables._pointers.cache_clear()
    first, second = make(kinds=1)[0], make(kinds=1)[0]
    a = _tables.table([first])
    assert len(uploads) == 2
    b = _tables.table([first])
    assert len(uploads) == 2 and b.pointers is a.pointers and b.groups is a.groups
    c = _tables.table([second])  # elsewhere, but of the same shapes
    assert len(uploads) == 3 and c.pointers is not a.pointers and c.groups is a.groups
    if DEVICE == "cpu":
        assert c.pointers.tolist() == [tensor.data_ptr() for tensor in second]
    _tables.table([first[:3]])
    assert len(uploads) == 5
    _tables.table([second])
    assert len(uploads) == 5


def test_the_caches_are_bounded():
    _tables._pointers.cache_clear()
    for number in range(_tables._CACHED + 10):
        _tables._pointers((16 * number,), torch.device("cpu"), 0)
    assert _tables._pointers.cache_info().currsize == _tables._CACHED


@pytest.mark.skipif(DEVICE == "cpu", reason="about CUDA graphs")
def test_a_graph_keeps_its_tables():
    tensors, expected = make(), make()
    lr = torch.tensor(0.1, device=DEVICE)
    sgd.step(*tensors, **RULE | dict(lr=lr))  # compiles
    sgd.step(*expected, **RULE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sgd.step(*tensors, **RULE | dict(lr=lr))
    _tables._groups.cache_clear()
    _tables._pointers.cache_clear()
    torch.full((1 << 20,), -1, device=DEVICE)  # over what the caches let go of
    for rate in (0.1, 0.3):
        lr.fill_(rate)
        graph.replay()
        sgd.step(*expected, **RULE | dict(lr=rate))
    for kind, right in zip(tensors, expected, strict=True):
        for a, b in zip(kind, right, strict=True):
            assert torch.equal(a, b)


@runs
def test_offsets_of_more_than_32_bits():
    """The last rows of 2^31 elements and more; only the last program runs."""
    rows, columns = (1 << 21) + 3, 1032
    torch.utils.deterministic.fill_uninitialized_memory = False  # 4 GiB that nobody touches
    weight = torch.empty(rows, columns, dtype=torch.float16, device=DEVICE)
    output = torch.empty_like(weight)
    weight[-1] = torch.randn(columns).to(weight)
    alone, _, _ = standardize_weight.forward(weight[-1:].clone(), 1e-6)
    mean, rstd = torch.zeros(2, rows, device=DEVICE)
    table = _tables.table([[weight], [output]])
    (group,) = table.groups
    shapes = group.shapes.clone()
    shapes[0] = 1 - group.programs  # the first program is taken for the last
    constexprs = dict(WEIGHT=_tables.TYPES[torch.float16], OUTPUT=_tables.TYPES[torch.float16])
    launch(
        standardize_weight._forward_many_kernel, (1,), table.pointers, shapes, mean, rstd, 1e-6,
        **constexprs, **group.constexprs, **group.options,
    )  # fmt: skip
    assert torch.equal(output[-1:], alone) and rstd[-1] > 0


# ---- without running


def launches_of(columns, kept=torch.bfloat16, rows=6400):
    """Everything that works on rows of one length, on tensors without memory."""

    def tensors(dtype=torch.float32):
        return [torch.empty(rows, columns, dtype=dtype, device="meta")]

    with recording() as launches:
        for project in (True, False):
            lists = tensors(), tensors(), tensors(), tensors(kept)
            sgd.step(*lists, **RULE | dict(project=project))
        sgd.step(tensors(), tensors(), tensors(), [], **RULE | dict(project=False))
        sgd.gradient_norms(tensors(), tensors(), 1e-6)
        sgd.project_gradients(tensors(), tensors(), 1e-6)
        outputs, mean, rstd = standardize_weight.forward_many(tensors(), 1e-6, kept)
        standardize_weight.backward_many(outputs, tensors(), mean, rstd)
        output, mean, rstd = standardize_weight.forward(tensors()[0], 1e-6, kept)
        standardize_weight.backward(output, tensors()[0], mean, rstd)
    return launches


def test_launches_are_recorded_from_meta_tensors():
    launches = launches_of(2304)
    names = [recorded.kernel.fn.__name__ for recorded in launches]
    assert names == [
        "_step_rows_kernel", "_step_rows_kernel", "_step_kernel", "_squares_kernel", "_norm_kernel",
        "_project_kernel", "_forward_many_kernel", "_backward_many_kernel", "_forward_kernel",
        "_backward_kernel",
    ]  # fmt: skip
    assert not any(recorded.options["enable_fp_fusion"] for recorded in launches)


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("columns", [64, 147, 1152, 4608, 18432])
def test_what_the_compiler_makes(columns, target):
    """No spills, no product fused into a sum, and 128 bits at a time where rows are aligned."""
    for recorded in launches_of(columns):
        compiled = static.compile_launch(recorded, target)
        assert compiled.stack == compiled.spills == 0, compiled
        # What isn't said to be rounded (rn) the assembler may fuse.
        ptx = static.machine_code_of(recorded, target).asm["ptx"]
        rounded = set(re.findall(r"\b(?:add|sub|mul)\S*\.f32\b", ptx))
        assert rounded and rounded <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32"}, compiled
        if columns != 147 and compiled.kernel != "norm_kernel":
            # Beside the tables' 64 bits, mean and rstd are read and written, a value a row.
            widths = Counter()
            for access, number in compiled.accesses.items():
                widths[access.bits] += number
            assert set(widths) <= {128, 64, 32}, compiled
            assert widths[128] >= 3 and widths[32] <= 6, compiled
