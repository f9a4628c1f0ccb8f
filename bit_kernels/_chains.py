"""Which modules take a GroupNorm's output: read from a symbolic trace, or watched in a run.

A run sees every operation on the very tensor, also those that no module makes. A trace needs no
example, but a network whose forward is plain enough.
"""

import copy
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Call:
    """One call of a module: whose output it was given, and who takes its own.

    source: the Call that made its input, None if it is none of the modules.
    takers: Calls, and names of operations that are no module's.
    """

    def __init__(self, module: nn.Module, source: "Call | None"):
        self.module, self.source = module, source
        self.takers: list[Call | str] = []
        if source is not None:
            source.takers.append(self)


def call(model: nn.Module, example: Any) -> Any:
    """model's output for an example: a tensor, a tuple of arguments or a dict of named ones."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def find(model: nn.Module, modules: list[nn.Module], example: Any = None) -> list[list[Call]]:
    """The calls of `modules` in one forward of the model, when training and when not.

    Raises whatever the model raises where it can't be copied, traced or run on the example.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    twin = copy.deepcopy(model, memo)  # the run may change buffers
    originals = {id(memo[id(module)]): module for module in modules}
    look = _trace if example is None else _run
    return [look(twin.train(mode), originals, example) for mode in (True, False)]


def _trace(model: nn.Module, originals: dict[int, nn.Module], _example: None) -> list[Call]:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return id(module) in originals or super().is_leaf_module(module, name)

    calls: dict[fx.Node, Call] = {}
    for node in Tracer().trace(model).nodes:
        called = model.get_submodule(node.target) if node.op == "call_module" else None
        sources = node.all_input_nodes
        if type(called) is nn.Identity and sources[0] in calls:
            calls[node] = calls[sources[0]]
            continue
        if id(called) in originals:
            calls[node] = Call(originals[id(called)], calls.get(sources[0]) if sources else None)
            sources = sources[1:]
        for other in sources:
            if other in calls:
                calls[other].takers.append(_name(node))
    return list(calls.values())


def _name(node: fx.Node) -> str:
    if node.op == "output":
        return "the network's output"
    return str(getattr(node.target, "__name__", node.target))


@torch.no_grad()
def _run(model: nn.Module, originals: dict[int, nn.Module], example: Any) -> list[Call]:
    calls: list[Call] = []
    makers: dict[int, Call] = {}  # by the id of the tensor made last
    alive = []  # so that no id is given twice
    inside: list[Call] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not inside:
                for leaf in tree_leaves((args, kwargs)):
                    if id(leaf) in makers:
                        makers[id(leaf)].takers.append(str(function))
                if function._schema.is_mutable:  # no longer what the module made
                    makers.pop(id(args[0]), None)
            return function(*args, **(kwargs or {}))

    def enter(module, args, kwargs):
        sources = [makers[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in makers]
        inside.append(Call(originals[id(module)], sources[0] if sources else None))
        calls.append(inside[-1])

    def leave(module, args, output):
        makers[id(output)] = inside.pop()
        alive.append(output)

    watched = [module for module in model.modules() if id(module) in originals]
    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in watched]
    hooks += [module.register_forward_hook(leave) for module in watched]
    with Watch():
        outputs = call(model, example)
    for hook in hooks:
        hook.remove()
    for leaf in tree_leaves(outputs):
        if id(leaf) in makers:
            makers[id(leaf)].takers.append("the network's output")
    return calls
