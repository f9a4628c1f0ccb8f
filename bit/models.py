"""The Big Transfer network: ResNet-v2 with GroupNorm and Weight Standardization, in network order.

Kolesnikov et al., "Big Transfer (BiT): General Visual Representation Learning", arXiv 1912.11370,
section 3.1, with the layer order, padding and epsilons of its released code:

    root     7x7 convolution, stride 2, then a 3x3 max pool, stride 2, over a border of zeros
    block1   units; the first one of block2 to block4 halves the map
    block2
    block3
    block4
    norm     GroupNorm and ReLU, then the mean over the map
    head     linear

Every convolution is weight-standardized and has no bias. Halving rounds up: n pixels become
ceil(n / 2), five times, so 224 px give a 7x7 map. Images are (N, 3, H, W) in [-1, 1], any H and W.

What is added to the paper: depths 14 and 26, widths below 1 and the "small" stem, for a CPU and for
images of about 32 px. GroupNorm then has fewer than 32 groups, of two channels, which is the
smallest group in the paper's own networks.
"""

import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bit_kernels import GroupNorm, StdConv2d, norm_relu_conv

UNITS = {  # depth: units in block1 to block4
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
STEMS = ("imagenet", "small")


def create(
    name: str,
    num_classes: int = 1000,
    *,
    stem: str = "imagenet",
    zero_head: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> "ResNetV2":
    """Build a network with fresh weights.

    name: "R{depth}x{width}". Depth is 14, 26, 50, 101 or 152, width multiplies the channels and may
        be a fraction. The paper's are R50x1, R50x3, R101x1, R101x3, R152x2 and R152x4.
    num_classes: outputs of the head. 0 means no head: the network returns the pooled features.
    stem: "imagenet" is the paper's root. "small" is one 3x3 convolution with stride 1 and no pool,
        so that 32 px still give a 4x4 map at the end.
    zero_head: start the head at zero, as the paper does for transfer, or from a normal distribution
        with deviation 0.01.
    device: where the weights live, torch's default device if None. On "meta" they take no memory.
    dtype: of the weights, torch's default dtype if None.

    Raises ValueError for a name, stem or num_classes that there is no network for.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    # Weights come into being once, where they are to live: R152x4 has 928 million of them.
    with torch.device("meta"):
        model = ResNetV2(name, num_classes, stem=stem).to(dtype)
    if device.type != "meta":
        model.to_empty(device=device)
        model.initialize(zero_head)
    return model


class ResNetV2(nn.Module):
    """The whole network. Build one with `create`, which also says what the arguments mean.

    Parameters are named root.conv, block1.unit01.norm1, .conv1, .norm2, .conv2, .norm3, .conv3 and
    (in unit01) .proj, ..., norm, head; convolutions are (out, in, kh, kw), the head (classes, in).
    `model.to(memory_format=torch.channels_last)` is the faster layout on most hardware.
    """

    def __init__(self, name: str, num_classes: int = 1000, *, stem: str = "imagenet"):
        units, base = shape_of(name)
        if num_classes < 0:
            raise ValueError(
                f"num_classes is {num_classes}; it must be at least 1, or 0 for no head"
            )
        if stem not in STEMS:
            raise ValueError(f"stem is {stem!r}; it may be one of {', '.join(STEMS)}")
        super().__init__()
        self.name = name
        self.num_classes = num_classes
        self.stem_kind = stem
        self.num_features = 32 * base

        self.root = Root(base, stem)
        self.block1 = _block(units[0], base, 1 * base, stride=1)
        self.block2 = _block(units[1], 4 * base, 2 * base, stride=2)
        self.block3 = _block(units[2], 8 * base, 4 * base, stride=2)
        self.block4 = _block(units[3], 16 * base, 8 * base, stride=2)
        self.norm = _norm(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if not self.root.conv.weight.is_meta:  # on "meta", drawing loads PyTorch's compiler: 3 s
            self.initialize()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes), or pooled features (N, num_features) without a head.

        images: (N, 3, H, W), floating point, in [-1, 1]; N may be 0.
        """
        _check_images(images)
        x = self.root(images)
        x = self.block1(x)
        x = self.block2(x)
        x = self.block3(x)
        x = self.block4(x)
        x = self.norm(x).mean((2, 3))
        return self.head(x)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the map of every stage, none of them normalised: the residual stream itself.

        For images (N, 3, H, W) and width w, sizes rounded up:

            "stem"    (N,   64 w, H/4,  W/4)   what block1 receives: after convolution and pool
            "block1"  (N,  256 w, H/4,  W/4)   after the block's last sum, and so on
            "block2"  (N,  512 w, H/8,  W/8)
            "block3"  (N, 1024 w, H/16, W/16)
            "block4"  (N, 2048 w, H/32, W/32)  before `norm` and its ReLU

        With the "small" stem the heights are H, H, H/2, H/4, H/8, and the widths likewise. The
        logits are `model.head(model.norm(maps["block4"]).mean((2, 3)))`.
        """
        _check_images(images)
        maps = {"stem": self.root(images)}
        maps["block1"] = self.block1(maps["stem"])
        maps["block2"] = self.block2(maps["block1"])
        maps["block3"] = self.block3(maps["block2"])
        maps["block4"] = self.block4(maps["block3"])
        return maps

    def initialize(self, zero_head: bool = True) -> None:
        """Draw fresh weights in place: convolutions Kaiming normal over fan-out, GroupNorm 1 and 0.

        The paper doesn't publish its own. Standardization makes the output independent of the
        scale of a kernel, which therefore only sets how fast the kernel learns.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if zero_head:
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=0.01)

    @property
    def config(self) -> dict[str, str | int]:
        """The arguments of `create` that rebuild this network, but for device and dtype."""
        return {"name": self.name, "num_classes": self.num_classes, "stem": self.stem_kind}

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return (
            f"ResNetV2({self.name!r}, num_classes={self.num_classes}, stem={self.stem_kind!r}: "
            f"{count:,} parameters)"
        )


class Root(nn.Module):
    """The first convolution and pool: (N, 3, H, W) to (N, channels, H/4, W/4), both rounded up."""

    def __init__(self, channels: int, stem: str):
        super().__init__()
        self.pools = stem == "imagenet"
        if self.pools:
            self.conv = StdConv2d(3, channels, 7, stride=2, padding=3, bias=False)
        else:
            self.conv = StdConv2d(3, channels, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        return _max_pool(x) if self.pools else x


def _max_pool(x: Tensor) -> Tensor:
    """F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2), keeping its result and indices for backward.

    A border of zeros, where max_pool2d(padding=1) has one of -inf: no activation comes before the
    pool, so x has negative values and a zero can win.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2)
    return _MaxPool.apply(x)


class _MaxPool(torch.autograd.Function):
    WINDOW = (3, 3), (2, 2), (1, 1), (1, 1), False  # size, stride, padding, dilation, ceil_mode

    @staticmethod
    def forward(ctx, x):
        output, indices = torch.ops.aten.max_pool2d_with_indices(x, *_MaxPool.WINDOW)
        for border in _MaxPool.borders(x.shape, output):
            border.clamp_(min=0)
        ctx.save_for_backward(output, indices)
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        ctx.shape = x.shape
        ctx.layout = (
            torch.channels_last
            if channels_last and not x.is_contiguous()
            else torch.contiguous_format
        )
        return output

    @staticmethod
    def backward(ctx, grad):
        output, indices = ctx.saved_tensors
        # A zero at the border is the border's own.
        grad = grad.clone(memory_format=torch.preserve_format)
        for border, values in zip(
            _MaxPool.borders(ctx.shape, grad), _MaxPool.borders(ctx.shape, output), strict=True
        ):
            border.masked_fill_(values == 0, 0)
        # The op asks the map for its shape and layout only.
        like = torch.empty(
            ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout
        )
        return torch.ops.aten.max_pool2d_with_indices_backward(
            grad, like, *_MaxPool.WINDOW, indices
        )

    @staticmethod
    def borders(shape, pooled):
        """The outputs whose window reaches over the edge of a map of this shape."""
        edges = [pooled[:, :, 0], pooled[:, :, :, 0]]
        if shape[2] % 2:
            edges.append(pooled[:, :, -1])
        if shape[3] % 2:
            edges.append(pooled[:, :, :, -1])
        return edges


class Unit(nn.Module):
    """A pre-activation bottleneck: (N, channels, H, W) to (N, 4 * mid, H/stride, W/stride)."""

    def __init__(self, channels: int, mid: int, stride: int):
        super().__init__()
        self.norm1 = _norm(channels)
        if stride > 1 or channels != 4 * mid:
            self.proj = StdConv2d(channels, 4 * mid, 1, stride=stride, bias=False)
        else:
            self.proj = None
        self.conv1 = StdConv2d(channels, mid, 1, bias=False)
        self.norm2 = _norm(mid)
        # The stride is here, as in the release; the first ResNet-v2 had it on conv1.
        self.conv2 = StdConv2d(mid, mid, 3, stride=stride, padding=1, bias=False)
        self.norm3 = _norm(mid)
        self.conv3 = StdConv2d(mid, 4 * mid, 1, bias=False)
        # How each convolution's result is normalised by what reads it, the sum by whatever follows.
        self.next_norms = [(norm.num_groups, norm.eps) for norm in (self.norm2, self.norm3)]
        self.next_norms.append((groups_of(4 * mid), self.norm1.eps))

    def forward(self, x: Tensor) -> Tensor:
        # The projection takes the activated map, the identity (proj is None) the raw one.
        norm2, norm3, after = self.next_norms
        y, shortcut = norm_relu_conv(x, self.norm1, self.conv1, self.proj, next_norm=norm2)
        (y,) = norm_relu_conv(y, self.norm2, self.conv2, next_norm=norm3)
        (y,) = norm_relu_conv(y, self.norm3, self.conv3, residual=shortcut, next_norm=after)
        return y


def _block(units: int, channels: int, mid: int, stride: int) -> nn.Sequential:
    block = OrderedDict(unit01=Unit(channels, mid, stride))
    for number in range(2, units + 1):
        block[f"unit{number:02d}"] = Unit(4 * mid, mid, stride=1)
    return nn.Sequential(block)


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(groups_of(channels), channels, activation="relu")


def groups_of(channels: int) -> int:
    return min(32, channels // 2)


def shape_of(name: str) -> tuple[tuple[int, ...], int]:
    """Return the units of each block and the root's channels, or raise ValueError."""
    match = re.fullmatch(r"R(\d+)x(\d+(?:\.\d+)?)", name)
    if match is None or int(match[1]) not in UNITS:
        raise ValueError(
            f"name is {name!r}; it must be R<depth>x<width> with a depth of "
            f"{', '.join(map(str, UNITS))} and a width such as 0.25, 0.5, 1, 2, 3 or 4"
        )
    base = 64 * float(match[2])
    widths = [int(base) * 2**doublings for doublings in range(6)]
    if base != int(base) or base < 2 or any(c % groups_of(c) for c in widths):
        raise ValueError(
            f"name is {name!r}; a width of {match[2]} gives channels that GroupNorm can't group; "
            f"it may be a multiple of 0.5, or for instance 0.125, 0.1875, 0.25, 0.375 or 0.75"
        )
    return UNITS[int(match[1])], int(base)


def _check_images(images: Tensor) -> None:
    shape = images.shape
    if len(shape) != 4 or shape[1] != 3 or 0 in shape[2:] or not images.is_floating_point():
        raise ValueError(
            f"images is {images.dtype} of shape {tuple(shape)}; "
            f"it must be floating point of shape (N, 3, H, W), H and W at least 1"
        )
