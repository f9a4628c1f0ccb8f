"""SGD in one pass over memory, which keeps the standardized weights of a network up to date."""

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bit_kernels._kept import KeptWeight
from bit_kernels.modules import StdConv2d
from bit_kernels.ops.sgd import gradient_norms, project_gradients, sgd

DECAYS = ("kernels", "all")


class SGD(torch.optim.Optimizer):
    """torch.optim.SGD with its arguments, its results and its state_dict, in one pass over memory.

    With `model` it also takes over the weight standardization of that model: its StdConv2d layers
    are given standardized weights that `step` writes together with the weights, so that the forward
    has none of it, and the backward neither. Results are those of torch.optim.SGD on the same
    network. What changes is `grad` of these weights: it is the gradient of the *standardized*
    weight until `step` projects it, on every path (eager, torch.compile, autocast, DDP, which may
    reduce it as it is). Hence, for these weights:

    - clip with this class's `clip_grad_norm_`, and call `project_gradients` before anything else
      reads `.grad`;
    - they take part in the loss through their layers alone: a penalty on a raw weight belongs into
      `weight_decay`;
    - before another optimizer trains the network, call `release`.

    Weights that are changed between steps (load_state_dict, an average swapped in, `.data`) are
    noticed and standardized again, as far as KeptWeight.up_to_date says. Checkpoints hold the
    plain weights.

    Args:
        params: tensors or parameter groups, dense and of real dtypes. float32 runs on kernels,
            everything else as plain PyTorch.
        lr: learning rate; a number or a tensor of one element, which is read on the GPU if it is
            there: a CUDA graph of the step follows it.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        model: whose StdConv2d layers with weights among `params` take them standardized from here.
        decay: which tensors weight decay reaches: "kernels" those of two and more dimensions, "all"
            is torch's rule. May differ by group. A state_dict of torch's, which doesn't say, leaves
            it as it is here.
        dtype: of the kept standardized weights, the parameter's if None. Under autocast give
            autocast's.

    Raises:
        ValueError: an argument isn't one of these, or a weight of `model` is shared by layers that
            standardize it differently or not at all.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        model: nn.Module | None = None,
        decay: str = "kernels",
        dtype: torch.dtype | None = None,
    ):
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; it may be None or a floating dtype")
        self._forget()
        self._model, self._dtype = model, dtype
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            decay=decay,
        )
        try:
            super().__init__(params, defaults)
        except ValueError:
            _detach(self._layers)
            raise

    def _forget(self) -> None:
        """Have no model and keep no weights."""
        self._model: nn.Module | None = None
        self._dtype: torch.dtype | None = None
        self._kept: dict[Tensor, KeptWeight] = {}
        self._layers: list[tuple[StdConv2d, KeptWeight]] = []
        # Whose gradients are those of the raw weights, each with the handle of its guard.
        self._projected: dict[Tensor, RemovableHandle | None] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_kept" not in self.__dict__:  # a copy, by copy.deepcopy or pickle
            self._forget()
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        decays = [group["decay"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group.setdefault("decay", decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            if self._model is not None:
                self._attach(group["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    def _attach(self, params: list[Tensor]) -> None:
        """Give standardized weights to the layers of the model that use one of `params`."""
        wanted, users = set(params), {}
        for module in self._model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter in wanted:
                    users.setdefault(parameter, []).append(module)
        kept, layers = {}, []
        for parameter, modules in users.items():
            standardizing = [
                m for m in modules if isinstance(m, StdConv2d) and m.weight is parameter
            ]
            if not standardizing:
                continue
            if len({m.eps for m in standardizing}) > 1 or len(standardizing) < len(modules):
                raise ValueError(
                    f"model shares a weight of shape {tuple(parameter.shape)} among "
                    f"{', '.join(map(repr, modules))}; all may be StdConv2d of one eps"
                )
            kept[parameter] = KeptWeight(parameter, standardizing[0].eps, self._dtype)
            layers += [(m, kept[parameter]) for m in standardizing]
        taken = [layer for layer, w in layers if layer._kept and w.parameter.grad is not None]
        if taken:
            raise ValueError(
                f"model has gradients of standardized weights that another optimizer keeps, of "
                f"{taken[0]} for one; call its release() or zero_grad() first"
            )
        self._kept |= kept
        self._layers += layers
        for layer, weight in layers:
            layer._kept = weight
        for parameter in kept:
            if parameter.grad is not None:
                self._projected[parameter] = self._guard(parameter)
        # An optimizer that is gone must not leave gradients unprojected.
        weakref.finalize(self, _detach, layers).atexit = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` does, or None.

        Raises:
            RuntimeError: another optimizer has taken over the model's standardized weights.
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_ownership()
        for group in self.param_groups:
            alike: dict[_Treatment, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(self._treatment(group, p), []).append(p)
            for treatment, params in alike.items():
                self._update(group, treatment, params)
        return loss

    def _treatment(self, group: dict[str, Any], p: Tensor) -> "_Treatment":
        if p.grad.layout != torch.strided:
            raise ValueError(f"params has a gradient of layout {p.grad.layout}; it must be dense")
        has_momentum = group["momentum"] != 0
        return _Treatment(
            p.dtype,
            p.device,
            self._kept[p].eps if p in self._kept else None,
            project=self._is_deferred(p),
            decays=group["decay"] == "all" or p.dim() > 1,
            fresh=has_momentum and self.state[p].get("momentum_buffer") is None,
        )

    def _update(self, group: dict[str, Any], treatment: "_Treatment", params: list[Tensor]) -> None:
        kept = [] if treatment.eps is None else [self._kept[p] for p in params]
        momenta = []
        if group["momentum"] != 0:
            momenta = [
                torch.empty_like(p) if treatment.fresh else self.state[p]["momentum_buffer"]
                for p in params
            ]
        sgd(
            params,
            [p.grad for p in params],
            momenta,
            [weight.place() for weight in kept],
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=float(group["weight_decay"]) if treatment.decays else 0.0,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            fresh=treatment.fresh,
            project=treatment.project,
            eps=treatment.eps or 0.0,
        )
        for weight in kept:
            weight.mark()
        if treatment.fresh:  # only now: they were uninitialised
            for p, momentum in zip(params, momenta, strict=True):
                self.state[p]["momentum_buffer"] = momentum

    def restandardize(self) -> None:
        """Standardize anew the weights that were changed by others, as a forward does by itself.

        For those who run what can't ask: before a CUDA graph is captured or replayed. Weights that
        were changed in place are standardized in place.
        """
        for weight in self._kept.values():
            weight.up_to_date()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._forget_projected()

    @torch.no_grad()
    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        """torch.nn.utils.clip_grad_norm_ for all parameters, by the raw weights' gradients.

        Gradients of standardized weights stay what they are, scaled as the others: the projection
        is linear.

        Returns:
            The total norm before clipping, of no dimension.

        Raises:
            RuntimeError: `error_if_nonfinite` and the norm is not finite.
        """
        self._check_ownership()
        norm_type = float(norm_type)
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        deferred = [p for p in params if self._is_deferred(p)]
        norms = []
        for (_, _, eps), alike in self._alike(deferred).items():
            norms += gradient_norms(alike, [p.grad for p in alike], eps, norm_type)
        plain = [p.grad for p in params if not self._is_deferred(p)]
        if plain or not norms:
            norms.append(torch.nn.utils.get_total_norm(plain, norm_type, foreach=foreach))
        first = norms[0]
        norms = torch.stack([norm.to(first.device) for norm in norms])
        total = torch.linalg.vector_norm(norms, norm_type)
        if error_if_nonfinite and not total.isfinite():
            raise RuntimeError(
                f"the total norm of order {norm_type} of the gradients is {total.item()}; with "
                f"error_if_nonfinite it must be finite"
            )
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, total, foreach)
        return total

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Make every `.grad` that of the raw weight, now and in place, for whoever reads it.

        `step` and `clip_grad_norm_` know. A backward that would add to such a gradient, before
        `zero_grad`, raises RuntimeError.
        """
        self._check_ownership()
        pending = [p for p in self._kept if p.grad is not None and self._is_deferred(p)]
        for (_, _, eps), alike in self._alike(pending).items():
            guards = [self._guard(p) for p in alike]
            project_gradients(alike, [p.grad for p in alike], eps)
            self._projected.update(zip(alike, guards, strict=True))

    def _alike(self, params: list[Tensor]) -> dict[tuple, list[Tensor]]:
        """Parameters with kept weights that the ops take together: by dtype, device and eps."""
        found: dict[tuple, list[Tensor]] = {}
        for p in params:
            found.setdefault((p.dtype, p.device, self._kept[p].eps), []).append(p)
        return found

    def _is_deferred(self, p: Tensor) -> bool:
        """Whether the gradient of `p` is that of its standardized form."""
        return p in self._kept and p not in self._projected

    def _guard(self, p: Tensor) -> RemovableHandle | None:
        """Looks out for a backward that adds to `p.grad`, or writes another one in its place."""
        if not p.requires_grad:
            return None
        raw, projected = p.grad, self._projected

        def after_accumulation(p: Tensor) -> None:
            if p.grad is raw:
                p.grad = None
                raise RuntimeError(
                    "backward added the gradient of a standardized weight to that of the raw one, "
                    "which is now dropped; call zero_grad() before the backward, after "
                    "project_gradients() too"
                )
            _remove(projected.pop(p, None))

        return p.register_post_accumulate_grad_hook(after_accumulation)

    def _forget_projected(self) -> None:
        for handle in self._projected.values():
            _remove(handle)
        self._projected.clear()

    def release(self) -> None:
        """Give the standardization back to the layers; gradients that are pending are projected."""
        self.project_gradients()
        self._forget_projected()
        _detach(self._layers)
        self._forget()

    def _check_ownership(self) -> None:
        if any(layer._kept is not weight for layer, weight in self._layers):
            raise RuntimeError(
                "another optimizer has taken over the standardized weights of this one's model; "
                "call release() before a second one is made"
            )


class _Treatment(NamedTuple):
    """What tensors of one call of `sgd` have in common beside their group's settings."""

    dtype: torch.dtype
    device: torch.device
    eps: float | None  # of the standardized form, where one is kept
    project: bool
    decays: bool
    fresh: bool


def _remove(handle: RemovableHandle | None) -> None:
    if handle is not None:
        handle.remove()


def _detach(layers: list[tuple[StdConv2d, KeptWeight]]) -> None:
    for layer, weight in layers:
        if layer._kept is weight:
            layer._kept = None


def _check_group(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements; it may be a number or have one")
    for name in ("lr", "momentum", "weight_decay"):
        if not 0 <= (value := float(group[name])) < math.inf:
            raise ValueError(f"{name} is {value}; it may be 0 or more")
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov is True with momentum {group['momentum']} and dampening "
            f"{group['dampening']}; it may be so with momentum and without dampening"
        )
    if group["decay"] not in DECAYS:
        raise ValueError(f"decay is {group['decay']!r}; it may be one of {DECAYS}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise ValueError(f"params has a tensor of {p.dtype}; it may be floating, not complex")
