"""The suite `step`: a training step of a whole network, over what its convolutions alone take.

A step is forward, cross-entropy, backward and SGD with momentum and decay. The limit, conv_only, is
forward and backward of the same network without norm, ReLU and standardization, and without an
optimizer.

Networks of other libraries take the same step as they are, under torch.optim.SGD(fused=True), and
converted, under bit_kernels.optim.SGD.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import others, rivals
from benchmarks.ops import LAYOUTS
from benchmarks.runner import Case

NUM_CLASSES = 1000
BATCHES = 3  # of fresh images; what a step writes in between is past every cache
GATE_STEPS = 2  # so that momentum and updated weights have been used
GATE_ROOM = 2e-3  # of what was learned of a parameter
SMALLEST_NORM = 1e-2  # of the largest, by which what was learned of a parameter is divided


@dataclass(frozen=True)
class StepCase:
    """name: of the network; images, side: of a batch, px; quick: in `--quick` instead."""

    name: str
    images: int
    side: int
    dtype: str = "float32"
    quick: bool = False


CASES = [
    StepCase("R50x1", 8, 224),
    StepCase("R50x1", 8, 128),
    StepCase("R50x1", 8, 224, "bfloat16"),
    StepCase("R50x1", 8, 128, "bfloat16"),
    StepCase("R26x0.25", 8, 64, quick=True),
    StepCase("R26x0.25", 2, 64, "bfloat16", quick=True),
]
NETWORKS = ("bit", "eager", "timm", "timm_batch_norm", "batch_norm", "conv_only")
COMPILED = ("bit_compiled", "timm_compiled")
BASELINES = ("eager", "timm")
PICTURE = ("times_limit", 1.0)
# Without instructions for bfloat16 a convolution takes ten times as long as in float32: such a
# machine measures it only when asked to.
MEASURED_DTYPES = ("float32", "bfloat16") if torch.cpu._is_avx512_bf16_supported() else ("float32",)
CONVERT = ("converted", "as_it_is")
CONVERT_IMAGES, CONVERT_SIDE = 8, 128


def cases(
    *, threads: list[int], dtypes: list[str], quick: bool = False, compiled: bool = False
) -> list[Case]:
    """Full-size networks, or with `quick` a small one; "bfloat16" is autocast."""
    found = [
        _case(case, count, compiled)
        for case in CASES
        for count in threads
        if case.quick == quick and case.dtype in dtypes
    ]
    if quick or "float32" not in dtypes:
        return found
    return found + [
        _convert_case(name, count)
        for name in others.NETWORKS
        for count in threads
        if others.importable(name)
    ]


def providers(networks: Sequence[str]) -> tuple[str, ...]:
    """Each network that is installed, in both layouts."""
    return tuple(
        f"{network}/{layout}"
        for network in networks
        if rivals.installed(network)
        for layout in reversed(LAYOUTS)
    )


def _case(case: StepCase, threads: int, compiled: bool) -> Case:
    named = providers((*NETWORKS, *COMPILED) if compiled else NETWORKS)
    return Case(
        suite="step",
        name=f"{case.name}/{case.images}x3x{case.side}x{case.side}",
        dtype=case.dtype,
        threads=threads,
        providers=named,
        baselines=providers(BASELINES),
        prepare=functools.partial(StepWorkload, case),
        plain={provider: rivals.plain_of(provider) for provider in named},
        room=GATE_ROOM,
        limits=providers(["conv_only"]),
        images=case.images,
    )


def _convert_case(name: str, threads: int) -> Case:
    return Case(
        suite="step",
        name=f"convert/{name}/{CONVERT_IMAGES}x3x{CONVERT_SIDE}x{CONVERT_SIDE}",
        dtype="float32",
        threads=threads,
        providers=tuple(f"{state}/{layout}" for state in CONVERT for layout in reversed(LAYOUTS)),
        baselines=tuple(f"as_it_is/{layout}" for layout in LAYOUTS),
        prepare=functools.partial(ConvertWorkload, name, CONVERT_IMAGES, CONVERT_SIDE),
        plain={f"{state}/{layout}": "as_it_is/NCHW" for state in CONVERT for layout in LAYOUTS},
        room=GATE_ROOM,
        images=CONVERT_IMAGES,
    )


class StepWorkload:
    """Batches and one network a rival; see benchmarks.runner.Workload."""

    def __init__(self, case: StepCase):
        self._case = case
        generator = torch.Generator().manual_seed(0)
        shape = (case.images, 3, case.side, case.side)
        self._batches = [
            (
                torch.rand(shape, generator=generator) * 2 - 1,
                torch.randint(NUM_CLASSES, (case.images,), generator=generator),
            )
            for _ in range(BATCHES)
        ]
        self._weights = rivals.SharedWeights(case.name, NUM_CLASSES)
        self._norms: dict[str, dict[str, Tensor]] = {}
        self._steps: dict[str, Step] = {}

    def reference(self) -> dict[str, Tensor]:
        return {
            name: tensor
            for plain in sorted({network.plain for network in rivals.NETWORKS.values()})
            for name, tensor in self._reference(f"{plain}/NCHW").items()
        }

    def _reference(self, plain: str) -> dict[str, Tensor]:
        step = Step(plain, self._weights, "float64")
        for images, labels in self._batches[:GATE_STEPS]:
            loss = step(images.double(), labels)
        learned = step.learned()
        norms = {key: tensor.norm() for key, tensor in learned.items()}
        # What a following BatchNorm takes out again has a gradient of rounding errors only.
        least = SMALLEST_NORM * max(norms.values())
        self._norms[plain] = {key: norm.clamp(min=least) for key, norm in norms.items()}
        return self._results(plain, loss, learned)

    def outputs(self, provider: str) -> dict[str, Tensor]:
        step = self._step(provider)
        for images, labels in self._batches[:GATE_STEPS]:
            loss = step(images, labels)
        return self._results(rivals.plain_of(provider), loss, step.learned())

    def calls(self, provider: str) -> list[Callable[[], object]]:
        step, layout = self._step(provider), rivals.layout_of(provider)
        return [
            functools.partial(step, images.contiguous(memory_format=layout), labels)
            for images, labels in self._batches
        ]

    def _step(self, provider: str) -> "Step":
        if provider not in self._steps:
            self._steps[provider] = Step(provider, self._weights, self._case.dtype)
        return self._steps[provider]

    def _results(self, plain: str, loss: Tensor, learned: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, and what was learned of all parameters, each over the reference's norm."""
        flat = [(learned[key] / norm).flatten() for key, norm in self._norms[plain].items()]
        return {f"{plain} loss": loss.detach(), f"{plain} learned": torch.cat(flat)}


