"""What each op computes: one plain PyTorch function an op, right in any dtype up to float64.

Every kernel of this package is tested against these functions in float64, and where no kernel
can serve a call these functions serve it.
"""

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


def standardize_weight(weight: Tensor, eps: float = 1e-10) -> Tensor:
    """(w - mean) / sqrt(var + eps) for each output channel, with the biased variance.

    Half types are computed in float32: an eps of 1e-10 is zero in float16.
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
    return rows.to(weight.dtype) if half else rows


def mixup(images, lam, partner, crop, corners, flips, mean, std, dtype: torch.dtype) -> Tensor:
    """lam * x[i] + (1 - lam) * x[partner[i]] of cropped, flipped and normalised uint8 images.

    Arguments as `functional.mixup`'s, none of them None, in NumPy arrays of full length.
    """
    wide = torch.promote_types(dtype, torch.float32)
    lam, mean, std = (torch.tensor(values, dtype=wide) for values in (lam, mean, std))
    (height, width), pixels = crop, []
    for image, (top, left), flip in zip(images, corners, flips, strict=True):
        cut = torch.tensor(image[top : top + height, left : left + width])
        pixels.append(cut.flip(1) if flip else cut)
    normal = (torch.stack(pixels).to(wide) / 255 - mean) / std
    lam = lam.reshape(-1, 1, 1, 1)
    mixed = lam * normal[: len(partner)] + (1 - lam) * normal[torch.tensor(partner)]
    return mixed.to(dtype).permute(0, 3, 1, 2)


def gradients(function, inputs, grad_output: Tensor) -> list[Tensor | None]:
    """The gradients of function(*inputs), differentiable themselves.

    `inputs` may hold None for an absent parameter; the gradient of what needs none is None.
    """
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    with torch.enable_grad():
        output = function(*inputs)
    found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]
