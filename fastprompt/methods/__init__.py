"""The published methods, one file each."""

from fastprompt.families import TEXT, VISION, Anatomy
from fastprompt.instruction import InstructionViT
from fastprompt.methods.base import DeepPrompts, Method
from fastprompt.methods.coda import CODAPrompt
from fastprompt.methods.dualprompt import DualPrompt
from fastprompt.methods.e2vpt import E2VPT
from fastprompt.methods.l2p import L2P
from fastprompt.methods.m2pt import M2PT
from fastprompt.methods.maple import MaPLe
from fastprompt.methods.peers import FullTuning, LoRA
from fastprompt.methods.prefix import PrefixTuning
from fastprompt.methods.vpt import VPT

__all__ = [
    "E2VPT",
    "L2P",
    "M2PT",
    "VPT",
    "CODAPrompt",
    "DeepPrompts",
    "DualPrompt",
    "FullTuning",
    "InstructionViT",
    "LoRA",
    "MaPLe",
    "Method",
    "PrefixTuning",
    "default_for",
    "default_of",
    "from_card",
]

_BY_NAME = {
    cls.__name__: cls
    for cls in (
        *(M2PT, VPT, E2VPT, DeepPrompts, L2P, DualPrompt, CODAPrompt),
        *(MaPLe, PrefixTuning, LoRA, FullTuning),
    )
}


def default_for(anatomy: Anatomy) -> Method:
    """M2PT for a vision-language model, VPT-deep for a vision model, else deep prompts."""
    return default_of({tower.kind for tower in anatomy.towers}, "projector" in anatomy.parts)


def check(method: Method, anatomy: Anatomy) -> None:
    """Raises ValueError unless the method can be put into such a model."""
    outside = any(tower.outside for tower in anatomy.towers)
    if outside and not isinstance(method, (VPT, DeepPrompts)):
        raise ValueError(f"{method}: want VPT or DeepPrompts, all that {anatomy.family} has so far")
    method.check(anatomy)


def default_of(kinds: set[str], projector: bool) -> Method:
    """As `default_for`, of a model with these kinds of towers."""
    if projector:
        return M2PT()
    if kinds == {VISION}:
        return VPT()
    return DeepPrompts(vision=10 * (VISION in kinds), text=10 * (TEXT in kinds))


def from_card(card: dict) -> Method:
    """The method that wrote a checkpoint's card.

    Raises:
        ValueError: a method, or an option of one, that this version does not know.
    """
    options = {**card}
    cls = _BY_NAME.get(options.pop("name", None))
    if cls is None:
        raise ValueError(f"method: want one of {', '.join(_BY_NAME)}; got {card.get('name')!r}")
    try:
        return cls(**options)
    except TypeError as error:
        raise ValueError(f"method {cls.__name__}: {error}") from error
