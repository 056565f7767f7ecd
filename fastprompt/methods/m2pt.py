"""M2PT, multimodal prompt tuning for zero-shot instruction learning (arXiv 2409.15657)."""

from dataclasses import dataclass

from fastprompt.families import TEXT, VISION, Anatomy
from fastprompt.methods.base import Method


@dataclass(frozen=True)
class M2PT(Method):
    """Visual prompts in every block of the vision encoder, textual prompts in every block of the
    language model, and the projector between them trained; all else frozen.

    Args:
        vision_tokens, text_tokens: prompt rows per block. The paper's headline is 20 and 10.
        train_projector: the paper's "interaction layer".
        train_lm_head: as the released code does; the paper's 0.09% is without it.
        visual_prompts: "drop": the projector sees the patch tokens alone.
    """

    vision_tokens: int = 10
    text_tokens: int = 10
    train_projector: bool = True
    train_lm_head: bool = False
    visual_prompts: str = "drop"

    def lengths(self) -> dict[str, int]:
        return {VISION: self.vision_tokens, TEXT: self.text_tokens}

    def trains(self) -> tuple[str, ...]:
        return ("projector",) * self.train_projector + ("lm_head",) * self.train_lm_head

    def check(self, anatomy: Anatomy) -> None:
        if "projector" not in anatomy.parts:
            raise ValueError(f"M2PT: want a vision-language model, got {anatomy.family}")
        if self.train_lm_head and "lm_head" not in anatomy.parts:
            raise ValueError("M2PT(train_lm_head=True): want a model with lm_head, got one without")
        if self.visual_prompts != "drop":
            raise ValueError(f"visual_prompts: want 'drop', got {self.visual_prompts!r}")
        super().check(anatomy)
