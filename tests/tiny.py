"""Tiny random models of every family, from their own configs, and inputs for them."""

import torch
import transformers as tf

TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
CLIP_TEXT = dict(
    TEXT, max_position_embeddings=40, projection_dim=24, eos_token_id=63, hidden_act="gelu"
)


def llama(**more):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, **more}))


def mistral(**more):
    return tf.MistralForCausalLM(tf.MistralConfig(**{**TEXT, "sliding_window": None, **more}))


def qwen2(**more):
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**{**TEXT, **more}))


def qwen3(**more):
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**{**TEXT, "head_dim": 16, **more}))


def vit(**more):
    return tf.ViTForImageClassification(tf.ViTConfig(**{**VISION, "num_labels": 5, **more}))


def dinov2(**more):
    options = {**VISION, "mlp_ratio": 2, "num_labels": 5, **more}
    options.pop("intermediate_size")
    return tf.Dinov2ForImageClassification(tf.Dinov2Config(**options))


def clip_vision(**more):
    return tf.CLIPVisionModel(tf.CLIPVisionConfig(**{**VISION, **more}))


def clip_text(**more):
    return tf.CLIPTextModel(tf.CLIPTextConfig(**{**CLIP_TEXT, **more}))


def siglip_vision(**more):
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**{**VISION, **more}))


def siglip_text(**more):
    return tf.SiglipTextModel(tf.SiglipTextConfig(**{**CLIP_TEXT, **more}))


VISION_CONFIGS = {
    "clip": lambda: tf.CLIPVisionConfig(**VISION),
    "siglip": lambda: tf.SiglipVisionConfig(**VISION, vision_use_head=False),
    "dinov2": lambda: tf.Dinov2Config(
        **{k: v for k, v in VISION.items() if k != "intermediate_size"}
    ),
    "vit": lambda: tf.ViTConfig(**VISION),
}
TEXT_CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**TEXT),
    "mistral": lambda: tf.MistralConfig(**TEXT),
    "qwen2": lambda: tf.Qwen2Config(**TEXT),
    "qwen3": lambda: tf.Qwen3Config(**{**TEXT, "head_dim": 16}),
}


def llava(vision="clip", text="llama", tap=-2, **more):
    config = tf.LlavaConfig(
        vision_config=VISION_CONFIGS[vision](),
        text_config=TEXT_CONFIGS[text](),
        vision_feature_layer=tap,
        # SigLIP has no class token to drop
        vision_feature_select_strategy="full" if vision == "siglip" else "default",
        image_token_index=5,
        image_seq_length=4,
        pad_token_id=0,
        **more,
    )
    return tf.LlavaForConditionalGeneration(config)


LANGUAGE = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}
ENCODERS = {
    "vit": vit,
    "dinov2": dinov2,
    "clip_vision": clip_vision,
    "siglip_vision": siglip_vision,
    "clip_text": clip_text,
    "siglip_text": siglip_text,
}
FAMILIES = {
    **LANGUAGE,
    **ENCODERS,
    "llava": llava,
    "llava dinov2 qwen3": lambda: llava("dinov2", "qwen3"),
    "llava siglip mistral": lambda: llava("siglip", "mistral", tap=-1),
    "llava vit qwen2": lambda: llava("vit", "qwen2", tap=[1, -2]),
}


def build(name, dtype=torch.float32, seed=0, **more):
    """A model in evaluation mode whose random weights are large enough to matter."""
    torch.manual_seed(seed)
    model = FAMILIES[name](**more)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)  # norms and biases too: all ones hide mistakes
    return model.to(dtype).eval()


def inputs(name, dtype=torch.float32, batch=2, length=9, seed=1):
    """Keyword arguments of the model's forward."""
    torch.manual_seed(seed)
    pixels = dict(pixel_values=torch.randn(batch, 3, 16, 16, dtype=dtype))
    ids = torch.randint(6, 63, (batch, length))
    if name.startswith("llava"):
        ids[:, 1:5] = 5  # the image's four patches
        return dict(pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
    if name in LANGUAGE:
        return dict(input_ids=ids)
    if name.endswith("_text"):
        ids[:, -1] = 63
        return dict(input_ids=ids)
    return pixels


def output(name, model, given):
    """The tensor that stands for a model's output in a comparison."""
    out = model(**given)
    if isinstance(out, torch.Tensor):  # timm's
        return out
    if hasattr(out, "logits") or hasattr(out, "last_hidden_state"):
        return out.logits if hasattr(out, "logits") else out.last_hidden_state
    # open_clip's: features of images and texts, and what else it has
    parts = out.values() if isinstance(out, dict) else out
    return torch.cat([part.flatten() for part in parts if part.is_floating_point()])


def in_float64(model):
    """Let rotation and RMS norms run in float64: transformers has them in float32."""
    for module in model.modules():
        for cls, forward in (("RotaryEmbedding", _rotary64), ("RMSNorm", _rms_norm64)):
            if type(module).__name__.endswith(cls):
                old = type(module)
                # as if transformers had it so: frozen blocks know the norms that it has
                own = {"forward": forward, "__module__": old.__module__}
                module.__class__ = type(old.__name__, (old,), own)


def _rotary64(self, x, position_ids):
    angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def _rms_norm64(self, x):
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
