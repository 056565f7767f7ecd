"""Where the demo's prompts start: as hidden states of a sentence and of training images.

M²PT starts from Xavier-uniform rows. Every block normalises its rows, so random ones soak up
attention at full strength (60% in this language model's later layers), and a short run never sees
the image. Rows taken from the model's own hidden states make a patched model begin as the base
model with a sentence before the text.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import fastprompt
from fastprompt.demo import data, language
from fastprompt.methods import M2PT

SENTENCE = "Look at the picture and answer the question about the shape in it with one word."
SCALE = 0.1  # root mean square of a row: blocks are blind to it, learning rates are not


@torch.no_grad()
def starts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, images: Tensor, size: int, method: M2PT
) -> dict[str, list[Tensor]]:
    """Rows for every block, to be asked for *before* the model is patched.

    Args:
        images: uint8 [n, 3, h, w], n at least ``method.vision_tokens``: one patch of each is taken.

    Returns:
        "vision" and "text" -> one [P, D] tensor per block.
    """
    base = fastprompt.patch(model, M2PT(0, 0))  # our 4-bit products: bitsandbytes' would repack
    ids = tokenizer(language.BOS + SENTENCE, add_special_tokens=False).input_ids
    ids = torch.tensor([ids[: method.text_tokens]])
    text = model.model.language_model(input_ids=ids, output_hidden_states=True, use_cache=False)
    pixels = data.pixels(images[: method.vision_tokens], size).to(model.dtype)
    vision = model.model.vision_tower(pixels, output_hidden_states=True)
    base.undo()
    patch = torch.arange(len(pixels)) % (vision.last_hidden_state.shape[1] - 1) + 1
    return {
        "text": [_scaled(h[0]) for h in text.hidden_states],
        "vision": [_scaled(h[range(len(h)), patch]) for h in vision.hidden_states],
    }


def _scaled(rows: Tensor) -> Tensor:
    rows = rows.float()
    return SCALE * rows / rows.square().mean(-1, keepdim=True).sqrt()


@torch.no_grad()
def begin(patch, rows: dict[str, list[Tensor]]) -> None:
    """Fill a fresh patch's prompts."""
    for tower in patch.anatomy.towers:
        for block, start in zip(tower.blocks, rows[tower.kind], strict=False):
            if hasattr(block.layer, "fastprompt"):
                block.layer.fastprompt.tokens.copy_(start)
    patch.refresh()
