"""`patch(model)`: give a frozen transformers model trainable prompts, in place, reversibly."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from fastprompt import families, reporting, tapping
from fastprompt.blocks import fp8
from fastprompt.blocks.frozen import Frozen
from fastprompt.blocks.memory import CHOICES as MEMORIES
from fastprompt.blocks.memory import Memory
from fastprompt.families import VISION, Anatomy
from fastprompt.loss import FusedLoss
from fastprompt.methods import Method, default_for
from fastprompt.ops.options import BACKENDS
from fastprompt.pools import Pool
from fastprompt.prompts import CHILD, Prompt
from fastprompt.steps import apply
from fastprompt.undoing import STEPS

ATTRIBUTE = "_fastprompt_patch"


@dataclass(eq=False)
class Patch:
    """What `patch` did to one model, and the way back.

    Attributes:
        model, method, anatomy: what was patched, with what, and how it was taken apart.
        replaced: module name -> what stands there now.
        skipped: module name -> why it was left alone.
        backend: which implementation of `ops.prompt_attention` runs.
        compute: what the blocks' products are computed in.
        pool: what chooses prompts for each sample, under L2P, DualPrompt and CODA-Prompt.
        memory, memories: what to keep of each block for backward: as asked, and by tower.
        unfused: block name -> why it never runs as one node.
        logits: whether a training forward with labels is to return logits beside its loss.
        loss: what computes a language model's loss without them, or why nothing does.
    """

    model: PreTrainedModel
    method: Method
    anatomy: Anatomy
    backend: str = "auto"
    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    pool: Pool | None = None
    memory: str = "auto"
    memories: dict[str, Memory] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)
    logits: bool = False
    loss: FusedLoss | str = "no language model's head"
    compute: str = "auto"
    _names: list[str] = field(default_factory=list)  # of the parameters that train
    _undo: list[tuple[str, Any]] = field(default_factory=list)  # newest last

    @property
    def blocks(self) -> dict[str, Frozen]:
        """Block name -> what stands there, of the blocks that may run as one autograd node."""
        read = (block for tower in self.anatomy.towers for block in tower.blocks)
        found = {block.name: Frozen.of(block.layer) for block in read}
        return {name: block for name, block in found.items() if block is not None}

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that trains."""
        return {name: self.model.get_parameter(name) for name in self._names}

    @property
    def prompts(self) -> dict[str, Prompt]:
        """Module name -> prompt, in the order of the blocks."""
        return {
            f"{block.name}.{CHILD}": getattr(block.layer, CHILD)
            for tower in self.anatomy.towers
            for block in (*tower.blocks, *tower.unread)
            if hasattr(block.layer, CHILD)
        }

    def report(self) -> str:
        """What was replaced, what was skipped and why, and what trains, as text."""
        return reporting.report(self)

    def prepare(self, processor: ProcessorMixin) -> ProcessorMixin:
        """Let the model's processor write as many image tokens as the model has rows for an image.

        Returns the same processor, changed. Wanted by M2PT's ``visual_prompts`` "raw" and
        "context", which make an image longer; harmless to call with any, and again.
        """
        tower = self.anatomy.tower(VISION)
        if self.anatomy.host is None or tower is None:
            raise ValueError(f"prepare: want a vision-language model, got {self.anatomy.family}")
        rows = self.method.lengths()[VISION] if self.method.shown() != "drop" else 0
        tapping.make_room(processor, self.anatomy.host, tower, rows)
        return processor

    def refresh(self) -> None:
        """Forget cached prompt keys and values: after a write through ``.data``."""
        for prompt in self.prompts.values():
            prompt.refresh()

    def query(self, features: Tensor) -> AbstractContextManager[None]:
        """``with patch.query(features):`` forwards inside take [B, D] as the pool's query.

        Saves the pass of the frozen model: its `features` of an image never change, so a data set's
        may be computed once and kept.
        """
        return self._of_a_pool().query(features)

    def features(self, pixel_values: Tensor) -> Tensor:
        """[B, D] of images [B, 3, H, W]: what the frozen model without prompts makes of them."""
        return self._of_a_pool().features(pixel_values)

    def set_task(self, task: int) -> None:
        """Go on to a task, from 0, of a method that has tasks (DualPrompt, CODA-Prompt)."""
        pool = self._of_a_pool()
        self.method = pool.method = pool.method.at_task(task)

    def auxiliary_loss(self) -> Tensor:
        """The pool's own loss (pull, orthogonality) of the last forward, a scalar.

        It is in the model's ``loss`` already, if that forward got labels and built a graph.
        """
        return self._of_a_pool().auxiliary_loss()

    def _of_a_pool(self) -> Pool:
        if self.pool is None:
            raise ValueError(f"want a patch with L2P, DualPrompt or CODAPrompt, got {self.method}")
        return self.pool

    def undo(self) -> None:
        """Give the exact old model back: modules, values, requires_grad flags and config.

        What was trained is lost; `fastprompt.save` it before.
        """
        while self._undo:
            step, what = self._undo.pop()
            STEPS[step](what)
        for kept in (self._names, self.memories, self.unfused):
            kept.clear()
        self.pool = None
        self.loss = "undone"
        self.model.__dict__.pop(ATTRIBUTE, None)


