"""Models of timm and open_clip: what `test_families.py` does not ask of every family."""

import copy
import pickle

import pytest
import tiny
import torch
import zoo
import zoo_outside
from test_exactness import relative
from test_families import P, method_for, pair
from torch import nn

import fastprompt
from fastprompt import sdpa
from fastprompt.concatenation import concatenate
from fastprompt.methods import E2VPT, L2P, VPT, DeepPrompts, LoRA
from fastprompt.viz import attention_to_prompts

timm = pytest.importorskip("timm")
vision_transformer = pytest.importorskip("timm.models.vision_transformer")
WIDTHS = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


def patched(name, method=None, dtype=torch.float32):
    model = zoo.build(name, dtype)
    patch = fastprompt.patch(model, method or method_for(name))
    torch.manual_seed(2)
    with torch.no_grad():
        for p in patch.prompts.values():
            p.tokens.normal_()
    return model, patch, zoo.inputs(name, dtype)


def test_what_wants_a_model_of_transformers():
    model, patch, given = patched("open_clip")
    with pytest.raises(ValueError, match="prefill: want a model of transformers, got open_clip"):
        fastprompt.prefill(patch, given["text"], given["image"])
    with pytest.raises(ValueError, match="prefix_cache: want a model of transformers"):
        fastprompt.prefix_cache(model)
    with pytest.raises(ValueError, match="prepare: want a vision-language model, got open_clip"):
        patch.prepare(None)


def test_refused_methods_and_forwards():
    model = zoo.build("timm_vit")
    for method in (L2P(), LoRA()):
        with pytest.raises(ValueError, match="want VPT or DeepPrompts, all that timm_vit has"):
            fastprompt.patch(model, method)
    for method in (L2P(), E2VPT()):
        with pytest.raises(ValueError, match="want VPT or DeepPrompts, all that timm_vit has"):
            fastprompt.trainable_share(model, method)
    with pytest.raises(
        ValueError, match=r"VPT\(deep=False\): want another vision encoder; timm_vit"
    ):
        fastprompt.patch(model, VPT(deep=False))
    model.blocks[1].attn.forward = lambda x, **more: x
    with pytest.raises(ValueError, match=r"blocks\.1: want its attention's own forward"):
        fastprompt.patch(model)


def test_an_attention_that_never_asks_for_the_call():
    model, _, given = patched("timm_vit")
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(ValueError, match="_attention once, got 0 calls"):
        model(**given)


def test_what_is_reported_and_trained():
    siglip, patch, _ = patched("timm_vit, siglip", VPT(num_tokens=P))
    assert [*patch.skipped] == ["attn_pool"] and "its own queries" in patch.skipped["attn_pool"]
    assert [n for n in patch.trainable if "fastprompt" not in n] == ["head.weight", "head.bias"]
    report = patch.report()
    assert "timm_vit" in report and "0 of 3 as one autograd node" in report
    assert "a Block of timm, which runs as it is" in report
    assert fastprompt.supports(zoo.build("timm_eva")).method == VPT()
    assert "two heads" in fastprompt.patch(zoo.build("timm_vit, distilled")).skipped["head_dist"]
    siglip.reset_classifier(0)
    patch.undo()
    assert isinstance(siglip.head, nn.Linear)
    headless = fastprompt.patch(zoo.build("timm_vit"), VPT(train_head=False))
    assert not any("head" in name for name in headless.trainable)


def test_without_fused_attn():
    """timm's flag is on while prompts are there, whose attention is that of literal rows."""
    slow = zoo.build("timm_eva, eva02")
    for block in slow.blocks:
        block.attn.fused_attn = False
    ours, theirs, patch, _ = pair("timm_eva, eva02", slow)
    given = zoo.inputs("timm_eva, eva02")
    with torch.no_grad():
        assert relative(ours(**given), theirs(**given)) < 1e-10
    patch.undo()
    assert not any(block.attn.fused_attn for block in ours.blocks)


@pytest.mark.parametrize("options", [dict(is_causal=True), dict(attn_mask=True)])
def test_masks(options):
    if "attn_mask" in options:  # every second place is seen; True: seen
        options["attn_mask"] = torch.arange(5) % 2 == 0
        options["attn_mask"] = options["attn_mask"][None].expand(5, -1)
    ours, theirs, *_ = pair("timm_vit")
    given = zoo.inputs("timm_vit")
    with torch.no_grad():
        base = ours(**given)
        got = ours(**given, **options)
        if "is_causal" in options:  # as a mask, since rows before it would shift its diagonal
            options = dict(attn_mask=torch.ones(5, 5, dtype=torch.bool).tril())
        want = theirs(**given, **options)
    assert relative(got, want) < 1e-10 < relative(got, base)


