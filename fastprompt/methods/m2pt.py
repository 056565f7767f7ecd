"""M2PT, multimodal prompt tuning for zero-shot instruction learning (arXiv 2409.15657)."""

from dataclasses import dataclass

from fastprompt.families import TEXT, VISION, Anatomy, Block, Tower
from fastprompt.methods.base import DeepMethod
from fastprompt.methods.lengths import Lengths
from fastprompt.tapping import SHOWN


@dataclass(frozen=True)
class M2PT(DeepMethod):
    """Visual prompts in every block of the vision encoder, textual prompts in every block of the
    language model, and the projector between them trained; all else frozen.

    Args:
        vision_tokens, text_tokens: prompt rows per block. The paper's headline is 20 and 10.
        train_projector: the paper's "interaction layer".
        train_lm_head: as the released code does; the paper's 0.09% is without it. A head that
            shares its weight with the embeddings is untied from them, which stay frozen.
        visual_prompts: what the projector sees of an image. "drop": its patches alone. "raw", as
            the released code has it: rows 1 .. P-1 written for the block after the tapped one,
            untouched, then the class token, then the patches. "context", as the paper's figure
            has it: the prompts' outputs of the tapped block, then the patches. Both make an image
            P tokens longer, and are for LLaVA 1 and 1.5: `Patch.prepare` makes room for them in the
            text.
        layers, init, dropout, and lengths by block: see `DeepMethod`; "raw"'s rows, of the block
            after the tapped one, are there whatever the layers.
    """

    vision_tokens: Lengths = 10
    text_tokens: Lengths = 10
    train_projector: bool = True
    train_lm_head: bool = False
    visual_prompts: str = "drop"

    def asked(self) -> dict[str, Lengths]:
        return {VISION: self.vision_tokens, TEXT: self.text_tokens}

    def trains(self) -> tuple[str, ...]:
        return ("projector",) * self.train_projector + ("lm_head",) * self.train_lm_head

    def shown(self) -> str:
        return self.visual_prompts

    def blocks(self, tower: Tower) -> list[Block]:
        raw = tower.kind == VISION and self.visual_prompts == "raw"
        return [*super().blocks(tower), *tower.unread[:1] * raw]

    def check(self, anatomy: Anatomy) -> None:
        if "projector" not in anatomy.parts:
            raise ValueError(f"M2PT: want a vision-language model, got {anatomy.family}")
        if self.train_lm_head and "lm_head" not in anatomy.parts:
            raise ValueError("M2PT(train_lm_head=True): want a model with lm_head, got one without")
        super().check(anatomy)
        self._check_shown(anatomy)

    def _check_shown(self, anatomy: Anatomy) -> None:
        shown, vision = self.visual_prompts, anatomy.tower(VISION)
        if shown not in SHOWN:
            raise ValueError(f"visual_prompts: want one of {', '.join(SHOWN)}; got {shown!r}")
        if shown == "drop":
            return
        wants = f"visual_prompts={shown!r}: want"
        if not anatomy.shows:
            raise ValueError(f"{wants} a LLaVA (1 or 1.5), got {anatomy.family}, which has 'drop'")
        layer = anatomy.host.config.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(f"{wants} one tapped layer, got vision_feature_layer {layer}")
        if not isinstance(self.vision_tokens, int):
            raise ValueError(
                f"{wants} vision_tokens of one length for all blocks, got {self.vision_tokens}"
            )
        if not self.vision_tokens:
            raise ValueError(f"{wants} vision_tokens of 1 or more, got 0")
        if not vision.blocks or (shown == "raw" and not vision.unread):
            after = ", and a block after it" * (shown == "raw")
            raise ValueError(
                f"{wants} the output of a block tapped{after}; got vision_feature_layer {layer} "
                f"of {len(vision.blocks) + len(vision.unread)} blocks"
            )
        if shown == "context" and vision.blocks[-1] not in self.blocks(vision):
            raise ValueError(
                f"{wants} a prompt in the tapped block, the last one; got layers={self.layers!r}"
            )
        if not vision.hands_on:
            raise ValueError(
                f"{wants} a vision tower that hands keywords on to its blocks; "
                f"{vision.family} does so in a transformers newer than 5.17"
            )
