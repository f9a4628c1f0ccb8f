"""timm's own BiT, for comparison, with or without torchvision.

timm imports torchvision for transforms, data sets and one BatchNorm class, none of which its BiT
uses; and torchvision's wheels don't go with every build of torch. Where torchvision can't be
imported, stand-ins take its place while timm is imported, and are gone afterwards.
"""

import contextlib
import sys
from unittest import mock

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


@contextlib.contextmanager
def _torchvision():
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


def create(name: str, num_classes: int):
    """Return timm's `name`, say resnetv2_50x1_bit, with the released code's eps of 1e-10."""
    with _torchvision():
        from timm.layers import StdConv2d
        from timm.models import resnetv2
    model = getattr(resnetv2, name)(num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, StdConv2d):
            module.eps = 1e-10
    return model