@pytest.mark.parametrize("name", ["timm_vit", "open_clip"])
def test_attention_dropout_is_of_training(name):
    model, _, given = patched(name)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.5
        elif hasattr(module, "attn_drop"):
            module.attn_drop.p = 0.5
    with torch.no_grad():
        one, two, *modes = (
            tiny.output(name, model.train(mode), given) for mode in (False, False, True, True)
        )
    assert torch.equal(one, two)
    assert min(relative(modes[0], other) for other in (one, modes[1])) > 1e-3


@pytest.mark.parametrize("name", ["timm_eva, eva02", "open_clip, coca"])
def test_baked(name):
    model, _, given = patched(name, dtype=torch.float64)
    with torch.no_grad():
        want = tiny.output(name, model, given)
        assert not fastprompt.bake(model).trainable
        assert relative(tiny.output(name, model, given), want) < 1e-12


def test_images_of_another_size():
    ours, theirs, *_ = pair("timm_eva, dinov3")
    x = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-10


def test_prompts_in_some_blocks():
    method = DeepPrompts(vision=P, layers="odd", train_head=False)
    model, patch, given = patched("timm_eva", method, torch.float64)
    assert [*patch.prompts] == ["blocks.0.fastprompt", "blocks.2.fastprompt"]
    assert "forward" not in vars(model.blocks[1].attn)
    model(**given).square().sum().backward()
    assert all(p.grad.any() for p in patch.trainable.values())


def test_kept_keys_follow_what_they_depend_on():
    model, patch, given = patched("timm_eva", dtype=torch.float64)
    with torch.no_grad():
        first = model(**given)
        assert patch.prompts["blocks.0.fastprompt"]._cached is not None
        assert torch.equal(model(**given), first)
        for tensor in (
            patch.prompts["blocks.0.fastprompt"].tokens,
            model.blocks[1].attn.v_bias,
            model.blocks[2].norm1.weight,
        ):
            before = model(**given)
            tensor.mul_(2)
            after = model(**given)
            patch.refresh()
            assert not torch.equal(before, after) and torch.equal(model(**given), after)


def test_copies():
    model, _, given = patched("timm_beit")
    with torch.no_grad():
        want = model(**given)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**given), want)
            fastprompt.patch_of(other).prompts["blocks.0.fastprompt"].tokens.data.zero_()
            fastprompt.patch_of(other).refresh()
            assert not torch.equal(other(**given), want)
        assert torch.equal(model(**given), want)


def test_save_and_load(tmp_path):
    model, patch, given = patched("timm_vit", VPT(num_tokens=P))
    fastprompt.save(model, tmp_path)
    assert fastprompt.read_card(tmp_path)["base"]["model_type"] == "timm_vit"
    other = zoo.build("timm_vit", torch.float32)
    assert fastprompt.load(other, tmp_path).method == patch.method
    with torch.no_grad():
        assert torch.equal(other(**given), model(**given))
    with pytest.raises(ValueError, match="was trained on a timm_vit, got a timm_beit"):
        fastprompt.load(zoo.build("timm_beit", torch.float32), tmp_path)
    with pytest.raises(ValueError, match="has other weights"):
        fastprompt.load(zoo.build("timm_vit", torch.float32, seed=5), tmp_path)


def test_looking_at_attention():
    model, _, given = patched("timm_vit")
    shares = attention_to_prompts(model, **given)
    assert [*shares] == [f"blocks.{i}" for i in range(3)]
    assert all(share.shape == (2, 2, 5) and 0 < share.mean() < 1 for share in shares.values())


def test_reentrant_checkpointing_is_refused():
    from timm.layers import set_reentrant_ckpt

    model, _, given = patched("timm_vit")
    model.set_grad_checkpointing()
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(ValueError, match=r"set_reentrant_ckpt\(False\)"):
            model(**given)
        with torch.no_grad():
            model(**given)
    finally:
        set_reentrant_ckpt(False)


def test_compiled():
    model = vision_transformer.VisionTransformer(**WIDTHS | dict(depth=1))
    patch, given = fastprompt.patch(model, VPT()), zoo.inputs("timm_vit", torch.float32)
    want = model.train()(**given)
    got = torch.compile(model, backend="eager", fullgraph=True)(**given)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    assert all(p.grad.any() for p in patch.trainable.values())


