"""The fused loss of patched language models: where it gives way, and the way back."""

import re

import pytest
import tiny
import torch
import torch.nn.functional as F
from losses import by_hand, labelled, pair, small_chunks  # noqa: F401 (a fixture)
from torch import nn

import fastprompt
from fastprompt.loss import FusedLoss
from fastprompt.methods import M2PT

pytestmark = pytest.mark.usefixtures("small_chunks")


class OwnHead(nn.Linear):
    pass


def _hook(model):
    model.lm_head.register_forward_hook(lambda *_: None)


def _trains(model):
    model.lm_head.weight.requires_grad_(True)


def _replaced(model):
    head = OwnHead(32, 64, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def _wrapped(model):
    """As PEFT has it: our head inside of another module."""

    class Wrapper(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x):
            return self.base_layer(x)

    model.lm_head = Wrapper(model.lm_head)


def _forward(model):
    model.lm_head.forward = lambda x: F.linear(x, model.lm_head.weight)


def _own_loss(model):
    model.loss_function = lambda logits, labels, vocab_size, **_: F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )


@pytest.mark.parametrize(
    "change, reason",
    [
        (_hook, "lm_head has hooks"),
        (_trains, "lm_head trains"),
        (_replaced, "lm_head"),
        (_wrapped, "lm_head"),
        (_forward, "lm_head's forward was replaced"),
        (_own_loss, "a loss function|loss_function was replaced"),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_falls_back_with_a_reason(before, change, reason):
    given = labelled("llama", torch.float32)
    model = tiny.build("llama")
    if before:
        if change is _trains:
            pytest.skip("a patch freezes it")
        change(model)
    torch.manual_seed(3)
    patch = fastprompt.patch(model)
    want = pair("llama", torch.float32)[1](**given).loss
    if not before:
        change(model)
    got = model.train()(**given)
    assert got.logits.shape == (2, 9, 64)
    torch.testing.assert_close(got.loss, want)
    (line,) = (each for each in patch.report().splitlines() if each.startswith("loss  "))
    assert re.search(reason, line)
    patch.undo()


def test_a_head_that_trains_keeps_its_logits():
    model = tiny.build("llava")
    patch = fastprompt.patch(model, M2PT(train_lm_head=True))
    out = model.train()(**labelled("llava", torch.float32))
    out.loss.backward()
    assert out.logits is not None and patch.trainable["lm_head.weight"].grad.any()
    assert "lm_head trains" in patch.report()


def test_logits_to_keep_is_left_to_transformers():
    ours, theirs = pair("llama", torch.float32)
    given = labelled("llama", torch.float32)
    shift = given.pop("labels")[:, -3:].contiguous()
    more = dict(labels=shift, shift_labels=shift, logits_to_keep=3)
    got, want = (model(**given, **more) for model in (ours, theirs))
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
    assert "logits_to_keep" in fastprompt.patch_of(ours).report()


def test_the_report_says_which_forwards_made_logits():
    model = tiny.build("llama").train()
    patch = fastprompt.patch(model)
    given = labelled("llama", torch.float32)
    assert model(input_ids=given["input_ids"]).logits is not None  # a loss of the user's own
    assert "of all logits: no labels were given" in patch.report()
    assert model(**given).logits is None and "logits are None" in patch.report()
    torch._dynamo.reset()
    assert torch.compile(model, backend="eager")(**given).logits is not None
    assert "of all logits: compiled as a whole" in patch.report()


def test_a_hook_from_before_the_patch_sees_no_logits():
    model, seen = tiny.build("llama").train(), []
    model.register_forward_hook(lambda module, args, out: seen.append(out.logits))
    fastprompt.patch(model)
    model(**labelled("llama", torch.float32))
    assert seen == [None]


def test_undo_gives_both_places_back():
    model = tiny.build("llama")
    given = labelled("llama", torch.float32)
    want = model(**given)
    before = set(vars(model)), set(vars(model.lm_head))
    patch = fastprompt.patch(model)
    assert isinstance(patch.loss, FusedLoss)
    model.train()(**given).loss.backward()
    patch.undo()
    assert (set(vars(model)), set(vars(model.lm_head))) == before
    assert not model._forward_hooks and not model._forward_pre_hooks
    got = model(**given)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)


def test_undo_of_a_head_that_accelerate_has_hooked():
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny.build("llama")
    patch = fastprompt.patch(model)
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    given = labelled("llama", torch.float32)
    assert model.train()(**given).logits is not None
    assert "lm_head is hooked by accelerate (ModelHook)" in patch.report()
    patch.undo()
    hooks.remove_hook_from_module(model.lm_head)
    assert model.lm_head.forward == nn.Linear.forward.__get__(model.lm_head)


def test_a_model_that_changes_its_logits_is_refused(monkeypatch):
    """As Gemma caps them and Cohere scales them: the loss would silently be another."""
    ours, theirs = pair("llama", torch.float32)
    given, run = labelled("llama", torch.float32), FusedLoss.__call__
    want = 2 * theirs(**given).logits
    monkeypatch.setattr(
        FusedLoss, "__call__", lambda self, logits, *a, **k: run(self, 2 * logits, *a, **k)
    )
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: .* changes them .*logits=True"):
        ours(**given)
    assert ours(**{k: v for k, v in given.items() if k != "labels"}).logits is not None
    torch.testing.assert_close(theirs(**given).loss, by_hand(want, given["labels"]))


def test_a_model_with_a_loss_inside_its_forward_is_left_alone():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = T5ForConditionalGeneration(config).requires_grad_(False)
    before = set(vars(model))
    assert FusedLoss.put_on(model, logits=False) == "the model does not ask its loss_function"
    assert set(vars(model)) == before and not model._forward_hooks
