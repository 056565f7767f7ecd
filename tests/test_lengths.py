"""Prompts of another length in each block, and dropout of their rows."""

import copy
import json

import pytest
import tiny
import torch
import zoo
from test_exactness import relative

import fastprompt
from fastprompt.concatenation import concatenate
from fastprompt.hooks import BiasOfPrompts
from fastprompt.methods import M2PT, VPT, DeepPrompts, from_card

EACH = [[2, 5, 3], {0: 2, 2: 5}, [0, 4, 1]]


def deep(name, lengths, **more):
    text, vision = name in ("llama", "qwen3") or "llava" in name, "vit" in name or "llava" in name
    of_vision = lengths if "llava" not in name or isinstance(lengths, int) else 2
    return DeepPrompts(of_vision if vision else 0, lengths if text else 0, train_head=False, **more)


def pair(name, method):
    ours = tiny.build(name, torch.float64)
    tiny.in_float64(ours)
    theirs = copy.deepcopy(ours)
    patch, written = fastprompt.patch(ours, method), concatenate(theirs, method)
    assert patch.prompts.keys() == written.keys()
    with torch.no_grad():
        for key, prompt in patch.prompts.items():
            written[key].tokens.copy_(prompt.tokens.normal_())
    return ours, theirs, patch, written


def same(name, ours, theirs, patch, written, before=lambda: None):
    given = tiny.inputs(name, torch.float64)
    before()
    got = tiny.output(name, ours, given)
    before()
    want = tiny.output(name, theirs, given)
    assert relative(got, want) < 1e-10
    direction = torch.randn_like(want)
    got.backward(direction)
    want.backward(direction)
    for key, prompt in patch.prompts.items():
        assert prompt.tokens.grad.any(), key
        assert relative(prompt.tokens.grad, written[key].tokens.grad) < 1e-10, key


@pytest.mark.parametrize("lengths", EACH, ids=str)
@pytest.mark.parametrize("name", ["llama", "vit", "llava"])
def test_each_length_against_literal_rows(name, lengths):
    """Each prompt ends at position -1, so a shorter one lacks the first places."""
    made = pair(name, deep(name, lengths))
    given = lengths if isinstance(lengths, dict) else dict(enumerate(lengths))
    there = {n.split(".")[-2]: p.length for n, p in made[2].prompts.items()
             if name != "llava" or "language" in n}  # fmt: skip
    assert there == {str(i): n for i, n in given.items() if n}
    same(name, *made)


def test_lengths_go_with_the_layers_that_are_named():
    patch = fastprompt.patch(tiny.build("vit"), VPT([4, 1], layers="odd"))
    assert {n.split(".")[-2]: p.length for n, p in patch.prompts.items()} == {"0": 4, "2": 1}
    assert "4 prompt rows × 1, 1 prompt rows × 1 of 3 blocks" in patch.report()


