"""`patch(model)`: give a frozen transformers model trainable prompts, in place, reversibly."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastprompt import attention, families, hooks, linear4bit, reporting, trainer
from fastprompt.blocks.frozen import Frozen, freeze
from fastprompt.blocks.memory import CHOICES as MEMORIES
from fastprompt.blocks.memory import Memory
from fastprompt.families import Anatomy, Tower
from fastprompt.families.base import join
from fastprompt.loss import FusedLoss
from fastprompt.methods import Method, default_for
from fastprompt.ops.options import BACKENDS
from fastprompt.pools import Pool
from fastprompt.prompts import Prompt
from fastprompt.trained import trained_copy
from fastprompt.undoing import CHILD, STEPS

ATTRIBUTE = "_fastprompt_patch"


@dataclass(eq=False)
class Patch:
    """What `patch` did to one model, and the way back.

    Attributes:
        model, method, anatomy: what was patched, with what, and how it was taken apart.
        replaced: module name -> what stands there now.
        skipped: module name -> why it was left alone.
        backend: which implementation of `ops.prompt_attention` runs.
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
            for block in tower.blocks
            if hasattr(block.layer, CHILD)
        }

    def report(self) -> str:
        """What was replaced, what was skipped and why, and what trains, as text."""
        return reporting.report(self)

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
        logits: whether a language model, given labels in training, returns its logits beside its
            loss. By default they are None there and never made: at 7B they take more memory than
            half of the blocks. In evaluation, and without labels, they are there always.

    Returns:
        The `Patch`, also kept on the model: ``.report()``, ``.trainable``, ``.undo()``.

    Raises:
        ValueError: a model or an option that is not served; the model is then as it was.
    """
    check_model(model)
    if backend not in BACKENDS:
        raise ValueError(f"backend: want one of {', '.join(BACKENDS)}; got {backend!r}")
    if memory not in MEMORIES:
        raise ValueError(f"memory: want one of {', '.join(MEMORIES)}; got {memory!r}")
    anatomy = families.anatomy(model)
    if method is not None and not isinstance(method, Method):
        raise ValueError(f"method: want one of fastprompt.methods, got {method!r}")
    method = default_for(anatomy) if method is None else method
    method.check(anatomy)
    _check_devices(anatomy)

    done = Patch(model, method, anatomy, backend, memory=memory, logits=logits)
    try:
        _apply(done)
    except BaseException:
        done.undo()  # never half a patch
        raise
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


def check_model(model: nn.Module) -> None:
    """Raise a ValueError if it is patched, wrapped or adapted, or no transformers model at all."""
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


def _check_devices(anatomy: Anatomy) -> None:
    for tower in anatomy.towers:
        for block in tower.blocks:
            if block.like.weight.device.type == "meta":
                raise ValueError(
                    f"{block.name}: want weights on a device, got offloaded ones (not served yet)"
                )


# ---- the steps, each leaving its own way back ----


def _apply(done: Patch) -> None:
    model, method = done.model, done.method
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    done._undo.append(("requires_grad", flags))
    model.requires_grad_(False)

    adopted = linear4bit.adopt(model)
    done._undo.append(("linear4bit", adopted))
    for part in method.trains():
        if part in done.anatomy.parts:
            _train(done, part, done.anatomy.parts[part])

    lengths = method.lengths()
    prompted = [t for t in done.anatomy.towers if lengths.get(t.kind) and t.blocks]
    for tower in prompted:
        for layer in range(len(tower.blocks)):
            _add_prompt(done, tower, layer)
        done.pool = done.pool or method.pool(tower)
    for tower in done.anatomy.towers:
        if tower not in prompted:
            none = (
                f"0 {tower.kind} tokens asked for" if tower.blocks else "no block's output is read"
            )
            done.skipped[tower.name or tower.family] = none
        for block in tower.unread:
            done.skipped[block.name] = "nothing reads its output: no prompt, and not run by LLaVA"

    _switch_configs(done, prompted)
    fused = None
    if isinstance(getattr(model, "lm_head", None), nn.Module):
        done.loss = FusedLoss.put_on(model, logits=done.logits)
        if isinstance(done.loss, FusedLoss):
            fused = done.loss
            done._undo.append(("loss", fused))
    if done.memory != "off":
        frozen = freeze(model, prompted, done.memory, fused)
        done.memories, done.unfused = frozen.memories, frozen.unfused
        done._undo += [("block", block) for block in frozen.blocks]
    for tower in prompted:
        _add_hooks(done, tower)
    if done.pool is not None:
        _add_pool(done, done.pool)
    _skip_unread(done)
    done._undo.append(("trainer", trainer.attach(model)))
    model.__dict__[ATTRIBUTE] = done


def _train(done: Patch, part: str, name: str) -> None:
    model = done.model
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    new = trained_copy(old)
    done._undo.append(("module", (model.get_submodule(parent), child, old)))
    setattr(model.get_submodule(parent), child, new)
    done._names += [f"{name}.{n}" for n, _ in new.named_parameters()]
    low = [n for n, m in old.named_modules() if type(m) is not type(new.get_submodule(n))]
    done.replaced[name] = f"{part}, trains" + (" as a float32 copy" if low else "")


def _add_prompt(done: Patch, tower: Tower, layer: int) -> None:
    block = tower.blocks[layer]
    prompt = done.method.prompt(tower.kind, layer, _row(block.like.weight))
    if prompt is None:
        return
    _add_child(done, block.layer, block.name, prompt)
    done.replaced[block.name] = done.method.describe(tower.kind, layer)


def _add_child(done: Patch, parent: nn.Module, name: str, child: nn.Module) -> None:
    done._undo.append(("prompt", parent))
    parent.add_module(CHILD, child.train(parent.training))
    done._names += [join(name, CHILD, n) for n, _ in child.named_parameters()]


def _row(weight: Tensor) -> Tensor:
    """[D]: the dtype that prompts have beside a norm's weight, its width and its device."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


