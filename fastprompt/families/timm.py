"""timm's vision transformers: ViT, DeiT, SigLIP, DINOv2 (VisionTransformer), EVA, DINOv3, BEiT.

Tokens keep their positions and prompts carry none, as in `encoders`: where places in an image
rotate keys, prompts are prefix tokens that are not rotated, and a bias between places is 0 for
prompts.
"""

from fastprompt.families.base import VISION
from fastprompt.families.outside import Library, OutsideFamily, Place

_PRE, _POST = Place("attn", "norm1", "norm1"), Place("attn", None, "norm1")
_REFUSED = {
    "ParallelScalingBlock": "queries, keys and values come out of one product with its MLP's input",
    "DiffParallelScalingBlock": "it subtracts one softmax from another",
    "DiffAttention": "it subtracts one softmax from another",
    "ParallelThingsBlock": "it has several attentions, and which prompts belong to is open",
}
_BESIDE = dict.fromkeys(
    ("AttentionPoolLatent", "AttentionPoolPrr"),
    "it pools what the blocks give: its own queries ask image tokens",
)


def _family(name: str, classes: tuple[str, ...], **places: Place) -> OutsideFamily:
    return OutsideFamily(name, VISION, "timm", classes, "blocks", places, _REFUSED, _BESIDE)


TIMM = Library(
    "timm",
    (
        _family("timm_vit", ("VisionTransformer",), Block=_PRE, ResPostBlock=_POST),
        _family("timm_eva", ("Eva",), EvaBlock=_PRE, EvaBlockPostNorm=_POST),
        _family("timm_beit", ("Beit",), Block=_PRE),
    ),
)
