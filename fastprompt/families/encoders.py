"""Vision encoders and CLIP-like text encoders of transformers: pre-norm, learned positions.

Tokens keep their learned positions and prompts carry none, as VPT-deep has it (section 3.2 of
arXiv 2203.12119: prompts are inserted after the position embedding).
"""

from dataclasses import replace

from fastprompt.families.base import TEXT, VISION, Layout, TowerFamily
from fastprompt.families.described import BlockLayout

_VIT_LAYER = BlockLayout(
    "ViTLayer",
    o_proj="attention.o_proj",
    norm2="layernorm_after",
    gate="mlp.fc1",
    down="mlp.fc2",
    activation="mlp.activation_fn",
    others=("mlp",),
)
_DINOV2_LAYER = replace(
    _VIT_LAYER,
    layer="Dinov2Layer",
    norm2="norm2",
    scale1="layer_scale1.lambda1",
    scale2="layer_scale2.lambda1",
)
_DINOV2_LAYERS = (
    _DINOV2_LAYER,
    replace(
        _DINOV2_LAYER,
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
        activation="mlp.act_fn",
    ),
    # transformers 5.17
    replace(
        _DINOV2_LAYER,
        q_proj="query",
        o_proj="attention.output.dense",
        activation="mlp.activation",
        dropout="dropout_prob",
        others=("attention", "attention.output", "mlp"),
    ),
)
_CLIP_LAYER = replace(
    _VIT_LAYER,
    layer="CLIPEncoderLayer",
    o_proj="self_attn.out_proj",
    norm2="layer_norm2",
    scaling="scale",
    dropout="dropout",
)

VIT = TowerFamily(
    "vit",
    VISION,
    ("ViTModel",),
    (Layout("layers", "attention", "layernorm_before", "embeddings", blocks=(_VIT_LAYER,)),),
)

_DINOV2 = Layout("layers", "attention", "norm1", "embeddings", blocks=_DINOV2_LAYERS)

DINOV2 = TowerFamily(
    "dinov2",
    VISION,
    ("Dinov2Model", "Dinov2Backbone"),
    (
        _DINOV2,
        replace(_DINOV2, layers="encoder.layers"),
        replace(_DINOV2, layers="encoder.layer"),
        # transformers 5.17
        replace(
            _DINOV2,
            layers="encoder.layer",
            attention="attention.attention",
            k_proj="key",
            v_proj="value",
            hands_on=False,
        ),
    ),
)


def _clip(layer: str, hands_on: bool) -> tuple[Layout, ...]:
    blocks = (replace(_CLIP_LAYER, layer=layer, hands_on=hands_on),)
    first = Layout("encoder.layers", "self_attn", "layer_norm1", "embeddings", blocks=blocks)
    # transformers 5.17 kept the stack one module deeper
    deeper = (
        replace(first, layers=f"{part}.encoder.layers", embeddings=f"{part}.embeddings")
        for part in ("vision_model", "text_model")
    )
    return first, *deeper


_CLIP, _SIGLIP = _clip("CLIPEncoderLayer", True), _clip("SiglipEncoderLayer", False)

CLIP_VISION = TowerFamily("clip", VISION, ("CLIPVisionModel", "CLIPVisionTransformer"), _CLIP)
CLIP_TEXT = TowerFamily("clip", TEXT, ("CLIPTextModel", "CLIPTextTransformer"), _CLIP)
SIGLIP_VISION = TowerFamily(
    "siglip", VISION, ("SiglipVisionModel", "SiglipVisionTransformer"), _SIGLIP
)
SIGLIP_TEXT = TowerFamily("siglip", TEXT, ("SiglipTextModel", "SiglipTextTransformer"), _SIGLIP)
