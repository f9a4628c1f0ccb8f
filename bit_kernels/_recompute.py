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
from bit_kernels.ops import group_norm_relu as normalisation
from bit_kernels.ops import standardize_weight as standardization
from bit_kernels.ops._convolution import convolution_backward
from bit_kernels.ops._library import apply_node, autocast_dtype, call_kernel

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
            activation = normalisation._apply_op(input, mean, rstd, weight, bias, self.relu)
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
    if ingredients is None and not relu:
        return  # nobody has a use for it
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


def normalised(conv: nn.Conv2d, input: Tensor) -> Note | None:
    """The note of conv's input, if keeping what it says instead of the input is worth while."""
    if not torch.is_grad_enabled() or not conv.weight.requires_grad or input.dim() != 4:
        return None
    found = noted(input)
    if found is None or found.ingredients is None:
        return None
    return found if conv.padding_mode == "zeros" and not isinstance(conv.padding, str) else None


def convolve(
    conv: nn.Conv2d, weight: Tensor, input: Tensor, found: Note, eps: float | None = None
) -> Tensor:
    """conv's convolution of a noted input; `weight` is standardized first if there is an eps."""
    dtype = autocast_dtype(input) or input.dtype
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return apply_node(_Convolution, input, weight, conv.bias, eps, dtype, geometry, *found[:2])


def _convolution(input, weight, bias, eps, dtype, geometry):
    """What the node computes, in PyTorch's own operations."""
    weight = weight.to(dtype) if eps is None else reference.standardize_weight(weight, eps, dtype)
    return torch.conv2d(
        input.to(dtype), weight, None if bias is None else bias.to(dtype), *geometry
    )


class _Convolution(torch.autograd.Function):
    """Keeps its input's ingredients instead of its input, and the weight as it is."""

    @staticmethod
    def forward(ctx, input, weight, bias, eps, dtype, geometry, recipe, ingredients):
        recipe.expect()
        ctx.save_for_backward(weight, bias, *ingredients)
        ctx.recipe, ctx.details = recipe, (eps, dtype, geometry)
        used = weight.to(dtype) if eps is None else _standardize(weight, eps, dtype)[0]
        bias = None if bias is None else bias.to(dtype)
        return torch.conv2d(input.to(dtype), used, bias, *geometry)

    @staticmethod
    def backward(ctx, grad_output):
        weight, bias, *ingredients = ctx.saved_tensors
        eps, dtype, geometry = ctx.details
        activation = ctx.recipe.make(*ingredients)
        if torch.is_grad_enabled():  # create_graph: the gradient must itself be differentiable
            grads = reference.gradients(
                lambda *inputs: _convolution(*inputs, *ctx.details),
                (activation, weight, bias),
                grad_output,
            )
            return *grads, None, None, None, None, None
        used, *statistics = (weight.to(dtype),) if eps is None else _standardize(weight, eps, dtype)
        stride, padding, dilation, groups = geometry
        needs = ctx.needs_input_grad[:3]
        found = iter(
            convolution_backward(
                grad_output, activation.to(dtype), used, stride, padding, dilation, groups, needs
            )
        )
        grad_input, grad_weight, grad_bias = (next(found) if need else None for need in needs)
        if statistics and grad_weight is not None:
            grad_weight = standardization._backward_op(grad_weight, weight, *statistics)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def _standardize(weight: Tensor, eps: float, dtype: torch.dtype):
    """(the standardized weight in dtype, mean, rstd)"""
    return call_kernel(
        standardization._forward_op, weight, eps, None if weight.dtype == dtype else dtype
    )
