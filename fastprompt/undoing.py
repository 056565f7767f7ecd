"""The way back from a patch: what undoes each of its steps."""

from torch import Tensor, nn

from fastprompt import attention, linear4bit, trainer
from fastprompt.blocks.frozen import Frozen
from fastprompt.loss import FusedLoss
from fastprompt.prompts import CHILD
from fastprompt.tapping import HostMethod, RunIfRead


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
    "block": Frozen.undo,
    "hooks": _remove,
    "trainer": trainer.detach,
    "loss": FusedLoss.undo,
}
