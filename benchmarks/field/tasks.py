"""A task as a file: what every contender trains on and is examined with, made once.

Whoever reads it needs torch and any transformers, and nothing of fastprompt.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

IGNORE = -100
Batch = dict[str, Tensor]  # keyword arguments of the model's forward, ``labels`` among them


@dataclass
class Task:
    """One small task.

    Attributes:
        name: "tiny" or "demo".
        model: the frozen model's folder.
        four_bit: whether it is loaded in NF4, computing in bfloat16; else it is float32.
        batches: one for each training step.
        watched: rows by which a learning rate is chosen.
        exam: held-out rows.
        families: of each row of the exam, its kind of question; empty if there is one kind.
        start: what prompts may begin as: token ids [T], images, a text, a tokenizer's folder.
        projector_rate: learning rate of the projector, the same for everybody.
    """

    name: str
    model: str
    four_bit: bool
    batches: list[Batch]
    watched: list[Batch]
    exam: list[Batch]
    families: list[str] = field(default_factory=list)
    start: dict[str, Tensor | str] = field(default_factory=dict)
    projector_rate: float = 3e-3

    def save(self, file: str | Path) -> None:
        torch.save(asdict(self), file)

    @classmethod
    def load(cls, file: str | Path) -> "Task":
        return cls(**torch.load(file, weights_only=True))

    def fresh_model(self) -> nn.Module:
        """The frozen model as a user would load it."""
        return mended(load_model(self.model, self.four_bit))


def load_model(folder: str, four_bit: bool, dtype: torch.dtype | None = None) -> nn.Module:
    """A model from its folder; in 4 bits it computes in ``dtype``, by default in bfloat16."""
    config = transformers.AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    if transformers.__version__.startswith("4."):  # which looks for it under its old name
        text.rope_theta = (getattr(text, "rope_parameters", None) or {})["rope_theta"]
    dtype = dtype or (torch.bfloat16 if four_bit else torch.float32)
    options = dict(quantization_config=_nf4(dtype)) if four_bit else {}
    kind = transformers.AutoModelForCausalLM
    if config.model_type == "llava":
        kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(
        folder, config=config, dtype=dtype, local_files_only=True, **options
    ).eval()


def mended(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking 4-bit weights in a forward without gradients, as it does on
    CPUs with AVX512-BF16: later gradients are wrong. `probes` looks at what happens otherwise."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _nf4(dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    dense = ["multi_modal_projector", "model.multi_modal_projector", "lm_head"]
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=dense,
    )
