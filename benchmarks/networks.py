"""The network that rivals are made of: Big Transfer's ResNet-v2 in plain, unfused PyTorch.

Topology and parameter names are those of `bit.models`, so that a `state_dict` loads across. What
stands between the convolutions can be exchanged, which gives

    eager        create(name)                                 what the fused network is to equal
    batch_norm   create(name, norm="batch", standardize=False)  the twin that most people train
    conv_only    create(name, norm=None, standardize=False)   the limit: convolutions, pool, residual
                                                              sums and head, and nothing else
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import UNITS, parse

NORMS = ("group", "batch", None)


def create(
    name: str,
    num_classes: int = 1000,
    *,
    stem: str = "imagenet",
    norm: str | None = "group",
    standardize: bool = True,
) -> "PlainResNet":
    """Build a network with the weights of `torch.manual_seed`'s next draws.

    name, num_classes, stem: as for `bit.models.create`.
    norm: "group", "batch", or None for neither normalization nor ReLU.
    standardize: whether kernels are standardized before they are applied.

    Raises ValueError for a name or norm that there is no network for.
    """
    return PlainResNet(name, num_classes, stem, norm, standardize)


class PlainResNet(nn.Module):
    def __init__(self, name: str, num_classes: int, stem: str, norm: str | None, standardize: bool):
        depth, width = parse(name)
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; it may be 'group', 'batch' or None")
        super().__init__()
        channels = int(64 * width)
        self.root = nn.Module()
        self.pools = stem == "imagenet"
        kernel, stride = (7, 2) if self.pools else (3, 1)
        self.root.conv = Conv(3, channels, kernel, stride, standardize)
        for block, units in enumerate(UNITS[depth], 1):
            mid = int(64 * width) << (block - 1)
            made = nn.Sequential()
            for unit in range(1, units + 1):
                stride = 2 if unit == 1 and block > 1 else 1
                made.add_module(f"unit{unit:02}", Unit(channels, mid, stride, norm, standardize))
                channels = 4 * mid
            self.add_module(f"block{block}", made)
        self.norm = normalization(norm, channels)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, Conv):
                # Maps keep their variance where no normalization would restore it.
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.root.conv(images)
        if self.pools:
            x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2)
        x = self.block4(self.block3(self.block2(self.block1(x))))
        return self.head(self.norm(x).mean((2, 3)))


class Unit(nn.Module):
    def __init__(self, channels: int, mid: int, stride: int, norm: str | None, standardize: bool):
        super().__init__()
        self.norm1 = normalization(norm, channels)
        projects = stride > 1 or channels != 4 * mid
        self.proj = Conv(channels, 4 * mid, 1, stride, standardize) if projects else None
        self.conv1 = Conv(channels, mid, 1, 1, standardize)
        self.norm2 = normalization(norm, mid)
        self.conv2 = Conv(mid, mid, 3, stride, standardize)
        self.norm3 = normalization(norm, mid)
        self.conv3 = Conv(mid, 4 * mid, 1, 1, standardize)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.norm1(x)
        shortcut = x if self.proj is None else self.proj(activated)
        y = self.conv1(activated)
        y = self.conv2(self.norm2(y))
        return self.conv3(self.norm3(y)) + shortcut


class Conv(nn.Conv2d):
    def __init__(self, channels: int, out: int, kernel: int, stride: int, standardize: bool):
        super().__init__(channels, out, kernel, stride, kernel // 2, bias=False)
        self.standardize = standardize

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.standardize:
            var, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
            weight = (weight - mean) * torch.rsqrt(var + 1e-10)
        return self._conv_forward(x, weight, None)


class GroupNormReLU(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class BatchNormReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def normalization(norm: str | None, channels: int) -> nn.Module:
    if norm == "group":
        return GroupNormReLU(min(32, channels // 2), channels)
    return BatchNormReLU(channels) if norm == "batch" else nn.Identity()
