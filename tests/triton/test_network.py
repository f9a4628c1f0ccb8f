"""A whole network trained by the GPU's kernels, against the same in float64 by plain PyTorch."""

import copy

import pytest
import torch
from checking import BACKEND, DEVICE
from torch.nn import functional as F

from bit import models
from bit_kernels.optim import SGD

if BACKEND != "triton":
    pytest.skip("for Triton's kernels: BIT_KERNELS_INTERPRET=1 or a GPU", allow_module_level=True)

STEPS = 3


def train(model, images, labels, **autocast):
    """Losses of a few steps, and the weights after them."""
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, model=model)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, **autocast) if autocast else torch.enable_grad():
            logits = model(images)
        loss = F.cross_entropy(logits.float() if autocast else logits, labels)
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64), [p.detach() for p in model.parameters()]


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(1)  # no ReLU's input is so near to 0 that rounding decides
    model = models.create("R26x0.125", num_classes=10, stem="small")
    model.head.weight.data.normal_(std=0.1)  # zeros would send no gradient back
    images = torch.rand(3, 3, 21, 18) * 2 - 1
    labels = torch.tensor([1, 7, 3])
    truth = train(copy.deepcopy(model).double(), images.double(), labels)
    return model, images.to(DEVICE), labels.to(DEVICE), truth


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training_follows_float64(networks, layout):
    model, images, labels, (losses, weights) = networks
    model = copy.deepcopy(model).to(DEVICE, memory_format=layout)
    found, trained = train(model, images.to(memory_format=layout), labels)
    assert (found - losses).abs().max() < 1e-4, (found, losses)
    assert losses[-1] < losses[0] - 0.1
    for ours, right in zip(trained, weights, strict=True):
        assert (ours.cpu().double() - right).abs().max() < 1e-3 * right.abs().max() + 1e-5


def test_float16_autocast(networks):
    model, images, labels, (losses, _) = networks
    model = copy.deepcopy(model).to(DEVICE, memory_format=torch.channels_last)
    found, _ = train(model, images, labels, dtype=torch.float16)
    assert (found - losses).abs().max() < 0.05, (found, losses)
