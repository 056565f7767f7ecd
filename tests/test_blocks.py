"""Frozen blocks against the unfused path: outputs and gradients, on every family and policy."""

import pytest
import tiny
import torch
from compare import FLOOR, assert_as_accurate
from frozen import NF4, POLICIES, gradients, is_fused, model_of, pair, relative, run
from pooled import METHODS
from torch.func import functional_call

import fastprompt
from fastprompt.blocks import compute
from fastprompt.methods import DeepPrompts

ALL = list(tiny.FAMILIES)


def same(name, models, given, bound=1e-10, loss=None):
    ours, theirs = models
    got, want = run(name, ours, given, loss), run(name, theirs, given, loss)
    assert is_fused(ours), fastprompt.patch_of(ours).report()
    assert not fastprompt.patch_of(theirs).blocks
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < bound
    assert all(x.any() for x in want)


@pytest.mark.parametrize("kind", ["dense", NF4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ALL)
def test_output_and_every_gradient(name, policy, kind):
    same(name, pair(name, policy, kind), tiny.inputs(name, torch.float64))


VARIANTS = {
    "dinov2 swiglu": ("dinov2", dict(use_swiglu_ffn=True)),
    "erf": ("vit", dict(hidden_act="gelu")),
    "tanh": ("vit", dict(hidden_act="gelu_pytorch_tanh")),
    "new": ("vit", dict(hidden_act="gelu_new")),
    "quick": ("vit", dict(hidden_act="quick_gelu")),
    "silu": ("siglip_vision", dict(hidden_act="silu")),
    "gated gelu": ("llama", dict(hidden_act="gelu_pytorch_tanh")),
    "gated quick": ("llama", dict(hidden_act="quick_gelu")),
    "no bias": ("vit", dict(qkv_bias=False)),
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "one key head": ("llama", dict(num_key_value_heads=1)),
    "as many": ("qwen3", dict(num_key_value_heads=4)),
    "window": ("mistral", dict(sliding_window=4)),
    "some windows": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ),
    "both ways": ("llama", dict(is_causal=False)),
}


