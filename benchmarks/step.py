"""The suite `step`: a training step of a whole network, over what its convolutions alone take.

A step is forward, cross-entropy, backward and SGD with momentum and decay. The limit, conv_only, is
forward and backward of the same network without norm, ReLU and standardization, and without an
optimizer.

Networks of other libraries take the same step as they are, under torch.optim.SGD(fused=True), and
converted, under bit_kernels.optim.SGD.

On a GPU timm's BiT is measured in NCHW, too: there PyTorch's GroupNorm gives contiguous outputs, so
that from the first of them on it convolves in NCHW, whatever layout it was given. Where timm is
missing the networks in plain PyTorch take its place.

There the batch is a few images over and over. A repeated batch has the loss and the gradients of
one, with BatchNorm too, so the gate compares the step that is timed with float64 on a few images.
"_graph" is the step as one CUDA graph, on a batch that is copied to where the graph reads it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cuda, others, rivals
from benchmarks.ops import LAYOUTS
from benchmarks.runner import Case

NUM_CLASSES = 1000
BATCHES = 3  # of fresh images; what a step writes in between is past every cache
GATE_STEPS = 2  # so that momentum and updated weights have been used
GATE_ROOM = 2e-3  # of what was learned of a parameter
SMALLEST_NORM = 1e-2  # of the largest, by which what was learned of a parameter is divided


@dataclass(frozen=True)
class StepCase:
    """name: of the network; images, side: of a batch, px; quick: in `--quick` instead.

    distinct: images of the batch, which are repeated; all if None. alone: as in runner.Case.
    """

    name: str
    images: int
    side: int
    dtype: str = "float32"
    quick: bool = False
    distinct: int | None = None
    alone: bool = False


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

CUDA_DTYPES = ("bfloat16",)
GPU_NETWORKS = (
    "bit",
    "bit_graph",
    "timm",
    "timm_batch_norm",
    "conv_only",
    "conv_only_graph",
    "eager",
    "timm_graph",
    "timm_batch_norm_graph",
)
GPU_LARGE = ("bit", "conv_only", "bit_graph", "conv_only_graph", "timm", "timm_graph")
# The limit and what is compared with it first: what is interrupted has those.
GPU_COMPILED = (
    "conv_only",
    "bit_compiled",
    "timm_compiled",
    "timm_batch_norm_compiled",
    "bit",
    "timm",
    "timm_batch_norm",
)
GPU_LIMITS = ("conv_only", "conv_only_graph")
GPU_GATE_STEPS = 3  # of which a graph takes the last
GPU_BYTES_AN_IMAGE = 160 << 20  # of 224 px in timm's R50x1 in bfloat16, all rivals' leftovers in it
GATE_ELEMENTS = 64 << 20  # of parameters; of more, as R152x4 has, every n-th is compared


def cases(
    *,
    threads: list[int],
    dtypes: list[str],
    quick: bool = False,
    compiled: bool = False,
    device: str = "cpu",
) -> list[Case]:
    """Full-size networks, or with `quick` a small one; "bfloat16" is autocast."""
    if device == "cuda":
        return _gpu_cases(dtypes, quick, compiled)
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


def providers(
    networks: Sequence[str], layouts: Sequence[str] = ("channels_last", "NCHW")
) -> tuple[str, ...]:
    """Each network that is installed, in both layouts."""
    return tuple(
        f"{network}/{layout}"
        for network in networks
        if rivals.installed(network)
        for layout in layouts
    )


def gpu_images(wanted: int = 256) -> int:
    """Images of a batch of R50x1: fewer by powers of two where the GPU's memory is short."""
    while wanted > 8 and wanted * GPU_BYTES_AN_IMAGE > cuda.memory_bytes():
        wanted //= 2
    return wanted


def _gpu_cases(dtypes: list[str], quick: bool, compiled: bool) -> list[Case]:
    """R50x1 and R152x4 in channels_last, and timm's in NCHW, too.

    Those that torch.compile makes have a case of their own, one after the other: it takes minutes.
    """
    images = gpu_images()
    declared = [
        (StepCase("R50x1", images, 224, distinct=min(16, images)), GPU_NETWORKS),
        (StepCase("R152x4", 8, 224, distinct=2, alone=True), GPU_LARGE),
    ]
    if quick:
        declared = [(StepCase("R26x0.25", 32, 64, distinct=8), GPU_NETWORKS)]
    found = [
        _gpu_case(replace(case, dtype=dtype), networks)
        for case, networks in declared
        for dtype in dtypes
    ]
    if compiled:
        case = replace(declared[0][0], alone=True)
        found += [_gpu_case(replace(case, dtype=dtype), GPU_COMPILED) for dtype in dtypes]
    return found


def _gpu_case(case: StepCase, networks: Sequence[str]) -> Case:
    named = _gpu_providers(networks)
    after = "/compiled" if any(name.endswith("_compiled") for name in networks) else ""
    return Case(
        suite="step",
        name=f"{case.name}/{case.images}x3x{case.side}x{case.side}{after}",
        dtype=case.dtype,
        threads=1,
        providers=named,
        baselines=_among(named, BASELINES) or named[-1:],
        prepare=functools.partial(
            StepWorkload, case, "cuda", tuple(dict.fromkeys(map(rivals.plain_of, named)))
        ),
        plain={provider: rivals.plain_of(provider, "channels_last") for provider in named},
        room=GATE_ROOM,
        limits=_among(named, GPU_LIMITS),
        images=case.images,
        device="cuda",
        alone=case.alone,
    )


