"""mixup's Triton kernel: what it is compiled to, which bytes it touches, where images may lie.

Its results are tested in tests/ops/test_mixup.py, by Triton's interpreter and on a GPU.
"""

import collections

import numpy as np
import pytest
import torch
from checking import DEVICE, INTERPRETED

from bit_kernels.functional import mixup

triton = pytest.importorskip("triton")

from bit_kernels.triton import _launch  # noqa: E402
from bit_kernels.triton import mixup as kernels  # noqa: E402
from bit_kernels.triton import static  # noqa: E402

compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs BIT_KERNELS_INTERPRET=1")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs DEVICE=cuda")


def record(images, out, **options):
    """The one launch that makes `out`, which isn't made."""
    count, outputs, channels = len(images), out.shape[0], out.shape[1]
    arguments = {
        "lam": np.full(outputs, 0.3),
        "partner": np.roll(np.arange(outputs), 1),
        "corners": np.zeros((count, 2), np.int64),
        "flips": np.arange(count) % 2 == 1,
        "mean": np.full(channels, 0.5),
        "std": np.full(channels, 0.5),
    }
    with _launch.recording() as launches:
        assert kernels.forward(images, **arguments | options, out=out) is out
    (launch,) = launches
    return launch


def record_meta(dtype, count=8, crop=(224, 224), channels=3):
    height, width = crop
    images = torch.empty(count, height + 32, width + 32, channels, dtype=torch.uint8, device="meta")
    out = torch.empty(count, height, width, channels, dtype=dtype, device="meta")
    return record(images, out.permute(0, 3, 1, 2))


# ---- what it is compiled to

# Bits of the widest store: whole tiles of 224 x 3 and 196 x 3 elements, the latter's rows beginning
# at multiples of 4 elements; rows of 13 x 3 begin anywhere.
CROPS = {(224, 224): (128, 128), (196, 196): (128, 64), (11, 13): (32, 16)}


@compiled
@pytest.mark.parametrize("target", static.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("crop", CROPS, ids=str)
def test_what_the_compiler_makes(crop, dtype, target):
    launch = record_meta(dtype, crop=crop)
    code = static.compile_launch(launch, target)
    assert code.stack == code.spills == 0
    assert code.registers <= 128  # 16 warps a multiprocessor: 32 bytes in flight for each thread
    assert {bits for kind, bits in code.widths if kind == "store"} == {
        CROPS[crop][dtype != torch.float32]
    }
    # Bytes are read by the threads that write what becomes of them; a tile of float32 would take
    # 4 x BH x BL, where the channels' constants take a row.
    assert code.shared <= 4 * launch.constexprs["BL"]


@compiled
@pytest.mark.parametrize("crop", [(1, 1), (32, 32), (480, 480)], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 4, 19])
def test_other_channels_and_sizes(channels, crop):
    code = static.compile_launch(record_meta(torch.bfloat16, 8, crop, channels), "sm_90")
    assert code.stack == code.spills == 0 and code.registers <= 128
    assert (code.widest("store") == 128) == (crop != (1, 1))


@pytest.mark.parametrize("count, programs", [(1, 84), (8, 672), (4096, 12288)])
def test_rows_of_a_program(count, programs):
    """A small batch is spread out as far as tiles go, a large one has long programs."""
    launch = record_meta(torch.bfloat16, count)
    assert launch.grid == (programs,)
    # Every row once: `rows` of each of `bands`.
    rows, bands, blocks = launch.args[5:8]
    assert (bands - 1) * rows < 224 <= bands * rows and programs == count * bands * blocks


def test_nothing_to_do():
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8, device="meta")
    out = torch.empty(0, 3, 4, 4, device="meta")
    with _launch.recording() as launches:
        empty = np.zeros(0, np.int64)
        corners, flips = np.zeros((2, 2), np.int64), np.zeros(2, np.bool_)
        kernels.forward(images, empty * 1.0, empty, corners, flips, np.ones(3), np.ones(3), out)
    assert launches == []


def test_rows_that_are_too_long():
    images = torch.empty(1, 1, 1 << 30, 1, dtype=torch.uint8, device="meta")
    out = torch.empty(1, 1, 1 << 30, 1, device="meta").permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="crop is 1073741824 px wide, of 1 channels"):
        record(images, out)


