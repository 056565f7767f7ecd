"""Frozen blocks whose products run in fp8: how far from exact, which do not, and what is said."""

import importlib

import pytest
import tiny
import torch
from fp8_casts import fp8_casts as fp8_casts
from frozen import NF4, POLICIES, model_of, relative, run
from test_exactness import method_for

import fastprompt
from fastprompt.blocks import fp8
from fastprompt.blocks.compute import Math
from fastprompt.methods import DeepPrompts
from fastprompt.ops.quantize_rows import E4M3

pytestmark = [*NF4.marks]  # no product of a dense weight runs in fp8
BF16 = torch.bfloat16
WIDE = dict(hidden_size=128, intermediate_size=192)  # whole blocks of 64 a row
TIMES = 16  # an fp8 product's error over a bfloat16 one's: significands of 4 bits and of 8


def prompted(name, dtype=BF16, kind="nf4", more=WIDE, exact=False, **options):
    """``exact``: the same weights, computing in float64."""
    model = model_of(name, kind, dtype, exact=False, **more)
    if exact:
        model.double()
        for module in model.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = torch.float64
    patch = fastprompt.patch(model, method_for(name), **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in patch.trainable.values():
            p.copy_(torch.randn(p.shape))  # the same in every dtype
    return model.train()


def loss(out):
    torch.manual_seed(7)
    return (out * torch.randn(out.shape).to(out)).sum()


def block(name, **options):
    """One block of a patched model: (the model, the block, its tokens, what it is given beside)."""
    model = prompted(name, **options)
    layer = fastprompt.patch_of(model).anatomy.towers[0].blocks[1].layer
    torch.manual_seed(0)
    x, given = torch.randn(2, 33, 128).to(BF16).to(model.dtype).requires_grad_(), {}
    if name in tiny.LANGUAGE:
        given["position_embeddings"] = model.model.rotary_emb(x, torch.arange(33)[None])
    return model, layer, x, given


def results(layer, x, given, f=None):
    """Output, the gradients of the tokens and of the prompt."""
    out = (layer if f is None else f)(x, None, **given)
    loss(out).backward()
    found = [out.detach(), x.grad, layer.fastprompt.tokens.grad]
    x.grad = layer.fastprompt.tokens.grad = None
    return found


@pytest.mark.parametrize("policy", ["speed", "low"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "vit", "clip_vision"])
def test_error_beside_bfloat16s(name, policy):
    truth, base = (results(*block(name, exact=exact)[1:]) for exact in (True, False))
    model, *inputs = block(name, compute="fp8", memory=policy)
    got = results(*inputs)
    report = fastprompt.patch_of(model).report()
    assert "in fp8 (emulated on the CPU, in float32), in training" in report
    assert "not in" not in report
    for ours, theirs, want in zip(got, base, truth, strict=True):
        assert ours.dtype == theirs.dtype
        error, other = (relative(t.double(), want.double()) for t in (ours, theirs))
        assert 4 * other < error < TIMES * other


@pytest.mark.parametrize("name", ["llama", "qwen3", "vit"])
def test_every_policy_gives_the_same_bits(name):
    results = []
    for policy in POLICIES:
        model = prompted(name, compute="fp8", memory=policy)
        results.append(run(name, model, tiny.inputs(name, BF16)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_auto_is_what_it_was():
    want = run("llama", prompted("llama"), tiny.inputs("llama", BF16))
    model = prompted("llama", compute="fp8")
    fp8_results = run("llama", model, tiny.inputs("llama", BF16))
    assert not torch.equal(fp8_results[0], want[0])
    patch = fastprompt.patch_of(model)
    patch.undo()
    fastprompt.patch(model, method_for("llama"), compute="auto")
    with torch.no_grad():
        torch.manual_seed(5)
        for p in fastprompt.patch_of(model).trainable.values():
            p.copy_(torch.randn(p.shape))
    got = run("llama", model, tiny.inputs("llama", BF16))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["llama", "clip_vision"])
def test_kernels(name, monkeypatch, fp8_casts):
    """What is quantised, by Triton's kernels (its interpreter here): what torch's definitions give,
    but for numbers between two of e4m3 that are rounded otherwise."""
    want = results(*block(name, compute="fp8")[1:])
    launched = set()
    for op in ("quantize_rows", "fp8_linear"):
        module = importlib.import_module(f"fastprompt.ops.{op}")

        def by_triton(x, backend, op=op):
            launched.add(op)
            return backend == "auto"

        monkeypatch.setattr(module, "by_triton", by_triton)
    got = results(*block(name, compute="fp8")[1:])
    assert launched == {"quantize_rows", "fp8_linear"}
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 0.02


def test_a_gradient_without_rows_in_memory(monkeypatch, fp8_casts):
    """As that of a sum: one number, expanded."""
    model = prompted("llama", compute="fp8")
    part = next(iter(fastprompt.patch_of(model).blocks.values())).parts.o_proj
    dy = torch.ones((), dtype=BF16).expand(2, 5, 128)
    want = fp8.project_backward([dy.contiguous()], [part])
    module = importlib.import_module("fastprompt.ops.quantize_rows")
    monkeypatch.setattr(module, "by_triton", lambda x, backend: True)
    assert torch.equal(fp8.project_backward([dy.float()], [part]), want)


def test_what_a_linear4bit_computes_in_is_left_alone():
    """bitsandbytes infers it from its first input, which is none of ours in fp8."""
    model = prompted("llama", compute="fp8")
    run("llama", model, tiny.inputs("llama", BF16))
    assert not any(layer.mlp.down_proj.compute_type_is_set for layer in model.model.layers)


def test_autocast():
    """A float32 stream, products in bfloat16 by autocast: those run in fp8."""
    found = []
    for how in ("auto", "fp8"):
        model, *inputs = block("llama", dtype=torch.float32, compute=how)
        with torch.autocast("cpu", BF16):
            found.append(results(*inputs))
    assert "products  7 of 21 in fp8" in fastprompt.patch_of(model).report()  # of the one that ran
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype == torch.float32 and 0.05 < relative(b, a) < 0.3


# ---- which products ----


def test_sizes_that_fp8_does_not_take():
    """intermediate_size 208: rows of down_proj are no whole blocks; gate and up are fp8's."""
    more = dict(hidden_size=128, intermediate_size=208)
    model = prompted("llama", more=more, compute="fp8")
    run("llama", model, tiny.inputs("llama", BF16))
    report = fastprompt.patch_of(model).report()
    assert "products  18 of 21 in fp8" in report
    assert "down_proj and 2 more: rows of 208, fp8 wants whole blocks of 64" in report
    base, got = (results(*block("llama", more=more, compute=how)[1:]) for how in ("auto", "fp8"))
    assert all(0.01 < relative(a, b) < 0.5 for a, b in zip(got, base, strict=True))


def test_one_of_several_is_enough():
    """q, k and v go through one product: k and v of 8 rows keep q from fp8, too."""
    more = WIDE | dict(num_attention_heads=16, num_key_value_heads=1)
    report = fastprompt.patch_of(prompted("llama", more=more, compute="fp8")).report()
    assert "products  12 of 21 in fp8" in report
    assert "q_proj and 8 more: [8, 128], fp8 wants multiples of 16" in report


def test_a_block_that_computes_in_float32():
    model = prompted("llama", torch.float32, compute="fp8")
    early = fastprompt.patch_of(model).report()  # nothing has run yet, nor has autocast
    assert "products  0 of 21 in fp8" in early
    assert "computes in torch.float32 unless autocast is bfloat16, fp8 wants" in early
    got = run("llama", model, tiny.inputs("llama", torch.float32))
    want = run("llama", prompted("llama", torch.float32), tiny.inputs("llama", torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    report = fastprompt.patch_of(model).report()
    assert "products  0 of 21 in fp8" in report
    assert "the block computes in torch.float32, fp8 wants torch.bfloat16" in report


def test_unfused_blocks_say_so():
    model = prompted("llama", compute="fp8")
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    run("llama", model, tiny.inputs("llama", BF16))
    report = fastprompt.patch_of(model).report()
    assert "products  14 of 21 in fp8" in report and "and 6 more: mlp has hooks" in report


def test_what_fp8_is_asked_of():
    """Each group of products by itself."""
    model = prompted("llama", compute="fp8")
    parts = next(iter(fastprompt.patch_of(model).blocks.values())).parts
    assert [len(group) for group in parts.groups] == [3, 1, 2, 1]
    for group in parts.groups:
        assert Math(BF16, False, True).taken_by(group) == E4M3
        assert Math(BF16, False).taken_by(group) == BF16


# ---- refusals ----


def refused(name, message, kind="nf4", more=WIDE, **options):
    model = model_of(name, kind, BF16, False, **more)
    before = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        fastprompt.patch(model, method_for(name), **options)
    assert before == {n: id(m) for n, m in model.named_modules()}
    assert not any("forward" in vars(b) for b in model.model.layers)


def test_refusals():
    refused("llama", "compute: want one of auto, fp8; got 'int8'", compute="int8")
    refused("llama", "got memory='off'", compute="fp8", memory="off")
    refused("llama", "got none: dense weights", kind="dense", compute="fp8")
    narrow = dict(hidden_size=32, intermediate_size=48)
    refused("llama", "got none: rows of 32, fp8 wants whole blocks", more=narrow, compute="fp8")
    with pytest.raises(ValueError, match="got none: no tower has prompts"):
        model = model_of("llama", "nf4", BF16, False, **WIDE)
        fastprompt.patch(model, DeepPrompts(text=0), compute="fp8")


def test_devices(monkeypatch):
    fp8.check_device.cache_clear()
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ValueError, match=r"capability 8.9 or newer, got 8.0 \(A100 has no fp8\)"):
        fp8.check_device(card)
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        fp8.check_device.cache_clear()
        fp8.check_device(card)
    with pytest.raises(ValueError, match="want an NVIDIA card or the CPU, got mps"):
        fp8.check_device(torch.device("mps"))
    fp8.check_device(torch.device("cpu"))
    fp8.check_device.cache_clear()


# ---- torch.compile ----


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_torch_compile_takes_a_block_whole(name):
    _, layer, *inputs = block(name, compute="fp8")
    want = results(layer, *inputs)
    torch._dynamo.reset()
    got = results(layer, *inputs, f=torch.compile(layer, backend="aot_eager", fullgraph=True))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 0.05  # a number between two of e4m3 may be rounded otherwise
