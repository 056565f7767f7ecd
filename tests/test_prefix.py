"""Prefix tuning: keys and values as they are, how they begin, and the MLP that may make them."""

import copy
import pickle

import pytest
import tiny
import torch
import zoo
from test_exactness import relative
from test_families import four_bit
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import fastprompt
from fastprompt import attention
from fastprompt.methods import DeepPrompts, PrefixTuning

P = 4


def build(name):
    return tiny.build(name, torch.float64) if name in tiny.FAMILIES else zoo.build(name)


def given(name):
    where = tiny if name in tiny.FAMILIES else zoo
    return where.inputs(name, torch.float64)


def random_(patch, seed=7):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in patch.trainable.values():
            p.normal_()
    return patch


def literal_cache(model, prompts):
    """The prefix as P tokens that were read: keys rotated by transformers at 0 .. P-1."""
    cache = DynamicCache()
    for i, tokens in enumerate(prompts):
        k, v = tokens.permute(1, 2, 0, 3)[:, None]
        places = torch.arange(len(tokens))[None]
        k, _ = apply_rotary_pos_emb(k, k, *model.model.rotary_emb(k, places))
        cache.update(k, v, i)
    return cache


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_against_tokens_that_were_read(name):
    """GQA; Qwen3's norm of keys' heads is not applied to keys that are given."""
    ours = build(name)
    tiny.in_float64(ours)
    theirs = copy.deepcopy(ours).requires_grad_(False)
    patch = random_(fastprompt.patch(ours, PrefixTuning(P)))
    rows = [p.tokens for p in patch.prompts.values()]
    assert all(r.shape == (P, 2, 2, patch.anatomy.towers[0].blocks[0].head_dim) for r in rows)
    copies = [r.detach().clone().requires_grad_() for r in rows]
    ids = given(name)["input_ids"]
    got = ours(input_ids=ids).logits
    cache = literal_cache(theirs, copies)
    cache.batch_repeat_interleave(len(ids))
    want = theirs(input_ids=ids, past_key_values=cache).logits
    assert relative(got, want) < 1e-10
    direction = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, rows, direction),
        torch.autograd.grad(want, copies, direction),
        strict=True,
    ):
        assert relative(a, b) < 1e-10


ALL = ["gpt2", "phi3", "opt", "olmo2", "gemma2", "gpt_oss", "bert", "t5"]


@pytest.mark.parametrize("name", ALL)
def test_against_rows_that_become_these_keys_and_values(name):
    """Fused projections, norms of keys, positions as a bias, sinks, windows: as rows have them."""
    ours = build(name)
    theirs = copy.deepcopy(ours)
    rows = random_(fastprompt.patch(theirs, DeepPrompts(text=P, train_head=False)))
    patch = fastprompt.patch(ours, PrefixTuning(P))
    towers = zip(rows.anatomy.towers, patch.anatomy.towers, strict=True)
    with torch.no_grad():
        for a, b in ((a, b) for s, t in towers for a, b in zip(s.blocks, t.blocks, strict=True)):
            side = vars(a.attention)[attention.ATTRIBUTE]
            k, v = side.project(side.prompt.tokens[None])
            b.layer.fastprompt.tokens.copy_(torch.cat([k, v]).permute(2, 0, 1, 3))
        want = tiny.output(name, theirs, given(name))
        assert relative(tiny.output(name, ours, given(name)), want) < 1e-10
        assert relative(tiny.output(name, build(name), given(name)), want) > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_prefill_is_the_text_in_front(name):
    model = build(name)
    tiny.in_float64(model)
    ids = given(name)["input_ids"]
    text = torch.randint(6, 60, (P + 2,))
    whole = torch.cat([text[:P].expand(len(ids), -1), ids], dim=1)
    places = torch.arange(whole.shape[1])
    if name == "gpt2":  # tokens keep the learned positions that they have alone
        places[P:] -= P
    with torch.no_grad():
        want = model(input_ids=whole, position_ids=places[None]).logits[:, P:]
        patch = fastprompt.patch(model.train(), PrefixTuning(P))
        model.eval()(input_ids=ids)  # keys are cached
        fastprompt.prefill(patch, text)
        assert relative(model(input_ids=ids).logits, want) < 1e-10


