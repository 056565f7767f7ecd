"""A patched language model's loss in training, without its logits.

transformers' causal models end in ``logits = self.lm_head(hidden)`` and, given labels,
``self.loss_function(logits, labels, ...)``. In a training forward with labels the instance's
``lm_head`` hands its input on to the instance's ``loss_function``, which is the fused one, and the
output's logits are None. In every other forward (evaluation, generation, no gradients, compiled as
a whole, or no labels, as under Trainer's label smoothing or a loss of the user's own) both do what
they always did.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastprompt import linear4bit, placement
from fastprompt.blocks.checks import hooked
from fastprompt.blocks.products import is_adopted
from fastprompt.ops.linear_cross_entropy import linear_cross_entropy, rows_at_once

_SLOT = "_loss_function"  # where transformers keeps an instance's own


@dataclass(eq=False)
class FusedLoss:
    """What a model's ``lm_head.forward`` and ``loss_function`` are, as one object.

    A plain object that holds its model: it follows it through deepcopy and pickle.

    Attributes:
        reason: why the last training forward made logits; None: it made none.
        logits: whether they are to be kept in training, too.
        hidden: what lm_head was given, between the two calls of a forward that makes no logits.
    """

    model: nn.Module
    head: nn.Module
    logits: bool
    replaced: Any = None  # lm_head's own forward, where the instance had one (4-bit)
    reason: str | None = None
    active: bool = False
    hidden: Tensor | None = None
    empty: Tensor | None = None  # what stands for the logits meanwhile
    names: list[str] = field(default_factory=list)  # of the model's positional arguments
    handles: list = field(default_factory=list)

    @classmethod
    def put_on(cls, model: nn.Module, logits: bool) -> FusedLoss | str:
        """Take both places of a model that has an lm_head. Returns why not, if it cannot."""
        head = model.lm_head
        why = _unknown(model, head)
        if why is not None:
            return why
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        made = cls(model, head, logits, replaced=placement.stands_in(head), names=names)
        placement.put_in(head, Head(made))
        setattr(model, _SLOT, made)
        made.handles = [
            model.register_forward_pre_hook(Enter(made), with_kwargs=True),
            # before the hooks that are there already, which are not to see what stands for logits
            model.register_forward_hook(Leave(made), prepend=True, always_call=True),
        ]
        return made

    def undo(self) -> None:
        for handle in self.handles:
            handle.remove()
        own = placement.stands_in(self.head)
        if isinstance(own, Head) and own.loss is self:
            placement.take_out(self.head, own, self.replaced)
        if vars(self.model).get(_SLOT) is self:
            delattr(self.model, _SLOT)

    def why_not(self) -> str | None:
        """What keeps a training forward with labels from doing without logits, as far as known."""
        return self._obstacle() or self.reason

    def _obstacle(self) -> str | None:
        head = self.head
        own = placement.stands_in(head)
        if self.logits:
            return "logits=True"
        if all(m is not head for m in self.model.children()):
            return "lm_head was replaced"
        if not isinstance(own, Head) or own.loss is not self:
            return "lm_head's forward was replaced"
        wrapped = placement.why_wrapped(head)
        if wrapped is not None:
            return f"lm_head {wrapped}"
        if vars(self.model).get(_SLOT) is not self:
            return "the model's loss_function was replaced"
        if hooked(head):
            return "lm_head has hooks"
        if any(p.requires_grad for p in head.parameters()):
            return "lm_head trains"
        if type(head) is nn.Linear and type(head.weight) is not nn.Parameter:
            return f"lm_head's weight is a {type(head.weight).__name__}"
        return None

    def rows_at_once(self, tokens: int) -> int:
        """Of how many of its tokens the forward that runs has logits at the same time, at most."""
        return min(tokens, rows_at_once(self.head.out_features)) if self.active else tokens

    def forget(self) -> None:
        self.active, self.hidden, self.empty = False, None, None

    def given(self, arguments: dict[str, Any]) -> None:
        """Decides, at the start of a forward with these arguments."""
        self.forget()
        if not self.model.training or not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            self.reason = "compiled as a whole"
            return
        self.reason = self._argument(arguments)
        self.active = self.why_not() is None

    def _argument(self, arguments: dict[str, Any]) -> str | None:
        """What of a forward's arguments asks for logits."""
        if arguments.get("labels") is None:
            return "no labels were given"
        kept = arguments.get("logits_to_keep")
        return "logits_to_keep" if isinstance(kept, Tensor) or kept else None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """As transformers' ``ForCausalLMLoss``, of what lm_head was given if it made no logits.

        Raises:
            ValueError: the model does something to its logits before their loss.
        """
        if self.hidden is None:
            return ForCausalLMLoss(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
        hidden, self.hidden = self.hidden, None
        if logits is not self.empty:
            raise ValueError(
                f"{type(self.model).__name__}: want its logits' loss as lm_head makes them, but it "
                "changes them before: fastprompt.patch(model, logits=True)"
            )
        if shift_labels is None:  # what each position is to foretell is the next one's label
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        weight, bias = self.head.weight, self.head.bias
        if self.replaced is not None:
            weight, dtype = linear4bit.opened(self.head, hidden)
            hidden = hidden.to(dtype)  # as the head's own forward does, under autocast too
        loss = linear_cross_entropy(
            hidden,
            weight,
            shift_labels.to(hidden.device).reshape(hidden.shape[:-1]),
            bias=bias,
            reduction="mean" if num_items_in_batch is None else "sum",
            ignore_index=ignore_index,
        )
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch


@dataclass(eq=False)
class Head:
    """Stands in for ``lm_head.forward``."""

    loss: FusedLoss

    def __call__(self, hidden: Tensor) -> Tensor:
        loss = self.loss
        if loss.active:
            loss.hidden, loss.empty = hidden, hidden.new_empty(*hidden.shape[:-1], 0)
            return loss.empty
        if loss.replaced is not None:
            return loss.replaced(hidden)
        return type(loss.head).forward(loss.head, hidden)


@dataclass(eq=False)
class Enter:
    """Forward pre-hook of the model."""

    loss: FusedLoss

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.loss.given(dict(zip(self.loss.names, args, strict=False)) | kwargs)


@dataclass(eq=False)
class Leave:
    """Forward hook of the model, called even when its forward raised."""

    loss: FusedLoss

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        active = self.loss.active
        self.loss.forget()
        if not active or output is None:
            return None
        if isinstance(output, tuple):  # return_dict=False: the loss comes first, then logits
            return (output[0], *output[2:])
        # an output's key cannot be taken away, nor set to None
        return type(output)(**{k: v for k, v in output.items() if k != "logits"})


def _unknown(model: nn.Module, head: nn.Module) -> str | None:
    """What of model or head the fused loss would leave out; asked once."""
    forward = inspect.unwrap(type(model).forward)
    if not forward.__module__.startswith("transformers."):
        return "the model's forward is not transformers' own"
    if "loss_function" not in forward.__code__.co_names:
        return "the model does not ask its loss_function"
    if vars(model).get(_SLOT) is not None or model.loss_function is not ForCausalLMLoss:
        return "a loss function of its own"
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None:
        return "the model soft-caps its logits"
    if any(p.requires_grad for p in head.parameters()):
        return "lm_head trains"
    wrapped = placement.why_wrapped(head)
    if wrapped is not None:
        return f"lm_head {wrapped}"
    if is_adopted(head):
        return None
    if placement.stands_in(head) is not None:
        return "lm_head's forward was replaced"
    return None if type(head) is nn.Linear else f"lm_head is a {type(head).__name__}"
