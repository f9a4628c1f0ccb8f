"""Whole networks that are compared, on the same weights, with the optimizer that each is given.

Suites name a rival NETWORK/LAYOUT, or NETWORK_compiled/LAYOUT through torch.compile, or, on a GPU,
NETWORK_graph/LAYOUT as a CUDA graph.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import networks, timm_networks
from benchmarks.ops import LAYOUTS
from bit import checkpoint, models
from bit_kernels.optim import SGD

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4


@dataclass(frozen=True)
class Network:
    """create: (name, num_classes) -> module; plain: the network of NETWORKS that computes the same
    in plain PyTorch; names: how the module's parameters are called, as in `bit.checkpoint`.
    """

    create: Callable[[str, int], nn.Module]
    plain: str
    names: str = "bit"


NETWORKS = {
    "bit": Network(models.create, "eager"),
    "eager": Network(networks.create, "eager"),
    "timm": Network(timm_networks.create, "eager", "timm"),
    "batch_norm": Network(
        functools.partial(networks.create, norm="batch", standardize=False), "batch_norm"
    ),
    "timm_batch_norm": Network(
        functools.partial(timm_networks.create, norm="batch"), "batch_norm", "timm"
    ),
    "conv_only": Network(
        functools.partial(networks.create, norm=None, standardize=False), "conv_only"
    ),
}


def installed(provider: str) -> bool:
    """Whether what the rival needs can be imported."""
    return not provider.startswith("timm") or timm_networks.installed()


def network_of(provider: str) -> Network:
    name = provider.partition("/")[0]
    return NETWORKS[name.removesuffix("_compiled").removesuffix("_graph")]


def layout_of(provider: str) -> torch.memory_format:
    return LAYOUTS[provider.partition("/")[2]]


def plain_of(provider: str, layout: str = "NCHW") -> str:
    """The rival that computes the same as `provider` in plain PyTorch."""
    return f"{network_of(provider).plain}/{layout}"


class SharedWeights:
    """Random weights of one network, for every rival alike, such that results can be compared.

    Gains of about 0.1 and shifts of 1 or -1 leave a ReLU half of its channels, and hardly a value
    near 0: elsewhere its sign is a matter of rounding, and after 50 layers so are the gradients.

    name, num_classes, device: as for `bit.models.create`. seed: of the weights.
    """

    def __init__(self, name: str, num_classes: int = 1000, seed: int = 0, device: str = "cpu"):
        self.name, self.num_classes, self._device = name, num_classes, device
        self._template = _empty(models.create, name, num_classes, device)
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            for key, parameter in self._template.named_parameters():
                parameter.normal_(generator=generator)
                if parameter.ndim > 1:
                    # Without normalization, in conv_only, maps keep their size.
                    parameter *= parameter[0].numel() ** -0.5
                elif "norm" in key and key.endswith("weight"):
                    parameter.mul_(0.02).add_(0.1)
                else:
                    parameter.sign_()

    def build(self, provider: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The rival's network in its layout, in training mode and not compiled yet."""
        network = network_of(provider)
        module = _empty(network.create, self.name, self.num_classes, self._device)
        # BatchNorm's buffers aren't among the weights, and conv_only has no norms.
        mine = dict(self._named(network.names))
        absent = [key for key, _ in module.named_parameters() if key not in mine]
        if absent:
            raise ValueError(f"{provider} has parameters that bit has not: {', '.join(absent)}")
        module.load_state_dict(mine, strict=False)
        return module.to(dtype=dtype, memory_format=layout_of(provider))

    def parameters(self, provider: str, module: nn.Module) -> dict[str, nn.Parameter]:
        """The rival's parameters under bit's names."""
        theirs = dict(module.named_parameters())
        names = zip(self._template.state_dict(), self._named(network_of(provider).names))
        return {key: theirs[name] for key, name in names if name in theirs}

    def _named(self, names: str) -> dict[str, Tensor]:
        return checkpoint.views(self._template, names)


def _empty(create: Callable, name: str, num_classes: int, device: str) -> nn.Module:
    """A network whose weights are nobody's yet: drawing 928 million to be overwritten takes long."""
    with torch.device("meta"):
        module = create(name, num_classes)
    module.to_empty(device=device)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
    return module


def compiled(provider: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward that is timed: the module, or torch.compile of it for "..._compiled/..."."""
    if not provider.partition("/")[0].endswith("_compiled"):
        return module
    return torch.compile(module, fullgraph=True, dynamic=False)


def make_optimizer(provider: str, module: nn.Module, dtype: str) -> torch.optim.Optimizer:
    """SGD with momentum, and decay of kernels; bit's own keeps its kernels standardized in `dtype`,
    "float32" or, for autocast, "bfloat16".
    """
    groups = parameter_groups(module.parameters())
    if network_of(provider) is NETWORKS["bit"]:
        kept = torch.bfloat16 if dtype == "bfloat16" else None
        return SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM, model=module, dtype=kept)
    return torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict]:
    """Weight decay reaches kernels, not gains and biases."""
    kernels, others = [], []
    for parameter in parameters:
        (kernels if parameter.ndim > 1 else others).append(parameter)
    return [
        {"params": kernels, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]


def loss_of(
    forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, dtype: str
) -> Tensor:
    """Mean cross-entropy; `dtype` "bfloat16" is autocast, with the loss in float32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = forward(images)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
