"""Architectures that are refused, by ``model_type``: why prompts as side keys do not fit them."""

_ALIBI = "its scores fall with distance (ALiBi), and prompts have none that is published"
_RECURRENT = "it keeps a state instead of keys, so prompts have nothing to be keys of"
_TWO_ATTENTIONS = "it has blocks with a second attention, and which one has prompts is open"
_ELSEWHERE = "its blocks attend to what is no part of their own sequence (cross-attention)"
REASONS = {
    "bloom": _ALIBI,
    "mpt": _ALIBI,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "rwkv": _RECURRENT,
    "perceiver": _ELSEWHERE,
    "blip_2_qformer": _ELSEWHERE,
    "mllama": _TWO_ATTENTIONS,
    "bart": _TWO_ATTENTIONS,
    "whisper": _TWO_ATTENTIONS,
    "deepseek_v3": "its keys come out of a compressed latent, not out of one projection",
    "swinv2": "its scores are cosines with a learned scale, which no kernel of ours computes",
}
