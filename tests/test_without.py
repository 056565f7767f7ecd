"""A patched model without its prompts, what each prompt does, and groups for an optimizer."""

import warnings

import pytest
import tiny
import torch
import zoo
from test_exactness import relative

import fastprompt
from fastprompt.methods import L2P, M2PT, VPT, DeepPrompts, FullTuning
from fastprompt.sets.beginning import kmeans


@torch.no_grad()
def train(patch):
    for p in patch.trainable.values():
        p.add_(torch.randn_like(p))


@pytest.mark.parametrize("name", ["llama", "llava", "vit", "siglip_vision", "gemma2", "t5"])
def test_disabled_gives_the_base_model(name):
    family = zoo if name in zoo.ROWS else tiny
    model, given = family.build(name, torch.float64), family.inputs(name, torch.float64)
    with torch.no_grad():
        base = tiny.output(name, model, given)
        patch = fastprompt.patch(model)
        train(patch)  # of a LLaVA and a ViT the projector and the head, too
        ours = tiny.output(name, model, given)
        with patch.disabled():
            assert relative(tiny.output(name, model, given), base) < 1e-10
            patch.report()
        assert torch.equal(tiny.output(name, model, given), ours) and relative(ours, base) > 1e-3
    with patch.disabled():  # with gradients blocks run as one node, whose norms are float64
        assert relative(tiny.output(name, model, given), base) < 1e-6
    assert all(p.requires_grad for p in patch.trainable.values())


def test_a_pool_can_be_disabled():
    model, given = tiny.build("vit", torch.float64), tiny.inputs("vit", torch.float64)
    with torch.no_grad():
        base = model(**given).logits
        patch = fastprompt.patch(model, L2P(pool_size=4, length=2, top_n=2))
        train(patch)
        with patch.disabled():
            assert relative(model(**given).logits, base) < 1e-10


def test_what_each_prompt_does():
    model, given = tiny.build("llava", torch.float64), tiny.inputs("llava", torch.float64)
    given["attention_mask"][1, :4] = 0  # left padding, whose logits are not looked at
    given["input_ids"][1, :5] = torch.tensor([0, 0, 0, 0, 5])
    given["input_ids"][1, 5:8] = 5
    patch = fastprompt.patch(model, M2PT(2, 3))
    with torch.no_grad():
        for i, prompt in enumerate(patch.prompts.values()):
            prompt.tokens.normal_().mul_(1.0 if i else 1e-9)  # its norm makes it as long as any
        last = patch.prompts["model.language_model.layers.2.fastprompt"]
    model.train()
    moves = patch.check(given | dict(labels=given["input_ids"]))
    assert list(moves) == [name.removesuffix(".fastprompt") for name in patch.prompts]
    assert all(move > 1e-3 for move in moves.values())
    assert model.training and all(module.training for module in model.modules())
    model.eval()
    with torch.no_grad():
        whole = model(**given).logits[given["attention_mask"].bool()]
        kept = last.tokens.clone()
        side = vars(model.model.language_model.layers[2].self_attn)["_fastprompt"]
        side.prompt = None
        gone = model(**given).logits[given["attention_mask"].bool()]
        side.prompt = last
    assert torch.equal(kept, last.tokens)
    want = (gone - whole).norm() / whole.norm()
    assert abs(moves["model.language_model.layers.2"] - want) < 1e-12


def test_prompts_that_do_nothing_are_told_of():
    model, given = tiny.build("llama"), tiny.inputs("llama")
    patch = fastprompt.patch(model, DeepPrompts(text=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.check(given)
    for layer in model.model.layers:  # keys that nobody looks at
        layer.self_attn.k_proj.weight.data.zero_()
        layer.self_attn.v_proj.weight.data.zero_()
    with pytest.warns(UserWarning, match=r"no prompt moves .*: were your prompts loaded"):
        moves = patch.check(given)
    assert max(moves.values()) < 1e-5


def test_prompts_of_sets_in_use_are_not_taken_out():
    """Inside `using` the blocks are told of those sets, whatever their own prompts are."""
    patch, given = fastprompt.patch(tiny.build("llama"), DeepPrompts(text=3)), tiny.inputs("llama")
    patch.add("b")
    calls = (
        lambda: patch.disabled().__enter__(),
        lambda: patch.check(given),
        lambda: kmeans(patch, [given]),
        lambda: fastprompt.prefill(patch, given["input_ids"][0]),
    )
    with patch.using("b"):
        for call in calls:
            with pytest.raises(ValueError, match="want to be outside of"):
                call()
    for call in calls[1:]:
        call()


def test_a_head_that_timm_has_taken_out():
    pytest.importorskip("timm")
    model, given = zoo.build("timm_vit"), zoo.inputs("timm_vit")
    patch = fastprompt.patch(model, VPT(2))
    train(patch)
    model.reset_classifier(0)
    with torch.no_grad():
        ours = tiny.output("timm_vit", model, given)
        with patch.disabled():
            tiny.output("timm_vit", model, given)
        assert torch.equal(tiny.output("timm_vit", model, given), ours)


def test_what_cannot_be_checked():
    none = fastprompt.patch(tiny.build("llava"), M2PT(0, 0))
    with pytest.raises(ValueError, match="check: want a prompt or more"):
        none.check(tiny.inputs("llava"))
    patch, given = fastprompt.patch(tiny.build("llama"), DeepPrompts(text=3)), tiny.inputs("llama")
    for out, got in (((1, 2), "a tuple"), ({"image_features": 1}, "image_features")):
        handle = patch.model.register_forward_hook(lambda *_, out=out: out)
        with pytest.raises(ValueError, match=f"check: want an output of logits.*; got {got}"):
            patch.check(given)
        handle.remove()


def test_groups_for_an_optimizer():
    patch = fastprompt.patch(tiny.build("llava"), M2PT(2, 3, train_lm_head=True))
    groups = patch.param_groups(prompt_lr=0.3, projector_lr=0.02)
    assert [(g["name"], g.get("lr")) for g in groups] == [
        ("prompts", 0.3), ("projector", 0.02), ("head", None),
    ]  # fmt: skip
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in patch.trainable.values()}
    assert len(groups[0]["params"]) == len(patch.prompts)
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.02, 0.5]
    patch = fastprompt.patch(tiny.build("vit"), VPT(2))
    assert [g["name"] for g in patch.param_groups(head_lr=0.1)] == ["prompts", "head"]
    with pytest.raises(ValueError, match="want no rate for the projector: none trains"):
        patch.param_groups(projector_lr=0.1)


def test_refusals():
    raw = fastprompt.patch(tiny.build("llava"), M2PT(2, 3, visual_prompts="context"))
    with pytest.raises(ValueError, match="disabled: want visual_prompts='drop', got 'context'"):
        raw.disabled().__enter__()
    with pytest.raises(ValueError, match="check: want visual_prompts='drop'"):
        raw.check({})
    raw.undo()
    with pytest.raises(ValueError, match="one that was undone"):
        raw.disabled().__enter__()
    with pytest.raises(ValueError, match="want a method of prompts, got FullTuning"):
        fastprompt.patch(tiny.build("llama"), FullTuning()).check({})
