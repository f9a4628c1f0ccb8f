"""Compares a converted network with its original: outputs, and the gradient of everything."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bit_kernels._chains import call

# The error that a tensor may have, as a share of its length, beside the original's own rounding:
# (outputs, gradients). A rounding can switch a ReLU, which a gradient shows at once.
_LIMITS = {torch.float64: (1e-8, 1e-8), torch.float32: (1e-4, 1e-2)}
_HALF = (1e-2, 2e-1)


def compare(original: nn.Module, converted: nn.Module, example: Any) -> str:
    """The largest errors, in words.

    In float64 the two must agree to 1e-8, when training and when not. In the network's own dtype,
    which the kernels serve, each tensor's error against float64 may be four times the original's,
    plus 1e-4 for outputs and 1e-2 for gradients (half types: 1e-2 and 0.2). Where the original
    can't run in float64, its own results stand for the truth.

    Raises RuntimeError if they differ.
    """
    wide = tree_map(lambda x: x.double() if _is_real(x) else x, example)
    try:
        truths = [_results(_copy(original, mode).double(), wide) for mode in (True, False)]
    except RuntimeError as error:
        truths, said = [], f"float64 can't run: {str(error).splitlines()[0]}; "
    else:
        ours = [_results(_copy(converted, mode).double(), wide) for mode in (True, False)]
        errors = [_differ(*pair) for pair in zip(ours, truths, strict=True)]
        said = f"error {max(errors):.1e} in float64, "
    theirs = _results(_copy(original, False), example)
    ours = _results(_copy(converted, False), example)
    if not truths:
        return said + f"{_differ(ours, theirs):.1e} in its own dtype"
    rival = {name: _error(theirs, truths[1], name) for name in truths[1]}
    worst = _differ(ours, truths[1], rival)
    return said + f"{worst:.1e} in its own dtype, the original's {max(rival.values()):.1e}"


def _copy(model: nn.Module, training: bool) -> nn.Module:
    return copy.deepcopy(model).train(training)


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _results(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """{"output 0": ..., "gradient of conv.weight": ...} of one seeded forward and backward."""
    example = tree_map(lambda x: x.detach().clone().requires_grad_() if _is_real(x) else x, example)
    inputs = [x for x in tree_leaves(example) if _is_real(x)]
    wanted = {f"input {i}": x for i, x in enumerate(inputs)}
    wanted |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(0)  # the same dropout
        outputs = [x for x in tree_leaves(call(model, example)) if _is_real(x)]
        loss = sum((x * _weights_of(x)).sum() for x in outputs if x.requires_grad)
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    for (name, x), gradient in zip(wanted.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(x) if gradient is None else gradient
    return found


def _weights_of(output: Tensor) -> Tensor:
    """Random, and the same in every dtype."""
    generator = torch.Generator("cpu").manual_seed(0)
    weights = torch.randn(output.shape, dtype=torch.float64, device="cpu", generator=generator)
    return weights.to(output)


def _error(found: dict[str, Tensor], truth: dict[str, Tensor], name: str) -> float:
    """The length of the difference, as a share of the truth's; a gradient that is nothing beside
    the largest one counts as a thousandth of that."""
    ours, true = found[name].double(), truth[name].double()
    length = true.norm()
    if name.startswith("gradient"):
        lengths = [x.double().norm() for n, x in truth.items() if n.startswith("gradient")]
        length = torch.maximum(length, 1e-3 * torch.stack(lengths).max())
    return ((ours - true).norm() / length.clamp_min(1e-30)).item()


def _differ(ours, truth, rival: dict[str, float] | None = None) -> float:
    """The largest error; raises RuntimeError if one is larger than it may be."""
    if ours.keys() != truth.keys():
        raise RuntimeError(f"the converted network gives {list(ours)}, the original {list(truth)}")
    worst = 0.0
    for name in truth:
        limit = _LIMITS.get(ours[name].dtype, _HALF)[not name.startswith("output")]
        limit += 4 * rival[name] if rival else 0
        error = _error(ours, truth, name)
        if not error <= limit:  # nor if it is NaN
            raise RuntimeError(
                f"the converted network's {name} is off by {error:.2g} of its length, more than "
                f"{limit:.2g}; the model is as it was"
            )
        worst = max(worst, error)
    return worst