def _add_pool(done: Patch, pool: Pool) -> None:
    tower = pool.tower
    keys = pool.method.shared_keys(_row(tower.blocks[0].like.weight))
    if keys is not None:
        _add_child(done, tower.model, tower.name, keys)
        done.replaced[join(tower.name, CHILD)] = f"{len(keys.keys)} pool keys, trains"
    done._undo.append(("hooks", pool.attach(done.model)))


def _switch_configs(done: Patch, towers: list[Tower]) -> None:
    """Give the model configs of its own (two models may share one) and switch the towers'."""
    model = done.model
    memo: dict[int, Any] = {}  # a config that several modules share stays shared among them
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                done._undo.append(("attribute", (module, key, value)))
                setattr(module, key, copy.deepcopy(value, memo))
    if "lm_head" in done.method.trains():
        # its copy must not be tied to the frozen embeddings again
        done._undo.append(
            ("attribute", (model, "all_tied_weights_keys", model.all_tied_weights_keys))
        )
        model.all_tied_weights_keys, model.config.tie_word_embeddings = {}, False
    for tower in towers:
        _keep_apart(tower)
        previous = tower.model.config._attn_implementation or "eager"
        by_need = previous == "eager" and not tower.model._supports_sdpa
        for block in [*tower.blocks, *tower.unread]:
            prompt = getattr(block.layer, CHILD, None)
            make = attention.SideKeys if done.pool is None else done.pool.side_keys
            sides = {block.attention: make(block, prompt, previous, done.backend)}
            sides |= {each: attention.SideKeys(block, None, previous) for each in block.without}
            for module, side in sides.items():
                side.by_need = by_need
                vars(module)[attention.ATTRIBUTE] = side
                done._undo.append(("side keys", module))
                # not the property: that would also switch the config's other parts
                module.config._attn_implementation_internal = attention.name_for(tower)
        tower.model.config._attn_implementation_internal = attention.name_for(tower)


def _keep_apart(tower: Tower) -> None:
    """Give modules beside a tower's blocks (a pooling head) a config that stays as it was.

    They make masks for an attention that is not ours. Of the tower's own modules only the blocks'
    attentions and what these are in are switched.
    """
    blocks = (*tower.blocks, *tower.unread)
    attentions = {id(each) for block in blocks for each in (block.attention, *block.without)}
    modules = dict(tower.model.named_modules())
    inside = [name for name, module in modules.items() if id(module) in attentions]
    switched = {""}.union(*(accumulate(name.split("."), join) for name in inside))
    own, apart = tower.model.config, copy.deepcopy(tower.model.config)
    for name, module in modules.items():
        if name not in switched and getattr(module, "config", None) is own:
            module.config = apart


def _add_hooks(done: Patch, tower: Tower) -> None:
    first, switched_on = (
        hooks.GradIntoFirstBlock(tower),
        hooks.StillSwitchedOn(tower, attention.name_for(tower)),
    )
    handles = [
        tower.embeddings.register_forward_hook(first),
        tower.model.register_forward_pre_hook(first.given, with_kwargs=True),
        tower.model.register_forward_pre_hook(switched_on),
    ]
    if tower.rotary is not None:
        start = done.anatomy.first_position
        counts = tower.model if start is None else done.anatomy.host
        count = hooks.CountFromText(start or 0)
        handles.append(counts.register_forward_pre_hook(count, with_kwargs=True))
    done._undo.append(("hooks", handles))
    if tower.bias is not None:
        rows = done.method.lengths()[tower.kind]
        done._undo.append(("bias", hooks.BiasOfPrompts.put_on(tower.bias, rows)))


def _skip_unread(done: Patch) -> None:
    host = done.anatomy.host
    unread = [block for tower in done.anatomy.towers for block in tower.unread]
    if host is None or not unread:
        return
    tap = hooks.Tap(host.config.vision_feature_layer)
    for block in unread:
        done._undo.append(("forward", hooks.RunIfRead.put_on(block.layer, tap)))
    leave = dict(with_kwargs=True, always_call=True)
    handles = [
        host.register_forward_pre_hook(hooks.EnterHost(tap), with_kwargs=True),
        host.register_forward_hook(hooks.LeaveHost(tap), **leave),
    ]
    done._undo.append(("hooks", handles))
