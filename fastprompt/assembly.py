"""A LLaVA out of separate parts: a vision encoder, a language model, a new projector.

transformers' LLaVA has a projector of two layers. M²PT's (and the first LLaVA's) is one linear
layer, which is `LinearLlavaForConditionalGeneration` here: a model type of its own, so that
``save_pretrained`` and, once fastprompt is imported, ``AutoModelForImageTextToText`` take it, and
code without fastprompt refuses it by name and never fills half a projector with random numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastprompt.families import TOWERS, VISION, anatomy
from fastprompt.tapping import has_class_token, make_room

IMAGE_TOKEN = "<image>"
_EVEN = 64  # rows of embeddings are made a multiple of it, as matrix products like them
# of a whole model, by name from its root; the language model alone is in 4-bit
_DENSE = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
# what transformers leaves on a model that it loaded in 4-bit, beside the config's entry
_QUANTIZED = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit")
_QUANTIZED += ("is_4bit_serializable", "hf_device_map")


class LinearLlavaConfig(LlavaConfig):
    """As LLaVA's, of a model whose projector is one linear layer."""

    model_type = "llava_linear"


class LinearLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with one linear layer as projector, as M²PT (arXiv 2409.15657) has it."""

    config_class = LinearLlavaConfig

    def __init__(self, config: LinearLlavaConfig):
        super().__init__(config)
        self.model.multi_modal_projector = self.model.multi_modal_projector.linear_1


_KINDS = {
    "linear": (LinearLlavaConfig, LinearLlavaForConditionalGeneration),
    "mlp": (LlavaConfig, LlavaForConditionalGeneration),
}


def assemble(
    vision: str | Path | PreTrainedModel,
    language: str | Path | PreTrainedModel,
    projector: str = "linear",
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | dict | None = None,
) -> LlavaForConditionalGeneration:
    """Build a LLaVA whose projector is new and untrained.

    The projector reads the patches of the last block but one, without the class token, as LLaVA's
    does.

    Args:
        vision: a folder or hub id (of CLIP whole, too), or a model of transformers.
        language: a folder or hub id, or a causal language model of transformers. A model given is
            taken over, not copied.
        projector: "linear", as M²PT has it, or "mlp": LLaVA-1.5's two layers.
        tokenizer: knows the image token, or room for it. None: ``language``'s; where that is a
            model, the image token gets the first new row after its vocabulary.
        quantization_config: for the language model alone; encoder and projector stay dense.
        dtype: of all parts. None: the language model's own.
        device_map: where to put the language model, on one device; the other parts follow.

    Returns:
        The model, in evaluation mode. `assemble_processor` makes its processor.

    Raises:
        ValueError: a part that cannot be served, or options that do not go together.
    """
    if projector not in _KINDS:
        raise ValueError(f"projector: want one of {', '.join(_KINDS)}; got {projector!r}")
    tongue = _language(language, quantization_config, dtype, device_map)
    if tokenizer is None and not isinstance(language, PreTrainedModel):
        tokenizer = language
    eye = _vision(vision, tongue)
    image_token = _make_room_for_image_token(tongue, tokenizer)

    quantized = getattr(tongue.config, "quantization_config", None)
    config_class, model_class = _KINDS[projector]
    size, patch = eye.config.image_size, eye.config.patch_size
    config = config_class(
        vision_config=eye.config,
        text_config=tongue.config,
        image_token_index=image_token,
        image_seq_length=(size // patch) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if has_class_token(eye) else "full",
        tie_word_embeddings=tongue.config.tie_word_embeddings,
    )
    config.name_or_path = f"{eye.config.name_or_path} + {tongue.config.name_or_path}"
    with torch.device("meta"):
        model = model_class(config)
    model.model.vision_tower, model.model.language_model = eye, tongue.base_model
    model.lm_head = tongue.get_output_embeddings()
    new = model.model.multi_modal_projector.to_empty(device=tongue.device).to(tongue.dtype)
    for part in new.modules():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    model.generation_config = tongue.generation_config
    if quantized is not None:
        quantized.llm_int8_skip_modules = _DENSE
        config.quantization_config = quantized  # where a reload looks for it
        for name in _QUANTIZED:
            if name in vars(tongue):
                setattr(model, name, vars(tongue)[name])
    return model.eval()


def assemble_processor(
    model: LlavaForConditionalGeneration,
    vision: str | Path | nn.Module,
    tokenizer: str | Path | PreTrainedTokenizerBase,
) -> LlavaProcessor:
    """The processor of an assembled model: it writes as many image tokens as the model wants.

    Args:
        model: of `assemble`, not yet patched; `Patch.prepare` goes on from here.
        vision: folder or hub id with the encoder's image processor, or an image processor.
        tokenizer: folder or hub id, or the tokenizer that `assemble` was given. It is given the
            image token if it has none, and a pad token (its unknown or end token) if it has none.

    Raises:
        ValueError: a tokenizer whose image token is not the model's.
    """
    tokens = _tokenizer(tokenizer)
    image_processor = (
        AutoImageProcessor.from_pretrained(vision) if isinstance(vision, str | Path) else vision
    )
    got, want = tokens.convert_tokens_to_ids(IMAGE_TOKEN), model.config.image_token_index
    if got != want:
        raise ValueError(f"tokenizer: want {IMAGE_TOKEN} as {want}, as the model has it; got {got}")
    processor = LlavaProcessor(image_processor, tokens, chat_template=tokens.chat_template)
    make_room(processor, model, anatomy(model).tower(VISION), rows=0)
    return processor


def command(arguments: list[str]) -> int:
    """``fastprompt assemble``: 0; 2 if the parts do not fit, or the folder is not empty."""
    parser = argparse.ArgumentParser(
        "fastprompt assemble",
        description="Write a LLaVA of separate parts, its projector new and untrained: the --model "
        "of fastprompt train.",
    )
    parser.add_argument("vision", help="hub id or folder of an image encoder, such as CLIP's")
    parser.add_argument("language", help="hub id or folder of a language model")
    parser.add_argument("--projector", choices=_KINDS, default="linear", help="linear, as M²PT's")
    parser.add_argument("--seed", type=int, default=0, help="of the projector (0)")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    given = parser.parse_args(arguments)
    try:
        if given.out.exists() and any(given.out.iterdir()):
            raise ValueError(f"--out: want a new or an empty folder, got {given.out}")
        torch.manual_seed(given.seed)
        model = assemble(given.vision, given.language, given.projector)
        processor = assemble_processor(model, given.vision, given.language)
        model.save_pretrained(given.out)
        processor.save_pretrained(given.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}")
        return 2
    print(f"wrote {given.out}: fastprompt train --model {given.out} --method projector …")
    return 0


def _language(
    given: str | Path | PreTrainedModel,
    quantization_config: BitsAndBytesConfig | None,
    dtype: torch.dtype | None,
    device_map: str | dict | None,
) -> PreTrainedModel:
    if isinstance(given, PreTrainedModel):
        if quantization_config is not None or device_map is not None:
            raise ValueError(
                "quantization_config, device_map: want a folder or hub id, got a model"
            )
        model = given if dtype is None else given.to(dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            given,
            quantization_config=quantization_config,
            dtype="auto" if dtype is None else dtype,
            device_map=device_map,
        )
    if len({p.device for p in model.parameters()}) > 1:
        raise ValueError("device_map: want the language model on one device, got it on several")
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ValueError(f"language: want a causal language model, got {type(model).__name__}")
    anatomy(model)  # refuses what fastprompt does not serve, by name
    return model


def _vision(given: str | Path | PreTrainedModel, tongue: PreTrainedModel) -> PreTrainedModel:
    kind = type(given)
    if not isinstance(given, PreTrainedModel):
        config = AutoConfig.from_pretrained(given)
        config = getattr(config, "vision_config", config)  # a whole CLIP's has it inside
        kind = MODEL_MAPPING.get(type(config), type(config))
    if not any(f.kind == VISION and kind.__name__ in f.classes for f in TOWERS):
        names = ", ".join(f.name for f in TOWERS if f.kind == VISION)
        raise ValueError(f"vision: want an encoder of {names}; got {kind.__name__}")
    if not isinstance(given, PreTrainedModel):
        given = kind.from_pretrained(given, config=config, dtype=tongue.dtype)
    return given.to(tongue.device, tongue.dtype)


def _tokenizer(given: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """With an image token and a pad token."""
    tokens = given
    if not isinstance(tokens, PreTrainedTokenizerBase):
        tokens = AutoTokenizer.from_pretrained(given)
    if IMAGE_TOKEN not in tokens.get_vocab():
        token = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
        tokens.add_tokens([token], special_tokens=True)
    if tokens.pad_token is None:
        tokens.pad_token = tokens.unk_token or tokens.eos_token
    return tokens


@torch.no_grad()
def _make_room_for_image_token(
    tongue: PreTrainedModel, tokenizer: str | Path | PreTrainedTokenizerBase | None
) -> int:
    """The image token's id; new rows of both embeddings are the mean of the old ones."""
    rows = tongue.get_input_embeddings().num_embeddings
    if tokenizer is None:
        token = rows
    else:
        tokens = _tokenizer(tokenizer)
        token = tokens.convert_tokens_to_ids(IMAGE_TOKEN)
        tongue.generation_config.pad_token_id = tokens.pad_token_id
    if token >= rows:
        tongue.resize_token_embeddings(token + 1, pad_to_multiple_of=_EVEN, mean_resizing=False)
        for weight in {
            tongue.get_input_embeddings().weight,
            tongue.get_output_embeddings().weight,
        }:
            weight[rows:] = weight[:rows].float().mean(0).to(weight.dtype)
    return token


# at import, or from_pretrained would not know the type of a folder that `assemble` led to
AutoConfig.register(LinearLlavaConfig.model_type, LinearLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(
    LinearLlavaConfig, LinearLlavaForConditionalGeneration, exist_ok=True
)
