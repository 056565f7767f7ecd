"""One contender on the tiny model, and when what it computes is right.

Numbers are right if they are at most twice as far from float64 as eager PyTorch's (`check`): eager
is the same contender in float32, plain.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.check import judge, limit
from benchmarks.field.tasks import Batch, Task, load_model

WORKS = "works"


def in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def said(probe: Callable[[], str]) -> str:
    """What a probe says; of an error its first line."""
    try:
        return probe()
    except Exception as error:  # anyone's code may raise anything
        return f"error: {in_a_line(error)}"


@dataclass
class Case:
    """A contender's own code and the tiny task."""

    module: ModuleType
    task: Task

    @property
    def batch(self) -> Batch:
        return self.task.exam[0]

    def model(
        self, dtype: torch.dtype = torch.float32, folder: str = "", four_bit: bool = False
    ) -> nn.Module:
        """A tuned model whose trained parameters are the same noise at every call."""
        base = load_model(folder or self.task.model, four_bit, dtype)
        return noisy(self.module.tune(base, self.task.start), dtype)

    def truth(self, folder: str = "") -> tuple[dict[str, Tensor], dict[str, float]]:
        """`results` in float64, and how far from them each may be."""
        true = results(self.model(torch.float64, folder), self.batch)
        eager = results(self.model(folder=folder), self.batch)
        return true, {name: limit(eager[name], true[name]) for name in true}


def noisy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As after a training: far from where it began, so that what is lost shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in sorted(trainable(model).items()):
            if p.dtype != dtype:
                p.data = p.data.to(dtype)
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def results(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Gradients of one training step, by parameter, and the logits in evaluation."""
    model.zero_grad()
    model.train()
    model(**batch).loss.backward()
    found = {n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None}
    model.eval()
    return {**found, "logits": logits_of(model, batch["input_ids"])}


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """[B, N, V]; those of soft tokens, which stand first, are left out."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[:, -ids.shape[1] :]


def verdict(
    got: dict[str, Tensor], truth: dict[str, Tensor], limits: dict[str, float], when: str = ""
) -> str:
    """What a probe says of `results`."""
    missing = truth.keys() - got.keys()
    if missing:
        return f"wrong: {when}{len(missing)} parameters get no gradient"
    found = judge(got, truth, limits, torch.float32)
    if found.right:
        return WORKS
    name = found.name
    off = float(torch.dist(got[name].double(), truth[name]) / truth[name].norm())
    return f"wrong: {when}{'logits' if name == 'logits' else 'gradients'} are off by {off:.1%}"
