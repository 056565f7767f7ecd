"""Frozen blocks as a part of autograd: saved tensors, caches, copies, torch.compile."""

import copy
import io
import pickle

import pytest
import tiny
import torch
from frozen import NF4, POLICIES, gradients, is_fused, model_of, pair, relative, run

import fastprompt
import fastprompt.families
from fastprompt.blocks import node


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "vit"])
def test_a_second_backward_gives_the_same_bits(name, policy):
    """Whatever is written to in place, nothing that is kept is."""
    model, _ = pair(name, policy)
    out = tiny.output(name, model, tiny.inputs(name, torch.float64))
    found = []
    for _ in range(3):
        out.square().sum().backward(retain_graph=True)
        found.append(gradients(model))
    assert is_fused(model)
    for a, *others in zip(*found, strict=True):
        assert a.any() and all(torch.equal(a, b) for b in others)


def test_a_second_backward_and_writes_in_place():
    model, _ = pair("llama", "balanced")
    out = tiny.output("llama", model, tiny.inputs("llama", torch.float64))
    out.sum().backward(retain_graph=True)
    once = gradients(model)
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    for a, b in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(a, 2 * b)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()

    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda m, args, out: seen.append(out))
    out = tiny.output("llama", model, tiny.inputs("llama", torch.float64))
    handle.remove()
    with torch.no_grad():
        seen[0].add_(1.0)  # the next block's input, which it keeps
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("policy", POLICIES)
def test_saved_tensors_go_through_hooks(policy):
    model, theirs = pair("qwen3", policy)
    given = tiny.inputs("qwen3", torch.float64)
    want = run("qwen3", theirs, given)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(), torch.from_numpy):
        out = tiny.output("qwen3", model, given)
    torch.manual_seed(7)
    out.backward(torch.randn_like(out))
    for a, b in zip(gradients(model), want[1:], strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("policy", ["speed", "low"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_a_plain_loop_fills_a_new_cache_and_gradients_go_through_it(name, policy):
    models = pair(name, policy, **(dict(sliding_window=4) if name == "mistral" else {}))
    results = []
    for model in models:
        out = model(**tiny.inputs(name, torch.float64))
        torch.manual_seed(7)
        layers = out.past_key_values.layers
        loss = sum((x * torch.randn_like(x)).sum() for c in layers for x in (c.keys, c.values))
        (loss + out.logits.square().sum()).backward()
        results.append([loss.detach(), *(c.keys.detach() for c in layers), *gradients(model)])
    assert is_fused(models[0])
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["llama", "dinov2"])
def test_copies_run_blocks_of_their_own(name, copied):
    model = pair(name, "balanced", exact=False)[0]
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    else:
        other = pickle.load(io.BytesIO(pickle.dumps(model)))
    own = {id(m) for m in other.modules()}
    for block in fastprompt.patch_of(other).blocks.values():
        assert {id(block.layer), id(block.parts.gate), id(block.inside[2].module)} <= own
        assert block.memory is next(iter(fastprompt.patch_of(other).memories.values()))
    given = tiny.inputs(name, torch.float64)
    before = run(name, model, given)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    changed = run(name, other, given)
    assert is_fused(other) and all(b.grad is None for b in model.parameters())
    for a, b, c in zip(run(name, model, given), before, changed, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    fastprompt.patch_of(other).undo()
    assert not any("forward" in vars(m) for m in other.modules())
    assert is_fused(model)


@pytest.mark.parametrize("policy", ["speed", "low"])
@pytest.mark.parametrize("kind", ["dense", NF4])
@pytest.mark.parametrize("name", ["llama", "qwen3", "dinov2", "clip_vision"])
def test_torch_compile_takes_a_fused_block_whole(name, kind, policy, monkeypatch):
    model, _ = pair(name, policy, kind, dtype=torch.float32, exact=False)
    layer = fastprompt.patch_of(model).anatomy.towers[0].blocks[1].layer
    x, given = torch.randn(2, 9, 32, requires_grad=True), {}
    if name in tiny.LANGUAGE:
        positions = torch.arange(9)[None]
        given["position_embeddings"] = model.model.rotary_emb(x, positions)

    def results(f):
        f(x, None, **given).square().sum().backward()
        found = [x.grad, layer.fastprompt.tokens.grad]
        x.grad = layer.fastprompt.tokens.grad = None
        return found

    want = results(layer)
    torch._dynamo.reset()

    def unfused(*_, **__):
        raise AssertionError("not as one node")

    monkeypatch.setattr(type(layer), "forward", unfused)
    got = results(torch.compile(layer, backend="aot_eager", fullgraph=True))
    assert all(relative(*pair) < 2e-6 for pair in zip(got, want, strict=True))


def test_the_node_by_itself():
    """Without a patch: `frozen_block` with a block's parts."""
    from fastprompt.ops.options import Options

    model = model_of("vit")
    model.requires_grad_(False)
    parts = fastprompt.families.anatomy(model).towers[0].blocks[0].parts
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    none = torch.empty(2, 0, 16, dtype=torch.float64)
    got = node.frozen_block(parts, x, none, none, Options(False, parts.scale))
    want = model.vit.layers[0](x)
    assert relative(got, want) < 1e-12
    dy = torch.randn_like(got)
    grads = [torch.autograd.grad(y, x, dy)[0] for y in (got, want)]
    assert relative(*grads) < 1e-12


@pytest.mark.parametrize("without", ["q_norm", "k_norm"])
def test_a_norm_on_queries_or_keys_alone(without):
    """What has none is not rotated in memory that is kept as it was before."""
    from fastprompt.ops.options import Options

    model = model_of("qwen3").requires_grad_(False)
    parts = fastprompt.families.anatomy(model).towers[0].blocks[0].parts
    setattr(parts, without, None)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    heads = parts.k_proj.out_features // parts.head_dim
    prompt = torch.randn(2, heads, 3, parts.head_dim, dtype=torch.float64)
    cos, sin = model.model.rotary_emb(x, torch.arange(5)[None])
    options = Options(True, parts.scale)
    found = []
    for policy in POLICIES:
        y = node.frozen_block(parts, x, *prompt, options, cos=cos, sin=sin, policy=policy)
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
