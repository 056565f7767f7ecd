"""What is not served, and why: by a model's config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from fastprompt.families.base import TowerFamily
    from fastprompt.families.hosts import Host

# configs of models that hold two served towers side by side, without a host
_PAIRS = ("clip", "siglip", "siglip2")

_ALIBI = "its scores fall with distance (ALiBi), and prompts have none that is published"
_RECURRENT = "it keeps a state instead of keys, so prompts have nothing to be keys of"
_TWO_ATTENTIONS = "its decoder's cross-attention would need prompts of its own"
REASONS = {
    "bloom": _ALIBI,
    "mpt": _ALIBI,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "rwkv": _RECURRENT,
    "gpt_oss": "its attention has sinks, one more score in each row's softmax",
    "t5": "its position bias would have to be made for prompts as well",
    "mllama": _TWO_ATTENTIONS,
    "bart": _TWO_ATTENTIONS,
    "whisper": _TWO_ATTENTIONS,
    "deepseek_v3": "its keys come out of a compressed latent, not out of one projection",
    "swinv2": "its scores are cosines with a learned scale, which no kernel of ours computes",
}


def refusal(
    config: PreTrainedConfig | None, hosts: tuple[Host, ...], families: tuple[TowerFamily, ...]
) -> str | None:
    """Why a model with this config cannot be patched; None: it can."""
    kind = getattr(config, "model_type", "")
    if kind in REASONS:
        return f"{kind} is not served: {REASONS[kind]}"
    if kind in {host.name for host in hosts}:
        for part in ("vision_config", "text_config"):
            why = refusal(getattr(config, part), (), families)
            if why is not None:
                return f"{part}: {why}"
        return None
    serving = [family for family in families if kind in family.types]
    if serving:
        why = serving[0].refuses(config)
        return why and f"{kind} {why}"
    if kind in _PAIRS:
        return None
    names = [*(host.name for host in hosts), *dict.fromkeys(family.name for family in families)]
    got = f"model_type {kind!r}" if kind else "no transformers config"
    return f"want a transformers model of {', '.join(names)}; got {got}"
