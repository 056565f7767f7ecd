"""The report, and undo, after something was done to a model behind its patch's back."""

import pytest
import tiny
import torch
from frozen import NF4, model_of
from losses import labelled

import fastprompt
from fastprompt.methods import M2PT
from fastprompt.ops import prompt_attention_native as native


def test_a_block_that_was_wrapped_afterwards_is_counted():
    model = tiny.build("llama")
    patch = fastprompt.patch(model)
    layer = model.model.layers[1]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    report = patch.report()
    assert "blocks  2 of 3" in report
    assert "unfused  model.layers.1: its forward was replaced" in report


def test_an_undone_patch_says_so():
    patch = fastprompt.patch(tiny.build("llama"))
    assert "undone" not in patch.report() and not patch.undone
    patch.undo()
    assert "undone" in patch.report().splitlines()[0] and "prompt rows" not in patch.report()


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_undo_after_the_embeddings_were_resized(name):
    model = tiny.build(name)
    patch = fastprompt.patch(model)
    model.resize_token_embeddings(70)
    patch.undo()
    assert model.config.get_text_config().vocab_size == 70
    model.train()(**labelled(name, torch.float32)).loss.backward()


def test_undo_refuses_a_trained_head_that_was_resized():
    model = tiny.build("llava")
    patch = fastprompt.patch(model, M2PT(train_lm_head=True))
    model.resize_token_embeddings(70)
    with pytest.raises(ValueError, match=r"want lm_head .* 64 rows; got 70"):
        patch.undo()
    assert not patch.undone and "undone" not in patch.report()
    model.resize_token_embeddings(64)
    patch.undo()
    model(**labelled("llava", torch.float32))


def short(state):
    state.absmax = state.absmax[:1]


def strided(state):
    state.absmax = state.absmax.repeat_interleave(2)[::2]


def wide(state):
    state.absmax = state.absmax.double()


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (short, "want 24 values of absmax, got 1"),
        (strided, "want absmax contiguous, got strides"),
        (wide, "want absmax in torch.float32, got torch.float64"),
    ],
)
@pytest.mark.parametrize("kind", [NF4])
def test_a_4bit_weight_that_cannot_be_read_is_named(kind, corrupt, message):
    model = model_of("llama", kind, torch.float32, False)
    layer = model.model.layers[2].mlp.up_proj
    if layer.weight.quant_state.nested:
        layer.weight.quant_state.state2, nested = None, layer.weight.quant_state.state2
        state = layer.weight.quant_state
        state.absmax = nested.code[state.absmax.int()] * nested.absmax[0] + state.offset
        state.nested = False
    corrupt(layer.weight.quant_state)
    before = set(vars(layer))
    with pytest.raises(ValueError, match=rf"model\.layers\.2\.mlp\.up_proj: weight: {message}"):
        fastprompt.patch(model)
    assert set(vars(layer)) == before


def test_logits_are_asked_for_by_a_bool():
    with pytest.raises(ValueError, match="logits: want True or False, got 'yes'"):
        fastprompt.patch(tiny.build("llama"), logits="yes")


@pytest.mark.skipif(not native.native.available(), reason="no compiled part")
def test_what_of_attention_goes_to_the_vendor():
    report = fastprompt.patch(tiny.build("llama")).report()
    assert "float16 masks, additive masks beside soft-capping, a single query" in report
