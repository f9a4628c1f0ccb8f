"""The suite `memory`: what a training step keeps, and the most that it takes.

Counted for a network in memory, or for one that no machine here could hold (FakeTensorMode: shapes
and storages without bytes), by the same code. Metrics, in MB of 10^6 bytes:

  saved_activations   kept by one forward pass for its backward, the images among it
  saved_weights       kept likewise, of a kernel's size: standardized kernels, casts to bfloat16
  weights, gradients, momenta     of the parameters
  standardized        kernels that stay from step to step, beside the parameters
  total               of all these: an upper bound, as gradients come while activations go
  peak_allocated      the most that tensors took in the second step of a process of its own
  peak_resident       the most that this process took of the machine, without Python and libraries

On a GPU see gpu_memory.py.
"""

import argparse
import functools
import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from benchmarks import rivals, timm_networks
from benchmarks.runner import Count, Figure
from benchmarks.step import providers

MB = 1e6
NETWORKS = ("bit", "timm", "timm_batch_norm", "eager", "batch_norm", "conv_only")
PICTURE = ("saved_activations", None)
MEASURED_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class MemoryCase:
    """name, classes: of the network; images, side: of a batch, px; runs: also measure its peak;
    quick: in `--quick` instead.
    """

    name: str
    classes: int
    images: int
    side: int
    dtype: str = "float32"
    runs: bool = False
    quick: bool = False


CASES = [
    MemoryCase("R50x1", 1000, 4, 224, runs=True),
    MemoryCase("R50x1", 1000, 4, 224, "bfloat16"),
    MemoryCase("R152x4", 21843, 8, 224),
    MemoryCase("R152x4", 21843, 8, 224, "bfloat16"),
    MemoryCase("R50x1", 1000, 4, 224, quick=True),
    MemoryCase("R26x0.25", 10, 4, 64, runs=True, quick=True),
]
RUN = ("bit", "timm", "timm_batch_norm", "conv_only")  # in processes of their own


CUDA_DTYPES = ("bfloat16",)


def cases(
    *,
    threads: list[int],
    dtypes: list[str],
    quick: bool = False,
    compiled: bool = False,
    device: str = "cpu",
) -> list[Count]:
    """Each network by accounting, and the peak of those that can run here; eager rivals only."""
    if device == "cuda":
        from benchmarks import gpu_memory

        return gpu_memory.cases(dtypes=dtypes, quick=quick)
    found = []
    for case in CASES:
        if case.quick != quick or case.dtype not in dtypes:
            continue
        name = f"{case.name}/{case.images}x3x{case.side}x{case.side}"
        shared = (case.dtype, max(threads))
        take = functools.partial(_account, case)
        found.append(Count("memory", f"{name}/accounting", *shared, take))
        if case.runs:
            take = functools.partial(_run, case, max(threads))
            found.append(Count("memory", f"{name}/run", *shared, take))
    return found


def saved_bytes(network: nn.Module, images: Tensor, labels: Tensor, dtype: str):
    """What `network` keeps of a forward pass and the loss, a bit.plan.Saved."""
    # Its command line needs a package that measuring on a GPU does without.
    from bit import plan

    loss_of = functools.partial(rivals.loss_of, network, images, labels, dtype)
    return plan.saved_bytes(network, images, labels, loss_of)


def _account(case: MemoryCase) -> Iterator[Figure]:
    """Every provider's bytes, without taking them."""
    from bit import plan

    activations: dict[str, int] = {}
    for provider in providers(NETWORKS):
        with torch.device("meta"):
            network = _network(case, provider)
        with FakeTensorMode():
            plan.claim_cpu(network)
            optimizer = _optimizer(case, provider, network)
            saved = saved_bytes(network, *_batch(case, provider), case.dtype)
            weights = sum(parameter.nbytes for parameter in network.parameters())
        activations[provider] = saved.activations
        parts = {
            "saved_activations": saved.activations,
            "saved_weights": saved.weights,
            "weights": weights,
            "gradients": weights,
            "momenta": 0 if optimizer is None else weights,
            "standardized": saved.kept,
        }
        parts["total"] = sum(parts.values())
        for metric, nbytes in parts.items():
            yield _figure(provider, metric, nbytes / MB)
    for provider, nbytes in activations.items():
        timm = activations.get(f"timm/{provider.partition('/')[2]}")
        if timm:
            share = nbytes / timm
            yield Figure(provider, "saved_share_of_timm", share, share, share, "1")


def _figure(provider: str, metric: str, value: float) -> Figure:
    return Figure(provider, metric, value, value, value, "MB")


def _network(case: MemoryCase, provider: str) -> nn.Module:
    network = rivals.network_of(provider).create(case.name, case.classes)
    return network.to(memory_format=rivals.layout_of(provider))


def _optimizer(case: MemoryCase, provider: str, network: nn.Module) -> torch.optim.Optimizer | None:
    if provider.startswith("conv_only"):
        return None
    return rivals.make_optimizer(provider, network, case.dtype)


def _batch(case: MemoryCase, provider: str) -> tuple[Tensor, Tensor]:
    images = torch.rand(case.images, 3, case.side, case.side) * 2 - 1
    images = images.contiguous(memory_format=rivals.layout_of(provider))
    return images, torch.zeros(case.images, dtype=torch.int64)


def _run(case: MemoryCase, threads: int) -> Iterator[Figure]:
    """The peaks of RUN's networks."""
    for provider in providers(RUN if timm_networks.installed() else NETWORKS):
        asked = [case.name, case.classes, case.images, case.side, case.dtype]
        arguments = [provider, threads, *asked]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", *map(str, arguments)],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{provider} failed in its own process: {done.stderr.strip()}")
        for metric, value in json.loads(done.stdout.splitlines()[-1]).items():
            yield _figure(provider, metric, value)


def probe(case: MemoryCase, provider: str) -> dict[str, float]:
    """Two training steps of one provider in this process: peaks in MB, and its saved bytes."""
    images, labels = _batch(case, provider)
    before = _resident()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        network = _network(case, provider)
        optimizer = _optimizer(case, provider, network)
        for _ in range(2):
            network.zero_grad(set_to_none=True)
            rivals.loss_of(network, images, labels, case.dtype).backward()
            if optimizer is not None:
                optimizer.step()
    peak = _resident() - before
    saved = saved_bytes(network, images, labels, case.dtype)
    return {
        "saved_activations": saved.activations / MB,
        "saved_weights": saved.weights / MB,
        "standardized": saved.kept / MB,
        "peak_allocated": _allocated(profiler) / MB,
        "peak_resident": peak / MB,
    }


def _allocated(profiler: profile) -> int:
    """The highest sum of bytes that were allocated and not yet freed, in order of time."""
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return max(itertools.accumulate(nbytes for _, nbytes in sorted(events, key=lambda e: e[0])))


def _resident() -> int:
    """The most bytes of the machine that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """One provider's peak, as JSON in the last line; the suite calls this."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("provider")
    parser.add_argument("threads", type=int)
    parser.add_argument("name")
    for number in ("classes", "images", "side"):
        parser.add_argument(number, type=int)
    parser.add_argument("dtype")
    asked = vars(parser.parse_args())
    provider = asked.pop("provider")
    torch.set_num_threads(asked.pop("threads"))
    print(json.dumps(probe(MemoryCase(**asked), provider)))


if __name__ == "__main__":
    main()
