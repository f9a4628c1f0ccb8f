"""What a module of somebody else's computes, found out by running it.

Names say little: a `StdConv2d` may divide by the unbiased deviation, a `GroupNormAct` may end in a
SiLU. So a twin of the module, with random float64 weights, is run on a random input and its output
compared with ours. eps need not be written anywhere: it is read off the outputs.
"""

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bit_kernels import reference
from bit_kernels.modules import Conv2d, GroupNorm, StdConv2d

# What a class may define and still be no more than what it computes.
_COMPUTES = {"__init__", "forward", "_conv_forward", "extra_repr", "reset_parameters"}

_MODULE_STATE = set(vars(nn.Module())) - {"training"}


class StdConv2dSame(StdConv2d):
    """StdConv2d over an input padded as TensorFlow's SAME does, to ceil(n / stride) outputs."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(pad_same(self, input))


def pad_same(conv: nn.Conv2d, input: Tensor) -> Tensor:
    """`input` within zeros, the odd one below and to the right."""
    pads = []
    for n, k, stride, dilation in zip(
        input.shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
    ):
        total = max((-(-n // stride) - 1) * stride + dilation * (k - 1) + 1 - n, 0)
        pads = [total // 2, total - total // 2, *pads]
    return F.pad(input, pads) if any(pads) else input


class Plan(NamedTuple):
    """What a module is to become, with which attributes; or that it stays, and why."""

    to: type | None
    why: str = ""
    attributes: dict[str, Any] = {}  # noqa: RUF012


@torch.no_grad()
def plan(module: nn.GroupNorm | nn.Conv2d, known: dict[tuple, Plan]) -> Plan:
    """GroupNorm, StdConv2d, StdConv2dSame or Conv2d, whichever computes the same.

    known: the plans of the modules probed so far, which serve their like.
    """
    base = nn.GroupNorm if isinstance(module, nn.GroupNorm) else nn.Conv2d
    why = _why_not(module, base)
    if why is not None:
        return Plan(None, why)
    if type(module) is nn.GroupNorm:
        return Plan(GroupNorm, attributes={"activation": None})
    if type(module) is nn.Conv2d:
        return Plan(Conv2d)
    like = _signature(module)
    if like not in known:
        known[like] = _probe(module, _probe_norm if base is nn.GroupNorm else _probe_conv)
    return known[like]


def _signature(module: nn.Module) -> tuple:
    """Everything that a module's forward can depend on but the values of its parameters."""
    attributes = {k: repr(v) for k, v in vars(module).items() if k not in _MODULE_STATE}
    parameters = {name: p is not None for name, p in module._parameters.items()}
    children = [(name, child and _signature(child)) for name, child in module._modules.items()]
    return type(module), str(attributes), str(parameters), tuple(children)


def _probe(module: nn.Module, probe) -> Plan:
    # float32 for a forward that insists on it.
    for dtype in (torch.float64, torch.float32):
        try:
            return probe(module, dtype)
        except Exception as error:  # noqa: BLE001 - whatever somebody else's code raises
            why = f"its forward failed on a random input: {error}"
    return Plan(None, why)


def _why_not(module: nn.Module, base: type) -> str | None:
    """Why a module's class can't be changed, whatever it computes."""
    more = {name for name, _ in module.named_parameters()} - {"weight", "bias"}
    more |= {name for name, _ in module.named_buffers()}
    if more:
        return f"it has parameters or buffers of its own: {', '.join(sorted(more))}"
    if any(is_lazy(p) for p in module.parameters()):
        return "its parameters have no shape yet"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    for child in list(module.modules())[1:]:
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks:
            return "there are hooks on the modules in it"
    classes = type(module).__mro__
    for cls in classes[: classes.index(base)]:
        for name, value in vars(cls).items():
            dunder = name.startswith("__") and name.endswith("__")
            if (callable(value) or hasattr(value, "__get__")) and not dunder | (name in _COMPUTES):
                return f"its class has methods of its own: {name}"
    return None


