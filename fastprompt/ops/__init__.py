"""The kernels, each usable on its own; `reference` says what each one means."""

from fastprompt.ops.cosine_logits import cosine_logits
from fastprompt.ops.nf4_linear import nf4_linear
from fastprompt.ops.prompt_attention import prompt_attention
from fastprompt.ops.select_prompts import select_prompts, sum_of

__all__ = ["cosine_logits", "nf4_linear", "prompt_attention", "select_prompts", "sum_of"]
