"""The steps of a patch, each of which leaves its own way back on ``done._undo``."""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedConfig

from fastprompt import adapters, attention, hooks, linear4bit, tapping, token_mode, trainer
from fastprompt.blocks import fp8
from fastprompt.blocks.frozen import freeze
from fastprompt.called import Called
from fastprompt.families import TEXT, VISION, Tower
from fastprompt.families.base import is_of, join
from fastprompt.loss import FusedLoss
from fastprompt.methods.base import new_prompts
from fastprompt.placement import offloaded
from fastprompt.pools import Pool
from fastprompt.prompts import CHILD, BlockPrompt, row_like
from fastprompt.share import is_tied
from fastprompt.trained import trained_copy

if TYPE_CHECKING:
    from fastprompt.patching import Patch


def apply(done: Patch) -> None:
    """Do to ``done.model`` all that its method asks; ``done.undo()`` takes back what was done."""
    model, method = done.model, done.method
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    moving = [(m, name, m._parameters[name].requires_grad) for m, name, _ in offloaded(model)]
    done._undo.append(("requires_grad", (model, bool(adapters.configs(model)), flags, moving)))
    of_peft = adapters.trained(model)
    model.requires_grad_(False)
    for p in of_peft:
        p.requires_grad_(True)

    adopted = linear4bit.adopt(model)
    done._undo.append(("linear4bit", adopted))
    linear4bit.check(adopted)
    for part in method.trains():
        if part in done.anatomy.parts:
            _train(done, part, done.anatomy.parts[part])

    adapted = method.adapt(model, done.anatomy)
    if adapted is not None:
        done._undo.append(("adapted", adapted))
        done._names += adapted.names
        done.replaced |= adapted.replaced

    lengths = method.lengths()
    prompted = [t for t in done.anatomy.towers if lengths.get(t.kind) and t.blocks]
    prompts, beside = new_prompts(method, prompted)
    for tower in prompted:
        _add_prompts(done, tower, prompts)
        done.pool = done.pool or method.pool(tower)
    for tower, module in beside:
        _add_child(done, tower.model, tower.name, module)
        done.replaced[join(tower.name, CHILD)] = f"{type(module).__name__}, trains"
    host = type(done.anatomy.host).__name__
    for tower in done.anatomy.towers:
        trains = adapted is not None and tower.kind == TEXT  # LoRA, full fine-tuning
        if tower not in prompted and not trains:
            none = (
                f"0 {tower.kind} tokens asked for" if tower.blocks else "no block's output is read"
            )
            done.skipped[tower.name or tower.family] = none
        for block in tower.unread:
            if block.name not in done.replaced:
                done.skipped[block.name] = (
                    f"nothing reads its output: no prompt, and not run by {host}"
                )

    done.skipped |= done.anatomy.beside
    inside = [tower for tower in prompted if not tower.outside]
    _switch_configs(done, inside)
    for tower in prompted:
        if tower.outside:
            _call_attention(done, tower)
            if is_of(tower.model, "timm"):
                handle = tower.model.register_forward_pre_hook(hooks.NotReentrant())
                done._undo.append(("hooks", [handle]))
        handle = tower.model.register_forward_pre_hook(hooks.PromptsStillTrain(tower))
        done._undo.append(("hooks", [handle]))
    fused = None
    if isinstance(getattr(model, "lm_head", None), nn.Module):
        done.loss = FusedLoss.put_on(model, logits=done.logits)
        if isinstance(done.loss, FusedLoss):
            fused = done.loss
            done._undo.append(("loss", fused))
    if done.memory != "off":
        frozen = freeze(model, prompted, done.memory, fused, done.compute)
        done.memories, done.unfused = frozen.memories, frozen.unfused
        done._undo += [("block", block) for block in frozen.blocks]
        if done.compute == "fp8":
            fp8.check_some([block.parts for block in frozen.blocks], frozen.unfused.values())
    for tower in inside:
        _add_hooks(done, tower)
    if done.pool is not None:
        _add_pool(done, done.pool)
    _tap(done)
    done._undo.append(("trainer", trainer.attach(model)))


