"""Which models are served. First match wins; what no family serves is refused by name."""

from torch import nn
from transformers import PreTrainedConfig

from fastprompt.families.absolute import ABSOLUTE
from fastprompt.families.base import TEXT, VISION, Anatomy, Block, Tower, find
from fastprompt.families.decoders import DECODERS
from fastprompt.families.encoders import ENCODERS
from fastprompt.families.hosts import HOSTS
from fastprompt.families.open_clip import OPEN_CLIP
from fastprompt.families.outside import library_of, take_apart
from fastprompt.families.refused import REASONS
from fastprompt.families.timm import TIMM

__all__ = ["HOSTS", "LIBRARIES", "REASONS", "TEXT", "TOWERS", "VISION"]
__all__ += ["Anatomy", "Block", "Tower", "anatomy", "outside", "refusal", "supported"]

TOWERS = (*ENCODERS, *DECODERS, *ABSOLUTE)
LIBRARIES = (TIMM, OPEN_CLIP)

# configs of models that hold two towers side by side, without a host
_PAIRS = ("clip", "siglip", "siglip2")
# the attributes under which transformers keeps what is put on top of a tower
_HEADS = {"classifier": "head", "score": "head", "lm_head": "lm_head"}


def supported() -> list[str]:
    """Names of the served families: vision-language models, vision and language towers."""
    others = (family.name for library in LIBRARIES for family in library.families)
    return [*_of_transformers(), *dict.fromkeys(others)]


def _of_transformers() -> list[str]:
    return [*(host.name for host in HOSTS), *dict.fromkeys(family.name for family in TOWERS)]


def outside(model: nn.Module) -> bool:
    """Whether it is a model of one of ``LIBRARIES``, which transformers does not know."""
    return library_of(model, LIBRARIES) is not None


def refusal(config: PreTrainedConfig | None) -> str | None:
    """Why no model with this config can be patched; None: one can."""
    if getattr(config, "model_type", "") not in {kind for host in HOSTS for kind in host.types}:
        return _refusal(config, _of_transformers())
    for part in ("vision_config", "text_config"):
        why = _refusal(getattr(config, part), list(dict.fromkeys(f.name for f in TOWERS)))
        if why is not None:
            return f"{part}: {why}"
    return None


def _refusal(config: PreTrainedConfig | None, wanted: list[str]) -> str | None:
    kind = getattr(config, "model_type", "")
    if kind in REASONS:
        return f"{kind} is not served: {REASONS[kind]}"
    serving = [family for family in TOWERS if kind in family.types]
    if serving:
        why = serving[0].refuses(config)
        return why and f"{kind} {why}"
    if kind in _PAIRS:
        return None
    got = f"model_type {kind!r}" if kind else "no transformers config"
    return f"want a transformers model of {', '.join(wanted)}; got {got}"


def anatomy(model: nn.Module) -> Anatomy:
    """Take a model of transformers, timm or open_clip apart.

    Raises:
        ValueError: an architecture, or a tower inside one, that no family serves.
    """
    library = library_of(model, LIBRARIES)
    if library is not None:
        return take_apart(model, library, LIBRARIES)
    # by the model's own type: inside an unknown model a served tower must not be patched silently
    why = refusal(getattr(model, "config", None))
    if why is not None:
        raise ValueError(f"{type(model).__name__}: {why}")
    host = next((host for host in HOSTS if model.config.model_type in host.types), None)
    if host is not None:
        taken = host.anatomy(model, TOWERS)
    else:
        towers = [family.tower(name, module) for name, module, family in find(model, TOWERS)]
        if not towers:
            wanted = ", ".join(_of_transformers())
            raise ValueError(f"{type(model).__name__}: want a model with one of {wanted} in it")
        taken = Anatomy(towers[0].family, towers)
    taken.parts |= {
        part: name
        for name, part in _HEADS.items()
        if any(True for _ in getattr(model, name, nn.Identity()).parameters())
    }
    return taken
