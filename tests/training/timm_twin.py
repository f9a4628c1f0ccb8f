"""timm's own BiT, for comparison."""

from benchmarks.timm_networks import torchvision_or_stand_ins


def create(name: str, num_classes: int):
    """Return timm's `name`, say resnetv2_50x1_bit, with the released code's eps of 1e-10."""
    with torchvision_or_stand_ins():
        from timm.layers import StdConv2d
        from timm.models import resnetv2
    model = getattr(resnetv2, name)(num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, StdConv2d):
            module.eps = 1e-10
    return model
