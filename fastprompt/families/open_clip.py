"""open_clip's CLIP and CoCa models, whose vision towers may be timm's.

Text is causal with learned positions: tokens keep theirs, prompts carry none and are seen by all.
"""

from fastprompt.families.base import TEXT, VISION
from fastprompt.families.outside import Library, OutsideFamily, Place

_PLACE = Place("attn", "ln_1", "ln_1")
_PLACES = dict(ResidualAttentionBlock=_PLACE, CustomResidualAttentionBlock=_PLACE)
_BESIDE = {
    "AttentionalPooler": "it pools what the blocks give: its own queries ask image tokens",
    "MultimodalTransformer": (
        "its blocks take turns with cross-attention to the image, and which prompts belong to is "
        "open"
    ),
}


def _family(name: str, kind: str, model: str, layers: str) -> OutsideFamily:
    return OutsideFamily(name, kind, "open_clip", (model,), layers, _PLACES, beside=_BESIDE)


OPEN_CLIP = Library(
    "open_clip",
    (
        _family("open_clip_vision", VISION, "VisionTransformer", "transformer.resblocks"),
        _family("open_clip_text", TEXT, "TextTransformer", "transformer.resblocks"),
        # of CLIP, which has the other parts of its text tower itself
        _family("open_clip_text", TEXT, "Transformer", "resblocks"),
    ),
    whole=("CLIP", "CustomTextCLIP", "CoCa"),
)
