"""VPT-shallow: prompt rows as tokens, against writing them by hand."""

import copy
import inspect

import pytest
import tiny
import torch
import zoo
from test_exactness import relative
from test_families import four_bit

import fastprompt
import fastprompt.viz
from fastprompt.families import VISION
from fastprompt.methods import VPT

P = 3


def build(name, dtype=torch.float64, **more):
    if name in tiny.FAMILIES:
        return tiny.build(name, dtype, **more)
    return zoo.build(name, dtype)


def given(name, dtype=torch.float64):
    return (tiny if name in tiny.FAMILIES else zoo).inputs(name, dtype)


def random_(patch):
    torch.manual_seed(7)
    with torch.no_grad():
        for prompt in patch.prompts.values():
            prompt.tokens.normal_()
    return patch


def states_by_hand(tower, pixels, rows, at):
    """Hidden states [B, N, D] without the rows, which stood behind the first ``at`` tokens."""
    model = tower.model
    x = model.embeddings(pixels)
    x = getattr(model, "pre_layrnorm", lambda x: x)(x)
    x = torch.cat([x[:, :at], rows.expand(len(x), -1, -1), x[:, at:]], dim=1)
    rotary = getattr(model, "rope_embeddings", None)
    more = {} if rotary is None else dict(position_embeddings=rotary(pixels))
    states = [x]
    for block in tower.blocks:
        if "attention_mask" in inspect.signature(type(block.layer).forward).parameters:
            more |= dict(attention_mask=None)
        x = block.layer(x, **more)
        states.append(x)
    return [torch.cat([x[:, :at], x[:, at + len(rows) :]], dim=1) for x in states]


def after(tower, x):
    """What the tower returns of its last hidden state."""
    names = {"clip": None, "siglip": "post_layernorm", "dinov3_vit": "norm"}
    name = names.get(tower.family, "layernorm")
    return x if name is None else getattr(tower.model, name)(x)


CLASSED = ["vit", "dinov2", "clip_vision", "deit", "dinov2_with_registers", "dinov3_vit"]
ALL = [*CLASSED, "internvl_vision", "siglip_vision"]


@pytest.mark.parametrize("previous", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ALL)
def test_against_rows_written_by_hand(name, previous):
    ours = build(name)
    ours.set_attn_implementation(previous)
    theirs = copy.deepcopy(ours).requires_grad_(False)
    patch = random_(fastprompt.patch(ours, VPT(P, deep=False, train_head=False)))
    ((key, prompt),) = patch.prompts.items()
    assert key.endswith("0.fastprompt") and list(patch.trainable) == [f"{key}.tokens"]
    rows = prompt.tokens.detach().clone().requires_grad_()
    pixels = given(name)["pixel_values"]
    # VPT's order is the class token, the prompt, the patches
    at = 0 if name == "siglip_vision" else 1
    other = fastprompt.families.anatomy(theirs).tower(VISION)
    want = states_by_hand(other, pixels, rows, at)
    tower = patch.anatomy.tower(VISION).model
    got = tower(pixels, output_hidden_states=True)
    bound = 1e-10 if previous == "sdpa" else 1e-6  # transformers' eager softmax is in float32
    assert relative(got.last_hidden_state, after(other, want[-1])) < bound
    assert len(got.hidden_states) == len(want)
    for a, b in zip(got.hidden_states[:-1], want[:-1], strict=True):
        assert a.shape == b.shape and relative(a, b) < bound
    assert got.hidden_states[-1].shape == want[-1].shape
    direction = torch.randn_like(got.last_hidden_state)
    got.last_hidden_state.backward(direction)
    after(other, want[-1]).backward(direction)
    assert relative(prompt.tokens.grad, rows.grad) < bound
    plain = other.model(pixels).last_hidden_state
    assert relative(plain, got.last_hidden_state) > 1e-3
    # heads and pooling see what they always saw, by place
    with torch.no_grad():
        whole = ours(**given(name))
        as_tuple = ours(**given(name), output_hidden_states=True, return_dict=False)
    shapes = {n: t.shape for n, t in theirs(**given(name)).items()}
    assert {n: t.shape for n, t in whole.items()} == shapes
    torch.testing.assert_close(as_tuple[0], whole[0])
    assert {x.shape for x in as_tuple[-1]} == {want[0].shape}


def test_four_bits():
    pytest.importorskip("bitsandbytes")
    models = four_bit(build("vit"))
    with torch.no_grad():
        for model in models:
            random_(fastprompt.patch(model, VPT(P, deep=False)))
        got, want = (model(**given("vit")).logits for model in models)
    assert relative(got, want) < 1e-10


