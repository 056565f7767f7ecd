"""Prompts in some blocks alone, against literal rows in those; how prompts begin."""

import copy
import json

import pytest
import tiny
import torch
import zoo
from test_exactness import relative

import fastprompt
from fastprompt.concatenation import concatenate
from fastprompt.methods import L2P, M2PT, VPT, DeepPrompts, from_card
from fastprompt.methods.base import chosen_layers
from fastprompt.prefill import SCALE, prefill

CHOICES = {"first": [0], "odd": [0, 2], "bottom": [0, 1], "top": [2], "1": [1], "2, 0": [0, 2]}


def deep(name, layers, rows=4):
    text, vision = name in ("llama", "qwen3") or "llava" in name, "vit" in name or "llava" in name
    return DeepPrompts(vision * rows, text * rows, train_head=False, layers=layers)


@pytest.mark.parametrize("layers", CHOICES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "vit", "llava siglip mistral"])
def test_some_blocks_against_literal_rows_in_those(name, layers):
    ours = tiny.build(name, torch.float64)
    tiny.in_float64(ours)
    theirs, method = copy.deepcopy(ours), deep(name, layers)
    patch, written = fastprompt.patch(ours, method), concatenate(theirs, method)
    assert patch.prompts.keys() == written.keys()
    found = {int(key.split(".")[-2]) for key in written}
    assert found == set(CHOICES[layers])
    with torch.no_grad():
        for key, prompt in patch.prompts.items():
            written[key].tokens.copy_(prompt.tokens)
    ours.train(), theirs.train()
    given = tiny.inputs(name, torch.float64)
    got, want = tiny.output(name, ours, given), tiny.output(name, theirs, given)
    assert relative(got, want) < 1e-10
    direction = torch.randn_like(want)
    got.backward(direction)
    want.backward(direction)
    for key, prompt in patch.prompts.items():
        assert relative(prompt.tokens.grad, written[key].tokens.grad) < 1e-10, key


def test_layers_of_a_vision_tower_are_those_that_are_read():
    """Of 3 vision blocks LLaVA reads 2, and all 3 of the language model."""
    patch = fastprompt.patch(tiny.build("llava"), M2PT(2, 2, layers="top"))
    assert [key.split("layers.")[1] for key in patch.prompts] == ["1.fastprompt", "2.fastprompt"]
    assert "× 1 of 3 blocks" in patch.report()


def test_raw_keeps_the_rows_that_the_projector_sees():
    method = M2PT(2, 2, visual_prompts="raw", layers="first")
    patch = fastprompt.patch(tiny.build("llava"), method)
    names = [key for key in patch.prompts if "vision" in key]
    assert [key.split("layers.")[1] for key in names] == ["0.fastprompt", "2.fastprompt"]
    with pytest.raises(ValueError, match=r"want a prompt in the tapped block.*got layers='first'"):
        fastprompt.patch(tiny.build("llava"), M2PT(2, 2, visual_prompts="context", layers="first"))
    fastprompt.patch(tiny.build("llava"), M2PT(2, 2, visual_prompts="context", layers="top"))


def test_halves_make_a_whole():
    for count in range(1, 7):
        both = chosen_layers("bottom", count), chosen_layers("top", count)
        assert both[0] + both[1] == chosen_layers("all", count) == list(range(count))
        assert len(both[0]) - len(both[1]) == count % 2
    assert chosen_layers("odd", 6) == [0, 2, 4] and chosen_layers("first", 6) == [0]


@pytest.mark.parametrize("layers", ["some", "", "1,x", "-1", 3, ["first"]])
def test_a_wrong_choice_is_an_error(layers):
    with pytest.raises(ValueError, match=r"layers: want one of all, first, odd, bottom, top, or"):
        fastprompt.patch(tiny.build("llama"), DeepPrompts(text=2, layers=layers))


