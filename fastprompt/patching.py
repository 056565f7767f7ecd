"""`patch(model)`: give a frozen transformer trainable prompts, in place, reversibly."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from fastprompt import (
    adapters,
    families,
    placement,
    reporting,
    shards,
    tapping,
    undoing,
    without,
)
from fastprompt.blocks import fp8
from fastprompt.blocks.frozen import Frozen
from fastprompt.blocks.memory import CHOICES as MEMORIES
from fastprompt.blocks.memory import Memory
from fastprompt.families import VISION, Anatomy
from fastprompt.loss import FusedLoss
from fastprompt.methods import Method, check, default_for
from fastprompt.ops.options import BACKENDS
from fastprompt.pools import Pool
from fastprompt.prompts import CHILD, Prompt
from fastprompt.sets.of_patch import WithSets
from fastprompt.share import is_4bit
from fastprompt.steps import apply

ATTRIBUTE = "_fastprompt_patch"


@dataclass(eq=False)
class Patch(WithSets):
    """What `patch` did to one model, and the way back.

    Attributes:
        model, method, anatomy: what was patched, with what, and how it was taken apart.
        replaced: module name -> what stands there now.
        skipped: module name -> why it was left alone.
        backend: which implementation of `ops.prompt_attention` runs.
        compute: what the blocks' products are computed in.
        given: names of frozen parameters that are not the base model's: a projector loaded into it.
            `fastprompt.save` writes them beside what trains.
        pool: what chooses prompts for each sample, under L2P, DualPrompt and CODA-Prompt.
        memory, memories: what to keep of each block for backward: as asked, and by tower.
        baked: whether prompts are keys and values for good: see `fastprompt.bake`.
        unfused: block name -> why it never runs as one node.
        logits: whether a training forward with labels is to return logits beside its loss.
        loss: what computes a language model's loss without them, or why nothing does.
    """

    model: nn.Module
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
    given: tuple[str, ...] = ()
    baked: bool = False
    _names: list[str] = field(default_factory=list)  # of the parameters that train
    _undo: list[tuple[str, Any]] = field(default_factory=list)  # newest last

    @property
    def blocks(self) -> dict[str, Frozen]:
        """Block name -> what stands there, of the blocks that may run as one autograd node."""
        read = (block for tower in self.anatomy.towers for block in tower.blocks)
        found = {block.name: Frozen.of(block.layer) for block in read}
        return {name: block for name, block in found.items() if block is not None}

    @property
    def undone(self) -> bool:
        """Whether `undo` has given the old model back."""
        return not self._undo

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

    def requires_grad_(self) -> Patch:
        """Let all that trains want a gradient again, after PEFT's ``get_peft_model``, which freezes
        everything but its own. Returns the patch."""
        for p in self.trainable.values():
            p.requires_grad_(True)
        return self

    def report(self) -> reporting.Report:
        """What was replaced, what was skipped and why, and what trains.

        A string; ``rich.print(patch.report())`` makes a table of it.
        """
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
        """Forget cached prompt keys and values, of all sets: after a write through ``.data``."""
        sets = [] if self._sets is None else self._sets.named.values()
        resting = (prompt for each in sets for prompt in each.prompts.values())
        for prompt in (*self.prompts.values(), *resting):
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

    def disabled(self) -> AbstractContextManager[None]:
        """``with patch.disabled():`` forwards inside are the base model's, without prompts and
        with its own projector and head. Backward wants to be inside as well."""
        return without.disabled(self)

    def check(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """How far the logits move when a block's prompt is taken out, relative to their norm.

        Runs one forward more than there are prompts, without gradients, in evaluation mode. Warns
        if no block's prompt matters: were they loaded?

        Args:
            batch: keyword arguments of the model's forward.

        Returns:
            Block name -> the norm of the difference over the norm of the logits.
        """
        return without.check(self, batch)

    def param_groups(
        self,
        *,
        prompt_lr: float | None = None,
        projector_lr: float | None = None,
        head_lr: float | None = None,
    ) -> list[dict[str, Any]]:
        """What trains, as groups for an optimizer: of prompts, projector, head, and the rest.

        Args:
            prompt_lr, projector_lr, head_lr: a group's learning rate; None: the optimizer's own.

        Returns:
            One group of "name" and "params" for each of these that there is.
        """
        kinds = dict(projector="projector", head="head", lm_head="head")
        parts = {f"{name}.": kinds[part] for part, name in self.anatomy.parts.items()}
        groups: dict[str, list[nn.Parameter]] = {"prompts": [], "projector": [], "head": []}
        for name, p in self.trainable.items():
            kind = next((k for part, k in parts.items() if name.startswith(part)), "rest")
            kind = "prompts" if CHILD in name.split(".") else kind
            groups.setdefault(kind, []).append(p)
        rates = dict(prompts=prompt_lr, projector=projector_lr, head=head_lr)
        for name, rate in rates.items():
            if rate is not None and not groups[name]:
                raise ValueError(f"param_groups: want no rate for the {name}: none trains")
        return [
            dict(name=name, params=params)
            | ({} if rates.get(name) is None else {"lr": rates[name]})
            for name, params in groups.items()
            if params
        ]

    def undo(self) -> None:
        """Give the exact old model back: modules, values, requires_grad flags and config.

        What was trained is lost; `fastprompt.save` it before. Embeddings that were resized since
        stay as they are, and so does the config's ``vocab_size``.

        Raises:
            ValueError: a head that trained was resized since, so that the old one no longer fits
                the embeddings, or FSDP2 split weights since; nothing has been changed then.
        """
        undoing.check_whole(self.model)
        resized = undoing.resized(self._undo)
        while self._undo:
            step, what = self._undo.pop()
            undoing.STEPS[step](what)
        for config, size in resized:
            config.vocab_size = size
        for kept in (self._names, self.memories, self.unfused):
            kept.clear()
        if self._sets is not None:
            self._sets.release()
        self.pool = self._sets = None
        self.loss = "undone"
        self.model.__dict__.pop(ATTRIBUTE, None)


def patch(
    model: nn.Module,
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
        model: a model of transformers, timm or open_clip, dense or 4-bit (bitsandbytes;
            `fastprompt.quantize_`), not yet wrapped by DDP or torch.compile: patch first, wrap
            after. It may have PEFT's adapters (LoRA), or be a PeftModel: what PEFT trains goes on
            training, and prompts pass through the adapters of their block. Adapters put on after
            the patch freeze prompts as all else: `Patch.requires_grad_`.
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
            from exact as bfloat16's. Only where gradients are computed: a forward without them
            (evaluation, generation) runs the layers' own products, so that a loss in evaluation is
            that of another function than was trained. On the CPU it is emulated, slowly. The report
            says which products do not, and why.
        logits: whether a language model, given labels in training, returns its logits beside its
            loss. By default they are None there and never made: at 7B they take more memory than
            half of the blocks. In evaluation, and without labels, they are there always.

    Returns:
        The `Patch`, also kept on the model: ``.report()``, ``.trainable``, ``.undo()``.

    Raises:
        ValueError: a model or an option that is not served; the model is then as it was.
    """
    check_model(model)
    model = adapters.unwrapped(model)
    if backend not in BACKENDS:
        raise ValueError(f"backend: want one of {', '.join(BACKENDS)}; got {backend!r}")
    if memory not in MEMORIES:
        raise ValueError(f"memory: want one of {', '.join(MEMORIES)}; got {memory!r}")
    if not isinstance(logits, bool):
        raise ValueError(f"logits: want True or False, got {logits!r}")
    if compute not in fp8.CHOICES:
        raise ValueError(f"compute: want one of {', '.join(fp8.CHOICES)}; got {compute!r}")
    if compute == "fp8" and memory == "off":
        raise ValueError("compute='fp8': want frozen blocks, got memory='off', which has none")
    anatomy = families.anatomy(model)
    if method is not None and not isinstance(method, Method):
        raise ValueError(f"method: want one of fastprompt.methods, got {method!r}")
    method = default_for(anatomy) if method is None else method
    check(method, anatomy)
    if adapters.configs(model) and type(method).adapt is not Method.adapt:
        raise ValueError(f"{method}: want a model without adapters, got {adapters.kinds(model)}")
    _check_devices(model, anatomy, method, compute)

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
    found = vars(adapters.unwrapped(model)).get(ATTRIBUTE)
    if found is None:
        raise ValueError(f"{type(model).__name__}: want a patched model, got one without a patch")
    return found


