"""One tiny random model and its inputs for every family that `tiny.py` does not have."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
import zoo_outside
from torch import Tensor, nn
from zoo_row import IMAGE, Row
from zoo_row import ids as _ids
from zoo_row import pixels as _pixels

_0 = torch.tensor(0)
_TEXT = {**tiny.TEXT, "head_dim": 8}
_VISION = dict(tiny.VISION)
_MROPE = dict(rope_theta=10000.0, mrope_section=[2, 1, 1], rope_type="default")


def _words(dtype: torch.dtype) -> dict[str, Any]:
    return dict(input_ids=_ids())


def _patches(dtype: torch.dtype) -> dict[str, Any]:
    """SigLIP 2's: rows of patches, of two images of unlike shapes."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    shapes = torch.tensor([[3, 2], [2, 2]])
    pixels = torch.randn(2, 6, 3 * 8 * 8, dtype=dtype)
    return dict(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes)


def _said(ids: Tensor, **images) -> dict[str, Any]:
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), **images)


def _seen(count: int, **more) -> Callable[[torch.dtype], dict[str, Any]]:
    """A text with one image of ``count`` rows in each sample."""
    return lambda dtype: _said(_ids(count), **_pixels(dtype), **more)


def _prefix(dtype: torch.dtype) -> dict[str, Any]:
    """PaliGemma's: all that is given is a prefix, whose tokens see one another."""
    given = _seen(4)(dtype)
    return given | dict(token_type_ids=torch.zeros_like(given["input_ids"]))


def _types(count: int) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        given = _seen(count)(dtype)
        return given | dict(token_type_ids=(given["input_ids"] == IMAGE).long())

    return inputs


def _tiles(dtype: torch.dtype) -> dict[str, Any]:
    """LLaVA-NeXT's: each image whole and in two tiles, and a row's end for each row of those."""
    pixels = torch.randn(2, 3, 3, 16, 16, dtype=dtype)
    sizes = torch.tensor([[16, 32], [16, 32]])
    return _said(_ids(14, length=20), pixel_values=pixels, image_sizes=sizes)


def _packed(dtype: torch.dtype) -> dict[str, Any]:
    """Qwen's: two images of unlike sizes in one row of patches, 4 and 8 of them after merging."""
    ids = _ids(8, length=14)
    ids[0, 5:9] = 20
    pixels = torch.randn(16 + 32, 3 * 2 * 4 * 4, dtype=dtype)
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    types = (ids == IMAGE).int()
    return _said(ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=types)


def _text(name: str, **more) -> Row:
    """A causal language model named as ``LlamaForCausalLM`` is."""
    return Row(
        lambda: getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**_TEXT | more)),
        _words,
        text=True,
        generates=True,
    )


def _heads(name: str, config: str | None = None, **more) -> Row:
    """A vision model under a classifier, or alone."""
    own = getattr(tf, f"{config or name}Config")
    cls = getattr(tf, f"{name}ForImageClassification", None) or getattr(tf, f"{name}Model")
    return Row(lambda: cls(own(**_VISION | dict(num_labels=5) | more)), _pixels, vision=True)


def _both(
    name: str, inputs: Callable, *, vision: Callable, text: Callable, next_type: int = 0, **more
) -> Row:
    """A vision-language model."""
    config = getattr(tf, f"{name}Config")
    ids = dict(image_token_id=IMAGE, image_token_index=IMAGE)
    return Row(
        lambda: getattr(tf, f"{name}ForConditionalGeneration")(
            config(vision_config=vision(), text_config=text(), **ids | more)
        ),
        inputs,
        vision=True,
        text=True,
        generates=True,
        next_type=next_type,
    )


def _qwen_vision(**more) -> dict[str, Any]:
    sizes = dict(depth=3, num_heads=2, patch_size=4, temporal_patch_size=2, spatial_merge_size=2)
    return {**sizes, "in_channels": 3, **more}


_GEMMA = dict(_TEXT, head_dim=16, query_pre_attn_scalar=16)
_GEMMA3 = dict(_GEMMA, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2)
_GEMMA3 |= dict(num_hidden_layers=4)
_BERT = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
_BERT |= dict(intermediate_size=48, max_position_embeddings=64, num_labels=5, pad_token_id=0)
_GPT2 = dict(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)
_GPT2 |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
_T5 = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, dropout_rate=0.0)
_T5 |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=16)
_T5 |= dict(pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
_OPT = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48)
_OPT |= dict(max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, dropout=0.0)