@pytest.mark.parametrize("name", ["timm_vit", "open_clip"])
def test_frozen_prompts_are_told_of(name):
    """As of PEFT's get_peft_model after the patch."""
    model, patch, given = patched(name)
    for p in patch.trainable.values():
        p.requires_grad_(False)
    next(patch.anatomy.towers[0].model.parameters()).requires_grad_(True)
    with pytest.warns(UserWarning, match="none of the prompts: if get_peft_model froze them"):
        model.train()(**given)


def test_a_mask_beside_causality_is_refused_as_it_is_by_torch():
    model, _, given = patched("timm_vit")
    mask = torch.ones(5, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="Attention: want attn_mask or is_causal, got both"):
        model(**given, attn_mask=mask, is_causal=True)


def test_an_attention_that_calls_twice():
    class Twice(nn.Module):
        def forward(self, x):
            once = nn.functional.scaled_dot_product_attention(x, x, x)
            return nn.functional.scaled_dot_product_attention(once, x, x)

    with pytest.raises(ValueError, match=r"Twice: .* once, got 2 calls"):
        sdpa.run(Twice(), lambda q, k, v: q, torch.randn(1, 1, 2, 4))


# ---- open_clip ----


def test_the_towers_of_coca():
    model, patch, given = patched("open_clip, coca", DeepPrompts(vision=P, text=2))
    assert {tower.name: tower.kind for tower in patch.anatomy.towers} == {
        "text": "text",
        "visual": "vision",
    }
    assert [*patch.skipped] == ["visual.attn_pool", "text_decoder"]
    assert "take turns with cross-attention" in patch.skipped["text_decoder"]
    assert not any("text_decoder" in name for name in patch.trainable)
    assert attention_to_prompts(model, **given)["text.transformer.resblocks.2"].shape == (2, 4, 12)


def test_a_tower_without_blocks():
    import open_clip

    resnet = dict(image_size=32, layers=(1, 1, 1, 1), width=8, head_width=32)
    text = dict(context_length=11, vocab_size=64, width=32, heads=4, layers=2)
    model = open_clip.CLIP(32, vision_cfg=resnet, text_cfg=text)
    patch = fastprompt.patch(model)
    assert patch.method == DeepPrompts(text=10)
    assert patch.skipped == {"visual": "ModifiedResNet has no blocks that are served"}
    with pytest.raises(ValueError, match="want a vision tower; open_clip_text has text"):
        patch.undo()
        fastprompt.patch(model, VPT())
    with pytest.raises(ValueError, match="want one of open_clip's CLIP"):
        fastprompt.patch(model.visual)


@pytest.mark.parametrize("name", ["open_clip", "open_clip, sequence first"])
def test_evaluation(name):
    """Where torch runs native code of its own."""
    ours, theirs, *_ = pair(name)
    given = zoo.inputs(name)
    with torch.inference_mode():
        for part in ("image", "text"):
            got, want = (getattr(m, f"encode_{part}")(given[part]) for m in (ours, theirs))
            assert relative(got, want) < 1e-10


def test_norms_in_float32_around_bfloat16():
    """open_clip's "bf16": as accurate as literal rows, twice their error at the most."""
    import open_clip
    from open_clip.model import convert_weights_to_lp

    configs = (zoo_outside._CLIP_VISION, zoo_outside._CLIP_TEXT)

    def build(cast_dtype):
        torch.manual_seed(0)
        return open_clip.CLIP(
            32, vision_cfg=configs[0], text_cfg=configs[1], cast_dtype=cast_dtype
        ).eval()

    models = [build(torch.bfloat16), build(torch.bfloat16), build(None).double()]
    for model in models[:2]:
        convert_weights_to_lp(model, torch.bfloat16)
        assert model.visual.ln_post.weight.dtype == torch.float32
    models[2].load_state_dict(models[0].state_dict())
    for model, put in zip(models, (fastprompt.patch, concatenate, fastprompt.patch), strict=True):
        put(model, DeepPrompts(vision=P, text=P))
        torch.manual_seed(3)
        for name, p in model.named_parameters():
            if "fastprompt" in name:
                p.data.copy_(torch.randn(p.shape))
    given = zoo.inputs("open_clip", torch.float32)
    errors = []
    with torch.no_grad():
        truth = models[2].encode_image(given["image"].double())
        for model in models[:2]:
            out = model.encode_image(given["image"].bfloat16())
            assert out.dtype == torch.bfloat16
            errors.append((out.double() - truth).norm())
    assert errors[0] < 2 * errors[1]


def test_looking_at_a_model_draws_no_random_numbers():
    """Or prompts of one seed would depend on the mode that the model is in."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, proj_drop_rate=0.5)
    before = torch.get_rng_state()
    assert fastprompt.supports(model.train())
    assert torch.equal(torch.get_rng_state(), before)
