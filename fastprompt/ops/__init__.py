"""The kernels, each usable on its own; `reference` says what each one means."""

from fastprompt.ops.cosine_logits import cosine_logits
from fastprompt.ops.dequantize_4bit import dequantize_4bit
from fastprompt.ops.gelu import gelu
from fastprompt.ops.layer_norm import layer_norm
from fastprompt.ops.linear_cross_entropy import linear_cross_entropy
from fastprompt.ops.nf4_linear import nf4_linear
from fastprompt.ops.prompt_attention import prompt_attention
from fastprompt.ops.quantize_rows import quantize_rows
from fastprompt.ops.rms_norm import rms_norm
from fastprompt.ops.rope import rope
from fastprompt.ops.select_prompts import select_prompts, sum_of
from fastprompt.ops.swiglu import swiglu

__all__ = [
    "cosine_logits",
    "dequantize_4bit",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "nf4_linear",
    "prompt_attention",
    "quantize_rows",
    "rms_norm",
    "rope",
    "select_prompts",
    "sum_of",
    "swiglu",
]
