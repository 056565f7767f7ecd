"""Vision encoders and CLIP-like text encoders of transformers: pre-norm, learned positions.

Tokens keep their learned positions and prompts carry none, as VPT-deep has it (section 3.2 of
arXiv 2203.12119: prompts are inserted after the position embedding).
"""

from fastprompt.families.base import TEXT, VISION, Layout, TowerFamily

VIT = TowerFamily(
    "vit",
    VISION,
    ("ViTModel",),
    (Layout("layers", "attention", "layernorm_before", "embeddings"),),
)

DINOV2 = TowerFamily(
    "dinov2",
    VISION,
    ("Dinov2Model", "Dinov2Backbone"),
    (
        Layout("layers", "attention", "norm1", "embeddings"),
        Layout("encoder.layers", "attention", "norm1", "embeddings"),
        Layout("encoder.layer", "attention", "norm1", "embeddings"),
        # transformers 5.17
        Layout("encoder.layer", "attention.attention", "norm1", "embeddings", "key", "value"),
    ),
)

_CLIP = (
    Layout("encoder.layers", "self_attn", "layer_norm1", "embeddings"),
    # transformers 5.17 kept the stack one module deeper
    Layout("vision_model.encoder.layers", "self_attn", "layer_norm1", "vision_model.embeddings"),
    Layout("text_model.encoder.layers", "self_attn", "layer_norm1", "text_model.embeddings"),
)

CLIP_VISION = TowerFamily("clip", VISION, ("CLIPVisionModel", "CLIPVisionTransformer"), _CLIP)
CLIP_TEXT = TowerFamily("clip", TEXT, ("CLIPTextModel", "CLIPTextTransformer"), _CLIP)
SIGLIP_VISION = TowerFamily(
    "siglip", VISION, ("SiglipVisionModel", "SiglipVisionTransformer"), _CLIP
)
SIGLIP_TEXT = TowerFamily("siglip", TEXT, ("SiglipTextModel", "SiglipTextTransformer"), _CLIP)
