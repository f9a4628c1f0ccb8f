"""The suite `inference`: images a second of a network in evaluation mode, live and frozen."""

import functools
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.runner import Case
from benchmarks.step import providers
from bit_kernels import freeze

NUM_CLASSES = 1000
BATCHES = 8  # of fresh images
FROZEN, ONNX = "bit_frozen", "onnxruntime"
NETWORKS = ("bit", FROZEN, "eager", "timm", "timm_batch_norm", "batch_norm", "conv_only")
COMPILED = ("bit_compiled", "timm_compiled")
BASELINES = ("eager", "timm")
GATE_ROOM = 1e-5  # of the largest logit: roundings of 50 layers in another order
PICTURE = ("images_per_s", None)


@dataclass(frozen=True)
class InferenceCase:
    """name: of the network; images, side: of a batch, px; quick: in `--quick` instead."""

    name: str
    images: int
    side: int
    quick: bool = False


CASES = [
    InferenceCase("R50x1", 1, 224),
    InferenceCase("R50x1", 8, 224),
    InferenceCase("R26x0.25", 1, 64, quick=True),
    InferenceCase("R26x0.25", 8, 64, quick=True),
]


def cases(
    *, threads: list[int], dtypes: list[str], quick: bool = False, compiled: bool = False
) -> list[Case]:
    """One image and eight, of 224 px, or with `quick` a small network at 64 px; float32 only."""
    return [
        _case(case, count, compiled)
        for case in CASES
        for count in threads
        if case.quick == quick and "float32" in dtypes
    ]


def _case(case: InferenceCase, threads: int, compiled: bool) -> Case:
    named = providers((*NETWORKS, *COMPILED) if compiled else NETWORKS)
    if _onnx_installed():
        named += (f"{ONNX}/NCHW",)
    return Case(
        suite="inference",
        name=f"{case.name}/{case.images}x3x{case.side}x{case.side}",
        dtype="float32",
        threads=threads,
        providers=named,
        baselines=providers(BASELINES),
        prepare=functools.partial(InferenceWorkload, case),
        plain={provider: _plain(provider) for provider in named},
        room=GATE_ROOM,
        limits=providers(["conv_only"]),
        images=case.images,
    )


def _network(provider: str) -> str:
    """The provider whose network this one runs, live."""
    name, _, layout = provider.partition("/")
    return f"{'bit' if name == FROZEN else 'eager' if name == ONNX else name}/{layout}"


def _plain(provider: str) -> str:
    return rivals.plain_of(_network(provider))


class InferenceWorkload:
    """Batches, and one network a rival; see benchmarks.runner.Workload."""

    def __init__(self, case: InferenceCase):
        generator = torch.Generator().manual_seed(0)
        shape = (case.images, 3, case.side, case.side)
        self._batches = [torch.rand(shape, generator=generator) * 2 - 1 for _ in range(BATCHES)]
        self._weights = rivals.SharedWeights(case.name, NUM_CLASSES)
        self._forwards: dict[str, Callable[[Tensor], Tensor]] = {}

    def reference(self) -> dict[str, Tensor]:
        found = {}
        for plain in sorted({network.plain for network in rivals.NETWORKS.values()}):
            network = self._weights.build(f"{plain}/NCHW", torch.float64).eval()
            with torch.inference_mode():
                found[f"{plain}/NCHW logits"] = network(self._batches[0].double())
        return found

    def outputs(self, provider: str) -> dict[str, Tensor]:
        return {f"{_plain(provider)} logits": self._forward(provider)(self._batches[0])}

    def calls(self, provider: str) -> list[Callable[[], object]]:
        forward = self._forward(provider)
        layout = rivals.layout_of(provider)
        return [
            functools.partial(forward, images.contiguous(memory_format=layout))
            for images in self._batches
        ]

    def _forward(self, provider: str) -> Callable[[Tensor], Tensor]:
        if provider not in self._forwards:
            network = self._weights.build(_network(provider)).eval()
            if provider.startswith(FROZEN):
                network = freeze(network)
            if provider.startswith(ONNX):
                forward = _onnx(network, self._batches[0])
            else:
                forward = torch.inference_mode()(rivals.compiled(provider, network))
            self._forwards[provider] = forward
        return self._forwards[provider]


def _onnx_installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript"))


def _onnx(network: torch.nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The network in onnxruntime, with as many threads as torch has now."""
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(network, (images,), dynamo=True, verbose=False).save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def forward(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: batch.numpy()})[0])

    return forward