def _twin(module: nn.Module, **parameters: Tensor | None) -> nn.Module:
    """The module with other parameters, and without its hooks when its class's forward is called."""
    twin = copy.copy(module)
    vars(twin)["_parameters"] = parameters
    vars(twin)["_modules"] = copy.deepcopy(module._modules)
    return twin


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(shape, dtype=dtype, device="cpu", generator=generator)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    tolerance = 1e-9 if ours.dtype == torch.float64 else 1e-4
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def _probe_norm(norm: nn.GroupNorm, dtype: torch.dtype) -> Plan:
    weight, bias = (
        None if p is None else _random(norm.num_channels, dtype=dtype) + shift
        for p, shift in ((norm.weight, 1), (norm.bias, 0))
    )
    twin = _twin(norm, weight=weight, bias=bias)
    input = _random(2, norm.num_channels, 5, 4, dtype=dtype)
    outputs = [type(norm).forward(twin.train(mode), input.clone()) for mode in (True, False)]
    for activation in (None, "relu"):
        ours = reference.group_norm_relu(
            input, norm.num_groups, weight, bias, norm.eps, relu=activation == "relu"
        )
        if all(_close(ours, theirs) for theirs in outputs):
            return Plan(GroupNorm, attributes={"activation": activation})
    return Plan(None, "it isn't a GroupNorm with a ReLU or nothing after it")


def _probe_conv(conv: nn.Conv2d, dtype: torch.dtype) -> Plan:
    # Few output channels: standardization treats each by itself.
    channels = conv.groups * max(1, min(conv.out_channels, 8) // conv.groups)
    size = [
        d * (k - 1) + more
        for d, k, more in zip(conv.dilation, conv.kernel_size, (6, 7), strict=True)
    ]
    input = _random(2, conv.in_channels, *size, dtype=dtype)
    kernels = _random(channels, *conv.weight.shape[1:], dtype=dtype) + 0.3
    cases = []  # (weight, bias, outputs when training and not)
    for scale in (1e-5, 1.0):  # beside a variance of 1e-10 any eps shows, beside 1 none does
        weight, bias = kernels * scale, None
        if conv.bias is not None:
            bias = scale * _random(channels, dtype=dtype)
        twin = _twin(conv, weight=weight, bias=bias)
        twin.out_channels = channels
        outputs = [type(conv).forward(twin.train(mode), input.clone()) for mode in (True, False)]
        cases.append((weight, bias, outputs))
    for same in (False, True):
        padded = pad_same(conv, input) if same else input
        if _agrees(conv, padded, cases, lambda weight: weight):
            if same:
                return Plan(None, "a plain convolution with TensorFlow's padding")
            return Plan(Conv2d)
        eps = _eps(conv, padded, *cases[0])
        if eps is None:
            continue
        if _agrees(conv, padded, cases, partial(reference.standardize_weight, eps=eps)):
            return Plan(StdConv2dSame if same else StdConv2d, attributes={"eps": eps})
        return Plan(
            None,
            "its weights are standardized another way: scaled, by the unbiased variance, or with "
            "eps outside the root",
        )
    return Plan(None, "it isn't a convolution with plain or standardized weights")


def _agrees(conv, input, cases, transform) -> bool:
    return all(
        _close(nn.Conv2d._conv_forward(conv, input, transform(weight), bias), output)
        for weight, bias, outputs in cases
        for output in outputs
    )


def _eps(conv, input, weight, bias, outputs) -> float | None:
    """The eps whose effect the outputs show; None if they aren't those of standardized weights.

    Beside a standardization without eps each output channel is smaller by sqrt(v / (v + eps)).
    """
    full = nn.Conv2d._conv_forward(conv, input, reference.standardize_weight(weight, 0.0), None)
    if full.shape != outputs[0].shape:
        return None
    shown = outputs[0] if bias is None else outputs[0] - bias.reshape(-1, 1, 1)
    axes = (0, 2, 3)
    ratio = (shown * full).sum(axes, keepdim=True) / full.square().sum(axes, keepdim=True)
    if not _close(ratio * full, shown):
        return None
    variance = weight.flatten(1).var(1, correction=0)
    eps = (variance * (ratio.flatten() ** -2 - 1)).median().item()
    written = getattr(conv, "eps", None)
    if isinstance(written, float) and abs(written - eps) <= 0.01 * eps:
        return written
    return 0.0 if abs(eps) < 1e-14 else float(f"{eps:.3g}")
