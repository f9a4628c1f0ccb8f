"""Networks of other libraries, as they are and after `bit_kernels.convert`."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import bit_kernels
from benchmarks.timm_networks import torchvision_or_stand_ins

NUM_CLASSES = 1000


def _timm(name: str) -> nn.Module:
    with torchvision_or_stand_ins():
        from timm.models import resnetv2
    return getattr(resnetv2, name)(num_classes=NUM_CLASSES)


def _transformers() -> nn.Module:
    from transformers import BitConfig, BitForImageClassification

    return BitForImageClassification(BitConfig(num_labels=NUM_CLASSES))


def _torchvision() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(num_classes=NUM_CLASSES, norm_layer=functools.partial(nn.GroupNorm, 32))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm.resnetv2_50x1_bit": functools.partial(_timm, "resnetv2_50x1_bit"),
    "timm.resnetv2_50d_gn": functools.partial(_timm, "resnetv2_50d_gn"),
    "transformers.BitForImageClassification": _transformers,
    "torchvision.resnet50_gn": _torchvision,
}


@functools.cache
def importable(name: str) -> bool:
    """Whether the library is there and goes with this torch; finding out takes seconds."""
    try:
        with torch.device("meta"):
            NETWORKS[name]()
    except (ImportError, RuntimeError):
        return False
    return True


def create(name: str, converted: bool, side: int) -> nn.Module:
    """One of NETWORKS, in training mode, with the same weights whether converted or not.

    Gains, shifts and kernels are those of `benchmarks.rivals.SharedWeights`, so that gradients can
    be compared. side: of the images in pixels, for the run in which `convert` looks on.
    """
    network = NETWORKS[name]().train()
    generator = torch.Generator().manual_seed(0)
    gains = {module.weight for module in network.modules() if isinstance(module, nn.GroupNorm)}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim > 1:
                parameter *= parameter[0].numel() ** -0.5
            elif parameter in gains:
                parameter.mul_(0.02).add_(0.1)
            else:
                parameter.sign_()
    if converted:
        bit_kernels.convert(network, example=torch.rand(1, 3, side, side) * 2 - 1)
    return network


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """The network's output; transformers' is in an object."""
    output = network(images)
    return getattr(output, "logits", output)
