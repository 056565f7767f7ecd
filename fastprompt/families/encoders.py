"""Vision encoders and CLIP-like text encoders of transformers, all pre-norm.

Tokens keep their positions and prompts carry none, as VPT-deep has it (section 3.2 of arXiv
2203.12119: prompts are inserted after the position embedding). So where places in an image rotate
keys, prompts are not rotated, and where they add a bias to scores (BEiT, Swin), prompts' is 0.
"""

from collections.abc import Iterator
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


def _family(name: str, model: str, *layouts: Layout) -> TowerFamily:
    return TowerFamily(name, VISION, (model,), (name,), layouts)


_VIT = Layout("layers", "attention", "layernorm_before", "embeddings")


def _vit(name: str, model: str, layer: str) -> TowerFamily:
    return _family(name, model, replace(_VIT, blocks=(replace(_VIT_LAYER, layer=layer),)))


def _dinov2(layer: str) -> tuple[Layout, ...]:
    blocks = tuple(replace(each, layer=layer) for each in _DINOV2_LAYERS)
    first = Layout("layers", "attention", "norm1", "embeddings", blocks=blocks)
    deeper = replace(first, layers="encoder.layer")
    # transformers 5.17
    older = replace(
        deeper, attention="attention.attention", k_proj="key", v_proj="value", hands_on=False
    )
    return first, replace(first, layers="encoder.layers"), deeper, older


def _clip(layer: str, hands_on: bool) -> tuple[Layout, ...]:
    blocks = (replace(_CLIP_LAYER, layer=layer, hands_on=hands_on),)
    first = Layout("encoder.layers", "self_attn", "layer_norm1", "embeddings", blocks=blocks)
    # transformers 5.17 kept the stack one module deeper
    deeper = (
        replace(first, layers=f"{part}.encoder.layers", embeddings=f"{part}.embeddings")
        for part in ("vision_model", "text_model")
    )
    return first, *deeper


def _two_towers(name: str, stem: str, hands_on: bool) -> Iterator[TowerFamily]:
    layouts = _clip(f"{stem}EncoderLayer", hands_on)
    for kind, part in ((VISION, "Vision"), (TEXT, "Text")):
        classes = (f"{stem}{part}Model", f"{stem}{part}Transformer")
        yield TowerFamily(name, kind, classes, (f"{name}_{kind}_model",), layouts)


# images of all samples follow one another in one row without a batch axis
_QWEN = Layout("blocks", "attn", "norm1", "patch_embed", k_proj="qkv", v_proj="qkv", packed=True)

ENCODERS = (
    _vit("vit", "ViTModel", "ViTLayer"),
    _vit("deit", "DeiTModel", "DeiTLayer"),
    TowerFamily(
        "dinov2",
        VISION,
        ("Dinov2Model", "Dinov2Backbone"),
        ("dinov2",),
        _dinov2("Dinov2Layer"),
    ),
    TowerFamily(
        "dinov2_with_registers",
        VISION,
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        ("dinov2_with_registers",),
        _dinov2("Dinov2WithRegistersLayer"),
    ),
    _family(
        "dinov3_vit", "DINOv3ViTModel", Layout("model.layer", "attention", "norm1", "embeddings")
    ),
    *_two_towers("clip", "CLIP", True),
    *_two_towers("siglip", "Siglip", False),
    *_two_towers("siglip2", "Siglip2", False),
    # relative positions are added to scores, as a mask
    _family("beit", "BeitModel", _VIT),
    # windows are samples to its attention: each sees the prompts
    _family(
        "swin",
        "SwinModel",
        replace(_VIT, layers="encoder.layers.*.blocks", embeddings="embeddings.norm"),
    ),
    _family("internvl_vision", "InternVLVisionModel", replace(_VIT, layers="encoder.layer")),
    _family("idefics3_vision", "Idefics3VisionTransformer", *_clip("Idefics3EncoderLayer", False)),
    _family("smolvlm_vision", "SmolVLMVisionTransformer", *_clip("SmolVLMEncoderLayer", False)),
    _family(
        "pixtral",
        "PixtralVisionModel",
        Layout("transformer.layers", "attention", "attention_norm", "ln_pre"),
    ),
    _family("qwen2_vl_vision", "Qwen2VisionTransformerPretrainedModel", _QWEN),
    _family("qwen2_5_vl_vision", "Qwen2_5_VisionTransformerPretrainedModel", _QWEN),
    _family("qwen3_vl_vision", "Qwen3VLVisionModel", _QWEN),
)
