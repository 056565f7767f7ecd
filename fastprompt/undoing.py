"""The way back from a patch: what undoes each of its steps."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastprompt import attention, hooks, linear4bit, trainer
from fastprompt.blocks.frozen import Frozen
from fastprompt.loss import FusedLoss
from fastprompt.prompts import CHILD
from fastprompt.tapping import HostMethod, RunIfRead


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


def _restore_flags(flags: list[tuple[nn.Parameter, bool, Tensor | None]]) -> None:
    for p, requires_grad, grad in flags:
        p.requires_grad_(requires_grad)
        p.grad = grad


def _put_back(what: tuple[nn.Module, str, nn.Module]) -> None:
    """The original of a trained part, where the model is by now and in the mode it is in."""
    parent, child, old = what
    new = getattr(parent, child)
    device = next(new.parameters()).device
    if next(old.parameters()).device != device:
        old.to(device)
    setattr(parent, child, old.train(new.training))


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()


STEPS = {
    "requires_grad": _restore_flags,
    "linear4bit": linear4bit.release,
    "module": _put_back,
    "adapted": lambda adapted: adapted.undo(),
    "attribute": lambda what: setattr(*what),
    "prompt": lambda layer: layer._modules.pop(CHILD, None),
    "side keys": lambda module: vars(module).pop(attention.ATTRIBUTE, None),
    "forward": RunIfRead.undo,
    "method": HostMethod.undo,
    "bias": hooks.BiasOfPrompts.undo,
    "block": Frozen.undo,
    "hooks": _remove,
    "trainer": trainer.detach,
    "loss": FusedLoss.undo,
}