def _train(done: Patch, part: str, name: str) -> None:
    model = done.model
    parent, _, child = name.rpartition(".")
    if any(map(adapters.adapted, model.get_submodule(name).modules())):
        done.skipped[name] = f"{part}, adapted by PEFT, which trains it"
        return
    old, tied = model.get_submodule(name), part == "lm_head" and is_tied(model)
    new = trained_copy(old)
    done._undo.append(("module", (model.get_submodule(parent), child, old)))
    setattr(model.get_submodule(parent), child, new)
    done._names += [f"{name}.{n}" for n, _ in new.named_parameters()]
    low = [n for n, m in old.named_modules() if type(m) is not type(new.get_submodule(n))]
    how = " as a float32 copy" * bool(low)
    how += ", untied from the embeddings" * tied
    done.replaced[name] = f"{part}, trains{how}"


def _add_prompts(done: Patch, tower: Tower, prompts: dict[str, BlockPrompt]) -> None:
    blocks, shown = done.method.blocks(tower), _shown(done, tower)
    for layer, block in enumerate(blocks):
        if block.name in prompts:
            _add_child(done, block.layer, block.name, prompts[block.name])
            done.replaced[block.name] = done.method.describe(tower.kind, layer)
    if shown != "drop":
        rows = f"{done.method.lengths()[VISION]} prompt rows"
        how = {"raw": "for the projector alone", "context": "as tokens, seen by the projector"}
        done.replaced[blocks[-1].name] = f"{rows} {how[shown]}"


def _shown(done: Patch, tower: Tower) -> str:
    """What the projector sees of the tower's prompts."""
    return done.method.shown() if tower.kind == VISION else "drop"


def _add_child(done: Patch, parent: nn.Module, name: str, child: nn.Module) -> None:
    done._undo.append(("prompt", parent))
    parent.add_module(CHILD, child.train(parent.training))
    done._names += [join(name, CHILD, n) for n, _ in child.named_parameters()]


def _add_pool(done: Patch, pool: Pool) -> None:
    tower = pool.tower
    keys = pool.method.shared_keys(row_like(tower.blocks[0].like))
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
            as_tokens = done.method.as_tokens(tower) or (
                _shown(done, tower) == "context" and block is tower.blocks[-1]
            )
            prompt = None if as_tokens else getattr(block.layer, CHILD, None)
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


def _call_attention(done: Patch, tower: Tower) -> None:
    """Put prompts into the attentions of a tower outside transformers."""
    for block in tower.blocks:
        prompt, module = getattr(block.layer, CHILD, None), block.attention
        if prompt is None:
            continue
        if not getattr(module, "fused_attn", True):  # timm's: whether it calls SDPA at all
            done._undo.append(("attribute", (module, "fused_attn", module.fused_attn)))
            module.fused_attn = True
        side = attention.SideKeys(block, prompt, "sdpa", done.backend)
        done._undo.append(("called", Called.put_on(module, side)))


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
    if done.method.as_tokens(tower):
        handles += token_mode.put_on(tower)
    if tower.rotary is not None:
        start = done.anatomy.first_position
        counts = tower.model if start is None else done.anatomy.host
        count = hooks.CountFromText(start or 0)
        handles.append(counts.register_forward_pre_hook(count, with_kwargs=True))
    offset = done.method.position_of_first(tower)
    if offset:
        begin = hooks.BeginAt(tower, offset)
        handles.append(tower.model.register_forward_pre_hook(begin, with_kwargs=True))
    done._undo.append(("hooks", handles))
    if tower.bias is not None:
        rows = done.method.lengths()[tower.kind]
        done._undo.append(("bias", hooks.BiasOfPrompts.put_on(tower.bias, rows)))


def _tap(done: Patch) -> None:
    """What the vision-language model reads of its vision tower."""
    host, vision, shown = done.anatomy.host, done.anatomy.tower(VISION), done.method.shown()
    if host is None or not (vision.unread or shown != "drop"):
        return
    layer = host.config.vision_feature_layer
    done._undo.append(("method", tapping.TapImages(host, layer, shown).put_on()))
    for block in vision.unread:
        done._undo.append(("forward", tapping.RunIfRead.put_on(block.layer)))
    if shown != "drop":
        rows = done.method.lengths()[VISION]
        done._undo.append(("method", tapping.CheckRoom(host, rows, shown).put_on()))
        front = int(host.config.vision_feature_select_strategy == "default")
        done._undo.append(("hooks", tapping.show(vision, shown, front)))
