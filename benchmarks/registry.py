"""What a benchmark is, and which there are."""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

WHERE = {  # name -> module:attribute, imported when it is asked for
    "prompt_attention": "benchmarks.prompt_attention:BENCHMARK",
    "prompt_attention_decode": "benchmarks.prompt_attention:DECODING",
    "prompt_attention_options": "benchmarks.prompt_attention_options:BENCHMARK",
    "decode_4bit": "benchmarks.decode_4bit:BENCHMARK",
    "nf4_linear": "benchmarks.nf4_linear:BENCHMARK",
    "select_prompts": "benchmarks.select_prompts:BENCHMARK",
    "frozen_ops": "benchmarks.frozen_ops:BENCHMARK",
    "instruction_step": "benchmarks.instruction_step:BENCHMARK",
    "generate_4bit": "benchmarks.generate_4bit:BENCHMARK",
    "m2pt_step": "benchmarks.m2pt_step:BENCHMARK",
    "vpt_step": "benchmarks.vpt_step:BENCHMARK",
}


def load(name: str) -> "Benchmark":
    return pkgutil.resolve_name(WHERE[name])


class NotMeasured(Exception):
    """Raised by a provider (or a whole case) that cannot run here; its text is the reason."""


class Step(NamedTuple):
    """One thing to be timed."""

    run: Callable[[], tuple]  # all of it is timed, and no more than it
    results: Callable[[tuple], dict[str, Tensor]]  # what `run` gave, by the names of the judge


@dataclass(frozen=True)
class Provider:
    """One way to do the work of a benchmark.

    Attributes:
        build: (case, mode) -> Step. What a user would do once, such as making a mask, is done here.
        about: one line for ``--list``.
        ours: an error is a failure of the run; anyone else's is a reason not to be measured.
        compiles: waits for a compiler, so ``--quick`` leaves it out unless it is named.
        exempt: why its results are not compared; empty if they are.
    """

    build: Callable[[Any, str], Step]
    about: str
    ours: bool = False
    compiles: bool = False
    exempt: str = ""


class Verdict(NamedTuple):
    """The result that is worst against its limit, and by how much: above 1 (or NaN) is wrong."""

    name: str
    share: float

    @property
    def right(self) -> bool:
        return self.share <= 1  # NaN is not


@dataclass(frozen=True)
class Benchmark:
    """Providers that do the same work on named shapes.

    Attributes:
        modes: what is timed, each for itself (forward, forward and backward, ...).
        dtypes: those that ``--dtype`` may name, by device; the first is the default.
        baseline: the provider whose time the others are set against.
        shapes: (device, quick) -> {model name: shape}; empty where it has none. A shape is a
            dataclass with a short str().
        case: (shape, dtype, device) -> the tensors of one shape, and what `judge` needs.
        judge: (case, mode, results) -> Verdict.
        cost: (shape, mode, itemsize) -> (bytes, FLOPs) that no way of doing it can avoid, or None.
        in_turn: the floor is the bytes' time and then the products', not the longer of the two.
        rate: rows say tokens a second; a shape's ``tokens`` are those of a step.
        truth: case -> (results, limits) that `judge` wants of it. A benchmark that has it runs
            each provider in a process of its own (`isolated`), whose peak memory is then its own;
            its case has a ``meter`` and takes what `truth` gave as ``case.truth``.
    """

    name: str
    about: str
    modes: tuple[str, ...]
    dtypes: Mapping[str, tuple[str, ...]]
    baseline: str
    shapes: Callable[[str, bool], dict[str, Any]]
    case: Callable[[Any, torch.dtype, str], Any]
    judge: Callable[[Any, str, dict[str, Tensor]], Verdict]
    providers: dict[str, Provider]
    cost: Callable[[Any, str, int], tuple[int, int]] | None = None
    in_turn: bool = False
    rate: bool = False
    truth: Callable[[Any], tuple[dict[str, Tensor], dict[str, float]]] | None = None
