"""The way back from a patch: what undoes each of its steps."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastprompt import adapters, attention, hooks, linear4bit, placement, shards, trainer
from fastprompt.blocks.frozen import Frozen
from fastprompt.called import Called
from fastprompt.loss import FusedLoss
from fastprompt.prompts import CHILD
from fastprompt.tapping import HostMethod, RunIfRead


def check_whole(model: nn.Module) -> None:
    """Raises ValueError where FSDP2 split weights since: no process has the old ones any more."""
    if shards.splits(model):
        raise ValueError("undo: want whole weights, got split ones (FSDP2): load the model again")


def resized(steps: list[tuple[str, Any]]) -> list[tuple[PreTrainedConfig, int]]:
    """The configs to be put back whose vocabulary was resized since, with its size by now.

    Raises:
        ValueError: a part to be put back was resized itself.
    """
    found = []
    for step, what in steps:
        if step not in ("module", "attribute"):
            continue
        parent, name, old = what
        new = getattr(parent, name)
        rows, got = (getattr(part, "out_features", None) for part in (old, new))
        if step == "module" and rows and got and rows != got:
            raise ValueError(
                f"undo: want {name} as large as it was, {rows} rows; got {got}: "
                f"model.resize_token_embeddings({rows}) first"
            )
        if isinstance(old, PreTrainedConfig):
            size = getattr(new, "vocab_size", None)
            if size != getattr(old, "vocab_size", None):
                found.append((old, size))
    return found


def _restore_flags(
    what: tuple[
        nn.Module,
        bool,
        list[tuple[nn.Parameter, bool, Tensor | None]],
        list[tuple[nn.Module, str, bool]],
    ],
) -> None:
    model, had_adapters, flags, moving = what
    since = bool(adapters.configs(model)) and not had_adapters
    for p, requires_grad, grad in flags:
        # PEFT, called since, has frozen all that is not its own
        p.requires_grad_(p.requires_grad if since else requires_grad)
        p.grad = grad
    for module, name, requires_grad in () if since else moving:
        module._parameters[name].requires_grad_(requires_grad)


def put_back(what: tuple[nn.Module, str, nn.Module]) -> None:
    """The original of a trained part, where the model is by now and in the mode it is in."""
    parent, child, old = what
    new = getattr(parent, child)
    by_now = next(new.parameters(), None)  # timm's reset_classifier may have taken it out
    if by_now is not None and next(old.parameters()).device != by_now.device:
        old.to(by_now.device)
    setattr(parent, child, placement.without_hooks(old, new).train(new.training))


def remember(steps: list[tuple[str, Any]], model: nn.Module, names: Collection[str]) -> None:
    """Add a step that gives parameters, which are about to be written, their values back."""
    known = {id(p) for step, what in steps if step == "values" for p, _ in what}
    given = [p for name, p in model.named_parameters() if name in names and id(p) not in known]
    steps.append(("values", [(p, p.detach().to("cpu", copy=True)) for p in given]))


@torch.no_grad()
def _write_back(what: list[tuple[nn.Parameter, Tensor]]) -> None:
    for p, value in what:
        p.copy_(value)


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()


STEPS = {
    "requires_grad": _restore_flags,
    "linear4bit": linear4bit.release,
    "module": put_back,
    "values": _write_back,
    "adapted": lambda adapted: adapted.undo(),
    "attribute": lambda what: setattr(*what),
    "prompt": lambda layer: layer._modules.pop(CHILD, None),
    "side keys": lambda module: vars(module).pop(attention.ATTRIBUTE, None),
    "called": Called.undo,
    "forward": RunIfRead.undo,
    "method": HostMethod.undo,
    "bias": hooks.BiasOfPrompts.undo,
    "block": Frozen.undo,
    "hooks": _remove,
    "trainer": trainer.detach,
    "loss": FusedLoss.undo,
}
