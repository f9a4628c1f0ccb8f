"""Folds the standardization of weights, for inference and export."""

import copy

import torch
from torch import Tensor, nn

from bit_kernels import functional
from bit_kernels._recognise import StdConv2dSame, pad_same
from bit_kernels.modules import FrozenConv2d, FrozenGroupNorm, GroupNorm, StdConv2d


class FrozenConv2dSame(FrozenConv2d):
    """FrozenConv2d over an input padded as TensorFlow's SAME does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(pad_same(self, input))


_FROZEN = {
    StdConv2d: FrozenConv2d,
    StdConv2dSame: FrozenConv2dSame,
    GroupNorm: FrozenGroupNorm,
}


def freeze(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """`model` for inference: weights standardized once, nothing left to train.

    >>> model = nn.Sequential(StdConv2d(3, 8, 3), GroupNorm(4, 8, activation="relu"))
    >>> frozen = freeze(model, inplace=False)
    >>> torch.equal(frozen(x), model(x))  # x: (N, 3, H, W)
    True

    Every `StdConv2d` becomes a plain convolution with the standardized weight. Every `GroupNorm`
    still runs its kernel, but `torch.export` and `torch.onnx.export` see PyTorch's own operations.
    The network is in evaluation mode and no parameter takes a gradient. `train()` raises, and so
    does a forward after someone has asked for the gradient of a folded weight. What is frozen
    already stays as it is: its convolutions are plain, so that nothing can be standardized twice.
    A state_dict says that it is frozen, and loads into frozen networks only.

    Args:
        model: a network with layers of this package. Others' are put in by `convert`.
        inplace: False leaves the model as it is and returns a frozen copy.

    Returns:
        The model, or its copy.

    Raises:
        ValueError: there is nothing to freeze, or a class derived from these layers.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, StdConv2d | GroupNorm)}
    frozen = (FrozenConv2d, FrozenGroupNorm)
    if not layers and not any(isinstance(m, frozen) for m in model.modules()):
        raise ValueError(
            "model has no StdConv2d or GroupNorm of bit_kernels; bit_kernels.convert(model) puts "
            "them into a network of other layers"
        )
    for name, layer in layers.items():
        if type(layer) not in _FROZEN and not isinstance(layer, frozen):
            raise ValueError(
                f"{name or 'model'} is a {type(layer).__name__}, a class derived from "
                "bit_kernels' layers; only those themselves can be frozen"
            )
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    for module in model.modules():
        if type(module) not in _FROZEN:
            continue
        if isinstance(module, StdConv2d):
            with torch.no_grad():
                weight = functional.standardize_weight(module.weight, module.eps)
            module.weight = nn.Parameter(weight)
            module.register_buffer("standardized", torch.ones((), dtype=torch.bool))
        module.__class__ = _FROZEN[type(module)]
    for parameter in model.parameters():
        parameter.requires_grad_(False).grad = None
    return model
