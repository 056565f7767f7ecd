"""The share of a model that trains: as the report says it, and at the sizes of published models."""

import pytest
import tiny
import torch
import transformers as tf

import fastprompt
from fastprompt.assembly import LinearLlavaConfig, LinearLlavaForConditionalGeneration
from fastprompt.methods import M2PT, VPT, CODAPrompt, DeepPrompts, DualPrompt

CLIP_L = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    patch_size=14, projection_dim=768,
)  # fmt: skip


@pytest.fixture(scope="module", params=["linear", "mlp"])
def at_7b(request):
    """(projector, the model): LLaMA-7B under CLIP-L/14, of no bytes at all."""
    linear = request.param == "linear"
    kind = LinearLlavaConfig if linear else tf.LlavaConfig
    config = kind(
        vision_config=tf.CLIPVisionConfig(**CLIP_L, image_size=224 if linear else 336),
        text_config=tf.LlamaConfig(),  # its defaults are the 7B
    )
    with torch.device("meta"):
        made = LinearLlavaForConditionalGeneration if linear else tf.LlavaForConditionalGeneration
        return request.param, made(config)


@pytest.mark.parametrize(
    "vision, text, head, linear, mlp",
    [(20, 10, False, 0.085, 0.32), (10, 10, False, 0.082, 0.32), (20, 10, True, 1.9, 2.2)],
)
def test_shares_of_7b(at_7b, vision, text, head, linear, mlp):
    projector, model = at_7b
    want = linear if projector == "linear" else mlp
    share = fastprompt.trainable_share(model, M2PT(vision, text, train_lm_head=head))
    digits = len(str(want).split(".")[1])
    assert round(share.percent(), digits) == want
    assert share.trained["prompts"] == 32 * text * 4096 + 23 * vision * 1024
    assert share.trained["projector"] == 1024 * 4096 + 4096 + (
        4096 * 4096 + 4096 if projector == "mlp" else 0
    )
    if head:
        assert share.trained["lm_head"] == 32000 * 4096
        without = fastprompt.trainable_share(model, M2PT(vision, text))
        assert share.percent("lm_head") == without.percent()
    raw = fastprompt.trainable_share(model, M2PT(vision, text, visual_prompts="raw"))
    assert raw.trained["prompts"] == share.trained["prompts"] + vision * 1024


@pytest.mark.parametrize("tied", [False, True])
def test_the_report_says_what_a_head_would_add(tied):
    model = tiny.build("llava", tie_word_embeddings=tied)
    with_head = fastprompt.trainable_share(model, M2PT(3, 2, train_lm_head=True))
    patch = fastprompt.patch(model, M2PT(3, 2))
    assert f"; with lm_head {with_head.percent():.3f}%)" in patch.report()
    with pytest.raises(ValueError, match="want a model before its patch"):
        fastprompt.trainable_share(model)
    patch.undo()
    assert fastprompt.trainable_share(model, M2PT(3, 2, train_lm_head=True)) == with_head


@pytest.mark.parametrize(
    "name, method, more",
    [
        ("llava", M2PT(3, 2), {}),
        ("llava", M2PT(3, 2, visual_prompts="raw"), {}),
        ("llava", M2PT(3, 2, train_lm_head=True), {}),
        ("llava", M2PT(3, 2, train_lm_head=True), dict(tie_word_embeddings=True)),
        ("llama", DeepPrompts(text=4), {}),
        ("vit", VPT(4), {}),
        ("vit", DualPrompt(3, 1, 2, 3, g_layers=(0,), e_layers=(2, 1)), {}),
        ("vit", CODAPrompt(6, 2, layers=(0, 1), tasks=3, task=1), {}),
    ],
)
def test_it_is_what_a_patch_trains(name, method, more):
    model = tiny.build(name, **more)
    share = fastprompt.trainable_share(model, method)
    patch = fastprompt.patch(model, method)
    trained = sum(p.numel() for p in patch.trainable.values())
    assert sum(share.trained.values()) == trained
    assert share.total == sum(p.numel() for p in model.parameters())
    assert f"trains  {trained:,} of {share.total:,} parameters ({share.percent():.3f}%" in (
        patch.report()
    )
    if name == "llava":
        head = model.lm_head.weight.numel()
        other = trained - head if method.train_lm_head else trained + head
        how = "without" if method.train_lm_head else "with"
        assert f"{how} lm_head {100 * other / share.total:.3f}%)" in patch.report()
        untied = "trains, untied from the embeddings)" in patch.report()
        assert untied == bool(more)
