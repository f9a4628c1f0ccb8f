"""Parameters of the flax network, from and to the PyTorch network.

By way of that one, which takes no device but memory, every format of `bit.checkpoint` is read and
written with all its checks: released .npz files, safetensors, timm's names.
"""

import jax
import numpy as np
import torch

from bit import models

KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def from_torch(model: models.ResNetV2) -> dict:
    """The parameters of a PyTorch network as a tree of NumPy arrays, views where they can be."""
    params = {}
    for name, tensor in model.state_dict().items():
        *place, kind = name.split(".")
        at = params
        for layer in place:
            at = at.setdefault(layer, {})
        array = tensor.detach().cpu().numpy()
        if kind == "weight":
            kind = "scale" if array.ndim == 1 else "kernel"
        at[kind] = _to_flax_axes(array)
    return params


def to_torch(params: dict, model: models.ResNetV2) -> models.ResNetV2:
    """Copy a tree of arrays into a PyTorch network of that shape, and return it.

    Raises ValueError, with the model untouched, if the tree is another network's.
    """
    found = {
        torch_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    slots = model.state_dict()
    if found.keys() != slots.keys():
        raise ValueError(f"params differ from {model!r} in {sorted(found.keys() ^ slots.keys())}")
    arrays = {name: _to_torch_axes(np.asarray(leaf)) for name, leaf in found.items()}
    for name, array in arrays.items():
        if array.shape != slots[name].shape:
            raise ValueError(
                f"params have {name} as {array.shape}, in PyTorch's axes; the model's is "
                f"{tuple(slots[name].shape)}"
            )
    for name, array in arrays.items():
        slots[name].copy_(torch.tensor(array))
    return model


def torch_name(path: tuple) -> str:
    """The PyTorch name of a parameter, by its path in the tree."""
    *place, kind = (key.key for key in path)
    return ".".join((*place, KINDS[kind]))


def _to_flax_axes(array: np.ndarray) -> np.ndarray:
    """From (out, in, kh, kw) to (kh, kw, in, out), and the head's likewise."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _to_torch_axes(array: np.ndarray) -> np.ndarray:
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
