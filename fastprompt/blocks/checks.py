"""Whether a block may run as one node right now; if not, why."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fastprompt import placement
from fastprompt.adapters import adapted
from fastprompt.blocks.parts import Norm, Parts, Vector
from fastprompt.blocks.products import is_adopted
from fastprompt.prompts import CHILD

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RECORDERS = "transformers.utils.output_capturing"


@dataclass(eq=False)
class Inside:
    """A module of a block, and its children (but a prompt) when the block was looked at."""

    name: str
    module: nn.Module
    children: list[nn.Module | None]
    drops: bool  # whether it is a kind of dropout


def inside(layer: nn.Module, ignored: nn.Module | None) -> list[Inside]:
    """The layer, named "", and every module in it but those of ``ignored`` (its prompt)."""
    of_prompt = {*ignored.modules()} if ignored is not None else {}
    found = [(name, m) for name, m in layer.named_modules() if m not in of_prompt]
    return [Inside(name, m, _children(m), _drops(m) is not None) for name, m in found]


def _children(layer: nn.Module) -> list[nn.Module | None]:
    return [child for name, child in layer._modules.items() if name != CHILD]  # sets take turns


def unknown(parts: Parts, found: list[Inside]) -> str | None:
    """What of the block the fused forward would leave out or do differently; asked once."""
    known = {id(module) for module in (*_modules(parts), *parts.others)}
    for part in found:
        module, kind = part.module, type(part.module)
        name = f"{part.name} is " if part.name else ""
        if adapted(module):
            return f"{part.name} has an adapter (PEFT's)"
        wrapped = placement.why_wrapped(module)
        if wrapped is not None:
            return f"{part.name or 'it'} {wrapped}"
        if placement.stands_in(module) is not None and not is_adopted(module):
            return f"{part.name}'s forward was replaced" if name else "its forward was replaced"
        if not _is_as_published(module):
            return f"{name}a {kind.__name__} with a forward of its own"
        if (
            part is not found[0]
            and id(module) not in known
            and _drops(module) is None
            and kind is not nn.Identity
        ):
            return f"{part.name} is a {kind.__name__}, which frozen blocks do not know"
    devices = {
        p.device for part in found for p in part.module._parameters.values() if p is not None
    }
    if len(devices) > 1:
        return f"its weights are on {' and '.join(sorted(map(str, devices)))}"
    for part in parts.products:
        if type(part) is not nn.Linear and not is_adopted(part):
            return f"a product is a {type(part).__name__}, want nn.Linear or Linear4bit"
    return None


def obstacle(parts: Parts, found: list[Inside]) -> str | None:
    """What keeps the block from running as one node at this moment; asked at every call."""
    for part in found:
        module = part.module
        own = module.__dict__  # some 400 modules are looked at in every step: no slow look-ups
        # hooks and forward of the layer itself, the first, run around the node, as always
        inner = part is not found[0]
        if ([*own["_modules"].values()] if inner else _children(module)) != part.children:
            of_peft = next((name for name, m in own["_modules"].items() if adapted(m)), None)
            if of_peft is not None:
                return f"{part.name}.{of_peft} has an adapter (PEFT's)".lstrip(".")
            return f"modules inside {part.name or 'it'} were replaced"
        if (
            own["_forward_hooks"] or own["_forward_pre_hooks"]
            or own["_backward_hooks"] or own["_backward_pre_hooks"]
        ) and inner and hooked(module):  # fmt: skip
            return f"{part.name} has hooks"
        if "forward" in own and inner:
            wrapped = placement.why_wrapped(module)
            if wrapped is not None:
                return f"{part.name} {wrapped}"
            if not is_adopted(module) and placement.stands_in(module) is not None:
                return f"{part.name}'s forward was replaced"
        for name, p in own["_parameters"].items():
            if p is not None and p.requires_grad:
                return f"{part.name}.{name} trains".lstrip(".")
        if part.drops and module.training and _drops(module):
            return f"dropout {_drops(module)} in training"
    if parts.attention.training and parts.attention_dropout:
        return f"attention dropout {parts.attention_dropout} in training"
    return None


def _modules(parts: Parts) -> Iterator[nn.Module]:
    for value in vars(parts).values():
        if isinstance(value, (Norm, Vector)):
            yield value.module
        elif isinstance(value, nn.Module):
            yield value


def _is_as_published(module: nn.Module) -> bool:
    """Whether its forward is one of torch's, transformers' or bitsandbytes' own."""
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
    return owner.__module__.startswith(("torch.nn.", "transformers.", "bitsandbytes."))


def _drops(module: nn.Module) -> float | None:
    """The probability of a dropout or drop-path module; None for any other."""
    return module.p if isinstance(module, nn.Dropout) else getattr(module, "drop_prob", None)


def hooked(module: nn.Module) -> bool:
    """Whether it has any hook but transformers' own recorders, which stay for good on the modules
    of a model that was asked once for its hidden states."""
    hooks = (hook for kind in _HOOKS for hook in getattr(module, kind).values())
    return any(getattr(hook, "__module__", "") != _RECORDERS for hook in hooks)
