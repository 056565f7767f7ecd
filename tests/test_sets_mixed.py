"""Many prompt sets: a mixed batch is each row alone, for every family, and in `generate`."""

import pytest
import tiny
import torch
import zoo
from prompt_sets import (
    ALL,
    GENERATES,
    build,
    inputs,
    mixed_and_alone,
    patched,
    randomize,
    row,
)
from test_exactness import relative
from test_families import four_bit, wide  # noqa: F401  (a fixture)

import fastprompt
from fastprompt.methods import DeepPrompts


@pytest.mark.parametrize("name", ALL)
def test_a_mixed_batch_is_each_row_alone(name, wide):  # noqa: F811
    patch, given = patched(name), inputs(name)
    for names in (["long", "default"], ["short", "long"], [None, "short"]):
        mixed, alone = mixed_and_alone(patch, name, given, names)
        assert relative(mixed, alone) < 1e-10, names
        # and a set that is used is that same set in a batch
        for i, own in enumerate(names):
            if own is not None:
                patch.use(own)
                with torch.no_grad():
                    used = tiny.output(name, patch.model, row(given, i))
                assert relative(used, mixed[i : i + 1]) < 1e-10
    other = mixed_and_alone(patch, name, given, ["short", None])[0]
    assert relative(other, mixed) > 1e-3, "the rows' prompts do nothing"


@pytest.mark.parametrize("name", ["llama", "vit", "llava", "qwen2_vl", "gpt2"])
def test_four_bit_weights(name):
    pytest.importorskip("bitsandbytes")
    model, _ = four_bit(build(name))
    mixed, alone = mixed_and_alone(patched(name, model), name, inputs(name), ["long", "short"])
    assert relative(mixed, alone) < 1e-6  # bitsandbytes computes in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    patch = patched("llama", build("llama", dtype))
    mixed, alone = mixed_and_alone(patch, "llama", inputs("llama", dtype), ["long", "short"])
    assert relative(mixed.float(), alone.float()) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(
    "options",
    [{}, dict(cache_implementation="static"), dict(num_beams=3), dict(use_cache=False)],
    ids=["dynamic", "static", "beams", "no cache"],
)
@pytest.mark.parametrize("name", GENERATES)
def test_generate(name, options):
    patch, given = patched(name), inputs(name)
    options = dict(
        options, max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=None,
        pad_token_id=0, bad_words_ids=[[zoo.IMAGE]],
    )  # fmt: skip
    names = ["long", "short"]
    given.pop("decoder_input_ids", None)
    with patch.using(names):
        got = patch.model.generate(**given, **options)
    assert "generate" not in vars(patch.model)
    alone = []
    for i, own in enumerate(names):
        with patch.using(own):
            alone.append(patch.model.generate(**row(given, i), **options))
    assert torch.equal(got, torch.cat(alone))
    with patch.using(names[::-1]):
        assert not torch.equal(patch.model.generate(**given, **options), got)


def test_left_padding_and_several_answers():
    patch, ids = patched("llama"), torch.randint(6, 63, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    more = dict(max_new_tokens=4, min_new_tokens=4, eos_token_id=None, pad_token_id=0)
    more |= dict(do_sample=False, num_beams=4, num_return_sequences=2)
    with patch.using(["short", "long"]):
        got = patch.model.generate(input_ids=ids, attention_mask=mask, **more)
    with patch.using("long"):
        alone = patch.model.generate(input_ids=ids[1:, 4:], **more)
    assert torch.equal(got[2:, 9:], alone[:, 5:])


# ---- whose images ----


def conversation():
    """A LLaVA's batch with two, no and one images in its rows."""
    torch.manual_seed(3)
    ids = torch.randint(6, 63, (3, 14))
    ids[0, 1:5] = ids[0, 7:11] = ids[2, 3:7] = 5
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    rows = [
        dict(input_ids=ids[:1], pixel_values=pixels[:2]),
        dict(input_ids=ids[1:2]),
        dict(input_ids=ids[2:], pixel_values=pixels[2:]),
    ]
    return given, rows


@pytest.mark.parametrize("options", [{}, dict(num_beams=2)])
@pytest.mark.parametrize("images", [None, [2, 0, 1]])
def test_several_and_no_images_in_a_row(images, options):
    patch, (given, rows) = patched("llava"), conversation()
    names = ["short", "long", "default"]
    options |= dict(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad(), patch.using(names, images=images):
        mixed = patch.model(**given).logits
        said = patch.model.generate(**given, bad_words_ids=[[5]], **options)
    for i, own in enumerate(names):
        with torch.no_grad(), patch.using(own):
            assert relative(patch.model(**rows[i]).logits, mixed[i : i + 1]) < 1e-10
            alone = patch.model.generate(**rows[i], bad_words_ids=[[5]], **options)
            assert torch.equal(alone, said[i : i + 1])


def test_images_whose_row_is_not_known():
    patch, (given, _) = patched("llava"), conversation()
    names = ["short", "long", "default"]

    def refused(message, names=names, call=patch.model, given=given, **options):
        raises = pytest.raises(ValueError, match=message)
        with raises, torch.no_grad(), patch.using(names, **options):
            call(**given)

    refused("a name for each row, 3 of text; got 2", names[:2])
    refused(r"images: want 3 numbers, one a row; got \[1\]", images=[1])
    refused(r"images: want a sum of 3, got \[1, 1, 0\]", images=[1, 1, 0])
    features = dict(pixel_values=given["pixel_values"])
    refused("cannot be known whose", call=patch.model.model.get_image_features, given=features)
    with torch.no_grad(), patch.using(names, images=[2, 0, 1]):
        patch.model.model.get_image_features(**features)
    embeds = patch.model.get_input_embeddings()(given["input_ids"])
    refused("cannot be known", given=dict(inputs_embeds=embeds, **features))
    odd = dict(given, input_ids=given["input_ids"].clone())
    odd["input_ids"][0, 1] = 7
    refused("as many tokens each, got rows of", given=odd)
    tiles = patched("llava_next")
    patch = tiles
    refused("give images=", ["long", "short"], tiles.model, inputs("llava_next"))


def test_generate_wants_a_name_for_each_row_that_it_is_given():
    patch = patched("llama")
    ids = torch.randint(6, 63, (4, 5))
    with patch.using(["long", "short"]):
        with pytest.raises(ValueError, match="4 of generate; got 2"):
            patch.model.generate(input_ids=ids, max_new_tokens=1)
        with pytest.raises(ValueError, match="name for each row, 4 of model; got 2"):
            patch.model(input_ids=ids)
    with torch.no_grad():
        patch.model(input_ids=ids)
    assert "generate" not in vars(patch.model)


def test_the_two_towers_of_clip():
    import transformers as tf

    torch.manual_seed(0)
    text = tf.CLIPTextConfig(**tiny.CLIP_TEXT)
    config = tf.CLIPConfig(text_config=text, vision_config=tf.CLIPVisionConfig(**tiny.VISION))
    model = tf.CLIPModel(config).double().eval()
    patch = fastprompt.patch(model, DeepPrompts(vision=2, text=3, train_head=False))
    patch.add("long", vision=4, text=5)
    randomize(patch)
    given = {**tiny.inputs("clip_vision", torch.float64), **tiny.inputs("clip_text")}
    with torch.no_grad(), patch.using(["long", "default"]):
        both = model(**given)
    with torch.no_grad(), patch.using("default"):
        one = model(**row(given, 1))
    assert relative(both.image_embeds[1:], one.image_embeds) < 1e-10
    assert relative(both.text_embeds[1:], one.text_embeds) < 1e-10