@pytest.mark.parametrize("name", ["llava", "llava vit qwen2"])
def test_a_vision_language_model_reads_patches_alone(name):
    """Taps of one state and of several; blocks past the tap are not run."""
    ours = build(name)
    theirs = copy.deepcopy(ours)
    random_(patch := fastprompt.patch(ours, VPT(P, deep=False)))
    rows = next(iter(patch.prompts.values())).tokens
    batch = given(name)
    other = fastprompt.families.anatomy(theirs).tower(VISION)
    other.blocks, other.unread = [*other.blocks, *other.unread], []
    states = states_by_hand(other, batch["pixel_values"], rows, 1)
    layers = theirs.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    features = torch.cat([states[i][:, 1:] for i in layers], dim=-1)
    with torch.no_grad():
        got = ours.model.get_image_features(batch["pixel_values"]).pooler_output
        want = theirs.model.multi_modal_projector(features)
        for a, b in zip(got, want, strict=True):
            assert relative(a, b) < 1e-10
        assert ours(**batch).logits.shape == theirs(**batch).logits.shape
        direct = ours.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
        # whose blocks past the tap run as well, with the prompt
        for a, b in zip(direct.hidden_states, states, strict=True):
            assert relative(a, b) < 1e-10


def gradients(memory="auto", reentrant=None):
    model = build("vit")
    patch = random_(fastprompt.patch(model, VPT(P, deep=False), memory=memory)).model.train()
    if reentrant is not None:
        patch.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**given("vit")).logits.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore:.*(gradient_checkpointing_enable|reentrant).*")
def test_frozen_blocks_and_gradient_checkpointing_change_nothing():
    want = gradients("off")
    for memory in ("speed", "low"):
        for reentrant in (None, True, False):
            torch.testing.assert_close(gradients(memory, reentrant), want, rtol=1e-9, atol=1e-11)


def test_there_and_back(tmp_path):
    model, batch = build("vit", torch.float32), given("vit", torch.float32)
    with torch.no_grad():
        before = model(**batch, output_hidden_states=True)
        patch = random_(fastprompt.patch(model, VPT(P, deep=False)))
        assert "3 prompt rows as tokens, through all blocks × 1 of 3 blocks" in patch.report()
        changed = model(**batch).logits
        copied = copy.deepcopy(model)
        next(iter(patch.prompts.values())).tokens.add_(1)
        assert torch.equal(copied(**batch).logits, changed)
        assert not torch.equal(model(**batch).logits, changed)
        next(iter(patch.prompts.values())).tokens.sub_(1)
        fastprompt.save(copied, tmp_path)
        other = build("vit", torch.float32)
        fastprompt.load(other, tmp_path)
        assert torch.equal(other(**batch).logits, changed)
        patch.undo()
        again = model(**batch, output_hidden_states=True)
        assert torch.equal(again.logits, before.logits)
        assert all(
            torch.equal(a, b)
            for a, b in zip(again.hidden_states, before.hidden_states, strict=True)
        )
    hooks = [h for m in model.modules() for h in m._forward_pre_hooks.values()]
    assert not hooks


def test_dropout_and_prefill():
    model = build("vit")
    patch = fastprompt.patch(model, VPT(P, deep=False, dropout=0.5))
    fastprompt.prefill(patch, pixel_values=given("vit")["pixel_values"])
    batch = given("vit")
    model.train()
    with torch.no_grad():
        first, second = (model(**batch).logits for _ in range(2))
    assert not torch.equal(first, second)
    count = patch.model.classifier.weight.numel() + 5 + P * 32
    assert sum(p.numel() for p in patch.trainable.values()) == count
    share = fastprompt.trainable_share(build("vit"), patch.method)
    assert share.trained["prompts"] == P * 32


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("swin", "swin: its blocks see windows"),
        ("beit", "beit: it adds a bias to scores"),
        ("siglip2 vision", "siglip2: it masks the patches"),
        ("qwen2_vl", "qwen2_vl_vision: its images follow one another in one row"),
    ],
)
def test_refusals_by_name(name, words):
    model = zoo.ROWS[name].build()
    with pytest.raises(
        ValueError, match=rf"VPT\(deep=False\): want another vision encoder; {words}"
    ):
        fastprompt.patch(model, VPT(P, deep=False))
    assert not any("fastprompt" in n for n, _ in model.named_modules())


def test_refusals_of_options():
    for method in (VPT([1, 2, 3], deep=False), VPT(2, deep=False, layers="top")):
        with pytest.raises(ValueError, match=r"VPT\(deep=False\): want one length, and no choice"):
            fastprompt.patch(build("vit"), method)
    model = build("vit")
    fastprompt.patch(model, VPT(P, deep=False))
    with pytest.raises(ValueError, match="prompts as tokens: want no attention_mask"):
        model.vit(**given("vit"), attention_mask=torch.tensor([[1, 1, 1, 1, 0]] * 2))
    with pytest.raises(
        ValueError, match="concatenate: want prompts that are rows of each block, got VPT"
    ):
        fastprompt.concatenation.concatenate(build("vit"), VPT(P, deep=False))
