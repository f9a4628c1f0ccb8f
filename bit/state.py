"""Everything that a run needs to go on as if it had never stopped, in one file.

Weights, momentum and progress share a file, so that no crash can leave one of them newer than the
others. Batches are a function of seed and step, so the step stands for the sampler's state and for
all randomness of the images; torch's generators are kept for what a network may draw.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bit.checkpoint import read_safetensors, write_safetensors

FILE = "state.safetensors"


@dataclass
class Progress:
    """How far a run has come."""

    images: int  # in the training split, to notice other data
    step: int = 0  # finished updates
    evaluated: int = 0  # step of the latest evaluation
    saved: int = 0  # step of last.safetensors
    best_val_top1: float = -1.0
    best_step: int = 0  # step of best.safetensors; 0 = there is none
    seconds: float = 0.0


def save(folder: Path, model: nn.Module, optimizer: torch.optim.SGD, progress: Progress) -> None:
    """Write the state into `folder`, whole or not at all. Raises OSError if it can't."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for parameter, values in optimizer.state.items():
        if (buffer := values.get("momentum_buffer")) is not None:
            tensors[f"momentum/{names[parameter]}"] = buffer
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    write_safetensors(folder / FILE, tensors, {"progress": dataclasses.asdict(progress)})


def load(folder: Path, model: nn.Module, optimizer: torch.optim.SGD) -> Progress:
    """Restore model, optimizer and random generators in place and return the progress."""
    tensors, metadata = read_safetensors(folder / FILE)
    parameters = dict(model.named_parameters())
    weights = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "model":
            weights[name] = tensor
        elif kind == "momentum":
            buffer = torch.empty_like(parameters[name]).copy_(tensor)
            optimizer.state[parameters[name]]["momentum_buffer"] = buffer
        elif name == "cpu":
            torch.set_rng_state(tensor.clone())
        else:
            torch.cuda.set_rng_state(tensor.clone())
    model.load_state_dict(weights)
    return Progress(**metadata["progress"])
