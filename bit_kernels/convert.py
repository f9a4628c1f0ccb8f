"""Puts the layers of this package into anybody's network, in place."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bit_kernels import _chains, _proof
from bit_kernels._recognise import Plan, plan
from bit_kernels.modules import Conv2d, FrozenConv2d, GroupNorm, ReLU, StdConv2d

_OURS = (Conv2d, FrozenConv2d, GroupNorm, StdConv2d)


@dataclass(frozen=True)
class Entry:
    """One module: its name, its class before, what it is now ("" if it was left), and why."""

    name: str
    was: str
    now: str
    why: str


@dataclass
class Report:
    """What `convert` did. Prints as a short table.

    replaced, left: the modules, in the network's order.
    proof: the errors that `verify=True` measured, in words.
    """

    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    proof: str = "not asked for"

    def __str__(self) -> str:
        rows = {}
        for entry in [*self.replaced, *self.left]:
            rows.setdefault((entry.was, entry.now or "as it was", entry.why), []).append(entry.name)
        lines = ["| modules | first | was | is | why |", "| --- | --- | --- | --- | --- |"]
        for (was, now, why), names in rows.items():
            first = names[0] or "the network"
            lines.append(f"| {len(names)} | {first} | {was} | {now} | {why} |")
        return "\n".join([*lines, f"Compared with the original: {self.proof}."])


def convert(model: nn.Module, *, example: Any = None, verify: bool = False) -> Report:
    """Make `model` run on this package's layers, in place, with equal results.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> print(convert(model, example=torch.randn(2, 3, 8, 8), verify=True))

    What is found, by what it computes and not by its name:

    - nn.GroupNorm and its subclasses, alone or with a ReLU inside: `GroupNorm`.
    - An nn.ReLU module after it, if the norm's output goes nowhere else: the norm does its work in
      the same pass, and the module becomes a `ReLU` that lets such tensors through.
    - nn.Conv2d subclasses that standardize their weights by the biased variance with eps inside
      the root: `StdConv2d`, with the eps that the outputs show.
    - Convolutions after these norms: `Conv2d`. They and the `StdConv2d`s no longer keep the
      normalised activation for backward.

    The modules change their class and stay the same objects: parameters (also an optimizer's),
    names, hooks and the network's own forward remain. A module that was inside one is no longer
    called, but stays where it was. Convert before `torch.compile`, whose graphs run the ReLU
    modules too.

    Args:
        model: a network, of any device and dtype. What stays as it was is in the report.
        example: an input: a tensor, a tuple of arguments or a dict of named ones. With it a run
            of a copy shows what follows what. Without it a symbolic trace does, if the network
            can be traced.
        verify: compare outputs and gradients with a copy of the original, on `example`.

    Returns:
        What was replaced, what was left, and why.

    Raises:
        ValueError: `model` is a TorchScript module; `verify` without `example`.
        RuntimeError: the comparison failed. The model is then as it was.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"model is a {type(model).__name__}; it must be an eager nn.Module")
    if verify and example is None:
        raise ValueError("verify is True and example None; verifying needs an example input")
    original = copy.deepcopy(model) if verify else None
    names, plans, relus = _plan(model)
    report = Report()
    _chain(model, names, plans, relus, example)
    before = [(module, type(module), dict(vars(module))) for module in plans]
    try:
        for module, decided in plans.items():
            was = _class_name(type(module))
            if decided.to is None:
                report.left.append(Entry(names[module], was, "", decided.why))
                continue
            module.__class__ = decided.to
            # Beside a child of the same name, as transformers' norms have one.
            vars(module).update(decided.attributes)
            values = ", ".join(f"{k}={v!r}" for k, v in decided.attributes.items())
            now = f"{decided.to.__name__}({values})" if values else decided.to.__name__
            report.replaced.append(Entry(names[module], was, now, decided.why))
        if verify:
            report.proof = _proof.compare(original, model, example)
    except BaseException:
        for module, cls, attributes in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        raise
    return report


def _class_name(cls: type) -> str:
    package = cls.__module__.split(".")[0]
    return f"nn.{cls.__name__}" if package == "torch" else f"{package}'s {cls.__name__}"


def _plan(model: nn.Module) -> tuple[dict[nn.Module, str], dict[nn.Module, Plan], list[nn.ReLU]]:
    """Every module's name; a plan for each norm and convolution; the ReLUs that are in neither."""
    names, plans, relus, within, known = {}, {}, [], set(), {}
    for name, module in model.named_modules():
        names[module] = name
        if module in within or isinstance(module, _OURS):
            continue
        if isinstance(module, nn.GroupNorm | nn.Conv2d):
            plans[module] = plan(module, known)
            within.update(module.modules())
        elif type(module) is nn.ReLU:
            relus.append(module)
    return names, plans, relus


def _chain(model, names, plans, relus, example) -> None:
    """Put into `plans` what depends on which module takes whose output."""
    bare = [m for m, p in plans.items() if p.to is GroupNorm and p.attributes["activation"] is None]
    plain = [m for m, p in plans.items() if p.to is Conv2d]
    norms = [m for m, p in plans.items() if p.to is GroupNorm]
    if not norms:
        plans.update((m, Plan(None, "there is no GroupNorm before it")) for m in plain)
        return
    if not plain and not (bare and relus):
        return
    try:
        runs = _chains.find(model, [*norms, *plain, *relus], example)
    except Exception as error:  # noqa: BLE001 - whatever somebody else's code raises
        how = "be traced; give an example" if example is None else "be run on a copy"
        why = f"what it follows is unknown: the network can't {how} ({_short(error)})"
        plans.update((m, Plan(None, why)) for m in plain)
        unknown = f"what follows is unknown: the network can't {how}"
        plans.update((m, plans[m]._replace(why=unknown)) for m in bare if relus)
        return
    taken = [call for run in runs for call in run]
    for norm in bare:
        why_not = _why_not_relu(norm, [call for call in taken if call.module is norm])
        if why_not is None:
            plans[norm] = Plan(GroupNorm, "with the ReLU after it", {"activation": "relu"})
            for call in taken:
                if call.source is not None and call.source.module is norm:
                    plans[call.module] = Plan(ReLU, "lets through what is done")
        elif why_not:
            plans[norm] = plans[norm]._replace(why=why_not)
    normalised = {call.module for call in taken if _makes_activation(call.source, plans)}
    for conv in plain:
        if conv not in normalised:
            plans[conv] = Plan(None, "there is no GroupNorm right before it")
        else:
            plans[conv] = Plan(Conv2d, "keeps no normalised activation")


def _why_not_relu(norm: nn.GroupNorm, calls: Iterable[_chains.Call]) -> str | None:
    """Why the norm can't do the ReLU after it; "" if there is none."""
    takers = [taker for call in calls for taker in call.takers]
    after = [t for t in takers if isinstance(t, _chains.Call) and type(t.module) is nn.ReLU]
    if not after:
        return ""
    others = [t for t in takers if t not in after]
    if others:
        other = others[0] if isinstance(others[0], str) else type(others[0].module).__name__
        return f"without the ReLU: {other} takes its output too"
    if norm._forward_hooks or norm._backward_hooks:
        return "without the ReLU: its hooks would see another output"
    return None


def _makes_activation(call: _chains.Call | None, plans: dict[nn.Module, Plan]) -> bool:
    """Whether the output is a GroupNorm's, or a ReLU's that lets one through."""
    if call is not None and type(call.module) is nn.ReLU:
        call = call.source
        return call is not None and plans[call.module].attributes.get("activation") == "relu"
    return call is not None and isinstance(call.module, nn.GroupNorm)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
