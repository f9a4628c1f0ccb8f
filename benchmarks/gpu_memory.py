"""The suite `memory` on a GPU: by the allocator's own count, in steps that are really taken.

peak_allocated       the most that tensors took in the third step, after momenta and tuning; MB
peak_share_of_timm   that over timm's BiT, in the layout in which it takes less
saved_activations, saved_weights, standardized, saved_share_of_timm    as on the CPU, of a forward
largest_batch        images of the largest batch whose step fits, to a sixteenth
largest_batch_of_timm   that over timm's BiT, in the layout in which more fit
"""

import functools
import gc
from collections.abc import Callable, Iterator

import torch

from benchmarks import cuda, memory, rivals
from benchmarks.memory import MB, MemoryCase
from benchmarks.runner import Count, Figure, Refusal, refusal_of
from benchmarks.shapes import parse
from benchmarks.step import gpu_images, providers
from bit.device import is_short_of_memory

# timm's BiT comes first, as others' shares are of it.
NETWORKS = ("bit", "timm_batch_norm", "conv_only")
STEPS = 3
SMALLEST = 16  # images, from where on batches are doubled
PARTS = 16  # of the largest batch, the exactness with which it is found


def cases(*, dtypes: list[str], quick: bool) -> list[Count]:
    """R50x1 as it is trained and R152x4 at 8 images, then the largest batch of R50x1."""
    if quick:
        declared = [("run", MemoryCase("R26x0.25", 10, 32, 64), _peaks)]
        declared.append(("largest_batch", MemoryCase("R26x0.25", 10, SMALLEST, 64), _largest))
    else:
        declared = [
            ("run", MemoryCase("R50x1", 1000, gpu_images(), 224), _peaks),
            ("run", MemoryCase("R152x4", 21843, 8, 224), _peaks),
            ("largest_batch", MemoryCase("R50x1", 1000, SMALLEST, 224), _largest),
        ]
    found = []
    for kind, case, take in declared:
        size = f"{case.side}x{case.side}"
        shape = size if kind == "largest_batch" else f"{case.images}x3x{size}"
        for dtype in dtypes:
            asked = MemoryCase(case.name, case.classes, case.images, case.side, dtype)
            take_it = functools.partial(take, asked)
            found.append(
                Count("memory", f"{case.name}/{shape}/{kind}", dtype, 1, take_it, device="cuda")
            )
    return found


def _each(case: MemoryCase, measure: Callable) -> Iterator[tuple[str, object]]:
    """measure(case, provider) of each provider, or why it has none; memory is given back between."""
    with cuda.untuned():  # a batch that is tried once is not worth it
        for provider in providers(["timm"]) + providers(NETWORKS, ["channels_last"]):
            found = None
            free()
            try:
                found = measure(case, provider)
            except Exception as error:
                found = refusal_of(provider, error)
            yield provider, found
    free()


def _peaks(case: MemoryCase) -> Iterator[Figure | Refusal]:
    timm: dict[str, float] = {}  # in the better layout
    for provider, found in _each(case, probe):
        if isinstance(found, Refusal):
            yield found
            continue
        for metric, nbytes in found.items():
            yield _exactly(provider, metric, nbytes / MB, "MB")
        if provider.startswith("timm/"):
            timm = {metric: min(n, timm.get(metric, n)) for metric, n in found.items()}
            continue
        for metric, share in (
            ("peak_allocated", "peak_share_of_timm"),
            ("saved_activations", "saved_share_of_timm"),
        ):
            if timm.get(metric) and metric in found:
                yield _exactly(provider, share, found[metric] / timm[metric], "1")


def _largest(case: MemoryCase) -> Iterator[Figure | Refusal]:
    timm = 0  # in the better layout
    for provider, found in _each(case, largest_batch):
        if isinstance(found, Refusal):
            yield found
            continue
        yield _exactly(provider, "largest_batch", found, "images")
        if provider.startswith("timm/"):
            timm = max(timm, found)
        elif timm:
            yield _exactly(provider, "largest_batch_of_timm", found / timm, "1")


def _exactly(provider: str, metric: str, value: float, unit: str) -> Figure:
    return Figure(provider, metric, value, value, value, unit)


def probe(case: MemoryCase, provider: str, device: str = "cuda") -> dict[str, int]:
    """Bytes of one provider's step, and of what its forward keeps, beside what was there before."""
    before = torch.cuda.memory_allocated()
    with torch.device(device):
        take_step = Step(case, provider)
        batch = memory._batch(case, provider)
    for step in range(STEPS):
        if step == STEPS - 1:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        take_step(*batch)
    torch.cuda.synchronize()
    found = {"peak_allocated": torch.cuda.max_memory_allocated() - before}
    take_step.network.zero_grad(set_to_none=True)
    try:
        saved = memory.saved_bytes(take_step.network, *batch, case.dtype)
    except ModuleNotFoundError:
        return found
    return found | {
        "saved_activations": saved.activations,
        "saved_weights": saved.weights,
        "standardized": saved.kept,
    }


class Step:
    """A network and its optimizer on torch's default device."""

    def __init__(self, case: MemoryCase, provider: str):
        self._dtype = case.dtype
        self.network = memory._network(case, provider)
        self._optimizer = memory._optimizer(case, provider, self.network)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.network.zero_grad(set_to_none=True)
        rivals.loss_of(self.network, images, labels, self._dtype).backward()
        if self._optimizer is not None:
            self._optimizer.step()


def largest_batch(case: MemoryCase, provider: str, device: str = "cuda") -> int:
    """Images of the largest batch of which two steps fit beside the network."""
    with torch.device(device):
        take_step = Step(case, provider)

    def fits(images: int) -> bool:
        asked = MemoryCase(case.name, case.classes, images, case.side, case.dtype)
        try:
            with torch.device(device):
                batch = memory._batch(asked, provider)
            for _ in range(2):
                take_step(*batch)
            torch.cuda.synchronize()
            return True
        except RuntimeError as error:
            if not is_short_of_memory(error):
                raise
        return False

    def tried(images: int) -> bool:
        answer = fits(images)
        take_step.network.zero_grad(set_to_none=True)
        free()  # only after `fits` has let go of its batch, and of the error with its tensors
        return answer

    _, width = parse(case.name)
    each = int(64 * width) * (case.side // 2) ** 2  # elements of the largest map
    return search(tried, case.images, (2**31 - 1) // each)


def search(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest number up to `most` that fits, by doubling and then bisecting, to a sixteenth; 0
    if not even `start` does.
    """
    low, high = 0, min(start, most)
    while fits(high):
        if high == most:
            return most
        low, high = high, min(2 * high, most)
    while high - low > max(1, low // PARTS) and low:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
