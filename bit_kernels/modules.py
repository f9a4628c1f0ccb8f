"""Drop-ins for nn.Conv2d and nn.GroupNorm; parameters and state_dicts are torch's own."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from bit_kernels import functional
from bit_kernels._kept import KeptWeight, take
from bit_kernels.ops._library import autocast_dtype
from bit_kernels.ops.norm_relu_conv import Conv, Norm


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
        kept = _kept_weight(self)
        if kept is None:
            weight = functional.standardize_weight(self.weight, self.eps)
        else:
            weight = take(self.weight, kept)
        return self._conv_forward(input, weight, self.bias)

    def kept_weight(self, dtype: torch.dtype) -> Tensor | None:
        """The standardized kernel that an optimizer keeps, without gradient; None if none does.

        It is in `dtype` and up to date with `weight`. Whoever uses it must pass the gradient with
        respect to it on to `weight` as it is: the optimizer projects it.
        """
        kept = self._kept
        if kept is None or kept.parameter is not self.weight:  # another in functional_call
            return None
        if torch.compiler.is_compiling():
            # A graph can't ask whether the weight has changed, so it standardizes for itself.
            return functional.standardize_weight(self.weight.detach(), self.eps).to(dtype)
        return kept.in_dtype(dtype)

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
        return functional.group_norm_relu(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            relu=self.activation == "relu",
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


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
    next_norm: groups and eps of the GroupNorm that reads that sum, to take its statistics with it.

    The modules themselves are called instead, one after the other, where one has hooks, is of
    another class (wrapped, parametrized, quantized) or pads with something but zeros.

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
    if type(norm) not in (GroupNorm, nn.GroupNorm) or _hooked(norm) or _has_any_global_hook():
        return False
    return all(
        conv is None
        or type(conv) in (StdConv2d, nn.Conv2d)
        and not _hooked(conv)
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        for conv in convs
    )


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
