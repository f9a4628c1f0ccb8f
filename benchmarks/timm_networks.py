"""timm's own Big Transfer network and its BatchNorm twin, with or without torchvision.

timm imports torchvision for transforms, data sets and one BatchNorm class, none of which its
ResNet-v2 uses; and torchvision's wheels don't go with every build of torch. Where torchvision can't
be imported, stand-ins take its place while timm is imported, and are gone afterwards.
"""

import contextlib
import functools
import importlib.util
import sys
from unittest import mock

from torch import nn

from benchmarks.shapes import UNITS, parse

TORCHVISION = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


def installed() -> bool:
    return importlib.util.find_spec("timm") is not None


@contextlib.contextmanager
def torchvision_or_stand_ins():
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # absent, or built for another torch
        sys.modules.update({name: mock.MagicMock() for name in TORCHVISION})
        try:
            yield
        finally:
            for name in TORCHVISION:
                del sys.modules[name]
    else:
        yield


def create(name: str, num_classes: int = 1000, *, norm: str = "group") -> nn.Module:
    """timm's resnetv2_{depth}x{width}_bit, at any depth and width of `benchmarks.networks`.

    norm: "group", or "batch" for timm's resnetv2_{depth}, whose convolutions are plain; like BiT
    it pools over a border of zeros here, so that both have one topology. The epsilon of
    standardization is the released code's 1e-10.

    On a GPU the group norm's outputs are contiguous, whatever its inputs are (PyTorch's
    native_group_norm), and so is all that follows: given channels_last it convolves in NCHW.
    """
    with torchvision_or_stand_ins():
        from timm.layers import BatchNormAct2d, GroupNormAct, StdConv2d, create_conv2d
        from timm.models.resnetv2 import ResNetV2

    def group_norm(channels: int, **options) -> nn.Module:
        return GroupNormAct(channels, num_groups=min(32, channels // 2), **options)

    depth, width = parse(name)
    return ResNetV2(
        UNITS[depth],
        width_factor=width,
        num_classes=num_classes,
        stem_type="fixed",
        norm_layer=group_norm if norm == "group" else BatchNormAct2d,
        conv_layer=functools.partial(StdConv2d, eps=1e-10) if norm == "group" else create_conv2d,
    )