# ---- which bytes it touches


def count_touched(patch):
    """How often each address is read as a byte, and written, from now on."""
    from triton.runtime.interpreter import interpreter_builder as builder

    read, written = collections.Counter(), collections.Counter()
    load, store = builder.create_masked_load, builder.create_masked_store

    def counting_load(pointers, mask, *others):
        if pointers.get_element_ty() == triton.language.uint8:
            read.update(pointers.data[mask.data].tolist())
        return load(pointers, mask, *others)

    def counting_store(pointers, value, mask, *others):
        written.update(pointers.data[mask.data].tolist())
        return store(pointers, value, mask, *others)

    patch.setattr(builder, "create_masked_load", counting_load)
    patch.setattr(builder, "create_masked_store", counting_store)
    return read, written


def addresses(crop):
    """Of the bytes of a tensor (h, w, C)."""
    offsets = sum(
        np.arange(n).reshape([-1 if d == k else 1 for k in range(3)]) * crop.stride(d)
        for d, n in enumerate(crop.shape)
    )
    return (crop.data_ptr() + offsets).reshape(-1).tolist()


@interpreted
def test_each_byte_is_read_as_often_as_it_is_used_and_each_element_written_once(monkeypatch):
    sizes = [(21, 40), (17, 90), (19, 33), (17, 32)]
    images = [torch.zeros(*size, 3, dtype=torch.uint8) for size in sizes]
    corners = np.array([(4, 8), (0, 58), (1, 0), (0, 0)])
    partner, lam = [3, 1, 0], [0.4, 0.5, 1.0]  # mixed, alone, and alone by its weight
    read, written = count_touched(monkeypatch)
    out = mixup(
        images, lam, partner, crop=(17, 32), corners=corners, flips=[False, True, True, True],
        backend="triton",
    )  # fmt: skip
    crops = [
        image[top : top + 17, left : left + 32]
        for image, (top, left) in zip(images, corners, strict=True)
    ]
    expected = collections.Counter(address for crop in crops for address in addresses(crop))
    assert read == expected
    elements = range(out.data_ptr(), out.data_ptr() + 4 * out.numel(), 4)
    assert written == dict.fromkeys(elements, 1)


@interpreted
def test_more_elements_than_32_bits_count(monkeypatch):
    """The last program of a launch that would write 4.4 GB."""
    from triton.runtime import interpreter

    torch.utils.deterministic.fill_uninitialized_memory = False
    monkeypatch.setattr(
        interpreter.GridExecutor, "_init_args_hst", lambda self, args, options: (args, options)
    )
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    side = 27000
    images = torch.empty(1, side, side, 3, dtype=torch.uint8)
    images[:, -64:] = torch.arange(64 * side * 3).remainder_(251).view(64, side, 3)
    out = torch.empty(1, side, side, 3, dtype=torch.float16).permute(0, 3, 1, 2)
    assert images.numel() == out.numel() > 1 << 31
    launch = record(images, out)
    last = launch.grid[0] - 1
    monkeypatch.setattr(
        interpreter.interpreter_builder, "set_grid_idx",
        lambda x, y, z: setattr(interpreter.interpreter_builder, "grid_idx", (last, y, z)),
    )  # fmt: skip
    _, rows, bands, blocks = launch.args[4:8]
    rows = side - (bands - 1) * rows  # of the last band
    images[:, -rows:-64] = 0
    out[0, :, -rows - 1 :, -300:] = float("nan")
    launch.kernel[(1,)](*launch.args, **launch.constexprs, **launch.options)
    length = launch.constexprs["BL"] * (blocks - 1)
    expected = (images[0, -rows:].float() - 127.5) / 127.5
    written = out[0].permute(1, 2, 0)[-rows - 1 :].reshape(rows + 1, -1)[:, length:]
    expected = expected.reshape(rows, -1)[:, length:]
    torch.testing.assert_close(written[1:].float(), expected, rtol=1e-3, atol=1e-3)
    assert written[0].isnan().all()


# ---- where images may lie


