"""The suite `inference`: images a second of a network in evaluation mode, live and frozen.

On a GPU bfloat16 and float16 are the network's own dtype, and what is frozen was standardized in
float32 before.
"""

import functools
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import cuda, rivals
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
    dtype: str = "float32"


CASES = [
    InferenceCase("R50x1", 1, 224),
    InferenceCase("R50x1", 8, 224),
    InferenceCase("R26x0.25", 1, 64, quick=True),
    InferenceCase("R26x0.25", 8, 64, quick=True),
]

CUDA_DTYPES = ("bfloat16", "float32")
GPU_CASES = [
    InferenceCase("R50x1", 128, 224),
    InferenceCase("R50x1", 8, 224),
    InferenceCase("R50x1", 1, 224),
    InferenceCase("R26x0.25", 8, 64, quick=True),
]
GPU_NETWORKS = ("bit", FROZEN, "eager", "timm", "timm_batch_norm", "conv_only")


def cases(
    *,
    threads: list[int],
    dtypes: list[str],
    quick: bool = False,
    compiled: bool = False,
    device: str = "cpu",
) -> list[Case]:
    """One image and eight, of 224 px, or with `quick` a small network at 64 px; float32 only."""
    if device == "cuda":
        return [
            _gpu_case(replace(case, dtype=dtype), compiled)
            for dtype in dtypes
            for case in GPU_CASES
            if case.quick == quick
        ]
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


def _gpu_case(case: InferenceCase, compiled: bool) -> Case:
    networks = (*GPU_NETWORKS, *COMPILED) if compiled else GPU_NETWORKS
    named = providers(networks, ["channels_last"])
    return Case(
        suite="inference",
        name=f"{case.name}/{case.images}x3x{case.side}x{case.side}",
        dtype=case.dtype,
        threads=1,
        providers=named,
        baselines=providers(BASELINES, ["channels_last"]),
        prepare=functools.partial(InferenceWorkload, case, "cuda"),
        plain={provider: _plain(provider, "channels_last") for provider in named},
        room=GATE_ROOM,
        limits=providers(["conv_only"], ["channels_last"]),
        images=case.images,
        device="cuda",
        capture=True,
    )


def _network(provider: str) -> str:
    """The provider whose network this one runs, live."""
    name, _, layout = provider.partition("/")
    return f"{'bit' if name == FROZEN else 'eager' if name == ONNX else name}/{layout}"


def _plain(provider: str, layout: str = "NCHW") -> str:
    return rivals.plain_of(_network(provider), layout)


class InferenceWorkload:
    """Batches, and one network a rival; see benchmarks.runner.Workload."""

    def __init__(self, case: InferenceCase, device: str = "cpu"):
        self._dtype = getattr(torch, case.dtype)
        self._layout = "NCHW" if device == "cpu" else "channels_last"  # of plain rivals
        generator = torch.Generator(device).manual_seed(0)
        shape = (case.images, 3, case.side, case.side)
        self._batches = [
            torch.rand(shape, generator=generator, device=device) * 2 - 1 for _ in range(BATCHES)
        ]
        self._weights = rivals.SharedWeights(case.name, NUM_CLASSES, device=device)
        self._forwards: dict[str, Callable[[Tensor], Tensor]] = {}

    def reference(self) -> dict[str, Tensor]:
        found = {}
        for plain in sorted({network.plain for network in rivals.NETWORKS.values()}):
            network = self._weights.build(f"{plain}/NCHW", torch.float64).eval()
            with torch.inference_mode(), cuda.untuned():
                found[f"{plain}/{self._layout} logits"] = network(self._batches[0].double())
        return found

    def outputs(self, provider: str) -> dict[str, Tensor]:
        (images, *_) = self._inputs(provider)
        return {f"{_plain(provider, self._layout)} logits": self._forward(provider)(images)}

    def calls(self, provider: str) -> list[Callable[[], object]]:
        forward = self._forward(provider)
        return [functools.partial(forward, images) for images in self._inputs(provider)]

    def _inputs(self, provider: str) -> Iterator[Tensor]:
        layout = rivals.layout_of(provider)
        for images in self._batches:
            yield images.to(dtype=self._dtype, memory_format=layout)

    def _forward(self, provider: str) -> Callable[[Tensor], Tensor]:
        if provider not in self._forwards:
            network = self._weights.build(_network(provider)).eval()
            if provider.startswith(FROZEN):
                network = freeze(network)
            network = network.to(self._dtype)
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
