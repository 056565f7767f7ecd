"""LLaVA-shaped models with random weights, built layer by layer in NF4 and never whole and dense.

The layers' linear parts are bitsandbytes' Linear4bit, double-quantised; embeddings, head, norms and
the projector (which trains) are dense, as loading LLaVA with ``llm_int8_skip_modules`` for the
projector and the head leaves them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
import transformers as tf
from torch import Tensor, nn

from benchmarks.registry import NotMeasured

IMAGE = 5  # the id of the token that stands for a patch


@dataclass(frozen=True)
class Vision:
    """A CLIP vision tower; LLaVA reads the state before its last layer."""

    width: int = 1024
    inner: int = 4096
    layers: int = 24
    heads: int = 16
    image: int = 336
    patch: int = 14

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class Language:
    width: int
    inner: int
    layers: int
    heads: int
    kv: int
    vocab: int
    kind: str = "llama"  # or qwen2, whose q, k and v have biases


CLIP = Vision()
LANGUAGE = {
    "7B": Language(4096, 11008, 32, 32, 32, 32064),
    "13B": Language(5120, 13824, 40, 40, 40, 32064),
    "34B": Language(7168, 20480, 60, 56, 8, 64064),  # Yi-34B's, as LLaVA-1.6's
    "72B": Language(8192, 29568, 80, 64, 8, 152064, "qwen2"),  # Qwen2-72B's, as LLaVA-NeXT's
}


@dataclass(frozen=True)
class Tuning:
    """A batch of B rows of N tokens, one image in each, the last ``answer`` of which have labels;
    without ``vision`` the language model alone."""

    B: int
    text: Language
    vision: Vision | None = CLIP
    N: int = 1024
    answer: int = 256
    visual: int = 20  # prompt rows in each layer
    textual: int = 10

    @property
    def tokens(self) -> int:
        return self.B * self.N

    def __str__(self) -> str:
        eye = f"{self.vision.patches} of an image, P{self.visual}+" if self.vision else "P"
        text = f"D{self.text.width} L{self.text.layers}"
        return f"B{self.B} N{self.N} ({eye}{self.textual}, {self.answer} labels) {text}"


SMALL_EYE = Vision(256, 1024, 4, 4, 112)
SMALL = Language(512, 1408, 4, 8, 8, 4096)
_CPU = Tuning(2, SMALL, SMALL_EYE, N=256, answer=64)
_QUICK = Tuning(
    2, Language(128, 384, 2, 2, 2, 256), Vision(64, 128, 3, 2, 56), 48, 8, visual=4, textual=3
)


def shapes(device: str, quick: bool) -> dict[str, Tuning]:
    """By name and batch: a LLaVA, and its language model alone."""
    if quick or device == "cpu":
        small = _QUICK if quick else _CPU
        return {"LLaVA-small b2": small, "Llama-small b2": replace(small, vision=None)}
    found = {f"LLaVA-1.5-7B b{b}": Tuning(b, LANGUAGE["7B"]) for b in (1, 4, 16)}
    return found | {f"Llama-7B b{b}": Tuning(b, LANGUAGE["7B"], None) for b in (1, 4)}


# ---- models ----


def config(s: Tuning) -> tf.PreTrainedConfig:
    text_kind = tf.Qwen2Config if s.text.kind == "qwen2" else tf.LlamaConfig
    text = text_kind(
        hidden_size=s.text.width, intermediate_size=s.text.inner, vocab_size=s.text.vocab,
        num_hidden_layers=s.text.layers, num_attention_heads=s.text.heads,
        num_key_value_heads=s.text.kv, max_position_embeddings=4096, use_cache=False,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if s.vision is None:
        return text
    v = s.vision
    vision = tf.CLIPVisionConfig(
        hidden_size=v.width, intermediate_size=v.inner, num_hidden_layers=v.layers,
        num_attention_heads=v.heads, image_size=v.image, patch_size=v.patch,
    )  # fmt: skip
    return tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE,
        image_seq_length=v.patches, vision_feature_layer=-2, tie_word_embeddings=False,
    )  # fmt: skip


def kind(s: Tuning) -> type[tf.PreTrainedModel]:
    if s.vision:
        return tf.LlavaForConditionalGeneration
    return tf.Qwen2ForCausalLM if s.text.kind == "qwen2" else tf.LlamaForCausalLM


def build(s: Tuning, dtype: torch.dtype, device: str) -> nn.Module:
    """The model, computing in ``dtype``; of each layer no more than itself is ever dense.

    Raises:
        NotMeasured: there is no bitsandbytes.
    """
    if find_spec("bitsandbytes") is None:
        raise NotMeasured("bitsandbytes is not installed")
    whole = config(s)
    depths = [(part, part.num_hidden_layers) for part in _towers(whole)]
    for part, _ in depths:
        part.num_hidden_layers = 0
    with _made(dtype, device):
        model = kind(s)(whole)
    for part, depth in depths:
        part.num_hidden_layers = depth
    language = model.model.language_model if s.vision else model.model
    for i in range(s.text.layers):
        with _made(dtype, device):
            layer = _decoder_layer(language.config, i)
        language.layers.append(quantized(layer, dtype))
    if s.vision:
        tower = model.model.vision_tower
        for _ in range(s.vision.layers):
            with _made(dtype, device):
                layer = _encoder_layer(tower.config)
            tower.encoder.layers.append(quantized(layer, dtype))
    return model.requires_grad_(False)


@contextmanager
def _made(dtype: torch.dtype, device: str) -> Iterator[None]:
    """New tensors are of ``dtype`` on ``device``. Not while packing: bitsandbytes' own tables
    would be of that dtype too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _towers(whole: tf.PreTrainedConfig) -> list[tf.PreTrainedConfig]:
    vision = getattr(whole, "vision_config", None)
    return [whole] if vision is None else [vision, whole.text_config]


def _decoder_layer(text: tf.PreTrainedConfig, i: int) -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    return (Qwen2DecoderLayer if text.model_type == "qwen2" else LlamaDecoderLayer)(text, i)


def _encoder_layer(vision: tf.PreTrainedConfig) -> nn.Module:
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    return CLIPEncoderLayer(vision)


def quantized(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The layer with every linear part in NF4, double-quantised, in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in list(layer.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        packed = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None,
            compute_dtype=dtype, quant_type="nf4", device="meta",
        )  # fmt: skip
        dense = linear.weight
        packed.weight = Params4bit(dense.data, False, quant_type="nf4", module=packed).to(
            dense.device
        )
        packed.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(layer.get_submodule(parent), child, packed)
    return layer


def inputs(s: Tuning, dtype: torch.dtype, wanted: torch.dtype, device: str) -> dict[str, Tensor]:
    """What the model's forward takes: BOS, the image, text; rounded to ``dtype``, in ``wanted``."""
    torch.manual_seed(2)
    ids = torch.randint(6, s.text.vocab, (s.B, s.N))
    ids[:, 0] = 1
    labels = ids.clone()
    labels[:, : -s.answer] = -100
    given = dict(labels=labels, use_cache=False)
    if s.vision:
        ids[:, 1 : 1 + s.vision.patches] = IMAGE
        pixels = torch.randn(s.B, 3, s.vision.image, s.vision.image)
        given["pixel_values"] = pixels.to(dtype).to(wanted)
    given["input_ids"] = ids
    return {n: t.to(device) if isinstance(t, Tensor) else t for n, t in given.items()}
