"""The memory of a training step, counted without taking it."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import tiny
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import _allocated
from bit import config, models, plan
from bit.metrics import autocast
from bit_kernels.data import mixup_cross_entropy
from bit_kernels.optim import SGD


class Step:
    """A training step in earnest, of what `account` counts."""

    def __init__(self, model, images, side, dtype, **network):
        self.dtype = dtype
        self.model = models.create(model, network.pop("classes", 1000), **network)
        self.model.to(memory_format=torch.channels_last)
        kept = torch.bfloat16 if dtype == "bfloat16" else None
        self.optimizer = SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, model=self.model, dtype=kept
        )
        images = torch.rand(images, 3, side, side)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.zeros(len(images), dtype=torch.int64)

    def loss(self):
        with autocast("cpu", self.dtype):
            logits = self.model(self.images)
        return mixup_cross_entropy(logits, (self.labels, self.labels, 1.0), reduction="sum")

    def kept(self):
        """Bytes of all storages that the forward leaves to the backward, parameters apart."""
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        own.add(self.labels.untyped_storage().data_ptr())
        del loss
        return sum(nbytes for at, nbytes in sizes.items() if at not in own)


def part(of, name):
    (found,) = (p for p in of.parts if p.name == name)
    return found.nbytes


@pytest.mark.parametrize(
    "model, images, side, dtype",
    [("R50x1", 2, 64, "float32"), ("R50x1", 1, 65, "bfloat16"), ("R26x0.5", 3, 32, "float32")],
)
def test_counts_what_a_forward_keeps(model, images, side, dtype):
    stem = "small" if side == 32 else "imagenet"
    counted = plan.account(model, images, side, stem=stem, dtype=dtype, device="cpu")
    step = Step(model, images, side, dtype, stem=stem)
    found = sum(part(counted, n) for n in ("standardized weights", "cast weights", "activations"))
    # Labels stacked for the loss, and lam's share of it, are a few numbers an image.
    assert step.kept() == pytest.approx(found, rel=1e-3)
    weights = sum(p.nbytes for p in step.model.parameters())
    assert {part(counted, name) for name in ("weights", "gradients", "momenta")} == {weights}
    loss = step.loss()
    loss.backward()
    step.optimizer.step()
    momenta = [values["momentum_buffer"] for values in step.optimizer.state.values()]
    assert sum(m.nbytes for m in momenta) == weights
    assert sum(p.grad.nbytes for p in step.model.parameters()) == weights


@pytest.mark.parametrize("model, images, side", [("R26x0.5", 8, 64), ("R50x1", 2, 96)])
def test_total_bounds_the_peak_of_a_run(model, images, side):
    counted = plan.account(model, images, side, device="cpu")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = Step(model, images, side, "float32")
        for _ in range(2):
            step.optimizer.zero_grad()
            step.loss().backward()
            step.optimizer.step()
    assert 0.7 * counted.total < _allocated(profiler) <= counted.total


@pytest.mark.parametrize("dtype, most", [("bfloat16", 20), ("float32", 26)])
@pytest.mark.parametrize("classes", [1000, 21843])
def test_r152x4_with_8_images_fits_80_gb(dtype, most, classes):
    counted = plan.account("R152x4", 8, 224, classes=classes, dtype=dtype)
    parameters = 928_340_224 + classes * 8193
    assert part(counted, "weights") == 4 * parameters
    assert 3 * 4 * parameters < counted.total < most * plan.GB
    assert counted.largest(80 * plan.GB) >= 64


def test_largest_is_the_last_that_fits():
    fitting = plan.account("R50x1", 7, 96).largest(3 * plan.GB)
    assert fitting > 7
    assert plan.account("R50x1", fitting, 96).total <= 3 * plan.GB
    assert plan.account("R50x1", fitting + 1, 96).total > 3 * plan.GB


def test_what_depends_on_what():
    # Enough images that no norm is small enough to be left to PyTorch, which keeps more.
    base = plan.account("R26x1", 16, 64)
    more, half, heads = (
        plan.account("R26x1", 32, 64),
        plan.account("R26x1", 16, 64, dtype="bfloat16"),
        plan.account("R26x1", 16, 64, classes=2000),
    )
    assert part(more, "activations") == pytest.approx(2 * part(base, "activations"), rel=1e-6)
    assert more.fixed == pytest.approx(base.fixed)
    assert part(half, "standardized weights") == part(base, "standardized weights") / 2
    assert part(half, "weights") == part(base, "weights")
    assert part(heads, "weights") - part(base, "weights") == 4 * 1000 * 2049
    # 2 batches of float32 images wait on a GPU, where an update takes the third.
    assert part(base, "images ahead") == 2 * 16 * 4 * 3 * 64 * 64


def run(arguments, capsys):
    code = plan.main(arguments.split())
    return code, capsys.readouterr()


def test_command_line_says_fits_or_by_how_much_not(capsys):
    code, said = run("--model R152x4 --batch 8 --size 224 --dtype bfloat16 --memory 80", capsys)
    assert code == 0
    assert said.out.startswith("R152x4, 1000 classes, 8 images of 224 px a pass, bfloat16\n")
    assert "fits 80 GB, with 6" in said.out
    total = next(line for line in said.out.splitlines() if line.startswith("total"))
    parts = [line for line in said.out.splitlines() if " GB  " in line]
    assert len(parts) == 11
    summed = sum(float(line.partition(" GB ")[0].split()[-1]) for line in parts)
    assert float(total.split()[1]) == pytest.approx(summed, abs=0.01)

    code, said = run("--model R50x1 --batch 512 --memory 24", capsys)
    assert code == 1
    excess, fitting = (said.out.splitlines()[-1].split()[i] for i in (5, 10))
    assert float(excess) > 1
    assert run(f"--model R50x1 --batch {fitting} --memory 24", capsys)[0] == 0
    assert run(f"--model R50x1 --batch {int(fitting) + 1} --memory 24", capsys)[0] == 1

    code, said = run("--model R152x4 --memory 10", capsys)
    assert code == 1 and "no --micro-batch would fit: 17." in said.out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--model R51x1", "name is 'R51x1'"),
        ("--batch 0", "images is 0; it must be at least 1"),
        ("--memory nan", "memory is nan; it must be more than 0"),
        ("--device tpu", "device is 'tpu'; it must be cpu or cuda"),
        ("--recipe bit_m", "recipe is 'bit_m'; it is for --topology, which isn't given"),
        ("--no-sharded", "sharded is False; it is for --topology"),
    ],
)
def test_wrong_arguments_are_one_line_and_2(arguments, expected, capsys):
    code, said = run(arguments, capsys)
    assert code == 2 and not said.out
    assert said.err.count("\n") == 1 and expected in said.err
    with pytest.raises(SystemExit) as caught:
        plan.main(["--dtype", "int8"])
    assert caught.value.code == 2


def test_warning_before_a_run_names_a_micro_batch_that_fits(monkeypatch):
    settings = tiny("unused", device="cuda:0", micro_batch=64, batch=48, crop=64, model="R50x1")
    settings = config.resolve(
        replace(settings, network=replace(settings.network, stem="imagenet")),
        num_examples=24,
        native_size=64,
    )
    free = plan.account("R50x1", 20, 64, classes=3).total + 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 10**11))
    said = plan.warning(settings, 3)
    assert said.startswith("cuda:0 has ") and "with micro_batch 48; --micro-batch 20 would" in said
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**11))
    assert "no --micro-batch would fit" in plan.warning(settings, 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**11, 10**11))
    assert plan.warning(settings, 3) is None
    assert plan.warning(replace(settings, run=replace(settings.run, device="cpu")), 3) is None