class Step:
    """A rival's network and optimizer, and what it does with a batch."""

    def __init__(self, provider: str, weights: rivals.SharedWeights, dtype: str):
        self._dtype = dtype
        wide = torch.float64 if dtype == "float64" else torch.float32
        self.network = weights.build(provider, wide)
        self._forward = rivals.compiled(provider, self.network)
        self._parameters = weights.parameters(provider, self.network)
        self.optimizer = None
        if not provider.startswith("conv_only"):
            self.optimizer = rivals.make_optimizer(provider, self.network, dtype)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = rivals.loss_of(self._forward, images, labels, self._dtype)
        for parameter in self._parameters.values():
            parameter.grad = None
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()

    def learned(self) -> dict[str, Tensor]:
        """Momenta, or gradients where there is no optimizer, under bit's names."""
        if self.optimizer is None:
            return {key: parameter.grad for key, parameter in self._parameters.items()}
        state = self.optimizer.state
        return {key: state[p]["momentum_buffer"] for key, p in self._parameters.items()}


class ConvertWorkload:
    """Batches, and a network of another library as it is and converted; see runner.Workload."""

    def __init__(self, name: str, images: int, side: int):
        self._name, self._side = name, side
        generator = torch.Generator().manual_seed(0)
        self._batches = [
            (
                torch.rand(images, 3, side, side, generator=generator) * 2 - 1,
                torch.randint(NUM_CLASSES, (images,), generator=generator),
            )
            for _ in range(BATCHES)
        ]

    def reference(self) -> dict[str, Tensor]:
        return self._results("as_it_is/NCHW", torch.float64)

    def outputs(self, provider: str) -> dict[str, Tensor]:
        return self._results(provider, torch.float32)

    def _results(self, provider: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The loss, and momenta after a few steps, each over its own size."""
        network, optimizer, step = self._make(provider, dtype)
        for images, labels in self._batches[:GATE_STEPS]:
            loss = step(images.to(dtype), labels)
        momenta = [optimizer.state[p]["momentum_buffer"] for p in network.parameters()]
        if dtype == torch.float64:
            norms = torch.stack([momentum.norm() for momentum in momenta])
            self._norms = norms.clamp(min=SMALLEST_NORM * norms.max()).tolist()
        flat = [(m / norm).flatten() for m, norm in zip(momenta, self._norms, strict=True)]
        return {"loss": loss.detach(), "learned": torch.cat(flat)}

    def calls(self, provider: str) -> list[Callable[[], object]]:
        layout = rivals.layout_of(provider)
        step = self._make(provider, torch.float32)[2]
        return [
            functools.partial(step, images.contiguous(memory_format=layout), labels)
            for images, labels in self._batches
        ]

    def _make(self, provider: str, dtype: torch.dtype):
        """The network, its optimizer, and what they do with a batch."""
        converted = provider.startswith("converted")
        network = others.create(self._name, converted, self._side)
        network = network.to(dtype=dtype, memory_format=rivals.layout_of(provider))
        optimizer = rivals.make_optimizer("bit" if converted else "eager", network, "float32")

        def step(images: Tensor, labels: Tensor) -> Tensor:
            loss = F.cross_entropy(others.logits(network, images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        return network, optimizer, step