@pytest.mark.parametrize("policy", ["speed", "low"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, policy):
    name, more = VARIANTS[variant]
    if variant == "dinov2 swiglu":
        mlp = next(m for m in tiny.build(name, **more).modules() if type(m).__name__[-3:] == "FFN")
        if not hasattr(mlp, "gate_proj"):
            pytest.skip("transformers 5.17 has gate and up in one layer there: unfused")
    same(name, pair(name, policy, **more), tiny.inputs(name, torch.float64))


def masks(kind):
    mask = torch.ones(2, 11, dtype=torch.long)
    if kind in ("left", "right"):
        mask[1, slice(0, 4) if kind == "left" else slice(7, 11)] = 0
        return dict(attention_mask=mask)
    if kind == "packed":
        return dict(position_ids=torch.tensor([[*range(5), *range(6)]] * 2))
    seen = torch.rand(2, 1, 11, 11) > 0.4
    if kind == "bool":
        return dict(attention_mask=seen)
    return dict(attention_mask=torch.zeros(2, 1, 11, 11).double().masked_fill(~seen, -1e30))


@pytest.mark.parametrize("kind", ["left", "right", "packed", "bool", "additive"])
@pytest.mark.parametrize("policy", ["speed", "low"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_masks(name, policy, kind):
    torch.manual_seed(2)
    given = dict(tiny.inputs(name, torch.float64, length=11), use_cache=False, **masks(kind))
    more = dict(sliding_window=3) if name == "mistral" else {}
    same(name, pair(name, policy, **more), given)


@pytest.mark.parametrize("policy", ["speed", "low"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "clip_vision", "siglip_vision"])
@pytest.mark.parametrize("method", METHODS)
def test_pools(method, name, policy):
    models = pair(name, policy, method=METHODS[method])
    given = tiny.inputs(name, torch.float64, batch=4)
    got, want = (run(name, model, given) for model in models)
    assert is_fused(models[0])
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or relative(a, b) < 1e-10


# ---- accuracy where dtypes are low ----


def block_call(name, dtype, policy, kind):
    """One block of a patched model as a function of its tokens and its prompt."""
    exact = dtype == torch.float64
    model = model_of(name, kind, dtype, exact, hidden_size=64, intermediate_size=96)
    patch = fastprompt.patch(model, DeepPrompts(text=5) if name in tiny.LANGUAGE else None,
                             memory=policy)  # fmt: skip
    layer = patch.anatomy.towers[0].blocks[1].layer.train()
    given = {}
    if name in tiny.LANGUAGE:
        like = torch.empty(0, dtype=dtype)
        given["position_embeddings"] = model.model.rotary_emb(like, torch.arange(33)[None])

    def call(x, tokens):
        wide = tokens.to(torch.promote_types(dtype, torch.float32))
        return functional_call(layer, {"fastprompt.tokens": wide}, (x, None), given)

    return call


@pytest.mark.parametrize("kind", ["dense", NF4])
@pytest.mark.parametrize("policy", ["speed", "balanced", "low"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "vit", "clip_vision"])
def test_never_less_accurate_than_twice_eager(name, dtype, policy, kind):
    calls = {
        (dt, how): block_call(name, dt, how, kind)
        for dt, how in ((dtype, policy), (dtype, "off"), (torch.float64, "off"))
    }
    torch.manual_seed(3)
    tensors = [t.to(dtype).requires_grad_() for t in (torch.randn(3, 33, 64), torch.randn(5, 64))]
    assert_as_accurate(
        lambda x, tokens: calls[dtype, policy](x, tokens),
        lambda x, tokens: calls[x.dtype, "off"](x, tokens),
        tensors,
        torch.randn(3, 33, 64).to(dtype),
    )


@pytest.mark.parametrize("kind", ["dense", NF4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["speed", "low"])
@pytest.mark.parametrize("name", ["llama", "vit", "dinov2", "llava"])
def test_autocast(name, policy, dtype, kind):
    """As near to float64 as the unfused path under autocast is, and of the same dtypes."""
    models = pair(name, policy, kind, dtype=dtype, exact=False)
    results = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            out = tiny.output(name, model, tiny.inputs(name, dtype))
        torch.manual_seed(7)
        out.backward(torch.randn_like(out))
        results.append([out.detach(), *gradients(model)])
    assert is_fused(models[0])
    truth = run(name, pair(name, "off", kind)[0], tiny.inputs(name, torch.float64))
    for got, base, want in zip(*results, truth, strict=True):
        assert got.dtype == base.dtype
        error, base_error = relative(got.double(), want), relative(base.double(), want)
        assert error <= 2 * base_error + FLOOR[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "dinov2"])
def test_every_policy_gives_the_same_bits(name, dtype):
    results = []
    for policy in POLICIES:
        model = pair(name, policy, dtype=dtype, exact=False)[0]
        results.append(run(name, model, tiny.inputs(name, dtype)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- what is and is not computed ----


def counted(monkeypatch, module, name):
    calls, function = [], getattr(module, name)

    def count(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, count)
    return calls


@pytest.mark.parametrize("policy", POLICIES)
def test_no_gradient_goes_into_the_first_block(policy, monkeypatch):
    ours, theirs = pair("llama", policy)
    to_x = counted(monkeypatch, compute, "projections_backward")
    attention = counted(monkeypatch, compute, "attend_backward")
    same("llama", (ours, theirs), tiny.inputs("llama", torch.float64))
    assert len(to_x) == 2 and [call[-2:] for call in attention] == [(True, True)] * 2 + [
        (False, True)
    ]
    # but where the embeddings want one it does
    given = tiny.inputs("llama", torch.float64)
    embeds = [torch.randn(2, 9, 32).double().requires_grad_() for _ in range(2)]
    embeds[1].data.copy_(embeds[0].data)
    del given["input_ids"]
    for model, x in zip((ours, theirs), embeds, strict=True):
        run("llama", model, given | dict(inputs_embeds=x))
    assert len(to_x) == 5 and relative(embeds[0].grad, embeds[1].grad) < 1e-10


def test_no_gradient_goes_to_a_prompt_that_does_not_train(monkeypatch):
    ours, theirs = pair("llama", "speed")
    for model in (ours, theirs):
        model.model.layers[1].fastprompt.requires_grad_(False)
    attention = counted(monkeypatch, compute, "attend_backward")
    got, want = (run("llama", m, tiny.inputs("llama", torch.float64)) for m in (ours, theirs))
    assert [call[-1] for call in attention] == [True, False, True]
    assert got[2] is None and relative(got[1], want[1]) < 1e-10


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("asked", ["auto", "speed", "offload"])
@pytest.mark.filterwarnings("ignore:.*(gradient_checkpointing_enable|reentrant).*")
def test_checkpointing_recomputes_once(asked, reentrant, monkeypatch):
    from fastprompt.blocks.frozen import _CHECKPOINTS_CALLS

    ours, theirs = pair("llama", asked)
    given = dict(tiny.inputs("llama", torch.float64))  # use_cache: dropped, as without a patch
    want = run("llama", theirs, given)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    first = counted(monkeypatch, compute, "projections")
    last = counted(monkeypatch, compute, "after_mlp")
    got = run("llama", ours, given)
    assert is_fused(ours)
    assert "memory  low, by gradient checkpointing" in fastprompt.patch_of(ours).report()
    assert all(relative(a, b) < 1e-10 for a, b in zip(got, want, strict=True))
    twice = _CHECKPOINTS_CALLS and reentrant  # that checkpoint computes the output again itself
    assert len(first) == 6 and len(last) == (6 if twice else 3)
    ours.gradient_checkpointing_disable()
    first.clear()
    run("llama", ours, given)
    assert len(first) == (6 if asked == "offload" else 3)


@pytest.mark.parametrize("policy, products", [("speed", 0), ("balanced", 1), ("low", 3)])
def test_what_each_policy_recomputes(policy, products, monkeypatch):
    model, _ = pair("qwen3", policy)
    out = tiny.output("qwen3", model, tiny.inputs("qwen3", torch.float64))
    again = counted(monkeypatch, compute, "project")
    out.sum().backward()
    # q, k, v; o_proj; gate and up: never down_proj
    assert len(again) == 3 * products


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_an_empty_batch(name, policy):
    model = pair(name, policy, dtype=torch.float32, exact=False)[0]
    given = {k: v[:0] for k, v in tiny.inputs(name).items()}
    if name == "llama":
        given["use_cache"] = False
    out = tiny.output(name, model, given)
    out.sum().backward()
    assert len(out) == 0 and is_fused(model) and not any(g.any() for g in gradients(model))
