"""mixup: every backend against plain float64 code, and what it does with memory and arguments."""

import functools
import multiprocessing
import threading

import numpy as np
import pytest
import torch
from checking import BACKEND, DEVICE, DTYPES, assert_as_good, of_the_cpu

from bit_kernels import _library, backends
from bit_kernels.functional import mixup

# Why each is here: (N, H, W, C) and the crop.
SAMPLES = {
    "rgb": ((6, 20, 21, 3), (16, 16)),  # rows of 48: whole vectors
    "odd": ((5, 13, 17, 3), (11, 13)),  # rows of 39 bytes: every row begins elsewhere in a vector
    "grey": ((4, 9, 40, 1), (9, 37)),
    "two": ((3, 6, 11, 2), (4, 9)),
    "alpha": ((4, 9, 12, 4), (7, 11)),
    "five": ((3, 8, 13, 5), (5, 12)),  # the most channels that are turned around in a register
    "many": ((3, 5, 7, 19), (4, 6)),
    "one_pixel": ((4, 3, 3, 3), (1, 1)),
    "narrow": ((4, 9, 3, 3), (9, 2)),  # rows shorter than a register
    "one_image": ((1, 12, 12, 3), (8, 8)),
    "streamed": ((8, 130, 131, 3), (128, 127)),  # 1.5 MB of float32, rows not of whole lines
    "streamed_half": ((16, 130, 131, 3), (128, 127)),
}
plain = functools.partial(mixup, backend="reference")


def fused(images, **options):
    return mixup(images, **options, device=DEVICE, backend=BACKEND).cpu()


def placed(images):
    """Where the backend reads images as they lie; elsewhere, as arrays, a GPU has them copied."""
    return images if BACKEND == "cpp" else torch.from_numpy(images).to(DEVICE)


