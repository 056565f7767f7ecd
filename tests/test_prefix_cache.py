"""Prompts as a prefix cache: the unpatched model behind it gives the patched one's logits."""

import copy

import pytest
import tiny
import torch
import zoo

import fastprompt
from fastprompt.methods import L2P, M2PT, DeepPrompts, PrefixTuning

P = 5


def patched(name, dtype=torch.float64, **more):
    """(the base model, the patched one), both rotating in their own precision."""
    base = tiny.build(name, dtype, **more)
    tiny.in_float64(base)
    model = copy.deepcopy(base)
    fastprompt.patch(model, DeepPrompts(text=P, train_head=False))
    return base, model


def padded(batch=3, length=9):
    ids = torch.randint(6, 63, (batch, length))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def behind(mask):
    return torch.cat([mask.new_ones(len(mask), P), mask], dim=1)


@pytest.mark.parametrize("name", tiny.LANGUAGE)
def test_logits(name):
    base, model = patched(name)
    ids = torch.randint(6, 63, (3, 9))
    cache = fastprompt.prefix_cache(model, batch=3)
    got = base(ids, past_key_values=cache, attention_mask=behind(torch.ones_like(ids))).logits
    torch.testing.assert_close(got, model(ids).logits, rtol=1e-10, atol=1e-10)
    assert cache.get_seq_length() == P + 9


@pytest.mark.parametrize("name", tiny.LANGUAGE)
def test_generated_tokens(name):
    base, model = patched(name, torch.float32)
    ids, mask = padded()
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    want = model.generate(ids, attention_mask=mask, **options)
    cache = fastprompt.prefix_cache(model, batch=3)
    # generate takes the tokens that a cache has seen off the ids: stand-ins for the prompts
    given = torch.cat([ids.new_full((3, P), 7), ids], dim=1)
    got = base.generate(given, past_key_values=cache, attention_mask=behind(mask), **options)
    assert torch.equal(got[:, P:], want)


def test_scaled_rotation_and_dtype():
    rope = dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
    base, model = patched("llama", rope_parameters=rope)
    ids = torch.randint(6, 63, (1, 9))
    cache = fastprompt.prefix_cache(model)
    mask = behind(torch.ones_like(ids))
    got = base(ids, past_key_values=cache, attention_mask=mask).logits
    torch.testing.assert_close(got, model(ids).logits, rtol=1e-10, atol=1e-10)
    assert (
        fastprompt.prefix_cache(model, dtype=torch.bfloat16).layers[0].keys.dtype == torch.bfloat16
    )


def test_no_dropout_in_a_cache():
    model = tiny.build("llama")
    patch = fastprompt.patch(model, DeepPrompts(text=P, dropout=0.5))
    in_training = fastprompt.prefix_cache(model.train()).layers[0].keys
    assert all(prompt.training for prompt in patch.prompts.values())
    assert torch.equal(in_training, fastprompt.prefix_cache(model.eval()).layers[0].keys)


def test_a_cache_is_nobodys_memory():
    _, model = patched("llama")
    one, two = (fastprompt.prefix_cache(model, batch=2) for _ in range(2))
    one.layers[0].keys.zero_()
    assert two.layers[0].keys.abs().min(dim=0).values.sum() > 0
    two.layers[1].values[0].zero_()
    assert two.layers[1].values[1].abs().sum() > 0
    assert not two.layers[1].values.requires_grad


def test_what_does_not_carry_over_is_said():
    model = tiny.build("llava")
    fastprompt.patch(model, M2PT(2, P))
    with pytest.warns(UserWarning, match=r"alone, not \['vision prompts', '.*projector"):
        assert fastprompt.prefix_cache(model).get_seq_length() == P


def test_what_is_not_there_is_not_said_to_be_left(recwarn):
    model = tiny.build("llava")
    fastprompt.patch(model, M2PT(0, P, train_projector=False))
    assert fastprompt.prefix_cache(model).get_seq_length() == P and not recwarn.list


def test_prefixes_behind_which_tokens_count_on():
    """PEFT's, under learned positions: the offset is the prefix's length."""
    base = zoo.build("gpt2", torch.float64)
    model, ids = copy.deepcopy(base), torch.randint(6, 63, (2, 9))
    fastprompt.patch(model, PrefixTuning(P, position_offset=P))
    cache = fastprompt.prefix_cache(model, batch=2)
    got = base(ids, past_key_values=cache, attention_mask=behind(torch.ones_like(ids))).logits
    torch.testing.assert_close(got, model(ids).logits, rtol=1e-10, atol=1e-10)
    other = zoo.build("gpt2")
    fastprompt.patch(other, PrefixTuning(P, position_offset=2))
    with pytest.raises(ValueError, match="give position_ids from 2 on"):
        fastprompt.prefix_cache(other)


def test_learned_positions_that_are_given():
    """Deep prompts carry none: tokens behind them count from 0, and have to be told so."""
    base = zoo.build("gpt2", torch.float64)
    model, ids = copy.deepcopy(base), torch.randint(6, 63, (2, 9))
    fastprompt.patch(model, DeepPrompts(text=P))
    want = model(ids).logits

    def got(**positions):
        cache = fastprompt.prefix_cache(model, batch=2, positions=True)
        mask = behind(torch.ones_like(ids))
        return base(ids, past_key_values=cache, attention_mask=mask, **positions).logits

    right = got(position_ids=torch.arange(9).expand(2, 9))
    torch.testing.assert_close(right, want, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(got(), want, rtol=1e-3)  # as if P tokens had been read


def test_refusals():
    def refused(message, model, method, **options):
        fastprompt.patch(model, method)
        with pytest.raises(ValueError, match=message):
            fastprompt.prefix_cache(model, **options)

    text = DeepPrompts(text=P, train_head=False)
    with pytest.raises(ValueError, match="want a patched model"):
        fastprompt.prefix_cache(tiny.build("llama"))
    refused("sliding window of 4", tiny.build("mistral", sliding_window=4), text)
    refused("prompts of one length in every block", tiny.build("vit"), None)
    refused("same prompts for all", tiny.build("vit"), L2P())
    rope = dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0)
    refused("no length changes, got 'dynamic'", tiny.build("llama", rope_parameters=rope), text)
    refused("pass positions=True", zoo.build("gpt2"), text)
    refused("want a decoder .* got t5, with a bias", zoo.build("t5"), text)
    refused("want a decoder .* got t5, with a bias", zoo.build("t5, encoder"), text)
    for name in ("bert", "roberta"):
        refused(f"want a decoder .* got {name}, an encoder", zoo.build(name), text)
    refused("want a decoder .* got clip, an encoder", tiny.build("clip_text"), text)
