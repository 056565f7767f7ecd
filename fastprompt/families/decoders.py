"""Language models with rotary positions: prompts stand at -P .. -1, before the first token."""

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


def _family(name: str, model: str, **layer: str) -> TowerFamily:
    return TowerFamily(name, TEXT, (model,), (replace(_LLAMA, blocks=(replace(_LAYER, **layer),)),))


LLAMA = _family("llama", "LlamaModel")
MISTRAL = _family(
    "mistral", "MistralModel", layer="MistralDecoderLayer", window="config.sliding_window"
)
QWEN2 = _family("qwen2", "Qwen2Model", layer="Qwen2DecoderLayer", window="sliding_window")
# its q_norm and k_norm are found on the attention
QWEN3 = _family("qwen3", "Qwen3Model", layer="Qwen3DecoderLayer", window="sliding_window")
