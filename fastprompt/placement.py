"""Under accelerate's hooks (device maps, offloading): a module's forward, and where weights are.

accelerate wraps ``module.forward`` and keeps what it wrapped in ``_old_forward``. What stands in a
forward's place stands beneath such hooks: inputs reach it on the device of the module's weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def slot(module: nn.Module) -> str:
    """The attribute that calls of the module end in, past accelerate's hooks."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


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
    if "_old_forward" not in module.__dict__:
        return None
    for hook in _hooks(module):
        if type(hook) is not _moves_inputs():
            return f"is hooked by accelerate ({type(hook).__name__})"
        if hook.offload:
            return "is offloaded"
    return None


def device_of(module: nn.Module) -> torch.device:
    """Where the module's weight is when it runs: of an offloaded one where its hook brings it."""
    if not module.weight.is_meta:
        return module.weight.device
    for hook in _hooks(module):
        if getattr(hook, "offload", False):
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


class Away(NamedTuple):
    """A parameter that is offloaded: its hook puts a new one in its place at every call."""

    module: nn.Module
    name: str
    values: Callable[[], Tensor]


def offloaded(model: nn.Module) -> list[Away]:
    """All parameters of the model that are."""
    found = []
    for module in model.modules():
        for hook in _offloads(module):
            inside = module.named_modules() if hook.place_submodules else [("", module)]
            for prefix, part in inside:
                for name, p in part._parameters.items():
                    if p is not None:
                        key = f"{prefix}.{name}".lstrip(".")
                        found.append(Away(part, name, partial(hook.weights_map.__getitem__, key)))
    return found


def offloaded_values(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Name -> what brings the values of each parameter that is offloaded."""
    places = {id(module): name for name, module in model.named_modules()}
    return {
        f"{places[id(away.module)]}.{away.name}".lstrip("."): away.values
        for away in offloaded(model)
    }


def shared(module: nn.Module) -> list[Any]:
    """What hooks inside the module hold of all the model: no copy of the module wants its own."""
    held = (
        getattr(hook, name, None)
        for part in module.modules()
        for hook in _hooks(part)
        for name in ("tied_params_map", "weights_map")
    )
    return [each for each in held if each is not None]


def without_hooks(module: nn.Module, like: nn.Module) -> nn.Module:
    """The module, without accelerate's hooks if ``like`` has none by now."""
    if not any("_old_forward" in vars(part) for part in like.modules()):
        for part in module.modules():
            if "_old_forward" in vars(part):
                from accelerate.hooks import remove_hook_from_module

                remove_hook_from_module(part)
    return module


@functools.cache
def _moves_inputs() -> type:
    from accelerate.hooks import AlignDevicesHook

    return AlignDevicesHook


def _hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))  # of a SequentialHook


def _offloads(module: nn.Module) -> Iterator[Any]:
    return (hook for hook in _hooks(module) if getattr(hook, "offload", False))
