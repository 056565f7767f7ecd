"""How a frozen model is loaded in 4 bits."""

import torch
from transformers import BitsAndBytesConfig

from fastprompt.families import HOSTS


def four_bit(dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """transformers' ``quantization_config`` for a backbone to tune, as ``fastprompt train`` has it.

    NF4 with nested scales (QLoRA, arXiv 2305.14314), 4.13 bits a weight. Projectors and lm_head
    stay dense: they are small, and trained or loaded from a file, so not worth an error of 9%.

    Args:
        dtype: that products are computed in; bitsandbytes' own default, float32, is slow.
    """
    projectors = dict.fromkeys(host.projector for host in HOSTS)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # names count from the root: of a host alone, and inside a model with a head
        llm_int8_skip_modules=[*projectors, *(f"model.{name}" for name in projectors), "lm_head"],
    )
