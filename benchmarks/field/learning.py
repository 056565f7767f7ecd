"""The training loop that everybody runs, and the exam."""

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean, median

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.field.tasks import IGNORE, Batch, Task

WARM_UP = 2  # steps that are not timed
CLIP = 1.0  # norm of the gradient


@dataclass
class History:
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        """Of the steps after the first ones; of all where there are no others."""
        return median(self.step_ms[WARM_UP:] or self.step_ms)


def train(model: nn.Module, batches: list[Batch], rate: float, projector_rate: float) -> History:
    """A step a batch: forward, backward, clipping, AdamW. Rates warm up and fall as a cosine."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    projector = [p for name, p in named if "multi_modal_projector" in name]
    others = [p for name, p in named if "multi_modal_projector" not in name]
    groups = [(others, rate), (projector, projector_rate)]
    optimizer = torch.optim.AdamW(
        [dict(params=params, lr=lr, peak=lr) for params, lr in groups if params], weight_decay=0.0
    )
    history, steps = History(), len(batches)
    model.train()
    for step, batch in enumerate(batches):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _share(step, steps)
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(others + projector, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        history.losses.append(loss.item())
        history.step_ms.append(1e3 * (time.perf_counter() - start))
    model.eval()
    return history


def _share(step: int, steps: int) -> float:
    """Of the peak rate: a linear warm-up over a tenth of all steps, within a cosine."""
    warm = min(1.0, (step + 1) / max(1, steps // 10))
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def examine(model: nn.Module, batches: list[Batch]) -> tuple[list[bool], float]:
    """Whether each row's labels are all the likeliest next tokens, and the mean loss of labels.

    That is whether greedy decoding would give exactly the answer.
    """
    model.eval()
    right, losses, counted = [], 0.0, 0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"][:, 1:]
        # soft tokens make logits longer, at the front
        logits = model(**inputs).logits[:, -labels.shape[1] - 1 : -1]
        due = labels != IGNORE
        right += ((logits.argmax(-1) == labels) | ~due).all(1).tolist()
        losses += float(F.cross_entropy(logits[due].float(), labels[due], reduction="sum"))
        counted += int(due.sum())
    return right, losses / counted


def scores(task: Task, right: list[bool]) -> dict[str, float]:
    """Accuracy over all rows, and the mean over families of questions where there are several."""
    found = dict(accuracy=fmean(right))
    if task.families:
        by_family = defaultdict(list)
        for family, is_right in zip(task.families, right, strict=True):
            by_family[family].append(is_right)
        found["macro"] = fmean(map(fmean, by_family.values()))
    return found