def check_model(model: nn.Module) -> None:
    """Raise a ValueError if it is patched, wrapped or adapted, or of no library that is served."""
    kind, why = type(model).__name__, adapters.refusal(model)
    if why is not None:
        raise ValueError(f"{kind}: {why}")
    model = adapters.unwrapped(model)
    if ATTRIBUTE in getattr(model, "__dict__", {}):
        raise ValueError(f"{kind} is patched already: patch.undo() first")
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"{kind}: want the model itself; patch first, then torch.compile")
    if hasattr(model, "module") and not isinstance(model, PreTrainedModel):
        raise ValueError(f"{kind}: want the model inside; patch first, then wrap it (DDP, FSDP)")
    if not isinstance(model, PreTrainedModel) and not families.outside(model):
        raise ValueError(
            f"want a transformers PreTrainedModel, a timm or open_clip model; got {kind}"
        )
    if shards.splits(model):
        raise ValueError(f"{kind}: want it before fully_shard (FSDP2): patch first, then split it")
    inner = next((n for n, m in model.named_modules() if ATTRIBUTE in vars(m)), None)
    if inner is not None:
        raise ValueError(f"{kind}: its part {inner!r} is patched already: undo that patch first")


def _check_devices(model: nn.Module, anatomy: Anatomy, method: Method, compute: str) -> None:
    why = placement.why_no_children(model, (b.layer for t in anatomy.towers for b in t.blocks))
    if why is not None:
        raise ValueError(why)
    trained = [anatomy.parts[part] for part in method.trains() if part in anatomy.parts]
    trained += [""] * (type(method).adapt is not Method.adapt)
    for name in trained:
        if placement.offloaded(model.get_submodule(name)):
            raise ValueError(f"{name or method}: want weights that stay, to train; got offloaded")
    for away in placement.offloaded(model):
        if is_4bit(away.module):
            raise ValueError(
                "want 4-bit weights on a device, got offloaded ones, of which accelerate brings "
                "back a part"
            )
    devices = {placement.device_of(block.like) for t in anatomy.towers for block in t.blocks}
    if len(devices) > 1 and type(method).pool is not Method.pool:
        raise ValueError(
            f"{method}: want all blocks on one device, where the pool is; got "
            f"{' and '.join(sorted(map(str, devices)))}"
        )
    for tower in anatomy.towers:
        for block in tower.blocks:
            device = placement.device_of(block.like)
            if device.type == "meta":
                raise ValueError(
                    f"{block.name}: want weights with values, got a model on the meta device"
                )
            if compute == "fp8":
                fp8.check_device(device)