ROWS = {
    **zoo_outside.ROWS,
    "gemma": _text("Gemma", head_dim=16),
    "gemma2": Row(
        lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(**_GEMMA, sliding_window=4, attn_logit_softcapping=5.0)
        ),
        _words,
        text=True,
        generates=True,
    ),
    "gemma3_text": Row(
        lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GEMMA3)),
        _words,
        text=True,
        generates=True,
    ),
    "phi3": _text("Phi3", sliding_window=4, resid_pdrop=0.0),
    "smollm3": _text("SmolLM3", num_hidden_layers=4),
    "olmo2": _text("Olmo2"),
    "mixtral": _text(
        "Mixtral", num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager"
    ),
    "gpt2": Row(
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(**_GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        ),
        _words,
        text=True,
        generates=True,
    ),
    "opt": Row(lambda: tf.OPTForCausalLM(tf.OPTConfig(**_OPT)), _words, text=True, generates=True),
    "opt, norms behind": Row(
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(**_OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=16))
        ),
        _words,
        text=True,
        generates=True,
    ),
    "bert": Row(
        lambda: tf.BertForSequenceClassification(
            tf.BertConfig(**_BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        ),
        _words,
        text=True,
    ),
    "roberta": Row(
        lambda: tf.RobertaForSequenceClassification(
            tf.RobertaConfig(**_BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        ),
        _words,
        text=True,
    ),
    "gpt_oss": _text(
        "GptOss",
        num_hidden_layers=4,
        sliding_window=4,
        num_local_experts=3,
        num_experts_per_tok=2,
        experts_implementation="eager",
    ),
    "t5": Row(
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
        lambda dtype: dict(
            input_ids=_ids(), decoder_input_ids=_ids(length=7).index_fill_(1, _0, 0)
        ),
        text=True,
        generates=True,
    ),
    "t5, encoder": Row(lambda: tf.T5EncoderModel(tf.T5Config(**_T5)), _words, text=True),
    "deit": _heads("DeiT"),
    "dinov2_with_registers": _heads("Dinov2WithRegisters", mlp_ratio=2),
    "dinov3_vit": _heads("DINOv3ViT", num_register_tokens=2),
    "beit": _heads("Beit", use_relative_position_bias=True, layer_scale_init_value=0.5),
    "beit, one bias": _heads("Beit", use_shared_relative_position_bias=True),
    "swin": Row(
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(
                image_size=32,
                patch_size=4,
                embed_dim=16,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=2,
                num_labels=5,
                drop_path_rate=0.0,
            )
        ),
        lambda dtype: dict(pixel_values=torch.randn(2, 3, 32, 32, dtype=dtype)),
        vision=True,
    ),
    "siglip2 vision": Row(
        lambda: tf.Siglip2VisionModel(tf.Siglip2VisionConfig(**_VISION, num_patches=9)),
        _patches,
        vision=True,
    ),
    "siglip2 text": Row(
        lambda: tf.Siglip2TextModel(tf.Siglip2TextConfig(**tiny.CLIP_TEXT)), _words, text=True
    ),
    "internvl_vision": Row(
        lambda: tf.InternVLVisionModel(
            tf.InternVLVisionConfig(**_VISION, use_qk_norm=True, layer_scale_init_value=0.5)
        ),
        _pixels,
        vision=True,
    ),
    "llava_next": _both(
        "LlavaNext",
        _tiles,
        vision=tiny.VISION_CONFIGS["clip"],
        text=tiny.TEXT_CONFIGS["mistral"],
        image_grid_pinpoints=[[16, 32]],
        image_seq_length=4,
    ),
    "llava_onevision": _both(
        "LlavaOnevision",
        _tiles,
        vision=tiny.VISION_CONFIGS["siglip"],
        text=tiny.TEXT_CONFIGS["qwen2"],
        image_grid_pinpoints=[[16, 32]],
    ),
    "qwen2_vl": _both(
        "Qwen2VL",
        _packed,
        vision=lambda: _qwen_vision(embed_dim=32, hidden_size=32, mlp_ratio=2),
        text=lambda: tf.Qwen2VLTextConfig(**tiny.TEXT, rope_parameters=_MROPE),
    ),
    "qwen2_5_vl": _both(
        "Qwen2_5_VL",
        _packed,
        vision=lambda: _qwen_vision(
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=32,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        text=lambda: tf.Qwen2_5_VLTextConfig(**tiny.TEXT, rope_parameters=_MROPE),
    ),
    "qwen3_vl": _both(
        "Qwen3VL",
        _packed,
        vision=lambda: _qwen_vision(
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=32,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
        ),
        text=lambda: tf.Qwen3VLTextConfig(**_TEXT, rope_parameters=_MROPE),
    ),
    "idefics3": _both(
        "Idefics3",
        lambda dtype: _said(_ids(1), pixel_values=torch.randn(2, 1, 3, 16, 16, dtype=dtype)),
        vision=lambda: tf.Idefics3VisionConfig(**_VISION),
        text=tiny.TEXT_CONFIGS["llama"],
        scale_factor=2,
    ),
    "smolvlm": _both(
        "SmolVLM",
        lambda dtype: _said(_ids(1), pixel_values=torch.randn(2, 1, 3, 16, 16, dtype=dtype)),
        vision=lambda: tf.SmolVLMVisionConfig(**_VISION),
        text=tiny.TEXT_CONFIGS["llama"],
        scale_factor=2,
    ),
    "paligemma": _both(
        "PaliGemma",
        _prefix,
        vision=tiny.VISION_CONFIGS["siglip"],
        text=lambda: tf.GemmaConfig(**_TEXT),
        next_type=1,
        projection_dim=32,
    ),
    "gemma3": _both(
        "Gemma3",
        _types(4),
        vision=tiny.VISION_CONFIGS["siglip"],
        text=lambda: tf.Gemma3TextConfig(**_GEMMA3),
        mm_tokens_per_image=4,
    ),
    "internvl": _both(
        "InternVL",
        _seen(1),
        vision=lambda: tf.InternVLVisionConfig(**_VISION),
        text=tiny.TEXT_CONFIGS["qwen2"],
    ),
    "mistral3": _both(
        "Mistral3",
        lambda dtype: _seen(1, image_sizes=torch.tensor([[16, 16], [16, 16]]))(dtype),
        vision=lambda: tf.PixtralVisionConfig(**_VISION),
        text=tiny.TEXT_CONFIGS["mistral"],
        spatial_merge_size=2,
    ),
}


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model in evaluation mode whose random weights are large enough to matter."""
    pytest.importorskip(ROWS[name].library)
    torch.manual_seed(seed)
    model = ROWS[name].build()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.ndim > 1 else p.add_(torch.randn_like(p), alpha=0.2)
    return model.to(dtype).eval()


def inputs(name: str, dtype: torch.dtype = torch.float64, seed: int = 1) -> dict[str, Any]:
    torch.manual_seed(seed)
    return ROWS[name].inputs(dtype)