def test_addresses_are_those_of_the_crops():
    whole = torch.zeros(3, 12, 15, 4, dtype=torch.uint8)
    parts = whole[:, 1:11, 2:14]  # rows of 12 pixels, 15 apart
    corners, flips = np.array([(0, 0), (2, 3), (3, 4)]), np.array([False, True, False])
    for images in (parts, list(parts)):
        places = kernels._places(images, corners, flips, 8, 4)
        for image, (top, left), flip, place in zip(parts, corners, flips, places, strict=True):
            first = image[top, left + 7 if flip else left]
            assert place.tolist() == [first.data_ptr(), 60, -1 if flip else 1]


def test_what_a_gpu_reads_itself(monkeypatch):
    """Pinned memory whose rows are runs; anything else of the host's is an array, to be copied."""
    from bit_kernels.ops.mixup import _as_they_lie

    gpu = torch.device("cuda", 0)
    pinned, pageable = (torch.zeros(2, 8, 9, 3, dtype=torch.uint8) for _ in range(2))
    memory = pinned.untyped_storage().data_ptr()
    monkeypatch.setattr(
        torch.Tensor, "is_pinned", lambda self: self.untyped_storage().data_ptr() == memory
    )
    assert _as_they_lie(pinned, gpu) is pinned
    assert all(isinstance(image, torch.Tensor) for image in _as_they_lie(list(pinned), gpu))
    part = pinned[:, 1:, 2:]
    assert _as_they_lie(part, gpu) is part
    for images in (pageable, pageable.numpy(), pinned[:, :, ::2]):
        assert isinstance(_as_they_lie(images, gpu), np.ndarray)
    with pytest.raises(ValueError, match="images are on meta; .* on cuda:0, or on the CPU"):
        _as_they_lie([pinned[0].to("meta")], gpu)


def test_pinned_images_are_kept_until_they_are_read(monkeypatch):
    class Event:
        done = False

        def query(self):
            return self.done

    class Stream:
        def record_event(self):
            events.append(Event())
            return events[-1]

    events = []
    monkeypatch.setattr(kernels, "_being_read", [])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    for images in ("first", "second", "third"):
        kernels._keep_until_read(images, torch.device("cuda", 0))
    events[1].done = True
    kernels._keep_until_read("fourth", torch.device("cuda", 0))
    assert [images for _, images in kernels._being_read] == ["first", "third", "fourth"]


def batch(count=8):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (count, 40, 37, 3), dtype=np.uint8))
    options = {
        "lam": rng.beta(1, 1, count),
        "partner": rng.permutation(count),
        "crop": (32, 31),
        "flips": np.arange(count) % 2 == 0,
    }
    return images, options


@on_gpu
@pytest.mark.parametrize(
    "place", ["pinned", "pinned_list", "pageable", "resident", "resident_list"]
)
def test_images_give_the_same_wherever_they_lie_and_nothing_waits(place):
    images, options = batch()
    expected = mixup(images, **options)
    there = images.pin_memory() if "pinned" in place else images
    there = there.to(DEVICE) if "resident" in place else there
    there = list(there) if "list" in place else there
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = mixup(there, **options, device=DEVICE, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-6, atol=1e-6)


@on_gpu
def test_pinned_memory_is_not_given_away_before_it_is_read():
    """Batches that nobody holds, one after another, each as soon as the memory of one is free."""
    images, options = batch(64)
    results = []
    for k in range(50):
        pinned = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True).copy_(images + k)
        results.append(mixup(pinned, **options, device=DEVICE))
        del pinned
    for k, result in enumerate(results):
        expected = mixup(images + k, **options)
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-6, atol=1e-6)


@on_gpu
def test_images_of_several_devices_are_refused():
    images, _ = batch()
    with pytest.raises(ValueError, match="images are on cpu and cuda:0; all must be on one device"):
        mixup([images[0].to(DEVICE), images[1]])
    with pytest.raises(ValueError, match="images are on cuda:0; for a result on the CPU"):
        mixup([images[0], images[1].to(DEVICE)])
    with pytest.raises(ValueError, match="out is .* on cpu; it must be .* on cuda:0"):
        out = torch.empty(8, 3, 40, 37).contiguous(memory_format=torch.channels_last)
        mixup(images.to(DEVICE), device=DEVICE, out=out)
