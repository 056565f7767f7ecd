"""Training and testing of the demo's models, and the baselines that need no backbone step."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastprompt.instruction import InstructionViT

# pixels, labels, and what gives the encoder's features, where the model selects by them
Batch = tuple[Tensor, Tensor, Callable[[], Tensor] | None]
PROMPTS = (".rows", "fastprompt.tokens")  # how their parameters' names end


@dataclass(frozen=True)
class Recipe:
    """AdamW with warm-up and cosine decay; head, projection and prompts apart."""

    steps: int = 150
    batch: int = 32
    head_lr: float = 5e-3
    projection_lr: float = 3e-3
    prompt_lr: float = 2e-2
    weight_decay: float = 1e-2  # of head and projection

    def groups(self, model: nn.Module) -> list[dict]:
        """What of the model wants gradients, as an optimiser takes it."""
        rates = dict(head=self.head_lr, projection=self.projection_lr, prompts=self.prompt_lr)
        parts: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
        for name, p in model.named_parameters():
            if p.requires_grad:
                part = "prompts" if name.endswith(PROMPTS) else name.partition(".")[0]
                parts[part if part in parts else "head"].append(p)
        return [
            dict(params=own, lr=rates[name],
                 weight_decay=0.0 if name == "prompts" else self.weight_decay)
            for name, own in parts.items() if own
        ]  # fmt: skip


@dataclass
class History:
    """Of one training."""

    losses: list[float] = field(default_factory=list)
    accuracy: dict[int, float] = field(default_factory=dict)  # by step
    seconds: float = 0.0  # without watching


def train(
    model: nn.Module,
    batch: Callable[[int], Batch],
    recipe: Recipe,
    watch: Callable[[], float] | None = None,
    watched: tuple[int, ...] = (),
    **options: object,
) -> History:
    """Train whatever of the model wants gradients; ``watch`` is asked at the steps ``watched``."""
    history = History()
    optimizer = torch.optim.AdamW(recipe.groups(model))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], total_steps=max(recipe.steps, 2),
        pct_start=0.1, cycle_momentum=False,
    )  # fmt: skip
    for step in range(recipe.steps + 1):
        if watch and step in watched:
            history.accuracy[step] = watch()
            model.train()
        if step == recipe.steps:
            break
        pixels, labels, query = batch(step)
        started = time.perf_counter()
        # the encoder's pass is a part of what selecting costs
        loss = model(pixels, labels, query=query and query(), **options).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.losses.append(loss.item())
        history.seconds += time.perf_counter() - started
    return history


@torch.no_grad()
def logits(
    model: InstructionViT,
    pixels: Tensor,
    query: Tensor | None,
    *,
    size: int = 64,
    **options: object,
) -> tuple[Tensor, float]:
    """[n, C] in evaluation mode, and seconds an image."""
    was, parts, started = model.training, [], time.perf_counter()
    model.eval()
    for at in range(0, len(pixels), size):
        own = None if query is None else query[at : at + size]
        parts.append(model(pixels[at : at + size], query=own, **options).logits)
    model.train(was)
    return torch.cat(parts), (time.perf_counter() - started) / max(1, len(pixels))


@torch.no_grad()
def by_every_way(
    model: InstructionViT, pixels: Tensor, query: Tensor | None, size: int
) -> tuple[dict[str, Tensor], float]:
    """Scores [n, C] by head, by cosine and by both, out of one pass, and seconds an image."""
    was, started = model.training, time.perf_counter()
    parts: dict[str, list[Tensor]] = {"head": [], "cosine": [], "both": []}
    model.eval()
    for at in range(0, len(pixels), size):
        own = None if query is None else query[at : at + size]
        out = model(pixels[at : at + size], query=own, predict="both", details=True)
        parts["head"].append(out.head_logits)
        parts["both"].append(out.logits)
        parts["cosine"].append(out.logits - out.head_logits.log_softmax(-1))  # -inf: not kept
    model.train(was)
    seconds = (time.perf_counter() - started) / max(1, len(pixels))
    return {way: torch.cat(own) for way, own in parts.items()}, seconds


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return (scores.argmax(1) == labels).float().mean().item()


def linear_probe(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, penalty: float = 1e-3
) -> Tensor:
    """Logits [n, classes] of a logistic regression on frozen features, trained to its end."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    head = nn.Linear(train.shape[1], classes)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    x = (train - mean) / std

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels) + penalty * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return head((test - mean) / std)


def nearest_prototype(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Cosine [n, classes] to the mean unit feature of each class."""
    mean = train.mean(0)
    train, test = (normalize(x - mean, dim=1) for x in (train, test))
    prototypes = torch.stack([train[labels == c].mean(0) for c in range(classes)])
    return test @ normalize(prototypes, dim=1).mT
