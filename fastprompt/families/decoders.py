"""Language models with rotary positions: prompts stand at -P .. -1, before the first token."""

from fastprompt.families.base import TEXT, Layout, TowerFamily

_LLAMA = (Layout("layers", "self_attn", "input_layernorm", "embed_tokens", rotary="rotary_emb"),)

LLAMA = TowerFamily("llama", TEXT, ("LlamaModel",), _LLAMA)
MISTRAL = TowerFamily("mistral", TEXT, ("MistralModel",), _LLAMA)
QWEN2 = TowerFamily("qwen2", TEXT, ("Qwen2Model",), _LLAMA)
QWEN3 = TowerFamily("qwen3", TEXT, ("Qwen3Model",), _LLAMA)  # its k_norm is found on the attention
