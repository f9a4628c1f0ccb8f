"""Drop-ins for nn.Conv2d, nn.GroupNorm and nn.ReLU; parameters and state_dicts are torch's own."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from bit_kernels import _recompute, functional, reference
from bit_kernels._kept import KeptWeight, take
from bit_kernels.ops._library import autocast_dtype
from bit_kernels.ops.norm_relu_conv import Conv, Norm


class Conv2d(nn.Conv2d):
    """nn.Conv2d that does not keep a `GroupNorm`'s output for backward, but makes it again.

    Takes nn.Conv2d's arguments; only what it keeps differs.
    """

    def forward(self, input: Tensor) -> Tensor:
        found = _recompute.normalised(self, input)
        if found is None:
            return super().forward(input)
        return _recompute.convolve(self, self.weight, input, found)


class StdConv2d(nn.Conv2d):
    """nn.Conv2d whose kernel is standardized per output channel before it is applied.

    Takes nn.Conv2d's arguments, in its order, plus `eps` (Weight Standardization, Qiao et al.,
    arXiv 1903.10520; eps inside the root and the biased variance as in Big Transfer's release).
    The parameter stays the raw kernel, so a state_dict of nn.Conv2d loads and back.

    Under a bit_kernels.optim.SGD that was given this layer's model the standardized kernel is taken
    from the optimizer, and `weight.grad` is then the gradient of the standardized kernel.

    Shapes: input (N, C_in, H, W) or (C_in, H, W), output as nn.Conv2d's.
    """

    _kept: KeptWeight | None = None  # put here by the optimizer

    def __init__(self, *args, eps: float = 1e-10, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        kept, found = _kept_weight(self), _recompute.normalised(self, input)
        weight, eps = (self.weight, self.eps) if kept is None else (take(self.weight, kept), None)
        if found is not None:
            return _recompute.convolve(self, weight, input, found, eps)
        if kept is None:
            weight = functional.standardize_weight(weight, self.eps)
        return self._conv_forward(input, weight, self.bias)

    def kept_weight(self, dtype: torch.dtype) -> Tensor | None:
        """The standardized kernel that an optimizer keeps, without gradient; None if none does.

        It is in `dtype` and up to date with `weight`. Whoever uses it must pass the gradient with
        respect to it on to `weight` as it is: the optimizer projects it.
        """
        kept = self._kept
        if kept is None:
            return None
        if kept.parameter is not self.weight:  # another in functional_call
            if getattr(self, "_is_replica", False):
                raise RuntimeError(
                    "nn.DataParallel's replicas know nothing of the standardized weights that "
                    "bit_kernels.optim.SGD keeps; use DistributedDataParallel, or give no model to "
                    "the optimizer"
                )
            return None
        if torch.compiler.is_compiling():
            # A graph can't ask whether the weight has changed, so it standardizes for itself.
            return functional.standardize_weight(self.weight.detach(), self.eps).to(dtype)
        return kept.in_dtype(dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "standardized" in state_dict:  # even where strict is False
            args[-1].append(f"{prefix}weight is a frozen network's, standardized already")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm with an optional ReLU in the same pass over memory.

    Takes nn.GroupNorm's arguments, in its order, plus `activation` (None or "relu").
    Parameters and state_dict are nn.GroupNorm's.

    Shapes: input (N, C, *), output the same shape and memory layout.
    """

    def __init__(self, *args, activation: str | None = None, **kwargs):
        if activation not in (None, "relu"):
            raise ValueError(f"activation is {activation!r}; it may be None or 'relu'")
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        relu = self.activation == "relu"
        output = functional.group_norm_relu(
            input, self.num_groups, self.weight, self.bias, self.eps, relu=relu
        )
        _recompute.note(output, input, self, relu)
        return output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class ReLU(nn.ReLU):
    """nn.ReLU that gives back what a `GroupNorm` with activation="relu" made, as it is."""

    def forward(self, input: Tensor) -> Tensor:
        found = _recompute.noted(input)
        return input if found is not None and found.recipe.relu else super().forward(input)


_NO_TRAINING = (
    "this network is frozen: its weights are standardized already and can't be trained; train the "
    "network that it was frozen from, or a new one"
)


