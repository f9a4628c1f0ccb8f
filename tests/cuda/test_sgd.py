"""sgd's CUDA kernels, on the host, against plain float64 code, with every option."""

import ctypes
import mmap

import pytest
import torch
from checking import assert_as_good
from on_host import AMPERE, ELEMENTS, SgdOptions, SgdTensor

from bit_kernels import reference

DTYPES = list(ELEMENTS)

# Why each is here; all of them are stepped in one call.
SAMPLES = {
    "root": (16, 3, 7, 7),  # rows of 147: no multiple of a vector
    "one_by_one": (20, 64, 1, 1),
    "three_by_three": (3, 64, 3, 3),  # 576: the longest row of a warp
    "short_rows": (7, 5, 1, 1),
    "one_element": (3, 1, 1, 1),
    "block": (2, 580, 1, 1),  # a block a row
    "unaligned_block": (2, 193, 3, 3),
    "long": (2, 4612, 1, 1),  # a large block a row
    "unaligned_long": (1, 513, 3, 3),
    "linear": (6, 20),
    "volume": (4, 3, 2, 3, 5),
}
OPTIONS = [
    dict(lr=0.1),
    dict(lr=0.1, weight_decay=0.02, maximize=True),
    dict(lr=0.1, momentum=0.9, weight_decay=0.02, fresh=True),
    dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.02),
    dict(lr=0.1, momentum=0.9, weight_decay=0.02, nesterov=True),
    dict(lr=0.1, momentum=0.9, maximize=True, nesterov=True, fresh=True),
    dict(lr=0.1, momentum=0.9, dampening=0.3, fresh=True),
    dict(lr=0.0, momentum=0.9),
]


def make(shapes):
    """Weights, gradients and momenta."""
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=random) * 0.02 + 0.01 for shape in shapes]
    others = [[torch.randn(s, generator=random) * 0.01 for s in shapes] for _ in range(2)]
    return weights, *others


def step(function, lists, options, dtype=torch.float32, wide=False, keeps=True, **more):
    """Weights, momenta and standardized weights after a step; what must be overwritten is NaN."""
    weights, grads, momenta = (
        [t.double() if wide else t.clone() for t in tensors] for tensors in lists
    )
    if options.get("fresh"):
        momenta = [m.fill_(torch.nan) for m in momenta]
    kind = torch.float64 if wide else dtype
    places = [torch.full_like(w, torch.nan, dtype=kind) for w in weights] if keeps else []
    function(weights, grads, momenta, places, **options, **more)
    return weights + (momenta if options.get("momentum") else []) + places


def check(sgd, shapes, options, dtype=torch.float32, keeps=True, offset=0):
    lists = make(shapes)
    ours = step(sgd.step, lists, options, dtype, keeps=keeps, offset=offset)
    theirs = step(reference.sgd, lists, options, dtype, keeps=keeps)
    truth = step(reference.sgd, lists, options, wide=True, keeps=keeps)
    assert_as_good([f"{i} of {shapes}" for i in range(len(ours))], ours, theirs, truth)


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_reference(options, project, sgd):
    check(sgd, list(SAMPLES.values()), options | dict(project=project, eps=1e-10))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_types_of_the_standardized_weight(dtype, offset, sgd):
    """And tensors that begin between two vectors."""
    options = OPTIONS[3] | dict(project=True, eps=1e-10)
    check(sgd, list(SAMPLES.values()), options, dtype, offset=offset)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[4]], ids=str)
def test_rows_too_long_for_shared_memory(options, sgd):
    sgd.reset(**AMPERE)
    shapes = [(2, 8000, 1, 1), (1, 887, 3, 3), (2, 4, 1, 1)]
    check(sgd, shapes, options | dict(project=True, eps=1e-10))
    sgd.reset(**AMPERE | dict(per_block=60_000))
    check(sgd, shapes, options | dict(project=True, eps=1e-10))
    assert [launch["shared"] for launch in sgd.launches()][-1] < 1000


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_tensors(options, offset, sgd):
    """Tensors of all sizes, none of them standardized, more than one launch has room for."""
    shapes = [(3,), (1,), (17,), (129, 7), (4, 4, 3, 3), (5000,), (4096,), (4097,)]
    check(sgd, shapes, options, keeps=False, offset=offset)
    many = [(1 + i % 5,) for i in range(150)]
    check(sgd, many, options, keeps=False, offset=offset)
    assert len(sgd.launches()) == 3