def _gpu_providers(networks: Sequence[str]) -> tuple[str, ...]:
    in_nchw = [name for name in networks if name == "timm"]
    if not rivals.installed("timm"):
        networks, in_nchw = (
            [name.replace("timm_batch", "batch").replace("timm", "eager") for name in names]
            for names in (networks, in_nchw)
        )
    named = providers(networks, ["channels_last"]) + providers(in_nchw, ["NCHW"])
    return tuple(dict.fromkeys(named))


def _among(named: Sequence[str], networks: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in providers(networks) if name in named)


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
    """Batches and one network a rival; see benchmarks.runner.Workload.

    plains: the networks that the reference is taken of, all of rivals.NETWORKS if None.
    """

    def __init__(self, case: StepCase, device: str = "cpu", plains: tuple[str, ...] | None = None):
        self._case, self._device = case, device
        self._plains = plains or tuple(sorted(set(map(rivals.plain_of, rivals.NETWORKS))))
        self._layout = "NCHW" if device == "cpu" else "channels_last"  # of plain rivals
        self._gate_steps = GATE_STEPS if device == "cpu" else GPU_GATE_STEPS
        generator = torch.Generator(device).manual_seed(0)
        draw = {"generator": generator, "device": device}
        count = case.distinct or case.images
        shape = (count, 3, case.side, case.side)
        self._few = [
            (torch.rand(shape, **draw) * 2 - 1, torch.randint(NUM_CLASSES, (count,), **draw))
            for _ in range(BATCHES)
        ]
        times = case.images // count
        self._batches = [
            (images.repeat(times, 1, 1, 1), labels.repeat(times)) for images, labels in self._few
        ]
        self._weights = rivals.SharedWeights(case.name, NUM_CLASSES, device=device)
        self._norms: dict[str, dict[str, Tensor]] = {}
        self._steps: dict[str, Step | GraphStep] = {}
        self._pool = cuda.Pool()

    def reference(self) -> dict[str, Tensor]:
        found = {}
        with cuda.untuned():
            for plain in self._plains:
                found |= self._reference(plain)
        return found

    def _reference(self, plain: str) -> dict[str, Tensor]:
        step = Step(plain, self._weights, "float64")
        for images, labels in self._few[: self._gate_steps]:
            loss = step(images.double(), labels)
        learned = step.learned()
        norms = {key: tensor.norm() for key, tensor in learned.items()}
        # What a following BatchNorm takes out again has a gradient of rounding errors only.
        least = SMALLEST_NORM * max(norms.values())
        plain = rivals.plain_of(plain, self._layout)
        self._norms[plain] = {key: norm.clamp(min=least) for key, norm in norms.items()}
        return self._results(plain, loss, learned)

    def outputs(self, provider: str) -> dict[str, Tensor]:
        step, layout = self._step(provider), rivals.layout_of(provider)
        for images, labels in self._batches[: self._gate_steps]:
            if self._device != "cpu":  # what is compiled or captured is what is timed
                images = images.contiguous(memory_format=layout)
            loss = step(images, labels)
        plain = rivals.plain_of(provider, self._layout)
        return self._results(plain, loss, step.learned())

    def calls(self, provider: str) -> list[Callable[[], object]]:
        step, layout = self._step(provider), rivals.layout_of(provider)
        return [
            functools.partial(step, images.contiguous(memory_format=layout), labels)
            for images, labels in self._batches
        ]

    def drop(self, *providers: str) -> None:
        self._steps.clear()
        self._pool.leave()

    def _step(self, provider: str) -> "Step | GraphStep":
        if provider not in self._steps:
            if self._case.alone:
                self.drop()
            step = Step(provider, self._weights, self._case.dtype)
            if provider.partition("/")[0].endswith("_graph"):
                step = GraphStep(step, self._gate_steps - 1, self._pool)
            self._steps[provider] = step
        return self._steps[provider]

    def _results(self, plain: str, loss: Tensor, learned: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, and what was learned of all parameters, each over the reference's norm."""
        norms = self._norms[plain]
        total = sum(learned[key].numel() for key in norms)
        every = max(1, total // GATE_ELEMENTS)
        flat = [learned[key].flatten()[::every] / norm for key, norm in norms.items()]
        return {f"{plain} loss": loss.detach().clone(), f"{plain} learned": torch.cat(flat)}


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


class GraphStep:
    """A rival's step as a CUDA graph, after the first `eager` ones, which fill what it needs: momenta,
    compiled kernels, tuned convolutions.

    pool: memory that it shares with others' graphs; its gradients are its own.
    """

    def __init__(self, step: Step, eager: int, pool: cuda.Pool):
        self._step, self._eager, self._pool = step, eager, pool
        self._graph: cuda.Graph | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if self._eager:
            self._eager -= 1
            return self._step(images, labels)
        if self._graph is None:
            self._images, self._labels = images.clone(), labels.clone()
            self._graph = cuda.Graph(lambda: self._step(self._images, self._labels), self._pool)
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._graph.result

    def learned(self) -> dict[str, Tensor]:
        return self._step.learned()


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
