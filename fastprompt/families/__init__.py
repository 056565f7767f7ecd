"""Which models are served. First match wins; what no family serves is refused by name."""

from torch import nn

from fastprompt.families import decoders, encoders, llava
from fastprompt.families.base import TEXT, VISION, Anatomy, Block, Tower, find

__all__ = ["TEXT", "VISION", "Anatomy", "Block", "Tower", "anatomy", "supported"]

TOWERS = (
    encoders.VIT,
    encoders.DINOV2,
    encoders.CLIP_VISION,
    encoders.CLIP_TEXT,
    encoders.SIGLIP_VISION,
    encoders.SIGLIP_TEXT,
    decoders.LLAMA,
    decoders.MISTRAL,
    decoders.QWEN2,
    decoders.QWEN3,
)

# the attributes under which transformers keeps what is put on top of a tower
_HEADS = {"classifier": "head", "score": "head", "lm_head": "lm_head"}


def supported() -> list[str]:
    """Names of the served families, in the order in which they are tried."""
    return ["llava", *dict.fromkeys(family.name for family in TOWERS)]


def anatomy(model: nn.Module) -> Anatomy:
    """Take a model of transformers apart.

    Raises:
        ValueError: an architecture, or a tower inside one, that no family serves.
    """
    if llava.serves(model):
        return llava.anatomy(model, TOWERS)
    kind = getattr(getattr(model, "config", None), "model_type", "")
    served = supported()
    # by the model's own type: inside an unknown model a served tower must not be patched silently
    if kind not in {
        f"{name}{part}" for name in served for part in ("", "_vision_model", "_text_model")
    }:
        raise ValueError(
            f"{type(model).__name__}: want a transformers model of {', '.join(served)}; "
            f"got {f'model_type {kind!r}' if kind else 'no transformers config'}"
        )
    towers = [family.tower(name, module) for name, module, family in find(model, TOWERS)]
    if not towers:
        raise ValueError(
            f"{type(model).__name__}: want a model with one of {', '.join(served)} in it"
        )
    parts = {
        part: name
        for name, part in _HEADS.items()
        if isinstance(getattr(model, name, None), nn.Linear)
    }
    return Anatomy(towers[0].family, towers, parts=parts)