def test_prefill_in_four_bits():
    pytest.importorskip("bitsandbytes")
    models, text = four_bit(tiny.build("qwen3", torch.float64)), torch.arange(6, 6 + P)
    with torch.no_grad():
        for model in models:
            tiny.in_float64(model)
            fastprompt.prefill(fastprompt.patch(model, PrefixTuning(P)), text)
        got, want = (model(**given("qwen3")).logits for model in models)
    assert relative(got, want) < 1e-10


def test_prefill_of_a_shorter_prefix_is_the_texts_end():
    model = tiny.build("llama", torch.float64)
    text = torch.randint(6, 60, (1, P + 1))
    patches = [fastprompt.patch(copy.deepcopy(model), PrefixTuning(n)) for n in (P, [2, P, 3])]
    for patch in patches:
        fastprompt.prefill(patch, text)
    whole, parts = ([p.tokens for p in patch.prompts.values()] for patch in patches)
    assert [len(part) for part in parts] == [2, P, 3]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(b, a[-len(b) :], rtol=0, atol=0)


def test_how_they_begin():
    def first(**options):
        torch.manual_seed(0)
        patch = fastprompt.patch(tiny.build("llama"), PrefixTuning(50, **options))
        return next(iter(patch.prompts.values())).tokens.detach()

    assert first().std() == pytest.approx(1, rel=0.1)
    assert first(init="xavier").abs().max() == pytest.approx((6 / (50 * 32 + 32)) ** 0.5, rel=0.02)


# ---- the MLP ----


def with_mlp(num_tokens=P, exact=True, **options):
    model = tiny.build("llama", torch.float64)
    if exact:
        tiny.in_float64(model)
    torch.manual_seed(3)
    return model, fastprompt.patch(model, PrefixTuning(num_tokens, mlp=6, **options))


@pytest.mark.parametrize("lengths", [P, [2, P, 3]])
def test_mlp_by_hand(lengths):
    model, patch = with_mlp(lengths)
    shared = model.model.fastprompt
    names = {"tokens", "hidden.weight", "hidden.bias"}
    assert {
        n.removeprefix("model.fastprompt.") for n in patch.trainable if ".layers." not in n
    } == names
    assert len(patch.trainable) == 3 + 2 * 3
    plain = tiny.build("llama", torch.float64)
    tiny.in_float64(plain)
    other = fastprompt.patch(plain, PrefixTuning(lengths))
    middle = torch.tanh(shared.tokens @ shared.hidden.weight.T + shared.hidden.bias)
    made = []
    for name, prompt in patch.prompts.items():
        rows = middle @ prompt.out.weight.T + prompt.out.bias
        rows = rows[P - prompt.length :].view(prompt.length, 2, 2, 8)
        made.append(rows)
        other.prompts[name].tokens.data.copy_(rows)
    ids = given("llama")
    got, want = model(**ids).logits, plain(**ids).logits
    assert relative(got, want) < 1e-12
    direction = torch.randn_like(want)
    got.backward(direction)
    want.backward(direction)
    grads = [p.tokens.grad for p in other.prompts.values()]
    expected = torch.autograd.grad(made, list(patch.trainable.values()), grads)
    for (name, p), grad in zip(patch.trainable.items(), expected, strict=True):
        assert grad.any() and relative(p.grad, grad) < 1e-10, name


def test_an_mlp_whose_blocks_are_on_other_devices():
    _, patch = with_mlp()
    for prompt in patch.prompts.values():
        prompt.out.to("meta")
        assert prompt.learned().device.type == "meta"


def test_mlp_is_folded_away_on_save(tmp_path):
    model, patch = with_mlp()
    with torch.no_grad():
        want = model(**given("llama")).logits
        patch.model.model.fastprompt.tokens.add_(1)  # kept keys do not outlive a change
        changed = model(**given("llama")).logits
        assert relative(changed, want) > 1e-3
    path = fastprompt.save(model, tmp_path)
    assert set(fastprompt.read_card(path)["tensors"]) == {
        f"model.layers.{i}.fastprompt.tokens" for i in range(3)
    }
    other = tiny.build("llama", torch.float64)
    tiny.in_float64(other)
    assert fastprompt.load(other, tmp_path).method == PrefixTuning(P)
    with torch.no_grad():
        torch.testing.assert_close(other(**given("llama")).logits, changed, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"holds PrefixTuning.*mlp=0.*patched with .*mlp=6"):
        fastprompt.load(model, tmp_path)
    patch.undo()
    assert not [n for n, _ in model.named_modules() if "fastprompt" in n]


