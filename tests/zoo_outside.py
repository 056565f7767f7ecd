"""Tiny random models of timm and open_clip, as rows of `zoo.py`'s table."""

import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from zoo_row import Row, ids, pixels

_TIMM = dict(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)


def _timm(module: str, name: str, **more) -> Row:
    """A vision model of timm's, from ``timm.models``."""

    def build() -> nn.Module:
        module_ = importlib.import_module(f"timm.models.{module}")
        options = {key: value(module_) if callable(value) else value for key, value in more.items()}
        return getattr(module_, name)(**_TIMM | options)

    return Row(
        build,
        lambda dtype: dict(x=torch.randn(2, 3, 16, 16, dtype=dtype)),
        vision=True,
        library="timm",
    )


_CLIP_VISION = dict(image_size=16, patch_size=8, width=32, head_width=16, layers=3, mlp_ratio=2)
_CLIP_TEXT = dict(context_length=11, vocab_size=64, width=32, heads=4, layers=3)
_COCA_VISION = dict(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)


def _open_clip(name: str, vision: dict, text: dict, **more) -> Row:
    """A model of open_clip's."""

    def build() -> nn.Module:
        import open_clip

        return getattr(open_clip, name)(
            32, vision_cfg=_CLIP_VISION | vision, text_cfg=_CLIP_TEXT | text, **more
        )

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return dict(image=pixels(dtype)["pixel_values"], text=ids())

    return Row(build, inputs, vision=True, text=True, library="open_clip")


def _sequence_first() -> nn.Module:
    from open_clip.transformer import Transformer

    model = ROWS["open_clip"].build()
    model.transformer = Transformer(32, 3, 4, batch_first=False)
    return model


def _with_timms() -> nn.Module:
    model = _open_clip(
        "CustomTextCLIP", dict(timm_model_name="test_vit", image_size=160), {}
    ).build()
    model.visual.set_input_size(32)
    return model


ROWS = {
    "timm_vit": _timm("vision_transformer", "VisionTransformer", qkv_bias=False, qk_norm=True),
    "timm_vit, dinov2": _timm(
        "vision_transformer",
        "VisionTransformer",
        reg_tokens=2,
        no_embed_class=True,
        dynamic_img_size=True,
        init_values=0.5,
        mlp_layer=lambda module: module.SwiGLUPacked,
    ),
    "timm_vit, siglip": _timm(
        "vision_transformer", "VisionTransformer", class_token=False, global_pool="map"
    ),
    "timm_vit, norms behind": _timm(
        "vision_transformer", "VisionTransformer", block_fn=lambda module: module.ResPostBlock
    ),
    "timm_vit, distilled": _timm("deit", "VisionTransformerDistilled"),
    "timm_eva": _timm("eva", "Eva", init_values=0.5),
    "timm_eva, eva02": _timm(
        "eva",
        "Eva",
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(2, 2),
    ),
    "timm_eva, dinov3": _timm(
        "eva",
        "Eva",
        dynamic_img_size=True,
        qkv_bias=False,
        init_values=0.5,
        rope_type="dinov3",
        rope_rotate_half=True,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        num_reg_tokens=2,
        attn_type="rope",
    ),
    "timm_eva, norms behind": _timm("eva", "Eva", use_post_norm=True),
    "timm_beit": _timm("beit", "Beit", use_rel_pos_bias=True, init_values=0.5),
    "timm_beit, one bias": _timm("beit", "Beit", use_shared_rel_pos_bias=True),
    "open_clip": _open_clip("CLIP", {}, {}),
    "open_clip, own attention": _open_clip(
        "CustomTextCLIP",
        dict(qk_norm=True, scale_heads=True, ls_init_value=0.5),
        dict(scale_attn_inner=True, scale_attn=True, no_causal_mask=True, pool_type="last"),
    ),
    "open_clip, coca": _open_clip(
        "CoCa",
        dict(_COCA_VISION, output_tokens=True),
        dict(embed_cls=True, output_tokens=True),
        multimodal_cfg=dict(context_length=12, vocab_size=64, width=32, heads=4, layers=2),
    ),
}

_CLIP = ROWS["open_clip"]
ROWS["open_clip, sequence first"] = replace(_CLIP, build=_sequence_first)
ROWS["open_clip, timm"] = replace(
    _CLIP,
    build=_with_timms,
    inputs=lambda dtype: dict(image=torch.randn(2, 3, 32, 32, dtype=dtype), text=ids()),
)
