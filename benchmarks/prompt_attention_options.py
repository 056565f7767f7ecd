"""What an option of `prompt_attention` costs: padding, packing, sets of prompts, Gemma 2's scores.

The bar is the op itself without the option (``plain``): masks of whole keys, packing and sets are
promised at the kernel's full speed. What others do is to write a mask [N, P+M], made once and not
timed, and to gather each sample's prompts, which is.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import prompt_attention as plain
from benchmarks.prompt_attention import ALL, FORWARD, Case, step
from benchmarks.registry import Benchmark, NotMeasured, Provider
from benchmarks.shapes import Attention
from fastprompt.ops import prompt_attention, reference


@dataclass(frozen=True)
class Shape(Attention):
    option: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()} {self.option}"


_GPU = {
    "ViT-B/16": Shape(64, 12, 12, 197, 64, 50, option="sets"),
    "Llama-8B": Shape(4, 32, 8, 1024, 128, 20, causal=True, option="left padding"),
    "Llama-8B packed": Shape(1, 32, 8, 4096, 128, 20, causal=True, option="packed"),
    "Gemma-2-2B": Shape(2, 8, 4, 2048, 256, 20, causal=True, option="window and soft-cap"),
}
_CPU = {
    "ViT-B/16": _GPU["ViT-B/16"],
    "SmolLM2-135M": Shape(8, 9, 3, 256, 64, 10, causal=True, option="left padding"),
    "SmolLM2 packed": Shape(1, 9, 3, 2048, 64, 10, causal=True, option="packed"),
    "Gemma-2-2B": Shape(2, 8, 4, 256, 256, 20, causal=True, option="window and soft-cap"),
}
_CPU["ViT-B/16"] = replace(_CPU["ViT-B/16"], B=8)
_SEQUENCES = 8  # packed, of unequal length


def _shapes(device: str, quick: bool) -> dict[str, Shape]:
    if device == "cuda" and not quick:
        return _GPU
    return _CPU if not quick else {"ViT-B/16": replace(_CPU["ViT-B/16"], B=2, N=33)}


class OptionsCase(Case):
    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        self.options = _options(shape, device)
        super().__init__(shape, dtype, device)

    def sets(self):
        return (self.shape.B,) if self.shape.option == "sets" else ()

    def reference(self, *tensors: Tensor) -> Tensor:
        return reference.prompt_attention(*tensors, causal=self.shape.causal, **self.options)

    def _truth(self):  # in one piece: the options are those of the whole batch
        given = [t.double().requires_grad_() for t in self.tensors]
        out = self.reference(*given)
        grads = torch.autograd.grad(out, given, self.grad.double())
        names = ("out", *(f"d{name}" for name in plain.INPUTS))
        return dict(zip(names, (out.detach(), *grads), strict=True))


def _options(s: Shape, device: str) -> dict:
    if s.option == "sets":
        return dict(prompt_index=torch.arange(s.B, device=device).flip(0))
    if s.option == "left padding":  # up to a half of a row
        first = torch.arange(s.B, device=device) * s.M // (2 * s.B)
        return dict(key_mask=torch.arange(s.M, device=device) >= first[:, None])
    if s.option == "packed":
        lengths = torch.arange(1, _SEQUENCES + 1) * s.N // sum(range(1, _SEQUENCES + 1))
        ends = F.pad(lengths.cumsum(0), (1, 0))
        ends[-1] = s.N
        ends = ends.to(device, torch.int32)
        return dict(cu_seqlens_q=ends, cu_seqlens_k=ends)
    return dict(window=s.N // 2, softcap=50.0)


# ---- providers ----


def _masked(case: OptionsCase, mode: str):
    """Prompts, each sample's own, concatenated to K and V, then SDPA under a written mask."""
    s, options = case.shape, case.options
    if "softcap" in options:
        raise NotMeasured("SDPA has no soft-capping")
    which = options.get("prompt_index")
    mask = None if s.option == "sets" else _mask(case)

    def attend(q, k, v, *prompts):
        pk, pv = (p[which] if which is not None else p.expand(s.B, *p.shape) for p in prompts)
        keys, values = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, enable_gqa=s.Hkv != s.H
        )

    return step(case, attend, mode)


def _mask(case: OptionsCase) -> Tensor:
    """[B or 1, 1, N, P+M] bool."""
    s, at = case.shape, torch.arange(case.shape.N, device=case.device)
    seen = (at[:, None] >= at)[None]
    if "key_mask" in case.options:
        seen = seen & case.options["key_mask"][:, None]
    if "cu_seqlens_q" in case.options:
        own = torch.bucketize(at, case.options["cu_seqlens_q"][1:], right=True)
        seen = seen & (own[:, None] == own)
    return F.pad(seen, (s.P, 0), value=True)[:, None]


def _compile(case, mode):
    return step(case, torch.compile(case.reference, dynamic=False), mode)


def _ours(case, mode):
    s = case.shape
    return step(case, lambda *t: prompt_attention(*t, causal=s.causal, **case.options), mode)


def _plain(case, mode):
    s = case.shape
    q, k, v, *prompts = case.tensors
    if s.option == "sets":
        prompts = [p[0] for p in prompts]
    attend = lambda *t: prompt_attention(*t, causal=s.causal)  # noqa: E731
    return step(case, attend, mode, [q, k, v, *prompts])


BENCHMARK = Benchmark(
    name="prompt_attention_options",
    about="padding, packing, sets of prompts, windows and soft-capping",
    modes=(FORWARD, ALL),
    dtypes=plain.BENCHMARK.dtypes,
    baseline="concat-masked",
    shapes=_shapes,
    case=OptionsCase,
    judge=plain.judge,
    providers={
        "concat-masked": Provider(_masked, "prompts concatenated, SDPA under a written mask"),
        "compile": Provider(_compile, "torch.compile of the eager formula", compiles=True),
        "eager": Provider(lambda c, m: step(c, c.reference, m), "the eager formula"),
        "fastprompt": Provider(_ours, "fastprompt.ops.prompt_attention", ours=True),
        "plain": Provider(_plain, "the same without the option, the bar", exempt="other work"),
    },
)
