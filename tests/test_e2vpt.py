"""E²VPT: input prompts and learned keys and values, against attention written out."""

import copy

import pytest
import tiny
import torch
import zoo
from test_exactness import relative
from transformers import AttentionInterface

import fastprompt
from fastprompt.concatenation import concatenate
from fastprompt.families import VISION
from fastprompt.methods import E2VPT, VPT

P, Q = 3, 2


def build(name, dtype=torch.float64):
    return tiny.build(name, dtype) if name in tiny.FAMILIES else zoo.build(name, dtype)


def given(name, dtype=torch.float64):
    return (tiny if name in tiny.FAMILIES else zoo).inputs(name, dtype)


def random_(patch):
    torch.manual_seed(7)
    with torch.no_grad():
        for prompt in patch.prompts.values():
            for p in prompt.parameters():
                p.normal_()
    return patch


def with_free(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """K and V with P_K and P_V behind them."""
    k, v = module.free.permute(1, 2, 0, 3)[:, None]
    key, value = (
        torch.cat([x, y.expand(len(x), -1, -1, -1)], 2) for x, y in ((key, k), (value, v))
    )
    weights = (query @ key.mT * scaling).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("literal_e2vpt", with_free)


@pytest.mark.parametrize("lengths", [P, [0, P, 1]])
@pytest.mark.parametrize("name", ["vit", "clip_vision", "dinov2", "dinov3_vit"])
def test_against_attention_written_out(name, lengths):
    ours = build(name)
    theirs = copy.deepcopy(ours)
    patch = random_(fastprompt.patch(ours, E2VPT(lengths, Q, train_head=False)))
    written = concatenate(theirs, VPT(lengths, train_head=False))
    theirs.set_attn_implementation("literal_e2vpt")
    other = fastprompt.families.anatomy(theirs).tower(VISION)
    copies, mine = [], []
    for block in other.blocks:
        prompt = patch.prompts[f"{block.name}.fastprompt"]
        block.attention.free = prompt.free.detach().clone().requires_grad_()
        copies.append(block.attention.free)
        mine.append(prompt.free)
        if f"{block.name}.fastprompt" in written:
            tokens = written[f"{block.name}.fastprompt"].tokens
            tokens.data.copy_(prompt.tokens)
            copies.append(tokens)
            mine.append(prompt.tokens)
    assert len(mine) == (6 if lengths == P else 5)
    got = tiny.output(name, ours, given(name))
    want = tiny.output(name, theirs, given(name))
    assert relative(got, want) < 1e-10
    direction = torch.randn_like(want)
    got = torch.autograd.grad(got, mine, direction)
    for a, b in zip(got, torch.autograd.grad(want, copies, direction), strict=True):
        assert b.any() and relative(a, b) < 1e-10


def test_there_and_back(tmp_path):
    model, batch = tiny.build("vit"), tiny.inputs("vit")
    with torch.no_grad():
        before = model(**batch).logits
        patch = random_(fastprompt.patch(model, E2VPT(P, Q, layers="top", dropout=0.1)))
        assert "3 prompt rows, dropout 0.1 and 2 keys and values × 1 of 3" in patch.report()
        names = {n.rpartition(".")[2] for n in patch.trainable if "fastprompt" in n}
        assert names == {"tokens", "free"}
        changed = model(**batch).logits
        assert relative(changed, before) > 1e-3
        next(iter(patch.prompts.values())).free.add_(1)  # kept keys do not outlive a change
        assert not torch.equal(model(**batch).logits, changed)
        changed = model(**batch).logits
        fastprompt.save(model, tmp_path)
        other = tiny.build("vit")
        fastprompt.load(other, tmp_path)
        assert torch.equal(other(**batch).logits, changed)
        share = fastprompt.trainable_share(tiny.build("vit"), patch.method)
        assert share.trained["prompts"] == P * 32 + Q * 2 * 32
        patch.undo()
        assert torch.equal(model(**batch).logits, before)


def test_how_they_begin_and_prefill():
    model = tiny.build("vit")
    patch = fastprompt.patch(model, E2VPT(50, 20))
    bound = (6 / (3 * 256 + 32)) ** 0.5
    prompt = next(iter(patch.prompts.values()))
    for p in (prompt.tokens, prompt.free):
        assert 0.95 * bound < p.abs().max() <= bound
    free = prompt.free.clone()
    fastprompt.prefill(patch, pixel_values=tiny.inputs("vit")["pixel_values"])
    assert torch.equal(prompt.free, free)
    assert prompt.tokens.square().mean().sqrt().item() == pytest.approx(0.1)
    assert "20 keys and values" in patch.report()
    none = fastprompt.patch(tiny.build("vit"), E2VPT(0, Q))
    assert len(none.prompts) == 3 and "0 prompt rows and 2 keys and values × 3" in none.report()


@pytest.mark.parametrize("kv", [0, -1, True, [2, 2, 2], 1.5])
def test_refusals(kv):
    with pytest.raises(ValueError, match="kv_tokens: want"):
        fastprompt.patch(tiny.build("vit"), E2VPT(P, kv))
    with pytest.raises(ValueError, match="want a vision tower; llama has text"):
        fastprompt.patch(tiny.build("llama"), E2VPT(P))
    with pytest.raises(ValueError, match="want prompts that are rows of each block, got E2VPT"):
        concatenate(tiny.build("vit"), E2VPT(P))
