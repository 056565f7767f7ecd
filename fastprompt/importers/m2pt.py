"""Checkpoints of M²PT's released code (github.com/William-wAng618/M2PT), in and out.

Its trainer saves the whole model, usually in shards. A prompt [1, P, D] of layer i is named

* ``model.prompts.{i}`` in the language model, for each of its layers,
* ``model.vision_tower.vision_tower.vision_model.encoder.prompts.{i}`` in the vision encoder, for
  each of its layers: the last one's is what "raw" shows the projector,

beside ``model.mm_projector.weight`` and ``.bias`` and ``lm_head.weight``, which train as well.
Everything else there is the frozen backbone and is not read.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprompt.adapters import unwrapped
from fastprompt.families import TEXT, VISION, Anatomy, anatomy
from fastprompt.files import replace
from fastprompt.importers.projector import check_projector, fill_projector, read_projector
from fastprompt.importers.shards import Shards
from fastprompt.methods import M2PT
from fastprompt.patching import ATTRIBUTE, Patch, patch, patch_of
from fastprompt.prompts import CHILD

PREFIX = {
    VISION: "model.vision_tower.vision_tower.vision_model.encoder.prompts.",
    TEXT: "model.prompts.",
}
PROJECTOR, HEAD = "model.mm_projector.", "lm_head.weight"
# a prefix of DeepSpeed's or of a part saved alone may come before
_PROMPT = {
    VISION: re.compile(r"(?:.*\.)?vision_model\.encoder\.prompts\.(\d+)"),
    TEXT: re.compile(r"(?:.*\.)?model\.prompts\.(\d+)"),
}
_HEAD = re.compile(r"(?:.*\.)?lm_head\.weight")


def load_m2pt(
    model: nn.Module | Patch,
    path: str | Path,
    *,
    visual_prompts: str = "raw",
    lm_head: bool = True,
) -> Patch:
    """Put what M²PT's released code trained into a LLaVA, patching it if it is not yet.

    Args:
        model: the same backbone (vicuna-7b-v1.3, CLIP-L/14 and one linear projector, as
            `fastprompt.assemble` builds it), dense or 4-bit.
        path: a checkpoint folder of the released code, or a file. Prompts, projector and lm_head
            alone are read, each from its own shard.
        visual_prompts: of `M2PT`; the released code computes "raw".
        lm_head: whether to take its lm_head, which the released script trains. One with fewer
            rows than the model's (it knows no image token) gives the first ones.

    Returns:
        The model's `Patch`, in which all that was read trains. `Patch.prepare` its processor.

    Raises:
        ValueError: a file that is missing or damaged, a layer without a prompt, another shape, or
            a model that is patched otherwise. The model is then as it was.
    """
    model = model.model if isinstance(model, Patch) else unwrapped(model)
    from_here = ATTRIBUTE not in vars(model)
    parts = anatomy(model) if from_here else patch_of(model).anatomy
    if "projector" not in parts.parts:
        raise ValueError(f"load_m2pt: want a vision-language model, got {parts.family}")
    shards = Shards.at(path)
    prompts = {kind: _prompts(shards, parts, kind, visual_prompts) for kind in PREFIX}
    if not prompts[VISION] and not prompts[TEXT]:
        raise ValueError(f"{path}: want prompts named {PREFIX[TEXT]}0 and on, found none")
    projector, head = read_projector(shards), None
    if lm_head and "lm_head" in parts.parts:
        head = _read_head(shards, model)
    lengths = {kind: found[0].shape[1] if found else 0 for kind, found in prompts.items()}
    method = M2PT(
        lengths[VISION],
        lengths[TEXT],
        train_projector=bool(projector),
        train_lm_head=head is not None,
        visual_prompts=visual_prompts if lengths[VISION] else "drop",
    )
    if not from_here and patch_of(model).method != method:
        raise ValueError(
            f"{path}: holds {method}; the model is patched with {patch_of(model).method}"
        )
    done = patch(model, method) if from_here else patch_of(model)
    own = model.get_submodule(parts.parts["projector"])
    try:
        if projector:
            check_projector(own, projector, path)
    except ValueError:
        if from_here:
            done.undo()
        raise
    with torch.no_grad():
        for kind, found in prompts.items():
            for block, tokens in zip(method.blocks(parts.tower(kind)), found, strict=False):
                getattr(block.layer, CHILD).tokens.copy_(tokens[0])
        if projector:
            fill_projector(own, projector)
        if head is not None:
            model.lm_head.weight[: len(head)].copy_(head)
    return done


def save_m2pt(model: nn.Module | Patch, path: str | Path) -> Path:
    """Write what trains under the names of M²PT's released code.

    There, ``model.load_state_dict(torch.load(path), strict=False)`` takes it, after the model was
    built with its ``PT_len`` and ``VIT_PT_len`` (the lengths of text and vision). Rows of lm_head
    that came with the image token, of which that code knows nothing, are left out.

    Args:
        model: patched with `M2PT`, ``visual_prompts="raw"``, which is what that code computes, and
            one linear projector.
        path: a file, such as ``pytorch_model.bin``. It appears whole or not at all.

    Returns:
        ``path``.

    Raises:
        ValueError: another method, or a part that the released code has no name for.
    """
    done = model if isinstance(model, Patch) else patch_of(model)
    method = done.method
    if not isinstance(method, M2PT) or (method.vision_tokens and method.visual_prompts != "raw"):
        raise ValueError(f"save_m2pt: want M2PT(visual_prompts='raw'), got {method}")
    if method.layers != "all":
        raise ValueError(
            "save_m2pt: want a prompt in every layer, as the released code has; got "
            f"layers={method.layers!r}"
        )
    lengths = (method.vision_tokens, method.text_tokens)
    if not all(isinstance(length, int) for length in lengths):
        raise ValueError(
            "save_m2pt: want prompts of one length in all layers, as the released code has; got "
            f"{method}"
        )
    tensors = {}
    for kind, prefix in PREFIX.items():
        for i, block in enumerate(method.blocks(done.anatomy.tower(kind))):
            if hasattr(block.layer, CHILD):
                tensors[f"{prefix}{i}"] = getattr(block.layer, CHILD).tokens[None]
    projector = done.model.get_submodule(done.anatomy.parts["projector"])
    if not isinstance(projector, nn.Linear):
        raise ValueError(f"save_m2pt: want one linear projector, got {type(projector).__name__}")
    tensors |= {f"{PROJECTOR}{name}": p for name, p in projector.named_parameters()}
    if method.train_lm_head:
        tensors[HEAD] = _without_image_token(done.model)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().clone() for name, t in tensors.items()}
    replace(path, lambda part: torch.save(tensors, part))
    return path


def _prompts(shards: Shards, parts: Anatomy, kind: str, shown: str) -> list[Tensor]:
    """[1, P, D] for each block that wants one; none where the checkpoint has none of the tower."""
    names = {int(m[1]): name for name in shards.files if (m := _PROMPT[kind].fullmatch(name))}
    if not names:
        return []
    tower = parts.tower(kind)
    blocks = M2PT(visual_prompts=shown).blocks(tower)
    depth = len(tower.blocks) + len(tower.unread)
    if max(names) >= depth:
        raise ValueError(
            f"{shards.path}: holds {max(names) + 1} layers of {kind} prompts; the model has {depth}"
        )
    missing = [f"{PREFIX[kind]}{i}" for i in range(len(blocks)) if i not in names]
    if missing:
        raise ValueError(
            f"{shards.path}: want a prompt for every layer; missing {', '.join(missing)}"
        )
    found = shards.read([names[i] for i in range(len(blocks))])
    first, D = next(iter(found.values())), blocks[0].width
    P = first.shape[1] if first.ndim == 3 else "P"  # DeepSpeed can leave an empty stand-in
    for name, tensor in found.items():
        if tensor.shape != (1, P, D):
            raise ValueError(f"{shards.path}: {name}: want [1, {P}, {D}], got {list(tensor.shape)}")
    return list(found.values())


def _read_head(shards: Shards, model: nn.Module) -> Tensor | None:
    name = next((name for name in shards.files if _HEAD.fullmatch(name)), None)
    if name is None:
        return None
    weight, own = shards.read([name])[name], model.lm_head
    if weight.shape[0] > own.out_features or weight.shape[1:] != (own.in_features,):
        raise ValueError(
            f"{shards.path}: {name}: want at most {[own.out_features, own.in_features]}, "
            f"got {list(weight.shape)}"
        )
    return weight


def _without_image_token(model: nn.Module) -> Tensor:
    weight, token = model.lm_head.weight, model.config.image_token_index
    # in the last rows, which are there for it: up to 64, as LLaVA's and `assemble`'s are padded
    return weight[:token] if 0 < len(weight) - token <= 64 else weight