def make(sample):
    shape, crop = SAMPLES[sample]
    rng = np.random.default_rng(0)
    count, channels = shape[0], shape[3]
    room = np.array(shape[1:3]) - crop
    corners = rng.integers(0, room + 1, (count, 2))
    corners[0], corners[-1] = 0, room  # the borders
    return rng.integers(0, 256, shape, dtype=np.uint8), {
        "lam": np.append(rng.beta(1, 1, count - 1), 0.3),
        "partner": rng.integers(0, count, count),
        "crop": crop,
        "corners": corners,
        "flips": np.arange(count) % 3 != 1,  # alone, as a partner, both, neither
        "mean": rng.uniform(0.2, 0.6, channels),
        "std": rng.uniform(0.1, 0.4, channels),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_matches_reference(sample, dtype):
    images, options = make(sample)
    ours = fused(placed(images), **options, dtype=dtype)
    theirs = plain(images, **options, dtype=dtype)
    truth = plain(images, **options, dtype=torch.float64)
    assert_as_good(["output"], [ours], [theirs], [truth])
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_reference_is_the_equation():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    result = plain(
        images, [0.25, 1.0], [1, 0], crop=(2, 3), corners=[[1, 2], [0, 1]], flips=[True, False],
        mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], dtype=torch.float64,
    )  # fmt: skip
    first = images[0, 1:3, 2:5][:, ::-1] / 255
    second = images[1, 0:2, 1:4] / 255
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])
    mixed = 0.25 * (first - mean) / std + 0.75 * (second - mean) / std
    np.testing.assert_allclose(result[0].permute(1, 2, 0), mixed, rtol=1e-12)
    np.testing.assert_allclose(result[1].permute(1, 2, 0), (second - mean) / std, rtol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("partner", [None, [0, 1, 2], [2, 2, 2]])
def test_one_lam_and_partners(lam, partner):
    images, options = make("two")
    options |= {"lam": lam, "partner": partner}
    truth = plain(images, **options, dtype=torch.float64)
    assert_as_good(
        ["output"], [fused(placed(images), **options)], [plain(images, **options)], [truth]
    )


def test_defaults_are_the_whole_image_from_minus_one_to_one():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    x = fused(images)
    assert x.shape == (1, 3, 16, 16) and x[0, 0, 0, 0] == -1 and x[0, 2, 15, 15] == 1
    middle = fused(images, crop=(4, 6))
    assert torch.equal(middle, x[:, :, 6:10, 5:11])


def test_images_past_the_outputs_are_partners_only():
    images, options = make("rgb")
    options |= {"lam": [0.3, 0.6], "partner": [4, 5]}
    both = fused(images, **options)
    assert both.shape == (2, 3, 16, 16)
    options |= {"lam": [0.3, 0.6] * 3, "partner": [4, 5] * 3}
    assert torch.equal(both, fused(images, **options)[:2])


def nhwc(planes):
    return planes.contiguous().permute(0, 2, 3, 1)


def part(images):
    """The images again, cut from a larger tensor: their rows and they themselves lie apart."""
    n, h, w, c = images.shape
    larger = images.new_full((n + 2, h + 5, w + 9, c), 77)
    larger[1:-1, 2 : h + 2, 4 : w + 4] = images
    return larger[1:-1, 2 : h + 2, 4 : w + 4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    {
        "list": list,
        "read_only": lambda x: np.frombuffer(x.tobytes(), np.uint8).reshape(x.shape),
        "upside_down": lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
        "mirrored": lambda x: np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1],
        "planes": lambda x: np.ascontiguousarray(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
        "part": lambda x: np.pad(x, ((1, 1), (2, 3), (4, 5), (0, 0)))[1:-1, 2:-3, 4:-5],
        "some_channels": lambda x: np.pad(x, ((0, 0), (0, 0), (0, 0), (1, 2)))[..., 1:-2],
        "every_other": lambda x: x.repeat(2, axis=0)[::2],
        "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1],
        "tensor": lambda x: torch.from_numpy(x).to(DEVICE),
        "tensors": lambda x: list(torch.from_numpy(x).to(DEVICE)),
        "tensor_of_planes": lambda x: nhwc(torch.from_numpy(x).to(DEVICE).permute(0, 3, 1, 2)),
        "part_of_tensor": lambda x: part(torch.from_numpy(x).to(DEVICE)),
        "parts_of_tensors": lambda x: list(part(torch.from_numpy(x).to(DEVICE))),
        "every_other_of_tensor": lambda x: torch.from_numpy(x.repeat(2, axis=0)).to(DEVICE)[::2],
        "arrays_and_tensors": lambda x: [x[0], *torch.from_numpy(x[1:])],
    }.items(),
    ids=lambda item: item[0],
)
def test_images_as_they_lie(view, dtype):
    images, options = make("odd")
    viewed = view[1](images)
    assert torch.equal(fused(viewed, **options, dtype=dtype), fused(images, **options, dtype=dtype))


@pytest.mark.parametrize("place", [np.asarray, placed], ids=["arrays", "placed"])
def test_images_of_different_sizes(place):
    rng = np.random.default_rng(0)
    sizes = [(9, 12), (8, 7), (20, 6)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    options = {"lam": 0.4, "partner": [1, 2, 0], "crop": (8, 6), "flips": [True, False, True]}
    truth = plain(images, **options, dtype=torch.float64)
    ours = fused([place(image) for image in images], **options)
    assert_as_good(["output"], [ours], [plain(images, **options)], [truth])


def test_images_of_more_bytes_than_32_bits_count():
    torch.utils.deterministic.fill_uninitialized_memory = False
    images = torch.empty(2, 40000, 18000, 3, dtype=torch.uint8, device=DEVICE)  # 4.3 GB untouched
    images[:, -4:, -5:] = torch.arange(120, device=DEVICE).reshape(2, 4, 5, 3)
    corners = [[39996, 17995]] * 2
    small, options = images[:, -4:, -5:].cpu(), {"lam": 0.3, "partner": [1, 0]}
    ours = fused(images, **options, crop=(4, 5), corners=corners, flips=[False, True])
    assert torch.equal(ours, fused(small, **options, flips=[False, True]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_serves_images_where_they_are(dtype):
    images, options = make("odd")
    there = torch.from_numpy(images).to(DEVICE)
    result = plain(there, **options, dtype=dtype)
    assert result.device == there.device
    torch.testing.assert_close(result.cpu(), plain(images, **options, dtype=dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_out(dtype):
    images, options = make("odd")
    buffer = torch.full((5, 11, 13, 3), float("nan"), dtype=dtype, device=DEVICE)
    out = buffer.permute(0, 3, 1, 2)
    result = mixup(images, **options, dtype=dtype, out=out)
    expected = mixup(images, **options, dtype=dtype, device=DEVICE)
    assert result is out and torch.equal(out, expected)


@pytest.mark.parametrize("offset", [0, 1, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_around_the_output(dtype, offset):
    images, options = make("streamed_half")
    shape = (16, 128, 127, 3)
    room = torch.full((np.prod(shape) + 32,), float("nan"), dtype=dtype, device=DEVICE)
    out = room[offset : offset + np.prod(shape)].view(shape).permute(0, 3, 1, 2)
    fused(images, **options, dtype=dtype, out=out)
    assert out.isfinite().all()
    assert room[:offset].isnan().all() and room[offset + np.prod(shape) :].isnan().all()


@of_the_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    images, options = make("streamed")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(fused(images, **options, dtype=dtype))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@of_the_cpu
def test_called_by_several_threads_at_once():
    images, options = make("streamed")
    expected, found = fused(images, **options), {}

    def work(name):
        found[name] = all(torch.equal(fused(images, **options), expected) for _ in range(5))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


@of_the_cpu
def test_forked_process_does_not_wait_for_threads_it_lacks():
    images, options = make("streamed")
    torch.set_num_threads(2)
    expected = fused(images, **options).numpy()  # the threads are there now
    context = multiprocessing.get_context("fork")
    answer, out = context.SimpleQueue(), torch.zeros_like(torch.from_numpy(expected))

    def work():  # with nothing else of torch that would wait for them
        answer.put(np.array_equal(fused(images, **options, out=out).numpy(), expected))

    child = context.Process(target=work)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0 and answer.get()


def test_empty():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert fused(images, partner=np.zeros(0, np.int64)).shape == (0, 3, 4, 4)


IMAGES = np.zeros((3, 8, 9, 3), np.uint8)


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": IMAGES.astype(np.int8)}, r"images are int8 \(3, 8, 9, 3\); they must be uint8"),
        ({"images": IMAGES[0]}, r"they must be uint8 \(N, H, W, C\)"),
        ({"images": [IMAGES]}, r"they must be uint8 \(H, W, C\) each"),
        ({"images": []}, "images are none"),
        ({"images": IMAGES[:0]}, "images are none"),
        ({"images": [IMAGES[0], "cat"]}, "images hold str"),
        ({"images": [IMAGES[0], IMAGES[0, :, :, :1]]}, "images have 3 and 1 channels"),
        ({"images": torch.zeros(3, 8, 9, 3, dtype=torch.uint8, device="meta")}, "are on meta"),
        ({"crop": (9, 9)}, r"crop is \(9, 9\); an image is \(8, 9\) px"),
        ({"crop": (0, 4)}, r"crop is \(0, 4\); it must be \(h, w\), both at least 1"),
        ({"crop": (4,)}, r"crop is \(4,\)"),
        ({"corners": [[0, 0], [3, 0], [0, 0]]}, r"corners has \(3, 0\) for image 1 of \(8, 9\) px"),
        ({"corners": [[0, 0], [0, 0], [-1, 0]]}, r"corners has \(-1, 0\) for image 2"),
        ({"corners": [[0, 0]]}, r"corners is int64 \(1, 2\); it must be integers \(3, 2\)"),
        ({"corners": np.zeros((3, 2))}, "corners is float64"),
        ({"flips": [True]}, r"flips is bool \(1,\); it must be booleans \(3,\)"),
        ({"flips": [0, 1, 0]}, "flips is int64"),
        ({"partner": [0, 3]}, r"partner runs from 0 to 3; with 3 images it must lie in 0..2"),
        ({"partner": [-1, 0]}, "partner runs from -1"),
        ({"partner": [0, 1, 2, 0]}, r"partner is int64 \(4,\).*M at most 3"),
        ({"partner": [0.0]}, "partner is float64"),
        ({"lam": 1.5}, "lam is .*; it must lie in 0..1"),
        ({"lam": float("nan")}, "lam is .*nan.*; it must lie in 0..1"),
        ({"lam": [0.1, 0.2]}, r"lam has shape \(2,\); it must be a number or \(3,\)"),
        ({"mean": [0.1, 0.2]}, r"mean has shape \(2,\); it must be a number or \(3,\)"),
        ({"std": 0.0}, "std .*more than 0"),
        ({"std": [1.0, float("inf"), 1.0]}, "must be finite"),
        ({"dtype": torch.uint8}, "dtype is torch.uint8; it must be a floating dtype"),
        ({"out": torch.zeros(3, 3, 6, 9)}, r"out is torch.float32 \(3, 3, 6, 9\).*\(3, 3, 6, 6\)"),
        ({"out": torch.zeros(3, 3, 6, 6)}, "out must be contiguous in channels_last memory"),
        ({"out": torch.zeros(3, 3, 6, 6).double()}, "out is torch.float64"),
        ({"device": "meta"}, "device is meta; it may be the CPU or a CUDA device"),
        ({"out": torch.zeros(3, 3, 6, 6, device="meta"), "device": None}, "out is on meta"),
        ({"images": torch.zeros(3, 8, 9, 3, device="meta"), "device": None}, "images are on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_refuses(change, message, backend):
    options = {"images": IMAGES, "crop": (6, 6), "device": DEVICE, "backend": backend} | change
    if "out" in change and change["out"].device.type == "cpu":
        options["out"] = change["out"].to(DEVICE)
    with pytest.raises(ValueError, match=message):
        mixup(**options)


def test_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is cuda:1, and PyTorch finds no GPU here"):
        mixup(IMAGES, device="cuda:1")


def test_insisting_on_a_kernel_that_can_not_serve():
    message = f"backend '{BACKEND}' can't serve bit_kernels.mixup.*float64"
    with pytest.raises(ValueError, match=message):
        fused(IMAGES, dtype=torch.float64)
    with pytest.raises(ValueError, match="backend is 'mkl'; it may be None or one of"):
        mixup(IMAGES, backend="mkl")
    other = "cpp" if BACKEND == "triton" else "triton"
    with pytest.raises(ValueError, match=f"backend '{other}' can't serve bit_kernels.mixup"):
        mixup(IMAGES, device=DEVICE, backend=other)


def test_report_names_the_backend():
    assert backends()["mixup"][f"{DEVICE} float16"].startswith(BACKEND)


def native_arguments():
    return {
        "images": IMAGES,
        "corners": np.zeros((3, 2), np.int64),
        "flips": np.zeros(3, np.bool_),
        "partner": np.arange(3),
        "lam": np.ones(3, np.float32),
        "centre": np.zeros(3, np.float32),
        "scale": np.ones(3, np.float32),
        "rows": 6,
        "columns": 6,
        "dtype": "float32",
        "output": np.zeros(3 * 6 * 6 * 3 * 4, np.uint8),
        "parallel_for": None,
    }


@of_the_cpu
@pytest.mark.parametrize(
    "change",
    [
        {"images": IMAGES.astype(np.int8)},
        {"images": IMAGES[:, :, ::2]},
        {"images": [IMAGES[0], b"", IMAGES[2]]},
        {"images": [IMAGES[0], 7, IMAGES[2]]},
        {"images": 7},
        {"corners": np.full((3, 2), 4)},
        {"corners": np.full((3, 2), -1)},
        {"corners": np.zeros((2, 2), np.int64)},
        {"corners": np.zeros((3, 2), np.int32)},
        {"flips": np.zeros(2, np.bool_)},
        {"partner": np.array([0, 1, 3])},
        {"partner": np.array([0, 1, -1])},
        {"partner": np.zeros(4, np.int64)},
        {"lam": np.ones(2, np.float32)},
        {"centre": np.zeros(4, np.float32)},
        {"scale": np.ones(2, np.float32)},
        {"rows": 9},
        {"rows": 0},
        {"columns": 2**61},
        {"dtype": "float64"},
        {"output": np.zeros(3 * 6 * 6 * 3 * 4 - 1, np.uint8)},
        {"output": np.frombuffer(bytes(3 * 6 * 6 * 3 * 4), np.uint8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_library_itself_touches_no_memory_it_should_not(change):
    _library.data.mixup(**native_arguments())
    with pytest.raises((TypeError, ValueError)):
        _library.data.mixup(**native_arguments() | change)
