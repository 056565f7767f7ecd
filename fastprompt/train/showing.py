"""What would be trained, as text: rows with trained tokens marked, and a run before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from rich.text import Text
from torch import nn

from fastprompt.blocks.memory import POLICIES, kept_bytes, size_text
from fastprompt.families import VISION
from fastprompt.patching import Patch
from fastprompt.tapping import has_class_token
from fastprompt.train.config import TrainConfig
from fastprompt.train.templates import IGNORE, ChatTemplate
from fastprompt.train.trainer import PromptTrainer

OPEN, CLOSE = "⟦", "⟧"


def marked(ids: Sequence[int], labels: Sequence[int], template: ChatTemplate) -> Text:
    """The row's text; what trains stands in ⟦ ⟧, and an image's tokens are one ``<image>×N``."""
    text, shown, before = Text(), [], ""
    for trains, run in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORE):
        for token, same in groupby(token for token, _ in run):
            repeated = len(list(same))
            shown += [token] if token == template.image_id else [token] * repeated
            if token == template.image_id:
                after = _decode(shown, template)
                text.append(f"{after[len(before) :]}×{repeated}")
                before = after
        after = _decode(shown, template)
        new, before = after[len(before) :], after
        text.append(f"{OPEN}{new}{CLOSE}" if trains else new, "bold green" if trains else "")
    return text


def _decode(ids: list[int], template: ChatTemplate) -> str:
    # the whole beginning each time: pieces decoded alone lose the spaces between them
    return template.tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def plan(trainer: PromptTrainer, patch: Patch, config: TrainConfig) -> str:
    """Trainable share, steps, and an estimate of memory, of a trainer that has not begun."""
    data = trainer.train_dataset
    checked = data.checked
    width = int(data.lengths.max())
    lines = [
        patch.report(),
        "",
        f"rows     {len(checked):,} train"
        + (f", {len(trainer.eval_dataset):,} held out" if trainer.eval_dataset else ""),
        f"tokens   {_spread(checked.lengths)} a row"
        + (f"; packed into {len(data):,} rows of up to {width}" if config.pack else ""),
        f"steps    {trainer.steps():,} of {config.batch_size} × {config.accumulate} rows",
        "",
        *memory(patch, config, width),
    ]
    if trainer.problems:
        lines += ["", trainer.problems.summary()]
    return "\n".join(lines)


def memory(patch: Patch, config: TrainConfig, width: int) -> list[str]:
    """Lines of an estimate: parameters, their gradients and AdamW's two moments, and what blocks
    keep of the longest batch under each policy. What one block needs while it runs comes on top.

    Args:
        width: tokens of the longest row.
    """
    model = patch.model
    parameters = sum(_bytes(p) for p in model.parameters()) + sum(map(_bytes, model.buffers()))
    trained = sum(_bytes(p) for p in patch.trainable.values())
    lines = [
        "memory, estimated for the longest batch",
        f"  {size_text(parameters):>9}  model",
        f"  {size_text(3 * trained):>9}  gradients and AdamW",
    ]
    dtype = getattr(torch, config.dtype)
    for policy in POLICIES:
        kept = 0
        for tower in patch.anatomy.towers:
            found = patch.memories.get(tower.name)
            if found is not None:
                each = _image_tokens(tower.model) if tower.kind == VISION else width
                tokens = config.batch_size * each
                kept += tokens * sum(kept_bytes(p, policy, dtype, dtype) for p in found.blocks)
        lines.append(f"  {size_text(kept):>9}  kept by blocks under memory={policy}")
    return lines


def _image_tokens(tower: nn.Module) -> int:
    config = tower.config
    return (config.image_size // config.patch_size) ** 2 + has_class_token(tower)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _spread(lengths: np.ndarray) -> str:
    low, middle, high = np.percentile(lengths, [0, 50, 100]).astype(int)
    return f"{low} to {high}, half of them at most {middle},"
