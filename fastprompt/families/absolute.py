"""Language models without rotation.

Learned positions: tokens keep theirs and prompts carry none. T5: relative positions are a bias to
scores, and prompts have the one that keys at -P .. -1 have. Its encoder and its decoder's
self-attention have prompts, cross-attention has none.
"""

from transformers import PreTrainedConfig

from fastprompt.families.base import TEXT, Layout, TowerFamily


def _no_cross_attention(config: PreTrainedConfig) -> str | None:
    if getattr(config, "add_cross_attention", False):
        return "with cross-attention: its prompts would have to be keys of two attentions"
    return None


def _opt(config: PreTrainedConfig) -> str | None:
    if not config.layer_norm_elementwise_affine:
        return "with layer_norm_elementwise_affine=False: norms without weights"
    return None


_BERT = Layout(
    "encoder.layer",
    "attention.self",
    None,
    "embeddings",
    k_proj="key",
    v_proj="value",
    like="attention.output.LayerNorm",
)

ABSOLUTE = (
    TowerFamily(
        "gpt2",
        TEXT,
        ("GPT2Model",),
        ("gpt2",),
        (Layout("h", "attn", "ln_1", "wte", k_proj="c_attn", v_proj="c_attn", counts="columns"),),
        _no_cross_attention,
    ),
    TowerFamily(
        "opt",
        TEXT,
        ("OPTDecoder",),
        ("opt",),
        (
            Layout(
                "layers",
                "self_attn",
                "self_attn_layer_norm",
                "embed_tokens",
                norm_if="do_layer_norm_before",  # opt-350m's stands behind
                counts="tokens",
            ),
        ),
        _opt,
    ),
    TowerFamily("bert", TEXT, ("BertModel",), ("bert",), (_BERT,), _no_cross_attention),
    TowerFamily("roberta", TEXT, ("RobertaModel",), ("roberta",), (_BERT,), _no_cross_attention),
    TowerFamily(
        "t5",
        TEXT,
        ("T5Stack",),
        ("t5",),
        (
            Layout(
                "block",
                "layer.0.SelfAttention",
                "layer.0.layer_norm",
                "embed_tokens",
                k_proj="k",
                v_proj="v",
                without="layer.1.EncDecAttention",
                bias=True,
            ),
        ),
    ),
)