def test_trainers_checkpoint_keeps_the_mlp(tmp_path):
    model, patch = with_mlp()
    model.save_pretrained(tmp_path)
    other, same = with_mlp()
    random_(same)
    fastprompt.load(other, tmp_path)
    assert all(torch.equal(p, same.trainable[n]) for n, p in patch.trainable.items())
    wrong = tiny.build("llama", torch.float64)
    fastprompt.patch(wrong, PrefixTuning(P))
    with pytest.raises(ValueError, match=r"the state to load: want .*unknown"):
        wrong.load_state_dict(dict(patch.trainable), strict=False)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_an_mlp_of_its_own(how):
    model, _ = with_mlp(exact=False)
    other = how(model)
    with torch.no_grad():
        want = model(**given("llama")).logits
        model.model.fastprompt.tokens.add_(1)
        torch.testing.assert_close(other(**given("llama")).logits, want)
        other.model.fastprompt.tokens.add_(1)
        assert relative(other(**given("llama")).logits, want) > 1e-3


# ---- reports and refusals ----


def test_report_and_share():
    _, patch = with_mlp(dropout=0.5)
    assert "4 free keys and values made by an MLP, dropout 0.5 × 3 of 3 blocks" in patch.report()
    count = sum(p.numel() for p in patch.trainable.values())
    assert f"prompts  {count - 4 * 32 - 6 * 33:,}" in patch.report()
    share = fastprompt.trainable_share(tiny.build("llama"), patch.method)
    assert share.trained["prompts"] == count


def test_dropout_in_training_alone():
    patch = fastprompt.patch(tiny.build("llama"), PrefixTuning(50, dropout=0.25))
    prompt = next(iter(patch.prompts.values()))
    assert prompt.eval().rows() is prompt.tokens
    rows = prompt.train().rows()
    assert 0.15 < (rows == 0).double().mean() < 0.35
    kept = rows != 0
    torch.testing.assert_close(rows[kept], prompt.tokens[kept] / 0.75)


def test_refusals():
    with pytest.raises(ValueError, match="want a text tower; vit has vision"):
        fastprompt.patch(tiny.build("vit"), PrefixTuning(P))
    for mlp in (-1, 2.0, True):
        with pytest.raises(ValueError, match=r"PrefixTuning.mlp: want a width of 0 or more, got"):
            fastprompt.patch(tiny.build("llama"), PrefixTuning(P, mlp=mlp))
    baked = tiny.build("llama").eval()
    with pytest.raises(ValueError, match="prefill: want prompts that can train, got a baked patch"):
        fastprompt.patch(baked, DeepPrompts(text=P))
        fastprompt.prefill(fastprompt.bake(baked), torch.arange(6, 20))
    _, patch = with_mlp()
    with pytest.raises(ValueError, match=r"prefill: want prompts that are rows .*mlp=6"):
        fastprompt.prefill(patch, torch.arange(6, 20))
    with pytest.raises(ValueError, match="want a text of 4 tokens or more for the text prompts"):
        fastprompt.prefill(fastprompt.patch(tiny.build("llama"), PrefixTuning(P)), torch.ones(3))


@pytest.mark.parametrize(
    "make", [lambda on: PrefixTuning(3, train_projector=on), lambda on: DeepPrompts(0, 3, True, on)]
)
def test_a_projector_that_trains_too(make, tmp_path):
    model = tiny.build("llava")
    patch = fastprompt.patch(model, make(True))
    projector = {n for n in patch.trainable if "multi_modal_projector" in n}
    assert len(projector) == 4 and len(patch.trainable) > 4
    given = tiny.inputs("llava")
    model.train()(**given, labels=given["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in patch.trainable.values())
    with torch.no_grad():
        for p in patch.trainable.values():
            p.add_(torch.randn_like(p), alpha=0.1)
    fastprompt.save(model, tmp_path)
    fresh = tiny.build("llava")
    fastprompt.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(**given).logits, model.eval()(**given).logits)
    off = fastprompt.patch(tiny.build("llava"), make(False))
    assert not any("multi_modal_projector" in n for n in off.trainable)
    with pytest.raises(ValueError, match="want a vision-language model, whose projector trains"):
        fastprompt.patch(tiny.build("llama"), make(True))
