"""Language models with rotary positions: prompts stand at -P .. -1, before the first token.

Where places have several axes (Qwen-VL's time, height and width) a prompt stands at the same
negative place on each of them, as a text token does.
"""

from dataclasses import replace

from fastprompt.families.base import TEXT, Layout, TowerFamily
from fastprompt.families.described import BlockLayout

_LAYER = BlockLayout(
    "LlamaDecoderLayer",
    o_proj="self_attn.o_proj",
    norm2="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    activation="mlp.act_fn",
    others=("mlp",),
)
_LLAMA = Layout("layers", "self_attn", "input_layernorm", "embed_tokens", rotary="rotary_emb")


def _family(name: str, model: str, **different) -> TowerFamily:
    """One laid out as Llama but for what is ``different``; its blocks run on their own."""
    return TowerFamily(name, TEXT, (model,), (name,), (replace(_LLAMA, **different),))


def _fused(name: str, model: str, **layer) -> TowerFamily:
    """One whose blocks run as one autograd node, too: as Llama's but for ``layer``."""
    return _family(name, model, blocks=(replace(_LAYER, **layer),))


DECODERS = (
    _fused("llama", "LlamaModel"),
    _fused("mistral", "MistralModel", layer="MistralDecoderLayer", window="config.sliding_window"),
    _fused("qwen2", "Qwen2Model", layer="Qwen2DecoderLayer", window="sliding_window"),
    # its q_norm and k_norm are found on the attention
    _fused("qwen3", "Qwen3Model", layer="Qwen3DecoderLayer", window="sliding_window"),
    _fused("gemma", "GemmaModel", layer="GemmaDecoderLayer"),
    _family("gemma2", "Gemma2Model"),
    _family("gemma3_text", "Gemma3TextModel"),  # each kind of layer has frequencies of its own
    _family("phi3", "Phi3Model", k_proj="qkv_proj", v_proj="qkv_proj"),
    _family("smollm3", "SmolLM3Model", rotates="use_rope"),
    # norms stand behind attention and MLP; its k_norm is over all heads together
    _family("olmo2", "Olmo2Model", norm=None, like="post_attention_layernorm"),
    _family("mixtral", "MixtralModel"),
    _family("gpt_oss", "GptOssModel"),
    _family("qwen2_vl_text", "Qwen2VLTextModel"),
    _family("qwen2_5_vl_text", "Qwen2_5_VLTextModel"),
    _family("qwen3_vl_text", "Qwen3VLTextModel"),
)
