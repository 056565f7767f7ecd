"""The kernels, each usable on its own; `reference` says what each one means."""

from fastprompt.ops.nf4_linear import nf4_linear
from fastprompt.ops.prompt_attention import prompt_attention

__all__ = ["nf4_linear", "prompt_attention"]
