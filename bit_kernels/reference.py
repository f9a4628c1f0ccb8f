"""What each op computes: one plain PyTorch function an op, right in any dtype up to float64.

Every kernel of this package is tested against these functions in float64, and where no kernel
can serve a call these functions serve it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def group_norm_relu(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    relu: bool = True,
) -> Tensor:
    """max(0, (x - mean) / sqrt(var + eps) * weight + bias), over each sample's groups."""
    if bias is not None and weight is None:
        weight = torch.ones_like(bias)  # PyTorch fails on a bias alone
    output = torch.group_norm(input, num_groups, weight, bias, eps)
    return output.relu_() if relu else output  # in place: backward needs the ReLU's output only


def standardize_weight(
    weight: Tensor, eps: float = 1e-10, dtype: torch.dtype | None = None
) -> Tensor:
    """(w - mean) / sqrt(var + eps) for each output channel, with the biased variance.

    Half types are computed in float32: an eps of 1e-10 is zero in float16. dtype is the result's,
    None the weight's.
    """
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (C_out, C_in, *)")
    # A batch norm over one sample whose channels are the kernels: PyTorch's fastest way to say it.
    rows = weight.reshape(1, weight.shape[0], weight.shape[1:].numel())
    half = weight.dtype in (torch.bfloat16, torch.float16)
    if half:
        rows = rows.float()
    rows = torch.native_batch_norm(rows, None, None, None, None, True, 0.0, eps)[0]
    rows = rows.reshape_as(weight)
    return rows.to(dtype or weight.dtype) if half or dtype else rows


def mixup(images, lam, partner, crop, corners, flips, mean, std, dtype: torch.dtype) -> Tensor:
    """lam * x[i] + (1 - lam) * x[partner[i]] of cropped, flipped and normalised uint8 images.

    Arguments as `functional.mixup`'s, none of them None; all but the images, which may also be
    tensors, in NumPy arrays of full length. The result is where the images are.
    """
    wide = torch.promote_types(dtype, torch.float32)
    (height, width), pixels = crop, []
    for image, (top, left), flip in zip(images, corners, flips, strict=True):
        cut = image[top : top + height, left : left + width]
        cut = cut if isinstance(cut, Tensor) else torch.tensor(cut)
        pixels.append(cut.flip(1) if flip else cut)
    pixels = torch.stack(pixels)
    lam, mean, std = (pixels.new_tensor(values, dtype=wide) for values in (lam, mean, std))
    normal = (pixels.to(wide) / 255 - mean) / std
    lam = lam.reshape(-1, 1, 1, 1)
    mixed = lam * normal[: len(partner)] + (1 - lam) * normal[torch.tensor(partner)]
    return mixed.to(dtype).permute(0, 3, 1, 2)


def norm_relu_conv(input: Tensor, norm, convs, residual: Tensor | None = None) -> list[Tensor]:
    """Each convolution of group_norm_relu(input); `residual` is added to the first's result.

    norm, convs: as in bit_kernels.functional.norm_relu_conv.
    """
    normal = group_norm_relu(
        input, norm.num_groups, norm.weight, norm.bias, norm.eps, relu=norm.relu
    )
    outputs = []
    for conv in convs:
        if conv is None:
            outputs.append(input)
            continue
        weight = conv.weight
        if conv.standardized is not None:
            # Its value, and its gradient for the weight.
            weight = conv.standardized + (weight - weight.detach())
        elif conv.eps is not None:
            weight = standardize_weight(weight, conv.eps)
        bias = None if conv.bias is None else conv.bias.to(normal.dtype)
        outputs.append(
            torch.conv2d(
                normal,
                weight.to(normal.dtype),
                bias,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
            )
        )
    if residual is not None:
        outputs[0] = outputs[0] + residual
    return outputs


def project_gradient(grad: Tensor, weight: Tensor, eps: float = 1e-10) -> Tensor:
    """The gradient of a weight from that of its standardized form: standardization's backward.

    rstd * (g - mean(g) - wh * mean(g * wh)) for each output channel, wh the standardized weight.
    Half types are computed in float32.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    g, w = grad.to(wide), weight.to(wide)
    axes = tuple(range(1, weight.dim()))
    var, mean = torch.var_mean(w, axes, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    normal = (w - mean) * rstd
    along = (g * normal).mean(axes, keepdim=True)
    return (rstd * (g - g.mean(axes, keepdim=True) - normal * along)).to(grad.dtype)


def sgd(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] = (),
    standardized: Sequence[Tensor] = (),
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    fresh: bool = False,
    project: bool = False,
    eps: float = 1e-10,
) -> None:
    """torch.optim.SGD's update in place, then `standardized` made anew from the weights.

    With `project` the gradients are those of `standardized`. Momenta that are fresh are set to the
    first gradient.
    """
    with torch.no_grad():
        for i, (w, grad) in enumerate(zip(weights, grads, strict=True)):
            g = project_gradient(grad, w, eps) if project else grad
            g = -g if maximize else g
            if weight_decay != 0:
                g = g.add(w, alpha=weight_decay)
            if momentum != 0:
                m = momenta[i]
                m.copy_(g) if fresh else m.mul_(momentum).add_(g, alpha=1 - dampening)
                g = g.add(m, alpha=momentum) if nesterov else m
            w.add_(g, alpha=-lr)
            if standardized:
                standardized[i].copy_(standardize_weight(w, eps))


def gradients(function, inputs, grad_outputs) -> list[Tensor | None]:
    """The gradients of function(*inputs), differentiable themselves.

    `inputs` may hold None for an absent parameter; the gradient of what needs none is None. What
    the function returns, and grad_outputs with it, may be a tensor or a list.
    """
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    with torch.enable_grad():
        outputs = function(*inputs)
    found = iter(
        torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True, allow_unused=True)
    )
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]
