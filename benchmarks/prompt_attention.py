"""Attention over prompts and tokens: every way that a user of PyTorch could pick.

Inputs are what a model's projections give: q, k, v [B, heads, N, d] as views of [B, N, heads, d].
A way that concatenates pays for it in its step, as its user would. The official way (``rows``)
has its prompts in the sequence already, so its concatenation, one layer earlier, is not counted.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks import check, shapes
from benchmarks.registry import Benchmark, NotMeasured, Provider, Step
from fastprompt.ops import prompt_attention, reference

FORWARD, ALL, PROMPTS = MODES = ("forward", "forward+backward", "forward+backward (prompts)")
INPUTS = ("q", "k", "v", "prompt_k", "prompt_v")
WANTED = {FORWARD: (), ALL: range(5), PROMPTS: (3, 4)}  # inputs that a mode takes gradients of
CHUNK = 2**28  # bytes of float64 scores at once, where the truth is computed


class Case:
    """The tensors of one shape, their exact results, and the errors that these allow."""

    def __init__(self, shape: shapes.Attention, dtype: torch.dtype, device: str):
        s, like = shape, dict(dtype=dtype, device=device)
        self.shape, self.dtype, self.device = shape, dtype, device

        def rows(heads, count):
            return torch.randn(s.B, count, heads, s.d, **like).transpose(1, 2)

        self.tensors = [rows(s.H, s.N), rows(s.Hkv, s.M), rows(s.Hkv, s.M)]
        self.tensors += [torch.randn(*self.sets(), s.Hkv, s.P, s.d, **like) for _ in range(2)]
        self.grad = rows(s.H, s.N)
        self.truth = self._truth()
        eager = step(self, self.reference, ALL)
        eager = eager.results(eager.run())
        self.limits = {name: check.limit(eager[name], want) for name, want in self.truth.items()}

    def sets(self) -> tuple[int, ...]:
        """What stands before the prompts' own axes."""
        return ()

    def reference(self, *tensors: Tensor) -> Tensor:
        return reference.prompt_attention(*tensors, causal=self.shape.causal)

    def _truth(self) -> dict[str, Tensor]:
        """In float64 and in slices of the batch: whole scores do not fit beside the rest."""
        s = self.shape
        size = max(1, CHUNK // (8 * s.H * s.N * (s.M + s.P)))
        *tokens, prompt_k, prompt_v = [t.double().requires_grad_() for t in self.tensors]
        grad, parts = self.grad.double(), []
        for i in range(0, s.B, size):
            inputs = (*(t[i : i + size] for t in tokens), prompt_k, prompt_v)
            out = self.reference(*inputs)
            parts.append((out.detach(), *torch.autograd.grad(out, inputs, grad[i : i + size])))
        out, dq, dk, dv, *prompts = zip(*parts, strict=True)
        exact = [*(torch.cat(part) for part in (out, dq, dk, dv)), *(sum(part) for part in prompts)]
        return dict(zip(("out", *(f"d{name}" for name in INPUTS)), exact, strict=True))


def judge(case, mode, results):
    names = ["out", *(f"d{INPUTS[i]}" for i in WANTED[mode])]
    truth = {name: case.truth[name] for name in names}
    return check.judge(results, truth, case.limits, case.dtype)


def cost(s: shapes.Attention, mode: str, itemsize: int) -> tuple[int, int]:
    """Bytes of reading and writing everything once, and FLOPs of the products, for `floor_ms`."""
    query, keys, prompts = (s.d * n for n in (s.B * s.H * s.N, s.B * s.Hkv * s.M, s.Hkv * s.P))
    pairs = s.N * s.cache + (s.N * (s.N + 1) // 2 if s.causal else s.N * s.N)
    moved, flops = 2 * (query + keys + prompts), 4 * s.B * s.H * s.d * (pairs + s.N * s.P)
    if mode == ALL:  # reads q, k, v, out, dout; writes dq, dk, dv; five products where two were
        return itemsize * (moved + 4 * query + 4 * keys + 4 * prompts), flops * 7 // 2
    if mode == PROMPTS:  # reads q, out, dout; four products over the prompts alone
        moved += 3 * query + 4 * prompts
        flops += 8 * s.B * s.H * s.d * s.N * s.P
    return itemsize * moved, flops


# ---- a step: forward, or forward and backward to some of the inputs ----


def step(case, attend, mode, tensors=None, wanted=None, grad=None, results=None) -> Step:
    """``attend(*tensors)``, and gradients to those in ``wanted``: by default those of the mode."""
    tensors = case.tensors if tensors is None else tensors
    if wanted is None:
        wanted = WANTED[mode]
    grad = case.grad if grad is None else grad
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    leaves = [tensors[i] for i in wanted]
    names = ["out", *(f"d{INPUTS[i]}" for i in wanted)]

    def run():
        if mode == FORWARD:
            with torch.no_grad():
                return (attend(*tensors),)
        out = attend(*tensors)
        return out, *torch.autograd.grad(out, leaves, grad)

    def by_name(given):
        return {name: t.detach() for name, t in zip(names, given, strict=True)}

    return Step(run, results or by_name)


def _sdpa(backend: str, device: str):
    """scaled_dot_product_attention, held to one backend; "sdpa" leaves the choice to PyTorch."""
    if backend == "sdpa":
        return F.scaled_dot_product_attention
    if device != "cuda":
        raise NotMeasured(f"the {backend} backend needs a CUDA device")
    only = dict(flash=SDPBackend.FLASH_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION)[backend]

    def attend(*tensors, **options):
        with sdpa_kernel(only):
            return F.scaled_dot_product_attention(*tensors, **options)

    return attend


# ---- providers ----


def _rows(backend):
    """A, the official way: prompts are rows of the sequence, and ask questions as tokens do."""

    def build(case, mode):
        s, sdpa = case.shape, _sdpa(backend, case.device)
        options = dict(is_causal=s.causal, enable_gqa=s.Hkv != s.H)
        q, k, v, *prompts = case.tensors
        prompts = [p.expand(s.B, -1, -1, -1) for p in prompts]
        heads = (torch.randn_like(q[:, :, : s.P]), *prompts)
        whole = [_sequence(head, t) for head, t in zip(heads, (q, k, v), strict=True)]
        # the next block overwrites the prompts' outputs, so no gradient comes back to them
        grad = _sequence(torch.zeros_like(heads[0]), case.grad)

        def results(given):
            out, *grads = (t.detach() for t in given)
            named = dict(out=out[:, :, s.P :])
            if mode == FORWARD:
                return named
            _, dk, dv = grads
            named |= dict(dprompt_k=dk[:, :, : s.P].sum(0), dprompt_v=dv[:, :, : s.P].sum(0))
            if mode == ALL:
                named |= {f"d{n}": t[:, :, s.P :] for n, t in zip("qkv", grads, strict=True)}
            return named

        # prompts alone are not cheaper here: they are part of q, k and v
        wanted = () if mode == FORWARD else (0, 1, 2)
        attend = lambda q, k, v: sdpa(q, k, v, **options)  # noqa: E731
        return step(case, attend, mode, whole, wanted, grad, results)

    return build


def _sequence(head: Tensor, tail: Tensor) -> Tensor:
    """[B, H, P+N, d] as a view of [B, P+N, H, d], as projections of a longer sequence give it."""
    parts = [t.transpose(1, 2) for t in (head, tail)]
    return torch.cat(parts, dim=1).transpose(1, 2)


def _concat(backend):
    """B: the prompts, repeated for each sample, in front of the keys and values."""

    def build(case, mode):
        s, sdpa = case.shape, _sdpa(backend, case.device)
        repeats, options = 1, dict(enable_gqa=s.Hkv != s.H)
        if s.causal and s.N > 1:
            seen = torch.ones(s.N, s.P + s.N, dtype=torch.bool, device=case.device).tril(s.P)
            if backend == "sdpa":  # transformers' own way: a bool mask, and then repeated heads
                mask, repeats, options = seen, s.H // s.Hkv, {}
            elif backend == "cudnn":  # an additive mask: a bool one would be converted each time
                mask = torch.zeros(seen.shape, dtype=case.dtype, device=case.device)
                mask = mask.masked_fill_(~seen, -torch.inf)[None, None]
            else:  # flash takes no mask but this one, which is never in memory
                mask = causal_lower_right(s.N, s.P + s.N)
            options["attn_mask"] = mask

        def attend(q, k, v, prompt_k, prompt_v):
            keys, values = _concatenate(k, prompt_k), _concatenate(v, prompt_v)
            if repeats > 1:
                keys, values = (t.repeat_interleave(repeats, dim=1) for t in (keys, values))
            return sdpa(q, keys, values, **options)

        return step(case, attend, mode)

    return build


def _concatenate(x: Tensor, prompt: Tensor) -> Tensor:
    return torch.cat([prompt.expand(x.shape[0], -1, -1, -1), x], dim=2)


def _in_cache(case, mode):
    """The prompts stand in the cache already, once for each sample, as prefix tuning has them."""
    q, k, v, *prompts = case.tensors
    keys, values = (_concatenate(x, p) for x, p in zip((k, v), prompts, strict=True))
    options = dict(enable_gqa=case.shape.Hkv != case.shape.H)
    attend = lambda *_: F.scaled_dot_product_attention(q, keys, values, **options)  # noqa: E731
    return step(case, attend, mode)


def _flex(case, mode):
    """X: FlexAttention over tokens and over prompts, merged by their log-sum-exps, compiled."""
    if case.device == "cpu":
        raise NotMeasured("FlexAttention has no log-sum-exp and no backward on the CPU")
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    s, mask = case.shape, None
    if s.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, s.N, s.N, case.device)
    options = dict(enable_gqa=s.Hkv != s.H, return_aux=AuxRequest(lse=True))

    def attend(q, k, v, prompt_k, prompt_v):
        shared = (p.expand(q.shape[0], -1, -1, -1) for p in (prompt_k, prompt_v))
        out, aux = flex_attention(q, k, v, block_mask=mask, **options)
        out_p, aux_p = flex_attention(q, *shared, **options)
        w = torch.sigmoid(aux.lse - aux_p.lse)[..., None]
        return (w * out + (1 - w) * out_p).to(q.dtype)

    return step(case, torch.compile(attend, dynamic=False), mode)


def _xformers(case, mode):
    if find_spec("xformers") is None:
        raise NotMeasured("xformers is not installed")
    if case.device == "cpu":
        raise NotMeasured("xformers has no kernel for the CPU")
    from xformers.ops import fmha

    s = case.shape
    bias = fmha.attn_bias.LowerTriangularFromBottomRightMask() if s.causal else None

    def attend(q, k, v, prompt_k, prompt_v):
        # its layout is [B, N, heads, d]; for grouped queries [B, N, Hkv, group, d]
        keys, values = (
            _concatenate(t, prompt).transpose(1, 2) for t, prompt in ((k, prompt_k), (v, prompt_v))
        )
        q = q.transpose(1, 2)
        if s.Hkv != s.H:
            q = q.unflatten(2, (s.Hkv, -1))
            group = q.shape[3]
            keys, values = (t.unsqueeze(3).expand(-1, -1, -1, group, -1) for t in (keys, values))
        out = fmha.memory_efficient_attention(q, keys, values, attn_bias=bias)
        return out.reshape(s.B, s.N, s.H, s.d).transpose(1, 2)

    return step(case, attend, mode)


def _bare(backend):
    """N: the tokens alone. Not the same work: what the vendor needs if prompts were free."""

    def build(case, mode):
        if mode == PROMPTS:
            raise NotMeasured("it has no prompts")
        s, sdpa = case.shape, _sdpa(backend, case.device)
        options = dict(is_causal=s.causal and s.N > 1, enable_gqa=s.Hkv != s.H)
        attend = lambda q, k, v: sdpa(q, k, v, **options)  # noqa: E731
        return step(case, attend, mode, case.tensors[:3], () if mode == FORWARD else (0, 1, 2))

    return build


def _eager(case, mode):
    return step(case, case.reference, mode)


def _compile(case, mode):
    return step(case, torch.compile(case.reference, dynamic=False), mode)


def _fastprompt(case, mode):
    causal = case.shape.causal
    return step(case, lambda *tensors: prompt_attention(*tensors, causal=causal), mode)


_A = "A, official way: P+N tokens through SDPA; "
_B = "B: prompts concatenated to K and V, then SDPA; "
_X = "X: FlexAttention over tokens and over prompts + log-sum-exp merge, compiled"
_N = "N, no prompt at all, the bar: SDPA on the tokens; "
_OWN = "the backend that PyTorch picks"
_FREE = dict(exempt="no prompt: not compared")

BENCHMARK = Benchmark(
    name="prompt_attention",
    about="attention whose first keys are prompts that the whole batch shares",
    modes=MODES,
    dtypes=dict(cuda=("bf16", "fp16", "fp32"), cpu=("fp32", "bf16", "fp16")),
    baseline="rows-sdpa",
    shapes=shapes.attention,
    case=Case,
    judge=judge,
    cost=cost,
    providers={
        "rows-sdpa": Provider(_rows("sdpa"), _A + _OWN),
        "rows-flash": Provider(_rows("flash"), _A + "flash"),
        "rows-cudnn": Provider(_rows("cudnn"), _A + "cuDNN"),
        "concat-sdpa": Provider(_concat("sdpa"), _B + _OWN),
        "concat-flash": Provider(_concat("flash"), _B + "flash"),
        "concat-cudnn": Provider(_concat("cudnn"), _B + "cuDNN"),
        "flex": Provider(_flex, _X, compiles=True),
        "xformers": Provider(_xformers, "memory_efficient_attention on concatenated K and V"),
        "compile": Provider(_compile, "torch.compile of the eager formula", compiles=True),
        "eager": Provider(_eager, "the eager formula (fastprompt.ops.reference)"),
        "fastprompt": Provider(_fastprompt, "fastprompt.ops.prompt_attention", ours=True),
        "bare-sdpa": Provider(_bare("sdpa"), _N + _OWN, **_FREE),
        "bare-cudnn": Provider(_bare("cudnn"), _N + "cuDNN", **_FREE),
    },
)

DECODING = Benchmark(
    name="prompt_attention_decode",
    about="generating: one query a head against a cache of keys, and prompts",
    modes=(FORWARD,),
    dtypes=BENCHMARK.dtypes,
    baseline="concat-sdpa",
    shapes=shapes.decoding,
    case=Case,
    judge=judge,
    cost=cost,
    providers={
        "concat-sdpa": BENCHMARK.providers["concat-sdpa"],
        "in-cache": Provider(_in_cache, "prompts in every sample's cache, then SDPA"),
        "fastprompt": BENCHMARK.providers["fastprompt"],
        "bare-sdpa": BENCHMARK.providers["bare-sdpa"],
        "bare-cudnn": BENCHMARK.providers["bare-cudnn"],
    },
)
