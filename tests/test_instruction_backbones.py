"""`TokenBackbone`: tokens go in behind CLS, and what became of them comes out."""

import copy

import pytest
import tiny
import torch
from encoders import OPEN_CLIP, SIDE, images

from fastprompt import families
from fastprompt.instruction.backbones import ORDERS, TokenBackbone


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )


def open_clip_visual():
    return pytest.importorskip("open_clip").CLIP(**OPEN_CLIP)


BACKBONES = {
    "vit": tiny.vit,
    "dinov2": tiny.dinov2,
    "clip": tiny.clip_vision,
    "timm": timm_vit,
    "open_clip": open_clip_visual,
}


def literally(name, model, pixels, tokens, order):
    """Every block by hand over the sequence with the tokens written into it."""
    if name in ("vit", "dinov2", "clip"):
        inside = getattr(model.base_model, "vision_model", model.base_model)
        hidden = inside.embeddings(pixels)
        before = getattr(inside, "pre_layrnorm", torch.nn.Identity())
        blocks = [block.layer for block in families.anatomy(model).tower("vision").blocks]
        after = getattr(inside, "post_layernorm", None) or inside.layernorm
    elif name == "timm":
        hidden = model._pos_embed(model.patch_embed(pixels))
        before, blocks, after = model.norm_pre, model.blocks, model.norm
    else:
        inside = model.visual
        patches = inside.conv1(pixels).flatten(2).transpose(1, 2)
        first = inside.class_embedding.expand(len(pixels), 1, -1)
        hidden = torch.cat([first, patches], 1) + inside.positional_embedding
        before, blocks, after = inside.ln_pre, inside.transformer.resblocks, inside.ln_post
    at = 1 if order == ORDERS[0] else hidden.shape[1]
    many = tokens.expand(len(pixels), -1, -1)
    hidden = before(torch.cat([hidden[:, :at], many, hidden[:, at:]], 1))
    for block in blocks:
        hidden = block(hidden, None) if name == "clip" else block(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    hidden = after(hidden)
    return hidden[:, 0], hidden[:, at : at + tokens.shape[1]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BACKBONES)
def test_tokens_are_what_writing_them_into_the_sequence_gives(name, order):
    torch.manual_seed(0)
    model = BACKBONES[name]().double().eval()
    pixels, tokens = images(3, dtype=torch.float64), torch.randn(1, 5, 32, dtype=torch.float64)
    tokens.requires_grad_()
    want = literally(name, model, pixels, tokens, order)
    (true_grad,) = torch.autograd.grad(want[0].square().sum() + want[1].sum(), tokens)
    backbone = TokenBackbone(model, order)
    got = backbone(pixels, tokens)
    (grad,) = torch.autograd.grad(got[0].square().sum() + got[1].sum(), tokens)
    for a, b in ((got[0], want[0]), (got[1], want[1]), (grad, true_grad)):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()
    # without tokens, the model as it is; and a copy runs on its own parts
    plain, nothing = backbone(pixels, None)
    assert nothing is None
    bare, _ = literally(name, model, pixels, tokens[:, :0], order)
    assert (plain - bare).abs().max() < 1e-12
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in backbone.modules()]
    assert not any(hooks)  # nothing stays on the caller's model
    copied = copy.deepcopy(backbone)
    with torch.no_grad():
        for p in backbone.parameters():
            p.zero_()
    again = copied(pixels, tokens)
    assert all((a == b).all() for a, b in zip(again, got, strict=True))


@pytest.mark.parametrize("wrong", [tiny.siglip_vision, tiny.llama, lambda: torch.nn.Linear(3, 4)])
def test_backbones_without_cls_are_refused(wrong):
    with pytest.raises(ValueError, match="want a"):
        TokenBackbone(wrong())
