"""Which models of timm are refused, before anything is changed."""

import pytest
from torch import nn

import fastprompt

timm = pytest.importorskip("timm")
vision_transformer = pytest.importorskip("timm.models.vision_transformer")
WIDTHS = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


class Plain(vision_transformer.Attention):
    """Written out, as attentions are that are no deny-list's."""

    def forward(self, x, attn_mask=None, **options):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0)
        weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * self.scale).softmax(-1)
        return self.proj((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(-2))


class Unsized(vision_transformer.Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.num_heads, self.head_dim


def with_attention(kind):
    model = vision_transformer.VisionTransformer(**WIDTHS)
    for block in model.blocks:
        block.attn = kind(32, 2, qkv_bias=True)
    return model


@pytest.mark.parametrize(
    "why, build",
    [
        (
            f"{block} is not served: {why}",
            lambda block=block: vision_transformer.VisionTransformer(
                **WIDTHS, block_fn=getattr(vision_transformer, block)
            ),
        )
        for block, why in {
            "ParallelScalingBlock": "queries, keys and values come out of one product",
            "DiffParallelScalingBlock": "it subtracts one softmax",
            "ParallelThingsBlock": "it has several attentions",
        }.items()
    ]
    + [
        (
            "blocks.0: DiffAttention is not served: it subtracts",
            lambda: vision_transformer.VisionTransformer(**WIDTHS, attn_layer="diff"),
        ),
        (
            "want norms with weights",
            lambda: vision_transformer.VisionTransformer(
                **WIDTHS, norm_layer=lambda *a, **k: nn.LayerNorm(32, elementwise_affine=False)
            ),
        ),
        (
            "ResNet: want one of timm's VisionTransformer, Eva, Beit",
            lambda: timm.create_model("resnet18"),
        ),
        ("blocks.0: Plain is not served: .* got 0 calls", lambda: with_attention(Plain)),
        ("Unsized is not served: want head_dim or num_heads", lambda: with_attention(Unsized)),
    ],
)
def test_refusals(why, build):
    model = build()
    names = {n: set(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=why):
        fastprompt.patch(model)
    assert not fastprompt.supports(model)
    assert names == {n: set(vars(m)) for n, m in model.named_modules()}


def test_an_attention_that_says_its_head_dim_alone():
    """And one on the meta device, through which nothing can go."""

    class Sized(vision_transformer.Attention):
        def forward(self, x, **options):
            out = nn.functional.scaled_dot_product_attention(*[self.qkv(x)[:, None, :, :16]] * 3)
            return self.proj(out[:, 0].repeat(1, 1, 2))

    model = with_attention(Sized)
    for block in model.blocks:
        del block.attn.num_heads
    assert fastprompt.supports(model) and fastprompt.supports(model.to("meta"))
    assert fastprompt.supports(with_attention(Plain).to("meta"))
