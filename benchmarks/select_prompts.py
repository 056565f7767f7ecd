"""Cosine top-K selection: the prompts of each query, and the mean of those not chosen.

Prompts stand still here, as they do in validation. Who can keep something about keys or prompts
between calls may: the peers their normalised keys ("matmul+topk", faiss's index), we the prompts'
sum ("cached").
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Benchmark, NotMeasured, Provider, Step, Verdict
from fastprompt.ops import select_prompts, sum_of

NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # a tie, by this much


@dataclass(frozen=True)
class Selection:
    B: int
    C: int
    D: int = 512
    E: int = 768
    k: int = 16

    def __str__(self) -> str:
        return f"B{self.B} C{self.C} D{self.D} E{self.E} k{self.k}"


def _shapes(device: str, quick: bool) -> dict[str, Selection]:
    sizes = [(64, 37), (256, 100), (256, 1000), (1024, 1000), (256, 21841)]
    if device == "cpu":
        sizes = [(64, 37), (64, 1000), (256, 21841), (1, 21841)]
    else:
        sizes += [(1024, 100_000), (256, 1_000_000)]
    if quick:
        sizes = [(64, 37), (64, 1000)]
    few = {37: dict(k=8), 100: dict(k=8), 1_000_000: dict(E=512)}
    return {f"{B} of {C}": Selection(B, C, **few.get(C, {})) for B, C in sizes}


class Case:
    def __init__(self, shape: Selection, dtype: torch.dtype, device: str):
        s, like = shape, dict(dtype=dtype, device=device)
        self.shape, self.dtype, self.device = shape, dtype, device
        self.query, self.keys = torch.randn(s.B, s.D, **like), torch.randn(s.C, s.D, **like)
        self.prompts = torch.randn(s.C, s.E, **like)
        self.unit, self.total = F.normalize(self.keys, dim=-1), sum_of(self.prompts)
        self.whole = self.total.double()


def judge(case: Case, mode: str, results: dict[str, Tensor]) -> Verdict:
    """Scores that fall, each as near to the truth as rounding; tokens those of the indices."""
    s, indices = case.shape, results["indices"].long()
    query, keys = (F.normalize(x.double(), dim=-1) for x in (case.query, case.keys))
    truth, size = [], max(1, 2**25 // s.C)
    for at in range(0, s.B, size):
        truth.append((query[at : at + size] @ keys.mT).topk(s.k).values)
    own = (query[:, None] * keys[indices]).sum(-1)  # exact scores of what was chosen
    near = float((own - torch.cat(truth)).abs().max()) / NEAR[case.dtype]
    if "tokens" not in results:
        return Verdict("indices", near)
    chosen = case.prompts[indices].double()
    mean = (case.whole - chosen.sum(1)) / (s.C - s.k)
    tokens = results["tokens"].double()
    eps = torch.finfo(case.dtype).eps
    # an eager mean rounds sums of up to C prompts; 20 roundings of a prompt's size are allowed
    far = float((tokens[:, -1] - mean).abs().max()) / (20 * eps)
    exact = 0.0 if torch.equal(tokens[:, :-1], chosen) else float("inf")
    return max((Verdict("indices", near), Verdict("mean", far), Verdict("tokens", exact)),
               key=lambda v: v.share)  # fmt: skip


def _step(case: Case, way) -> Step:
    def run():
        with torch.no_grad():
            return way(case.query, case.keys, case.prompts)

    names = ("tokens", "indices")
    return Step(run, lambda given: dict(zip(names, given, strict=False)))


def _eager_way(k):
    def way(query, keys, prompts):
        scores = F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).mT
        indices = scores.topk(k).indices
        chosen = prompts[indices]
        mean = (prompts.sum(0) - chosen.sum(1)) / (len(prompts) - k)
        return torch.cat([chosen, mean[:, None]], 1), indices

    return way


def _eager(case, mode):
    return _step(case, _eager_way(case.shape.k))


def _compile(case, mode):
    return _step(case, torch.compile(_eager_way(case.shape.k), dynamic=False))


def _matmul_topk(case, mode):
    """No normalising, no gathering, no mean: what selection costs at the least with torch."""

    def way(query, keys, prompts):
        return None, (query @ case.unit.mT).topk(case.shape.k).indices

    step = _step(case, way)
    return Step(step.run, lambda given: dict(indices=given[1]))


def _faiss(case, mode):
    if find_spec("faiss") is None:
        raise NotMeasured("faiss is not installed (pip install faiss-cpu)")
    if case.device != "cpu" or case.dtype != torch.float32:
        raise NotMeasured("faiss-cpu takes float32 on the CPU alone")
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(case.shape.D)
    index.add(case.unit.numpy())

    def way(query, keys, prompts):
        unit = F.normalize(query, dim=-1).numpy()
        indices = torch.from_numpy(index.search(unit, case.shape.k)[1])
        chosen = prompts[indices]
        mean = (case.total - chosen.sum(1, dtype=torch.float64)) / (len(prompts) - case.shape.k)
        return torch.cat([chosen, mean.to(prompts.dtype)[:, None]], 1), indices

    return _step(case, way)


def _ours(cached):
    def build(case, mode):
        total = case.total if cached else None
        return _step(case, lambda *x: select_prompts(*x, case.shape.k, total=total)[:2])

    return build


def cost(s: Selection, mode: str, itemsize: int) -> tuple[int, int]:
    moved = s.C * (s.D + s.E) + s.B * s.D + 2 * s.B * (s.k + 1) * s.E
    return itemsize * moved, 2 * s.B * s.C * s.D


BENCHMARK = Benchmark(
    name="select_prompts",
    about="cosine top-K of class prompts, and the mean of the rest",
    modes=("selection",),
    dtypes=dict(cuda=("bf16", "fp16", "fp32"), cpu=("fp32", "bf16")),
    baseline="eager",
    shapes=_shapes,
    case=Case,
    judge=judge,
    cost=cost,
    providers={
        "eager": Provider(_eager, "normalise, matmul, topk, gather, mean"),
        "compile": Provider(_compile, "torch.compile of the same", compiles=True),
        "matmul+topk": Provider(_matmul_topk, "on keys that are normalised already; no more"),
        "faiss": Provider(_faiss, "IndexFlatIP on normalised keys; gather and mean by torch"),
        "fastprompt": Provider(_ours(False), "fastprompt.ops.select_prompts", ours=True),
        "cached": Provider(_ours(True), "the same with the prompts' sum known", ours=True),
    },
)
