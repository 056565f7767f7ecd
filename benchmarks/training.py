"""What training steps have in common: what is recomputed, what a step gives, who takes part.

A step is forward, backward and AdamW's step on what trains. Its results are the loss and the
gradients, those of each tower's prompts and of each other part as one vector. The truth is the
literal form (`fastprompt.concatenation`) in float32, in float64 where float32 is measured; the
limit is twice what the same form is off by in the dtype measured, and one rounding.
"""

import contextlib
import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprompt
from benchmarks import check
from benchmarks.isolated import Meter
from benchmarks.registry import NotMeasured, Provider, Step, Verdict
from fastprompt.concatenation import concatenate
from fastprompt.methods import Method
from fastprompt.trained import trained_copy

NONE, BALANCED, ALL, HOST = MODES = (
    "recompute none", "recompute balanced", "recompute all", "recompute all, inputs on the host",
)  # fmt: skip
MEMORY = dict(zip(MODES, ("speed", "balanced", "low", "offload"), strict=True))
GRAPHED = 4  # the largest batch whose step is worth a CUDA graph: beyond, launches hide


@dataclass
class Case(ABC):
    """One shape. Each provider makes a model of its own, with the same weights and prompts."""

    parts: ClassVar[tuple[str, ...]] = ()  # modules that train beside the prompts

    shape: Any
    dtype: torch.dtype
    device: str
    meter: Meter | None = field(default=None, init=False)
    truth_file: str = field(default="", init=False)
    peak: float | None = field(default=None, init=False)

    @abstractmethod
    def build(self) -> nn.Module:
        """The model as a user would load it, in ``dtype`` on ``device``."""

    @abstractmethod
    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Keyword arguments of its forward, labels among them."""

    @property
    @abstractmethod
    def method(self) -> Method: ...

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().train()
        if self.meter:
            self.meter.start()
        return model

    def trained(self, model: nn.Module, prompts: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
        """Everything that trains, by name; the prompts get the same values in every model."""
        torch.manual_seed(1)
        with torch.no_grad():
            for prompt in prompts.values():
                # drawn on the CPU, so that they do not depend on dtype and device
                prompt.tokens.copy_(torch.randn(prompt.tokens.shape) * 0.1)
        found = {f"{name}.tokens": prompt.tokens for name, prompt in prompts.items()}
        for part in self.parts:
            named = model.get_submodule(part).named_parameters()
            found |= {f"{part}.{name}": p for name, p in named}
        return found

    def results(self, loss: Tensor, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """The loss, and one gradient for each tower and part."""
        groups: dict[str, list[Tensor]] = {}
        for name, p in trained.items():
            part = next((part for part in self.parts if name.startswith(f"{part}.")), None)
            groups.setdefault(part or name.split(".layers.")[0], []).append(p.grad.flatten())
        return dict(loss=loss) | {f"d {name}": torch.cat(g) for name, g in groups.items()}


# ---- the two forms ----


def literal(case: Case, model: nn.Module) -> dict[str, nn.Parameter]:
    """The official way: prompt rows written before each block, in place."""
    prompts = concatenate(model, case.method)
    for part in case.parts:
        parent, _, child = part.rpartition(".")
        setattr(model.get_submodule(parent), child, trained_copy(model.get_submodule(part)))
    for module in model.modules():  # FACTS: else bitsandbytes' gradients on such CPUs go wrong
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return case.trained(model, prompts)


def checkpointing(model: nn.Module, mode: str) -> Callable[[], contextlib.AbstractContextManager]:
    """transformers' own recomputation, and the context that its forward is to run in."""
    if mode == BALANCED:
        raise NotMeasured("transformers recomputes whole layers or nothing")
    if mode != NONE:
        old = model.gradient_checkpointing_enable  # its name before transformers 5.23
        getattr(model, "activation_checkpointing_enable", old)(dict(use_reentrant=False))
    if mode != HOST:
        return contextlib.nullcontext
    pinned = torch.cuda.is_available()
    return lambda: torch.autograd.graph.save_on_cpu(pin_memory=pinned)


