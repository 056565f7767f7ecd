"""Small encoders for tests, one with nothing in it and tiny random CLIPs as files, and models."""

import json
from pathlib import Path

import tiny
import torch
import transformers as tf
from torch import nn

from fastprompt.instruction import Encoder, InstructionViT

SIDE = 16  # pixels


class ToyEncoder(Encoder):
    """Sums of letters, and one linear layer on pixels."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.width, self.calls = width, 0
        self.noise = nn.Dropout(0.5)  # which only a mistake makes heard
        self.text, self.image = nn.Embedding(128, width), nn.Linear(3 * SIDE * SIDE, width)

    def encode_text(self, texts):
        return torch.stack([self.text(torch.tensor([*text.encode()])).sum(0) for text in texts])

    def encode_images(self, pixel_values):
        self.calls += 1
        return self.noise(self.image(pixel_values.to(self.image.weight.dtype).flatten(1)))

    def text_parameters(self):
        return [self.text.weight]


def tokenizer(words: list[str]) -> tf.PreTrainedTokenizerFast:
    """One token a word, ending in one that CLIP's text tower reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
    known["<end>"] = 63
    tokens = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 63)]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


def clip_folder(folder: Path) -> Path:
    """A tiny CLIPModel of transformers and its tokenizer, saved."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = tf.CLIPConfig(
        text_config=dict(**sizes, vocab_size=64, max_position_embeddings=16, eos_token_id=63),
        vision_config=dict(**sizes, image_size=SIDE, patch_size=8),
        projection_dim=24,
    )
    tf.CLIPModel(config).save_pretrained(folder)
    tokenizer(["a", "photo", "of", "cat", "dog", "the"]).save_pretrained(folder)
    return folder


OPEN_CLIP = dict(
    embed_dim=24,
    vision_cfg=dict(image_size=SIDE, layers=2, width=32, head_width=16, patch_size=8),
    text_cfg=dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=2),
)


def open_clip_files(folder: Path) -> tuple[Path, Path]:
    """A tiny CLIP of open_clip: its config, and its weights, as files."""
    import open_clip
    from safetensors.torch import save_file

    config, weights = folder / "tiny-clip.json", folder / "tiny-clip.safetensors"
    config.write_text(json.dumps(OPEN_CLIP))
    model = open_clip.CLIP(**OPEN_CLIP)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, weights)
    return config, weights


NAMES = ["cat", "dog", "owl", "fox", "bee", "elk", "yak"]


def images(n=4, seed=1, dtype=torch.float32):
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exemplars(classes=7):
    return [images(2 + i % 2, seed=100 + i) for i in range(classes)]


def build(backbone=tiny.vit, classes=NAMES, encoder=None, images=None, **options):
    torch.manual_seed(0)
    model = InstructionViT(backbone(), encoder or ToyEncoder(), **options)
    wanted = options.get("kind") in ("image", "mixed")
    model.set_classes(classes, exemplars(len(classes)) if wanted and images is None else images)
    return model
