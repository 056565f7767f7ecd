"""Under accelerate's hooks (device maps, offloading): a module's forward, and where weights are.

accelerate wraps ``module.forward`` and keeps what it wrapped in ``_old_forward``. What stands in a
forward's place stands beneath such hooks: inputs reach it on the device of the module's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_SLOTS = ("_old_forward", "forward")


def slot(module: nn.Module) -> str:
    """The attribute that calls of the module end in, past accelerate's hooks."""
    return next((name for name in _SLOTS if name in vars(module)), "forward")


def stands_in(module: nn.Module) -> Any:
    """What stands in the place of the class's forward, beneath hooks; None: nothing does."""
    found = vars(module).get(slot(module))
    return None if getattr(found, "__func__", None) is type(module).forward else found


def put_in(module: nn.Module, forward: Callable) -> None:
    """Let calls of the module end in ``forward``."""
    setattr(module, slot(module), forward)


def take_out(module: nn.Module, forward: Callable, before: Callable | None = None) -> None:
    """Take ``forward`` out of either place (hooks may have come or gone since), for what was there
    ``before``; None: the class's own."""
    own = vars(module)
    if own.get("_old_forward") is forward:
        module._old_forward = before or type(module).forward.__get__(module)
    if own.get("forward") is forward:
        if before is None:
            del module.forward  # the class's own shows again
        else:
            module.forward = before


def why_wrapped(module: nn.Module) -> str | None:
    """What accelerate's hooks do to a call of the module, unless they only move its inputs."""
    if "_old_forward" not in vars(module):
        return None
    from accelerate.hooks import AlignDevicesHook

    found = _hooks(module)
    other = next((hook for hook in found if type(hook) is not AlignDevicesHook), None)
    if other is not None:
        return f"is hooked by accelerate ({type(other).__name__})"
    return "is offloaded" if any(hook.offload for hook in found) else None


def device_of(module: nn.Module) -> torch.device:
    """Where the module's weight is when it runs: of an offloaded one where its hook brings it."""
    if not module.weight.is_meta:
        return module.weight.device
    for hook in _offloads(module):
        to = hook.execution_device
        return torch.device("cuda", to) if isinstance(to, int) else torch.device(to)
    return module.weight.device


def why_no_children(model: nn.Module, layers: Iterable[nn.Module]) -> str | None:
    """Why the layers can get no new child: a hook that offloads a module with all in it would look
    for it among its weights."""
    inside = {*layers}
    for name, module in model.named_modules():
        whole = any(hook.place_submodules for hook in _offloads(module))
        if whole and not inside.isdisjoint(module.modules()):
            return (
                f"{name or 'the model'}: want it offloaded module by module, got it as a whole "
                "(accelerate's preload_module_classes)"
            )
    return None


def offloaded_values(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Name -> what brings the values of each parameter that is offloaded."""
    places = {id(m): prefix for prefix, m in model.named_modules()}
    return {
        f"{places[id(m)]}.{name}".lstrip("."): partial(hook.weights_map.__getitem__, name)
        for m, name in offloaded(model)
        for hook in _offloads(m)
    }


def offloaded(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where parameters are offloaded: a hook puts new ones there at every call."""
    return [
        (m, name)
        for m in module.modules()
        if any(_offloads(m))
        for name, p in m._parameters.items()
        if p is not None
    ]


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))  # of a SequentialHook


def _offloads(module: nn.Module) -> Iterator[Any]:
    return (hook for hook in _hooks(module) if getattr(hook, "offload", False))
