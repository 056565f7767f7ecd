"""MaPLe: vision prompts made from text prompts, against literal rows in both towers."""

import copy
import pickle

import pytest
import tiny
import torch
import transformers as tf
import zoo
from test_exactness import relative
from test_families import four_bit

import fastprompt
from fastprompt.concatenation import concatenate
from fastprompt.methods import DeepPrompts, MaPLe
from fastprompt.viz import similarity

P, DEPTH = 3, 2


def build(name="clip", dtype=torch.float64):
    torch.manual_seed(0)
    kind = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[name]
    text = dict(tiny.CLIP_TEXT, hidden_size=24, num_attention_heads=3)  # of another width
    vision = dict(tiny.VISION)
    if name != "clip":
        text["projection_size"] = tiny.VISION["hidden_size"]
    if name == "siglip2":
        vision = {**vision, "num_patches": 9}
    config = getattr(tf, f"{kind}Config")(text_config=text, vision_config=vision, projection_dim=24)
    model = getattr(tf, f"{kind}Model")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.to(dtype).eval()


def given(name="clip", dtype=torch.float64):
    images = zoo.inputs("siglip2 vision", dtype) if name == "siglip2" else tiny.inputs("vit", dtype)
    batch = tiny.inputs("clip_text") | images
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -2:] = 0
    return batch | dict(attention_mask=mask)


def random_(patch):
    torch.manual_seed(7)
    with torch.no_grad():
        for p in patch.trainable.values():
            p.normal_()
    return patch


def towers(prompts):
    """Pairs of a text and a vision prompt, block by block."""
    kinds = ([p for n, p in prompts.items() if kind in n] for kind in ("text", "vision"))
    return list(zip(*kinds, strict=True))


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_against_literal_rows(name):
    ours = build(name)
    theirs = copy.deepcopy(ours)
    patch = random_(fastprompt.patch(ours, MaPLe(P, DEPTH)))
    written = concatenate(theirs, DeepPrompts(P, P, layers="0,1", train_head=False))
    assert patch.prompts.keys() == written.keys() and len(written) == 2 * DEPTH
    pairs = list(zip(towers(patch.prompts), towers(written), strict=True))
    for (text, vision), (text_rows, vision_rows) in pairs:
        text_rows.tokens.data.copy_(text.tokens)
        mapped = text.tokens @ vision.map.weight.T + vision.map.bias
        vision_rows.tokens.data.copy_(mapped)
    batch = given(name)
    got, want = ours(**batch).logits_per_image, theirs(**batch).logits_per_image
    assert relative(got, want) < 1e-10
    assert relative(build(name)(**batch).logits_per_image, want) > 1e-3
    direction = torch.randn_like(want)
    got.backward(direction)
    want.backward(direction)
    for (text, vision), (text_rows, vision_rows) in pairs:
        d = vision_rows.tokens.grad
        assert relative(vision.map.weight.grad, d.T @ text.tokens) < 1e-10
        assert relative(vision.map.bias.grad, d.sum(0)) < 1e-10
        assert relative(text.tokens.grad, text_rows.tokens.grad + d @ vision.map.weight) < 1e-10


def test_one_tower_alone_still_trains_both_sides():
    model = build()
    patch = random_(fastprompt.patch(model, MaPLe(P, DEPTH)))
    model.train().get_image_features(
        given()["pixel_values"]
    ).pooler_output.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in patch.trainable.values())


@pytest.mark.filterwarnings("ignore:.*(gradient_checkpointing_enable|reentrant).*")
def test_gradient_checkpointing_changes_nothing():
    def gradients(reentrant=None):
        model = build()
        patch = random_(fastprompt.patch(model, MaPLe(P, DEPTH)))
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**given()).logits_per_image.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in patch.trainable.values()])

    want = gradients()
    for reentrant in (True, False):
        torch.testing.assert_close(gradients(reentrant), want, rtol=1e-9, atol=1e-11)


def test_there_and_back(tmp_path):
    model, batch = build(), given()
    with torch.no_grad():
        before = model(**batch).logits_per_image
        patch = random_(fastprompt.patch(model, MaPLe(P, DEPTH)))
        assert "3 prompt rows made from the text's × 2 of 3 blocks" in patch.report()
        changed = model(**batch).logits_per_image
        assert similarity(patch)["vision"].shape == (DEPTH, DEPTH)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        text, _ = towers(patch.prompts)[0]
        text.tokens.add_(1)  # kept keys of the vision tower do not outlive a change of the text's
        image = model.get_image_features(batch["pixel_values"]).pooler_output
        for other in copies:
            assert torch.equal(other(**batch).logits_per_image, changed)
            old = other.get_image_features(batch["pixel_values"]).pooler_output
            assert relative(image, old) > 1e-6
        text.tokens.sub_(1)
        fastprompt.save(model, tmp_path)
        other = build()
        loaded = fastprompt.load(other, tmp_path)
        assert loaded.method == patch.method
        torch.testing.assert_close(other(**batch).logits_per_image, changed, rtol=0, atol=1e-12)
        share = fastprompt.trainable_share(build(), patch.method)
        count = sum(p.numel() for p in patch.trainable.values())
        assert share.trained["prompts"] == count == DEPTH * (P * 24 + 24 * 32 + 32)
        patch.undo()
        assert torch.equal(model(**batch).logits_per_image, before)
    assert not any("fastprompt" in n for n, _ in model.named_modules())


def test_four_bits():
    pytest.importorskip("bitsandbytes")
    models = four_bit(build())
    with torch.no_grad():
        for model in models:
            random_(fastprompt.patch(model, MaPLe(P, DEPTH)))
        got, want = (model(**given()).logits_per_image for model in models)
    assert relative(got, want) < 1e-6


def test_refusals():
    for name, kinds in (
        ("vit", "vit with vision"),
        ("llava", "llava with text, vision and a proj"),
    ):
        with pytest.raises(ValueError, match=f"MaPLe: want a CLIP with .*, got {kinds}"):
            fastprompt.patch(tiny.build(name), MaPLe(P, DEPTH))
    for options, words in (
        ((0, 1), "MaPLe.num_tokens: want a whole number 1 or more, got 0"),
        ((P, 4), r"MaPLe.depth: want a whole number 1 .. 3, got 4"),
        ((P, "all"), r"MaPLe.depth: want a whole number 1 .. 3, got 'all'"),
    ):
        with pytest.raises(ValueError, match=words):
            fastprompt.patch(build(), MaPLe(*options))
    patch = fastprompt.patch(build(), MaPLe(P, DEPTH))
    with pytest.raises(ValueError, match="prefill: want prompts that are rows"):
        fastprompt.prefill(patch, torch.arange(6, 20))
    with pytest.raises(ValueError, match="want prompts that are rows of each block, got MaPLe"):
        concatenate(build(), MaPLe(P, DEPTH))
