"""What tests train on: a tiny LLaVA with its processor, conversations about coloured shapes."""

import json
import random
from pathlib import Path

import tiny
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = [
    "<unk>", "<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>",
]  # fmt: skip
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# what the published LLaVA-1.5 processor has: images first, and no end of an answer
LLAVA = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def tokenizer(chat_template: str | None = CHATML, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """Bytes as tokens: every text is known."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", additional_special_tokens=SPECIAL[4:], chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def processor(chat_template: str | None = CHATML, **more) -> LlavaProcessor:
    images = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_resize=True
    )
    return LlavaProcessor(
        images, tokenizer(chat_template, **more), patch_size=8, chat_template=chat_template,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>",
    )  # fmt: skip


def save_llava(folder: Path, **more) -> Path:
    """A tiny random LLaVA that this tokenizer speaks, with its processor."""
    torch.manual_seed(0)
    text = tiny.tf.LlamaConfig(
        **{**tiny.TEXT, "vocab_size": 272, "max_position_embeddings": 512, "pad_token_id": 3}
    )
    config = LlavaConfig(
        vision_config=tiny.VISION_CONFIGS["clip"](), text_config=text, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_token_index=4, image_seq_length=4,
        pad_token_id=3,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(folder)
    processor(**more).save_pretrained(folder)
    return folder


def draw(colour: str, shape: str, size: int = 24) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    pen, box = ImageDraw.Draw(image), (4, 4, size - 4, size - 4)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(4, size - 4), (size // 2, 4), (size - 4, size - 4)], fill=colour)
    return image


def rows(folder: Path, count: int = 12, seed: int = 0) -> list[dict]:
    """Conversations of one or two questions, each sixth without an image; images in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, made = random.Random(seed), []
    for i in range(count):
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        turns = [("What colour is it?", colour), ("And which shape?", f"a {shape}")]
        row = {"id": f"row-{seed}-{i}"}
        if i % 6 == 5:
            turns = [(f"Say {colour}.", colour)]
        else:
            row["image"] = f"{seed}-{i}.png"
            draw(colour, shape).save(folder / row["image"])
            turns = turns[: rng.choice((1, 2))]
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        row["conversations"] = [
            {"from": who, "value": text}
            for asked, answer in turns
            for who, text in (("human", asked), ("gpt", answer))
        ]
        made.append(row)
    return made


def write_jsonl(path: Path, made: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path
