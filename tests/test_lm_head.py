"""M2PT(train_lm_head=True): a float32 head of its own, from any head that a model may have."""

import copy

import pytest
import tiny
import torch
from frozen import NF4, relative

import fastprompt
from fastprompt.methods import M2PT
from fastprompt.trained import dense_weight

METHOD = M2PT(3, 2, train_lm_head=True)


def build(kind):
    if kind == "tied":
        return tiny.build("llava", tie_word_embeddings=True)
    model = tiny.build("llava", torch.bfloat16 if kind == "bf16" else torch.float32)
    if kind == "nf4":
        from bitsandbytes.nn import Linear4bit

        head = Linear4bit(32, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        head.support_avx512bf16_for_cpu = False  # bitsandbytes' own repacking
        head.weight.data = model.lm_head.weight.data
        model.lm_head = head.to("cpu").requires_grad_(False)
    return model


def given(model):
    made = tiny.inputs("llava", model.dtype)
    return made | {"labels": made["input_ids"]}


@pytest.mark.parametrize("kind", ["float32", "bf16", NF4, "tied"])
def test_a_head_of_its_own_that_undo_takes_back(kind, tmp_path):
    model = build(kind)
    batch, old = given(model), model.lm_head
    embeddings = model.get_input_embeddings().weight
    before = dense_weight(old).clone()
    model.requires_grad_(False)
    with torch.no_grad():
        base = model(**batch).logits
    patch = fastprompt.patch(model, METHOD)
    head = patch.trainable["lm_head.weight"]
    assert head.dtype == torch.float32 and torch.equal(head, before.float())
    assert head is not embeddings and model.lm_head is not old
    report = patch.report()
    assert ("lm_head, trains as a float32 copy" in report) == (kind in ("bf16", "nf4"))
    assert ("untied from the embeddings" in report) == (kind == "tied")
    assert "of all logits: lm_head trains" in report

    model.tie_weights()  # as from_pretrained and Trainer may: it must not tie them again
    optimizer = torch.optim.SGD(patch.trainable.values(), lr=0.5)
    model.train()(**batch).loss.backward()
    optimizer.step()
    assert not torch.equal(head, before.float()) and embeddings.grad is None
    assert torch.equal(dense_weight(old), before)

    with torch.no_grad():
        want = model.eval()(**batch).logits
        fastprompt.save(model, tmp_path)
        other = build(kind)
        fastprompt.load(other, tmp_path)
        assert torch.equal(other(**batch).logits, want)
        assert not torch.equal(want, base)
        patch.undo()
        assert model.lm_head is old and torch.equal(model(**batch).logits, base)
    model.tie_weights()
    assert (model.lm_head.weight is embeddings) == (kind == "tied")


def test_its_gradient_is_that_of_a_dense_head():
    model = tiny.build("llava", torch.float64)
    plain = copy.deepcopy(model).train()
    fastprompt.patch(model, METHOD)
    fastprompt.patch(plain, M2PT(3, 2), logits=True)
    with torch.no_grad():
        for name, p in fastprompt.patch_of(plain).trainable.items():
            p.copy_(fastprompt.patch_of(model).trainable[name])
    plain.lm_head.weight.requires_grad_(True)
    for each in (model.train(), plain):
        each(**given(each)).loss.backward()
    assert relative(model.lm_head.weight.grad, plain.lm_head.weight.grad) < 1e-10
    for name, p in fastprompt.patch_of(plain).trainable.items():
        assert relative(fastprompt.patch_of(model).trainable[name].grad, p.grad) < 1e-10