def test_more_standardized_tensors_than_one_launch_has_room_for(sgd):
    check(sgd, [(2 + i % 3, 4 + i % 4, 1, 1) for i in range(160)], OPTIONS[3] | dict(eps=1e-10))


@pytest.mark.parametrize("hidden", [0.0, 1e3])
def test_norm_of_projected_gradients(hidden, sgd):
    """Also of a gradient nearly along the weight, of which the projection leaves next to nothing."""
    shapes = [*SAMPLES.values(), (4, 0, 3, 3), (0, 4)]
    weights, grads, _ = make(shapes)
    for w, g in zip(weights, grads, strict=True):
        if w.numel() > 0:
            g += hidden * reference.standardize_weight(w)
    for offset in (0, 1):
        norms = sgd.norms(weights, grads, offset=offset)
        for w, g, norm in zip(weights, grads, norms, strict=True):
            if w.numel() == 0:
                assert norm == 0
                continue
            true, plain = (
                torch.linalg.vector_norm(reference.project_gradient(g.to(t), w.to(t)))
                for t in (torch.float64, torch.float32)
            )
            bound = 2 * (plain - true).abs() + 1e-5 * true + 1e-5 * hidden
            assert (norm - true).abs() <= bound, w.shape


def test_norms_of_many_tensors(sgd):
    weights, grads, _ = make([(1 + i % 4, 3 + i % 5) for i in range(150)])
    together = sgd.norms(weights, grads)
    alone = torch.cat([sgd.norms([w], [g]) for w, g in zip(weights, grads, strict=True)])
    assert torch.equal(together, alone)


def test_same_bits_in_any_order_of_threads(sgd):
    """Which is how a barrier that is missing would show, too."""
    lists = make(list(SAMPLES.values()))
    options = OPTIONS[4] | dict(project=True, eps=1e-10)
    expected = step(sgd.step, lists, options), sgd.norms(*lists[:2])
    for order in (1, 2, 3):
        sgd.library.shim_order(order)
        for a, b in zip(step(sgd.step, lists, options), expected[0], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(sgd.norms(*lists[:2]), expected[1])


def test_more_elements_than_32_bits_count(sgd):
    """The last rows of a tensor that is nearly all unused address space."""
    rows, columns = 540_000, 4000
    assert rows * columns > 2**31
    last, grad, _ = make([(1, columns)])
    w, g, wh = (_zeros(rows * columns) for _ in range(3))
    w[-columns:], g[-columns:] = last[0][0], grad[0][0]
    table = (SgdTensor * 1)(
        SgdTensor(g.data_ptr(), w.data_ptr(), None, wh.data_ptr(), rows, columns)
    )
    options = SgdOptions(0.1, 0, 0, 0.01, False, False, False, True, 1e-10)
    sgd.library.shim_first_cluster(rows - 1)
    sgd.call("bit_kernels_sgd", table, ctypes.c_int64(1), 0, ctypes.byref(options), 0, None)
    chosen = dict(lr=0.1, weight_decay=0.01, project=True, eps=1e-10)
    weight, standardized = step(reference.sgd, (last, grad, grad), chosen, wide=True)
    assert (w[-columns:].double() - weight[0]).abs().max() < 1e-6
    assert (wh[-columns:].double() - standardized[0]).abs().max() < 1e-5


def _zeros(elements: int) -> torch.Tensor:
    """float32 zeros whose memory is only there where it is touched."""
    no_reserve = 0x4000  # MAP_NORESERVE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, 4 * elements, flags=flags), dtype=torch.float32)
