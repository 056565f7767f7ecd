"""Generation by a language model in NF4, random weights: new tokens behind a cached context.

A step feeds NEW tokens a sequence, one after the other, through transformers' own model and its
static cache. The tokens are given, not sampled, so that all providers do the same work. "graph":
a token's forward is captured in a CUDA graph, since launches take longer than the kernels of it.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm as norm
from transformers import StaticCache

from benchmarks import llava
from benchmarks.llava import LANGUAGE, Language, Tuning
from benchmarks.registry import Benchmark, NotMeasured, Provider, Step, Verdict
from fastprompt import linear4bit

EAGER, GRAPH = MODES = ("eager", "graph")
NEW = 16


@dataclass(frozen=True)
class Generation:
    B: int
    text: Language
    context: int

    @property
    def tokens(self) -> int:
        """Made by a step."""
        return self.B * NEW

    def __str__(self) -> str:
        return (
            f"B{self.B} {NEW} tokens behind {self.context}, D{self.text.width} L{self.text.layers}"
        )


def _shapes(device: str, quick: bool) -> dict[str, Generation]:
    if quick or device == "cpu":
        tiny = Language(128, 384, 2, 2, 2, 256)
        return {"Llama-tiny b2": Generation(2, tiny, 24)}
    return {f"Llama-7B b{b}": Generation(b, LANGUAGE["7B"], 512) for b in (1, 8, 32)}


class Case:
    def __init__(self, shape: Generation, dtype: torch.dtype, device: str):
        self.shape, self.device = shape, device
        torch.manual_seed(0)
        self.model = llava.build(Tuning(shape.B, shape.text, None), dtype, device).eval()
        for module in self.model.modules():  # repacked by bitsandbytes, ours could not read it
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        ids = torch.randint(6, shape.text.vocab, (shape.B, shape.context + NEW), device=device)
        self.context, self.new = ids.split([shape.context, NEW], dim=1)

    @cached_property
    def want(self) -> Tensor:
        """[B, NEW, vocab]: logits by bitsandbytes."""
        decoding = Decoding(self.model, self)
        return torch.stack(decoding.all(decoding.one), 1)


class Decoding:
    """A model behind its cached context, one token a sequence at a time."""

    @torch.inference_mode()
    def __init__(self, model: nn.Module, case: Case):
        self.model, self.given = model, case.new
        self.length = case.context.shape[1]
        self.cache = StaticCache(config=model.config, max_cache_len=self.length + NEW)
        model(case.context, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = case.new[:, :1].clone()

    def one(self) -> Tensor:
        """[B, vocab] after `token`."""
        return self.model(self.token, past_key_values=self.cache, use_cache=True).logits[:, -1]

    @torch.inference_mode()
    def all(self, one: Callable[[], Tensor]) -> list[Tensor]:
        for layer in self.cache.layers:  # back behind the context
            layer.cumulative_length.fill_(self.length)
        logits = []
        for i in range(NEW):
            self.token.copy_(self.given[:, i : i + 1])
            logits.append(one().clone())
        return logits


def _captured(decoding: Decoding) -> Callable[[], Tensor]:
    """`Decoding.one` as a graph's replay."""
    decoding.all(decoding.one)  # kernels are compiled, libraries take their workspaces
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        logits = decoding.one()

    def one() -> Tensor:
        graph.replay()
        return logits

    return one


def _by(adopt: bool):
    def build(case: Case, mode: str) -> Step:
        if mode == GRAPH and case.device != "cuda":
            raise NotMeasured("CUDA graphs need a CUDA device")
        model = case.model
        if adopt:
            model = deepcopy(model)
            linear4bit.adopt(model)
        decoding = Decoding(model, case)
        one = _captured(decoding) if mode == GRAPH else decoding.one
        return Step(lambda: (decoding.all(one),), lambda got: dict(logits=torch.stack(got[0], 1)))

    return build


def _judge(case: Case, mode: str, results: dict[str, Tensor]) -> Verdict:
    """Within 3% of bitsandbytes': bfloat16, rounded in another order in every layer."""
    want = case.want.double()
    return Verdict("logits", float(norm(results["logits"].double() - want) / (3e-2 * norm(want))))


BENCHMARK = Benchmark(
    name="generate_4bit",
    about="tokens a second of a language model in NF4",
    modes=MODES,
    dtypes=dict(cuda=("bf16",), cpu=("fp32", "bf16")),
    baseline="bitsandbytes",
    shapes=_shapes,
    case=Case,
    judge=_judge,
    rate=True,
    providers={
        "bitsandbytes": Provider(_by(adopt=False), "the model as bitsandbytes runs it"),
        "fastprompt": Provider(
            _by(adopt=True), "fastprompt's products behind its Linear4bit", ours=True
        ),
    },
)
