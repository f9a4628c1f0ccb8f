"""sgd: what is compared. Nothing here takes time; see benchmarks/ops/__init__.py.

A case is one step of an optimizer over many weights, with momentum and decay. In "standardized"
cases ours also projects the gradients and writes the standardized weights, and the floor counts
them. The rivals get gradients that are projected already and only step: their networks standardize
in the forward and project in the backward, which no time here includes.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import cuda
from benchmarks.runner import Absent, Case
from benchmarks.shapes import network_shapes
from bit_kernels import reference
from bit_kernels.backends import choose
from bit_kernels.functional import sgd

SETTINGS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
EPS = 1e-10
NETWORKS = {
    "r50x1": network_shapes().kernels,  # every kernel of the network
    "r152x4": network_shapes(152, 4).kernels,  # of a GPU's cases only
    "8x4M": ((2048, 2048, 1, 1),) * 8,
    "tiny": ((8, 4, 1, 1), (16, 8, 3, 3)) * 4,  # the cost of a call
}
TORCH = {
    "eager": {"foreach": False},
    "eager_foreach": {"foreach": True},
    "eager_fused": {"fused": True},
}
OURS = "bit_kernels"
BACKENDS = ("triton", "cuda")  # ours on a GPU


@dataclass(frozen=True)
class Step:
    """weights: a key of NETWORKS; kept: dtype of the standardized weights, None without them."""

    weights: str
    kept: str | None

    @property
    def name(self) -> str:
        return f"sgd/{self.weights}/{f'standardized-{self.kept}' if self.kept else 'plain'}/step"

    def necessary_bytes(self) -> int:
        """Gradient, weight and momentum are read, weight, momentum and standardized written."""
        written = getattr(torch, self.kept).itemsize if self.kept else 0
        return (5 * 4 + written) * sum(map(math.prod, NETWORKS[self.weights]))


STEPS = [
    Step(weights, kept)
    for weights in NETWORKS
    if weights != "r152x4"
    for kept in (None, "float32", "bfloat16")
]
GPU_STEPS = [
    Step(weights, kept)
    for weights in ("r50x1", "r152x4", "tiny")
    for kept in ("bfloat16", None, "float32")
    if kept != "float32" or weights != "r152x4"
]


def gpu_cases(*, dtypes: list[str], quick: bool) -> list[Case]:
    """As `cases`, of the networks that are trained there; small weights would stay in the L2."""
    rivals = tuple(name for name in TORCH if name != "eager")
    return [
        Case(
            suite="ops",
            name=step.name,
            dtype="float32",
            threads=1,
            providers=(*BACKENDS, *rivals),
            baselines=rivals,
            prepare=functools.partial(Workload, step, "cuda"),
            passes=None if step.weights == "tiny" else 5 + (step.kept == "float32"),
            necessary_bytes=None if step.weights == "tiny" else step.necessary_bytes(),
            device="cuda",
            capture=step.weights != "tiny",
            alone=step.weights == "r152x4" and cuda.memory_bytes() < 120 << 30,
        )
        for step in GPU_STEPS
        if "float32" in dtypes and (not quick or step.weights == "tiny")
    ]


def cases(*, threads: list[int], dtypes: list[str], quick: bool, compiled: bool) -> list[Case]:
    """float32 weights only, whatever `dtypes` says of activations."""
    return [
        Case(
            suite="ops",
            name=step.name,
            dtype="float32",
            threads=count,
            providers=(OURS, *TORCH),
            baselines=tuple(TORCH),
            prepare=functools.partial(Workload, step),
            # In units of the weights' bytes; half a pass where the standardized ones are half.
            passes=None if step.weights == "tiny" else 5 + (step.kept == "float32"),
            necessary_bytes=None if step.weights == "tiny" else step.necessary_bytes(),
        )
        for step in STEPS
        for count in threads
        if "float32" in dtypes and (not quick or step.weights != "8x4M")
    ]


class Workload:
    """One set of weights for each provider; see benchmarks.runner.Workload.

    Nothing is rotated: a step reads and writes three to five times the caches. It isn't so for
    "tiny", where the cost of a call is what counts.
    """

    def __init__(self, step: Step, device: str = "cpu"):
        random = torch.Generator(device).manual_seed(0)
        normal = functools.partial(torch.randn, generator=random, device=device)
        shapes = NETWORKS[step.weights]
        self._weights = [normal(shape) * 0.02 for shape in shapes]
        self._grads = [normal(shape) * 0.01 for shape in shapes]
        self._kept = getattr(torch, step.kept) if step.kept else None
        self._raw_grads = self._grads
        if self._kept:
            pairs = zip(self._grads, self._weights, strict=True)
            self._raw_grads = [reference.project_gradient(g, w, EPS) for g, w in pairs]
        # The gate looks at one tensor: everything in float64 would be gigabytes.
        self._largest = max(range(len(shapes)), key=lambda t: math.prod(shapes[t]))

    def reference(self) -> dict[str, Tensor]:
        weight, grad = (tensors[self._largest].double() for tensors in (self._weights, self._grads))
        momentum, place = torch.zeros_like(weight), torch.empty_like(weight)
        kept = {"standardized": [place], "project": True, "eps": EPS} if self._kept else {}
        reference.sgd([weight], [grad], [momentum], **SETTINGS, **kept)
        return {"weight": weight} | ({"standardized": place} if self._kept else {})

    def outputs(self, provider: str) -> dict[str, Tensor]:
        weights, places, step = self._make(provider)
        step()
        weight = weights[self._largest].detach()
        if not self._kept:
            return {"weight": weight}
        if places:
            return {"weight": weight, "standardized": places[self._largest]}
        standardized = reference.standardize_weight(weight, EPS).to(self._kept)
        return {"weight": weight, "standardized": standardized}

    def calls(self, provider: str) -> list[Callable[[], object]]:
        step = self._make(provider)[-1]
        return [step, step]

    def _make(self, provider: str) -> tuple[list[Tensor], list[Tensor], Callable[[], object]]:
        """Fresh weights, the places of standardized ones where there are, and what steps them."""
        weights = [weight.clone() for weight in self._weights]
        if provider in TORCH:
            parameters = [nn.Parameter(weight) for weight in weights]
            for parameter, grad in zip(parameters, self._raw_grads, strict=True):
                parameter.grad = grad
            optimizer = torch.optim.SGD(parameters, **SETTINGS, **TORCH[provider])
            return parameters, [], optimizer.step
        momenta = [torch.zeros_like(weight) for weight in weights]
        places, more = [], {}
        if self._kept:
            places = [torch.empty_like(weight, dtype=self._kept) for weight in weights]
            more = {"standardized": places, "project": True, "eps": EPS}
        if provider in BACKENDS:
            try:
                choose("sgd", weights[0], provider)
            except ValueError as error:
                raise Absent(str(error)) from None
            more["backend"] = provider
        step = functools.partial(sgd, weights, self._grads, momenta, **SETTINGS, **more)
        return weights, places, step