def step_of(
    case: Case,
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    **more: bool,
) -> Step:
    """``more``: of AdamW."""
    given = case.inputs(case.dtype)
    fused = case.device == "cuda"
    optimizer = torch.optim.AdamW(trained.values(), lr=7e-4, weight_decay=0.0, fused=fused, **more)

    def run() -> tuple[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with context():
            loss = model(**given).loss
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    run.optimizer = optimizer
    return Step(run, lambda got: _metered(case, got[0], trained))


def _metered(case: Case, loss: Tensor, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    case.peak = case.meter.peak() if case.meter else None  # before the truth takes room
    return case.results(loss, trained)


# ---- providers ----


def ref(case: Case, mode: str) -> Step:
    model = case.model()
    context = checkpointing(model, mode)
    return step_of(case, model, literal(case, model), context)


def compiled(**options: str) -> Callable[[Case, str], Step]:
    def build(case: Case, mode: str) -> Step:
        model = case.model()
        context = checkpointing(model, mode)
        trained = literal(case, model)
        for module in list(model.modules()):
            if hasattr(module, "fastprompt"):  # a layer, with its prompt
                module.compile(dynamic=False, **options)
        return step_of(case, model, trained, context)

    return build


def side_keys(case: Case, mode: str) -> Step:
    model = case.model()
    return step_of(case, model, patched(case, model, mode))


def patched(
    case: Case, model: nn.Module, mode: str, compute: str = "auto"
) -> dict[str, nn.Parameter]:
    patch = fastprompt.patch(model, case.method, memory=MEMORY[mode], compute=compute)
    trained = case.trained(model, patch.prompts)
    if trained.keys() != patch.trainable.keys():
        raise RuntimeError(f"other things train: {sorted(trained.keys() ^ patch.trainable.keys())}")
    return trained


def graphed(case: Case, mode: str) -> Step:
    """The same step captured in a CUDA graph, with the prompts and the optimiser as they began."""
    if case.device != "cuda":
        raise NotMeasured("CUDA graphs need a CUDA device")
    if mode == HOST:
        raise NotMeasured("copies to the host are not captured")
    if case.shape.B > GRAPHED:
        raise NotMeasured(f"launches do not bound a batch above {GRAPHED}")
    # its check of the image tokens' number waits for the card, which capturing forbids
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    model = case.model()
    trained = patched(case, model, mode)
    begin = {name: p.detach().clone() for name, p in trained.items()}
    step = step_of(case, model, trained, capturable=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step.run()
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(begin[name])
        for state in step.run.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def run() -> tuple[Tensor]:
        graph.replay()
        return got

    return Step(run, step.results)


PROVIDERS = {
    "ref": Provider(ref, "official way: prompt rows written before each layer, over P+N tokens"),
    "ref-compile": Provider(compiled(), "ref, every layer compiled", compiles=True),
    "ref-reduce-overhead": Provider(
        compiled(mode="reduce-overhead"),
        'ref, every layer compiled with mode="reduce-overhead"',
        compiles=True,
    ),
    "fastprompt": Provider(side_keys, "fastprompt.patch, memory= as the mode asks", ours=True),
    "fastprompt-graph": Provider(graphed, "the same step in a CUDA graph", ours=True),
}


# ---- truth ----


class Widened(nn.Module):
    """A frozen linear layer, dense or 4-bit, with its numbers as they are, in a wide dtype.

    The numbers are decoded at each use and kept by no one, so that a large model fits.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.frozen = (linear.weight,)  # in a tuple: a cast of the model leaves it alone
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.frozen[0]
        state = getattr(weight, "quant_state", None)
        if state is not None:
            from bitsandbytes.functional import dequantize_4bit

            state = copy.copy(state)
            state.dtype = torch.float32  # not rounded to what the model computes in
            weight = dequantize_4bit(weight.data, state)
        return F.linear(x, weight.to(x.dtype), self.bias)


def truth(case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Loss and gradients in a wide dtype, and what everybody may be off by."""
    eager = step_of(case, model := case.model(), literal(case, model), checkpointing(model, ALL))
    eager = {name: t.cpu() for name, t in eager.results(eager.run()).items()}
    del model
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    model = case.model()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            if not any(name.startswith(part) for part in case.parts):
                setattr(model.get_submodule(parent), child, Widened(module))
    model = model.to(wide)
    trained = literal(case, model)
    context = checkpointing(model, ALL)
    with context():
        loss = model(**case.inputs(wide)).loss
    loss.backward()
    true = {name: t.cpu() for name, t in case.results(loss.detach(), trained).items()}
    rounding = check.FLOOR[case.dtype]
    limits = {
        name: float(2 * (eager[name].double() - t.double()).norm() + rounding * t.double().norm())
        for name, t in true.items()
    }
    return {name: t.double() for name, t in true.items()}, limits


def judge(case: Case, mode: str, results: dict[str, Tensor]) -> Verdict:
    true, limits = torch.load(case.truth_file)
    got = {name: t.detach().cpu().float() for name, t in results.items()}
    return check.judge(got, true, limits, torch.float32)
