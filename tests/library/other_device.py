"""Training on a device type that torch knows and we have no kernels for; a process of its own.

PyTorch lets a device be written in Python: here "tpu", as TorchTPU calls its own, whose tensors hold
a CPU tensor each and compute with it. It has no kernel of ours, so nothing but the reference path is
left, and any tensor that is made or read on the wrong device is an error. Prints "right" at the end.
"""

import warnings

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "tpu"


class There(torch.Tensor):
    """A tensor of the device. `here`: its values, with the same strides."""

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=f"{NAME}:0",
            requires_grad=here.requires_grad,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = pytree.tree_leaves((args, kwargs))
        strangers = [
            x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, There) and x.ndim
        ]
        goes = kwargs.get("device")
        leaves_device = goes is not None and torch.device(goes).type != NAME
        if strangers and function is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{function} got tensors of two devices")
        if goes is not None:
            kwargs["device"] = "cpu"
        unwrapped = pytree.tree_map_only(There, lambda x: x.here, (args, kwargs))
        result = function(*unwrapped[0], **unwrapped[1])
        if function is torch.ops.aten.copy_.default and not isinstance(args[0], There):
            return args[0]
        mutated = {id(x.here): x for x in leaves if isinstance(x, There)}

        def wrap(x: torch.Tensor):
            return mutated.get(id(x)) if id(x) in mutated else x if leaves_device else There(x)

        return pytree.tree_map_only(torch.Tensor, wrap, result)


def register() -> None:
    """Make the device known, with what creates tensors on it."""
    _setup_privateuseone_for_python_backend(NAME)

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        like = torch.contiguous_format if memory_format is None else memory_format
        return There(torch.empty(size, dtype=dtype, memory_format=like))

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return There(torch.empty_strided(size, stride, dtype=dtype))

    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    register.library = library  # as long as the process lives


def main() -> None:
    register()
    from bit import models
    from bit_kernels.optim import SGD

    torch.manual_seed(0)
    cpu = models.create("R14x0.25", 5, stem="small", zero_head=False)
    other = models.create("R14x0.25", 5, stem="small", device="meta")
    for module in other.modules():
        for name, parameter in module.named_parameters(recurse=False):
            source = cpu.get_parameter(_path(other, module, name)).detach()
            setattr(module, name, torch.nn.Parameter(There(source.clone())))
    images, labels = torch.randn(3, 3, 12, 12), torch.tensor([0, 3, 4])
    losses = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name, model, x, y in (
            ("cpu", cpu, images, labels),
            (NAME, other, There(images), There(labels)),
        ):
            options = dict(lr=0.05, momentum=0.9, weight_decay=1e-3)
            optimizer = SGD(model.parameters(), model=model, **options)
            losses[name] = []
            for _ in range(4):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                value = loss.detach()
                losses[name].append(float(value.here if isinstance(value, There) else value))
    assert any(f"no kernel for device type '{NAME}'" in str(one.message) for one in told)
    torch.testing.assert_close(
        torch.tensor(losses["cpu"]), torch.tensor(losses[NAME]), rtol=1e-4, atol=1e-5
    )
    assert losses["cpu"][-1] < losses["cpu"][0]
    print("right")


def _path(model: torch.nn.Module, module: torch.nn.Module, name: str) -> str:
    place = next(place for place, one in model.named_modules() if one is module)
    return f"{place}.{name}" if place else name


if __name__ == "__main__":
    main()