class FrozenConv2d(nn.Conv2d):
    """A plain nn.Conv2d whose weight is a `StdConv2d`'s, standardized for good.

    Its state_dict has one entry more, `standardized`, without which nothing loads into it and with
    which nothing else loads. It can't train: its weight would no longer be standardized.
    """

    standardized: Tensor

    def train(self, mode: bool = True) -> "FrozenConv2d":
        if mode:
            raise RuntimeError(_NO_TRAINING)
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(_NO_TRAINING)
        return super().forward(input)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" in state_dict and prefix + "standardized" not in state_dict:
            args[-1].append(f"{prefix}weight is a live network's: load it, then freeze")


class FrozenGroupNorm(GroupNorm):
    """`GroupNorm` that a graph to export shows as PyTorch's own operations."""

    def train(self, mode: bool = True) -> "FrozenGroupNorm":
        if mode:
            raise RuntimeError(_NO_TRAINING)
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        if not _exporting():
            return super().forward(input)
        return reference.group_norm_relu(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            relu=self.activation == "relu",
        )


def _exporting() -> bool:
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def norm_relu_conv(
    input: Tensor,
    norm: nn.GroupNorm,
    *convs: nn.Conv2d | None,
    residual: Tensor | None = None,
    next_norm: tuple[int, float] | None = None,
) -> list[Tensor]:
    """[conv(norm(input)) for conv in convs], keeping for backward the input alone.

    >>> norm, conv = GroupNorm(32, 64, activation="relu"), StdConv2d(64, 128, 3, padding=1)
    >>> (y,) = norm_relu_conv(torch.randn(2, 64, 14, 14), norm, conv)

    norm: `GroupNorm` or nn.GroupNorm. convs: `StdConv2d` or nn.Conv2d; None gives the input itself,
        as the shortcut of a residual unit, and saves a pass over memory in backward.
    residual: added to the first convolution's result.
    next_norm: groups and eps of the GroupNorm that reads the first result, to take its statistics on
        the way where that is possible.

    The modules themselves are called instead, one after the other, where one has hooks or a
    forward of its own, is of another class (wrapped, parametrized, quantized) or pads with
    something but zeros.

    Raises ValueError as functional.norm_relu_conv does.
    """
    if not _fusible(norm, *convs):
        normal = norm(input)
        outputs = [input if conv is None else conv(normal) for conv in convs]
        if residual is not None:
            outputs[0] = outputs[0] + residual
        return outputs
    relu = isinstance(norm, GroupNorm) and norm.activation == "relu"
    return functional.norm_relu_conv(
        input,
        Norm(norm.num_groups, norm.weight, norm.bias, norm.eps, relu),
        [None if conv is None else _tensors_of(conv) for conv in convs],
        residual=residual,
        next_norm=next_norm,
    )


def _tensors_of(conv: nn.Conv2d) -> Conv:
    eps, kept = (conv.eps, _kept_weight(conv)) if isinstance(conv, StdConv2d) else (None, None)
    return Conv(
        conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups, eps, kept
    )


def _kept_weight(conv: StdConv2d) -> Tensor | None:
    """`conv.kept_weight` in the dtype that a convolution computes in now."""
    if conv._kept is None:
        return None
    return conv.kept_weight(autocast_dtype(conv.weight) or conv.weight.dtype)


def _fusible(norm: nn.GroupNorm, *convs: nn.Conv2d | None) -> bool:
    """Whether calling the modules would do nothing but what their tensors say."""
    if _hooked(norm) or _has_any_global_hook():
        return False
    if type(norm) is FrozenGroupNorm:
        if _exporting():
            return False
    elif type(norm) not in (GroupNorm, nn.GroupNorm):
        return False
    return all(
        conv is None
        or (type(conv) in (StdConv2d, nn.Conv2d) or _is_frozen(conv))
        and not _hooked(conv)
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        for conv in convs
    )


def _is_frozen(conv: nn.Conv2d) -> bool:
    """Whether nobody tries to train it, which calling it would refuse."""
    return type(conv) is FrozenConv2d and not conv.weight.requires_grad


def _hooked(module: nn.Module) -> bool:
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