def test_a_bias_of_positions_ends_at_the_last_row():
    """T5: the decoder's last token sees a shorter prompt where it sees the end of a longer one."""
    given = zoo.inputs("t5")
    model = zoo.build("t5")
    patch = fastprompt.patch(model, DeepPrompts(text=[2, 5, 3], train_head=False))
    whole = fastprompt.patch(zoo.build("t5"), DeepPrompts(text=5, train_head=False))
    bias = vars(model.encoder.block[0].layer[0].SelfAttention)["compute_bias"]
    assert isinstance(bias, BiasOfPrompts) and bias.rows == 5
    seen = []
    for one in (patch, whole):
        with fastprompt.recorder.listening(lambda n, _, o: seen.append((n, o["prompt_bias"]))):
            one.model(**given)
    parts, wholes = dict(seen[: len(seen) // 2]), dict(seen[len(seen) // 2 :])
    assert {parts[n].shape[-1] for n in parts if "encoder" in n} == {2, 3, 5}
    for name, bias in parts.items():
        assert torch.equal(bias, wholes[name][..., 5 - bias.shape[-1] :])


def test_generate_with_lengths_of_each_block():
    model = tiny.build("llama", torch.float64)
    fastprompt.patch(model, deep("llama", [1, 6, 3]))
    ids = tiny.inputs("llama")["input_ids"]
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = [model.generate(ids, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*got)


def test_a_checkpoint_knows_its_lengths(tmp_path):
    for lengths in EACH:
        model = tiny.build("llama")
        patch = fastprompt.patch(model, deep("llama", lengths))
        fastprompt.save(model, tmp_path)
        card = json.loads((tmp_path / "card.json").read_text())["method"]
        assert from_card(card) == patch.method
        other = fastprompt.load(tiny.build("llama"), tmp_path)
        assert [p.length for p in other.prompts.values()] == [
            p.length for p in patch.prompts.values()
        ]
    assert DeepPrompts(text={"2": 1, "0": 3}) == DeepPrompts(text={0: 3, 2: 1})


def test_prefill_of_each_length():
    patch = fastprompt.patch(tiny.build("llama"), deep("llama", [2, 5, 3]))
    before = [p.tokens.clone() for p in patch.prompts.values()]
    fastprompt.prefill(patch, torch.arange(6, 12))
    for old, prompt in zip(before, patch.prompts.values(), strict=True):
        assert prompt.tokens.shape == old.shape and not torch.equal(prompt.tokens, old)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([2, 3], "want 3 lengths, one for each block that layers='all' names; got 2"),
        ({3: 2}, "want layers below 3, got 3"),
        ({-1: 2}, "want lengths by layer, from 0, got"),
        ({"x": 2}, "want lengths by layer, from 0, got"),
        ([2, -1, 2], "want a length of 0 or more, got -1"),
        ([2, True, 2], "want a length of 0 or more, got True"),
        (2.0, r"want a length of 0 or more, got 2\.0"),
        ("3", "want a length of 0 or more, got '3'"),
    ],
    ids=str,
)
def test_wrong_lengths_are_errors(lengths, words):
    model = tiny.build("llama")
    with pytest.raises(ValueError, match=words):
        fastprompt.patch(model, DeepPrompts(text=lengths))
    assert not any("fastprompt" in n for n, _ in model.named_modules())


def test_lengths_by_layer_and_layers_are_an_error():
    with pytest.raises(ValueError, match="want lengths by layer, or layers='top'; got both"):
        fastprompt.patch(tiny.build("vit"), VPT({0: 1}, layers="top"))
    with pytest.raises(ValueError, match=r"want vision_tokens of one length .* got \(2, 2\)"):
        fastprompt.patch(tiny.build("llava"), M2PT([2, 2], 2, visual_prompts="raw"))
    fastprompt.patch(tiny.build("llava"), M2PT([2, 2], {1: 3}))


# ---- dropout ----


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_dropped_rows_against_literal_rows(name):
    """In training both draw the same masks; in evaluation there are none."""
    ours, theirs, patch, written = pair(name, deep(name, 4, dropout=0.5))
    ours.train(), theirs.train()
    same(name, ours, theirs, patch, written, before=lambda: torch.manual_seed(5))
    given = tiny.inputs(name, torch.float64)
    with torch.no_grad():
        first, second = (tiny.output(name, ours, given) for _ in range(2))
        assert relative(first, second) > 1e-3  # no kept keys
        ours.eval(), theirs.eval()
        first, second = (tiny.output(name, model, given) for model in (ours, theirs))
        assert relative(first, second) < 1e-10
        assert torch.equal(tiny.output(name, ours, given), first)


def gradients(memory, reentrant=None):
    model = tiny.build("vit", torch.float64)
    patch = fastprompt.patch(model, VPT(4, dropout=0.5), memory=memory)
    torch.manual_seed(3)
    for p in patch.prompts.values():
        p.tokens.data.normal_()
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    model(**tiny.inputs("vit", torch.float64)).logits.square().sum().backward()
    return torch.cat([p.tokens.grad.flatten() for p in patch.prompts.values()])


@pytest.mark.filterwarnings("ignore:.*(gradient_checkpointing_enable|reentrant).*")
@pytest.mark.parametrize("memory", ["off", "speed"])
def test_what_is_recomputed_is_dropped_alike(memory):
    want = gradients(memory)
    zeros = (want == 0).double().mean()
    assert 0.3 < zeros < 0.7  # a number that was dropped has no gradient
    for reentrant in (True, False):
        torch.testing.assert_close(gradients(memory, reentrant), want, rtol=1e-10, atol=1e-12)


def test_dropout_is_no_part_of_what_prompts_are(tmp_path):
    model = tiny.build("vit")
    patch = fastprompt.patch(model, VPT(4, dropout=0.5))
    assert "4 prompt rows, dropout 0.5 × 3 of 3 blocks" in patch.report()
    fastprompt.save(model, tmp_path)
    other = tiny.build("vit")
    fastprompt.patch(other, VPT(4))
    fastprompt.load(other, tmp_path)
    for p in (1, -0.1, "0.5", True):
        with pytest.raises(ValueError, match="dropout: want a probability from 0 to below 1, got"):
            fastprompt.patch(tiny.build("vit"), VPT(4, dropout=p))