def test_a_choice_of_no_block_is_an_error():
    with pytest.raises(ValueError, match=r"want indices below 2, the vision blocks; got '0,2'"):
        fastprompt.patch(tiny.build("llava"), M2PT(2, 2, layers="0,2"))
    one = tiny.build("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="layers='top': none of 1 text block"):
        fastprompt.patch(one, DeepPrompts(text=2, layers="top"))
    with pytest.raises(ValueError, match="init: want one of xavier, normal; got 'he'"):
        fastprompt.patch(tiny.build("vit"), VPT(2, init="he"))


def test_a_checkpoint_knows_its_layers(tmp_path):
    model = tiny.build("llama")
    fastprompt.patch(model, DeepPrompts(text=2, layers="odd", init="normal"))
    fastprompt.save(model, tmp_path)
    other = tiny.build("llama")
    patch = fastprompt.load(other, tmp_path)
    assert patch.method.layers == "odd" and len(patch.prompts) == 2
    # how they began does not matter, which they are does
    same = tiny.build("llama")
    fastprompt.patch(same, DeepPrompts(text=2, layers="odd"))
    fastprompt.load(same, tmp_path)
    wrong = tiny.build("llama")
    fastprompt.patch(wrong, DeepPrompts(text=2))
    with pytest.raises(ValueError, match="holds DeepPrompts"):
        fastprompt.load(wrong, tmp_path)
    old = {k: v for k, v in json.loads((tmp_path / "card.json").read_text())["method"].items()}
    del old["layers"], old["init"]  # as cards were before
    assert from_card(old) == DeepPrompts(text=2)


@pytest.mark.parametrize("method", [VPT(50), DeepPrompts(vision=50)])
def test_init(method):
    def rows(**more):
        torch.manual_seed(0)
        made = type(method)(50, **more)
        return next(iter(fastprompt.patch(tiny.build("vit"), made).prompts.values())).tokens

    xavier, normal = rows().detach(), rows(init="normal").detach()
    bound = 6 / (3 * 256 + 32) if isinstance(method, VPT) else 6 / (50 * 32 + 32)
    assert 0.9 * bound < xavier.abs().max() ** 2 <= bound
    assert normal.std() == pytest.approx(0.02, rel=0.1) and normal.abs().max() > 0.05


def unit(rows):
    return SCALE * rows / rows.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("vision, first", [("siglip", 0), ("clip", 1)])
def test_prefill_begins_at_the_first_patch(vision, first):
    """Behind a class token, where there is one."""
    model = tiny.build("llava", vision=vision)
    images = tiny.inputs("llava", batch=2)["pixel_values"]
    with torch.no_grad():
        tower = model.model.vision_tower
        states = tower(images, output_hidden_states=True).hidden_states[0]
    patch = fastprompt.patch(model, M2PT(3, 0))
    prefill(patch, pixel_values=images)
    want = torch.stack([states[i % 2, first + i] for i in range(3)])
    torch.testing.assert_close(next(iter(patch.prompts.values())).tokens.detach(), unit(want))


@pytest.mark.parametrize("shown", ["drop", "raw", "context"])
def test_prefill_is_hidden_states_of_the_model_without_prompts(shown):
    model = tiny.build("llava")
    given = tiny.inputs("llava", batch=2)
    ids = given["input_ids"][0, 5:]
    with torch.no_grad():
        text = model.model.language_model(input_ids=ids[None], output_hidden_states=True)
        vision = model.model.vision_tower(given["pixel_values"], output_hidden_states=True)
    patch = fastprompt.patch(model.train(), M2PT(3, 4, visual_prompts=shown))
    before = {n: p.clone() for n, p in patch.trainable.items() if "fastprompt" not in n}
    model.eval()(**given, use_cache=False) if shown == "drop" else None  # keys are cached
    model.train()
    prefill(patch, ids, given["pixel_values"])
    assert model.training and model.model.vision_tower.training
    for key, prompt in patch.prompts.items():
        layer = int(key.split(".")[-2])
        if "language" in key:
            want = text.hidden_states[layer][0, :4]
        else:  # patches 1, 2, 3 of images 0, 1, 0
            want = torch.stack([vision.hidden_states[layer][i % 2, 1 + i] for i in range(3)])
        torch.testing.assert_close(prompt.tokens.detach(), unit(want))
    assert all(torch.equal(patch.trainable[n], p) for n, p in before.items())
    assert len(patch.prompts) == 5 + (shown == "raw")


def test_prefill_wants_enough():
    patch = fastprompt.patch(tiny.build("llava"), M2PT(3, 4))
    before = [p.tokens.clone() for p in patch.prompts.values()]
    pixels, ids = tiny.inputs("llava")["pixel_values"], torch.arange(6, 20)
    for given, words in (
        (dict(input_ids=ids), "want images for the vision prompts, got none"),
        (dict(pixel_values=pixels), "want a text of 4 tokens or more for the text prompts, got n"),
        (dict(pixel_values=pixels, input_ids=ids[:3]), "want a text of 4 tokens.*, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            prefill(patch, **given)
    after = [p.tokens for p in patch.prompts.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(ValueError, match=r"want images \[B, 3, H, W\], got \[2, 1, 3, 16, 16\]"):
        prefill(patch, ids, pixels[:, None])
    pooled = fastprompt.patch(tiny.build("vit"), L2P())
    with pytest.raises(ValueError, match=r"want prompts that are rows of a block .*, got L2P"):
        prefill(pooled, pixel_values=pixels)


@pytest.mark.parametrize("name", ["qwen2_vl", "mistral3"])
def test_prefill_names_towers_of_packed_images(name):
    patch = fastprompt.patch(zoo.build(name, torch.float32), M2PT(3, 2))
    pixels = zoo.inputs(name, torch.float32)["pixel_values"]
    with pytest.raises(ValueError, match=r"for each image; got (qwen2_vl|pixtral)"):
        prefill(patch, torch.arange(6, 20), pixels)