def patch(
    model: PreTrainedModel,
    method: Method | None = None,
    *,
    backend: str = "auto",
    memory: str = "auto",
    compute: str = "auto",
    logits: bool = False,
) -> Patch:
    """Give ``model`` trainable prompts; everything that the method does not name is frozen.

    The model stays the same object with the same forward, masks, caches and ``generate``. Inside
    each block the prompt acts as additional keys and values (exactly what writing prompt rows
    before every block computes), so no sequence gets longer.

    Args:
        model: a transformers model, dense or 4-bit (bitsandbytes), not yet wrapped by DDP, PEFT
            or torch.compile: patch first, wrap after.
        method: of `fastprompt.methods`. None picks by architecture: M2PT for a vision-language
            model, VPT-deep for a vision model, deep prompts for a language model.
        backend: of `fastprompt.ops.prompt_attention`.
        memory: what each frozen block keeps for backward. "speed": all that saves recomputing a
            product (at 7B in bfloat16 91 KB a token and block); "balanced": the same without the
            MLP's hidden activations (48 KB), which are recomputed; "low": the block's input (8
            KB); "offload": that input in the host's memory. "auto" takes the fastest that fits,
            at the first training forward and when the tokens grow. "off" runs transformers' own
            layers. Gradient checkpointing turns each into "low".
        compute: "auto": in the dtype that the backbone computes in. "fp8": the products of frozen
            4-bit blocks that compute in bfloat16 run in fp8 (e4m3, a scale for each row), on
            NVIDIA cards of capability 8.9 and newer; gradients are then some ten times as far
            from exact as bfloat16's. On the CPU it is emulated, slowly. The report says which
            products do not, and why.
        logits: whether a language model, given labels in training, returns its logits beside its
            loss. By default they are None there and never made: at 7B they take more memory than
            half of the blocks. In evaluation, and without labels, they are there always.

    Returns:
        The `Patch`, also kept on the model: ``.report()``, ``.trainable``, ``.undo()``.

    Raises:
        ValueError: a model or an option that is not served; the model is then as it was.
    """
    _check_model(model)
    if backend not in BACKENDS:
        raise ValueError(f"backend: want one of {', '.join(BACKENDS)}; got {backend!r}")
    if memory not in MEMORIES:
        raise ValueError(f"memory: want one of {', '.join(MEMORIES)}; got {memory!r}")
    if compute not in fp8.CHOICES:
        raise ValueError(f"compute: want one of {', '.join(fp8.CHOICES)}; got {compute!r}")
    if compute == "fp8" and memory == "off":
        raise ValueError("compute='fp8': want frozen blocks, got memory='off', which has none")
    anatomy = families.anatomy(model)
    if method is not None and not isinstance(method, Method):
        raise ValueError(f"method: want one of fastprompt.methods, got {method!r}")
    method = default_for(anatomy) if method is None else method
    method.check(anatomy)
    _check_devices(anatomy, compute)

    done = Patch(model, method, anatomy, backend, memory=memory, compute=compute, logits=logits)
    try:
        apply(done)
    except BaseException:
        done.undo()  # never half a patch
        raise
    model.__dict__[ATTRIBUTE] = done
    return done


def patch_of(model: nn.Module) -> Patch:
    """The patch that a model carries.

    Raises:
        ValueError: the model is not patched.
    """
    found = vars(model).get(ATTRIBUTE)
    if found is None:
        raise ValueError(f"{type(model).__name__}: want a patched model, got one without a patch")
    return found


def _check_model(model: nn.Module) -> None:
    kind = type(model).__name__
    if ATTRIBUTE in getattr(model, "__dict__", {}):
        raise ValueError(f"{kind} is patched already: patch.undo() first")
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"{kind}: want the model itself; patch first, then torch.compile")
    if hasattr(model, "peft_config") or kind.startswith("Peft"):
        raise ValueError(f"{kind}: want a model without PEFT adapters (not served yet)")
    if hasattr(model, "module") and not isinstance(model, PreTrainedModel):
        raise ValueError(f"{kind}: want the model inside; patch first, then wrap it (DDP, FSDP)")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"want a transformers PreTrainedModel, got {kind}")
    inner = next((n for n, m in model.named_modules() if ATTRIBUTE in vars(m)), None)
    if inner is not None:
        raise ValueError(f"{kind}: its part {inner!r} is patched already: undo that patch first")


def _check_devices(anatomy: Anatomy, compute: str) -> None:
    for tower in anatomy.towers:
        for block in tower.blocks:
            if block.norm.weight.device.type == "meta":
                raise ValueError(
                    f"{block.name}: want weights on a device, got offloaded ones (not served yet)"
                )
            if compute == "fp8":
                fp8.check_device(block.norm.weight.device)
