"""How a convolution after a GroupNorm does without keeping the normalised activation.

PyTorch keeps a GroupNorm's input for the GroupNorm and its output for the convolution that follows.
The output is one pass over the input away. So `GroupNorm` notes of its output how it was made, and
a convolution that gets such a tensor keeps for backward what it was made of, which the GroupNorm
keeps anyway. When the gradient of its weight is due it makes the activation again: once for all the
convolutions that take it. To everything else the output is an ordinary tensor.

The notes lie beside the tensor, not on it, so that it can be copied, saved and sent.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from bit_kernels import reference
from bit_kernels.ops._library import apply_node

_notes = WeakIdKeyDictionary()  # a GroupNorm's output: its Note


class Recipe:
    """What to do to make an activation again; shared by the convolutions that take it."""

    def __init__(self, num_groups: int, eps: float, relu: bool):
        self.num_groups, self.eps, self.relu = num_groups, eps, relu
        self.convolutions = self.waiting = 0
        self.activation = None  # from the first convolution's backward to the last one's

    def expect(self) -> None:
        """One more convolution will ask for the activation."""
        self.convolutions += 1
        self.waiting += 1

    def make(self, input, weight, bias, mean, rstd) -> Tensor:
        """The activation."""
        if torch.is_grad_enabled():  # create_graph: it must be differentiable
            return reference.group_norm_relu(
                input, self.num_groups, weight, bias, self.eps, relu=self.relu
            )
        activation = self.activation
        if activation is None:
            activation = torch.ops.bit_kernels.group_norm_relu(
                input, self.num_groups, weight, bias, self.eps, self.relu
            )[0]
        self.waiting -= 1
        if self.waiting > 0:
            self.activation = activation
        else:  # the last one; a retained graph may be gone through again
            self.activation, self.waiting = None, self.convolutions
        return activation


class Note(NamedTuple):
    """How one output of a GroupNorm came to be."""

    recipe: Recipe
    ingredients: tuple[Tensor | None, ...] | None  # for recipe.make; None where there are none
    versions: tuple[int | None, ...]  # of the output and the ingredients


def _versions(*tensors: Tensor | None) -> tuple[int | None, ...]:
    # PyTorch doesn't count the changes of inference tensors, whose backward can't come either.
    return tuple(None if t is None or t.is_inference() else t._version for t in tensors)


def _watched() -> bool:
    """Whether a compiler or a transform looks on, which needs operations that it can see."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def note(output: Tensor, input: Tensor, norm: nn.GroupNorm, relu: bool) -> None:
    """Note that `norm`, with or without its ReLU, made `output` from `input`."""
    if _watched() or type(output) is not Tensor:
        return
    # Plain PyTorch has no such statistics; its ReLU keeps the output in any case.
    statistics = getattr(output.grad_fn, "statistics", None)
    ingredients = None
    if statistics is not None:
        ingredients = (input, norm.weight, norm.bias, *statistics)
    recipe = Recipe(norm.num_groups, norm.eps, relu)
    _notes[output] = Note(recipe, ingredients, _versions(output, *(ingredients or ())))


def noted(tensor: Tensor) -> Note | None:
    """The note of a tensor that has not changed since, nor what it was made of."""
    if _watched():
        return None
    found = _notes.get(tensor)
    if found is None or found.versions != _versions(tensor, *(found.ingredients or ())):
        return None
    return found


def convolve(conv: nn.Conv2d, input: Tensor, weight: Tensor) -> Tensor:
    """conv's convolution, with `weight` for its own."""
    found = noted(input) if torch.is_grad_enabled() and weight.requires_grad else None
    if (
        found is None
        or found.ingredients is None
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
        or input.dim() != 4
    ):
        return conv._conv_forward(input, weight, conv.bias)
    bias, dtype = conv.bias, input.dtype
    if torch.is_autocast_enabled(input.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return apply_node(_Convolution, input, weight, bias, dtype, geometry, *found[:2])


class _Convolution(torch.autograd.Function):
    """torch.conv2d in `dtype` that keeps its input's ingredients instead of its input."""

    @staticmethod
    def forward(ctx, input, weight, bias, dtype, geometry, recipe, ingredients):
        recipe.expect()
        ctx.save_for_backward(weight, *ingredients)
        ctx.recipe, ctx.dtype, ctx.geometry = recipe, dtype, geometry
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return torch.conv2d(input.to(dtype), weight, bias, *geometry)

    @staticmethod
    def backward(ctx, grad_output):
        weight, *ingredients = ctx.saved_tensors
        activation = ctx.recipe.make(*ingredients).to(ctx.dtype)
        stride, padding, dilation, groups = ctx.geometry
        grads = torch.ops.aten.convolution_backward(
            grad_output,
            activation,
            weight,
            ctx.bias_sizes,
            stride,
            padding,
            dilation,
            False,  # not transposed
            (0, 0),  # no output padding
            groups,
            ctx.needs_input_grad[:3],
        )
        return *grads, None, None, None, None
