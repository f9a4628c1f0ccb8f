"""A standardized weight that an optimizer keeps up to date, and how a convolution takes it."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from bit_kernels import _library, functional
from bit_kernels.backends import choose
from bit_kernels.ops._layout import empty_output


class KeptWeight:
    """The standardized form of one parameter, in the parameter's memory layout.

    bit_kernels.optim.SGD makes it, writes `standardized` in its step, and puts it into the
    convolutions that use the parameter. It belongs to that optimizer: copies of a convolution,
    by copy.deepcopy or pickle, have none.

    Args:
        parameter: (C_out, C_in, *kernel), floating.
        eps: of the standardization.
        dtype: of `standardized`; None is the parameter's.
    """

    def __init__(self, parameter: Tensor, eps: float, dtype: torch.dtype | None):
        self.parameter, self.eps, self._dtype = parameter, eps, dtype
        self.standardized: Tensor | None = None  # made when first asked for
        self._suits = None  # dtype, device, shape and strides of the parameter that it was made for
        self._sampled, self._seen = 0, None  # bytes that are sampled; what was there

    def up_to_date(self) -> Tensor:
        """`standardized`, made again if the parameter was changed by anybody but the optimizer.

        What shows: operations in place, and other memory behind the parameter; on the CPU also
        changes through `.data`, in 16 sampled places of which the ends are two. A CUDA graph takes
        `standardized` as it finds it, and while one is captured a change raises RuntimeError.
        """
        if self._seen != self._look():
            if self.parameter.is_cuda and torch.cuda.is_current_stream_capturing():
                # The graph would write it in each replay, but nobody has written it yet.
                raise RuntimeError(
                    f"a weight of shape {tuple(self.parameter.shape)} has changed since it was "
                    "standardized, and a CUDA graph is being captured; call the optimizer's "
                    "restandardize() or run a forward before, and restandardize() before a replay"
                )
            # A tensor made under inference mode could not be trained with after it.
            with torch.inference_mode(False), torch.no_grad():
                self.place().copy_(self._standardize(self.parameter))
            self.mark()
        return self.standardized

    def place(self) -> Tensor:
        """`standardized` as a place to write to, another if it doesn't suit the parameter."""
        weight = self.parameter
        suits = weight.dtype, weight.device, weight.shape, weight.stride()
        if self._suits != suits:
            dtype = self._dtype or weight.dtype
            self.standardized = torch.empty_like(empty_output(weight), dtype=dtype)
            self._suits = suits
        return self.standardized

    def mark(self) -> None:
        """Says that `standardized` belongs to the parameter as it is now."""
        weight = self.parameter
        lies_dense = weight.is_cpu and weight.untyped_storage().nbytes() >= weight.nbytes
        self._sampled = weight.nbytes if lies_dense and _library.native is not None else 0
        self._seen = self._look()

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        """The standardized weight in `dtype`, the kept one where that is its dtype."""
        if dtype == (self._dtype or self.parameter.dtype):
            return self.up_to_date()
        with torch.no_grad():
            return self._standardize(self.parameter.detach()).to(dtype)

    def _standardize(self, weight: Tensor) -> Tensor:
        # The kernel whatever the size, as in the step: both give the same bits.
        backend = choose("sgd", weight)
        return functional.standardize_weight(weight, self.eps, backend=backend)

    def _look(self) -> tuple[int, int, int]:
        weight, sample = self.parameter, 0
        address = 0 if isinstance(weight, FakeTensor) else weight.data_ptr()
        if weight.is_cpu and weight.nbytes == self._sampled and address:
            sample = _library.native.fingerprint(address, self._sampled)
        return weight._version, address, sample

    def __deepcopy__(self, memo) -> None:
        return None

    def __reduce__(self):
        return type(None), ()


class _TakeKept(torch.autograd.Function):
    """The kept tensor forward; its gradient, as it is, to the parameter."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, kept):
        return kept.view_as(kept)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the gradient of a weight whose standardized form bit_kernels.optim.SGD keeps is "
                "that of the standardized form, and can't be differentiated again; call the "
                "optimizer's release() for create_graph=True"
            )
        return grad.to(ctx.dtype), None


def take(weight: Tensor, kept: Tensor) -> Tensor:
    """`kept` as a function of `weight` whose gradient reaches it unprojected."""
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return kept
    return _TakeKept.apply(weight, kept)
