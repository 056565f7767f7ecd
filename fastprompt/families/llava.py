"""LLaVA: a served vision tower, a projector, a served language model.

The projector reads one hidden state of the vision tower (or several). Blocks past the deepest one
that is read get no prompt, and are not run inside LLaVA's own forward.
"""

from torch import nn

from fastprompt.families.base import Anatomy, TowerFamily, is_transformers, join


def serves(model: nn.Module) -> bool:
    return is_transformers(model, ("LlavaForConditionalGeneration", "LlavaModel"))


def anatomy(model: nn.Module, families: tuple[TowerFamily, ...]) -> Anatomy:
    inner = "model" if is_transformers(model, ("LlavaForConditionalGeneration",)) else ""
    host = model.get_submodule(inner)
    towers = []
    for part in ("vision_tower", "language_model"):
        module, name = getattr(host, part), join(inner, part)
        family = next((f for f in families if f.serves(module)), None)
        if family is None:
            raise ValueError(
                f"{name}: want one of {', '.join(sorted({f.name for f in families}))}; "
                f"got {type(module).__name__}"
            )
        towers.append(family.tower(name, module))
    vision = towers[0]
    read = _blocks_read(model.config.vision_feature_layer, len(vision.blocks))
    vision.blocks, vision.unread = vision.blocks[:read], vision.blocks[read:]
    parts = {"projector": join(inner, "multi_modal_projector")}
    if inner:
        parts["lm_head"] = "lm_head"
    return Anatomy("llava", towers, host, parts)


def _blocks_read(feature_layer: int | list[int], depth: int) -> int:
    """How many blocks come before the deepest hidden state read; state 0 is the embeddings'."""
    layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"vision_feature_layer: want {-depth - 1} .. {depth} ({depth} blocks), got {layer}"
            )
    return max(layer if layer >= 0 else depth + 1 + layer for layer in layers)
