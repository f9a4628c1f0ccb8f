"""Drop-ins for nn.Conv2d and nn.GroupNorm; parameters and state_dicts are torch's own."""

from torch import Tensor, nn

from bit_kernels import functional


class StdConv2d(nn.Conv2d):
    """nn.Conv2d whose kernel is standardized per output channel before it is applied.

    Takes nn.Conv2d's arguments, in its order, plus `eps` (Weight Standardization, Qiao et al.,
    arXiv 1903.10520; eps inside the root and the biased variance as in Big Transfer's release).
    The parameter stays the raw kernel, so a state_dict of nn.Conv2d loads and back.

    Shapes: input (N, C_in, H, W) or (C_in, H, W), output as nn.Conv2d's.
    """

    def __init__(self, *args, eps: float = 1e-10, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        weight = functional.standardize_weight(self.weight, self.eps)
        return self._conv_forward(input, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm with an optional ReLU in the same pass over memory.

    Takes nn.GroupNorm's arguments, in its order, plus `activation` (None or "relu").
    Parameters and state_dict are nn.GroupNorm's.

    Shapes: input (N, C, *), output the same shape and memory layout.
    """

    def __init__(self, *args, activation: str | None = None, **kwargs):
        if activation not in (None, "relu"):
            raise ValueError(f"activation is {activation!r}; it may be None or 'relu'")
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return functional.group_norm_relu(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            relu=self.activation == "relu",
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"
