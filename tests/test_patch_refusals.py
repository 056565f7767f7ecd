"""What `patch` refuses, with a ValueError and the model as it was; and odd models that it takes."""

from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

import fastprompt
from fastprompt.methods import M2PT, VPT, DeepPrompts

OPT = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8)
OPT |= dict(max_position_embeddings=16, word_embed_proj_dim=8)


def unchanged(model, act, message):
    before = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    names = {n: set(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        act(model)
    after = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    assert before.keys() == after.keys()
    assert all(before[n][0] is p and before[n][1] == flag for n, (p, flag) in after.items())
    assert names == {n: set(vars(m)) for n, m in model.named_modules()}


def test_refusals():
    patch = fastprompt.patch
    unchanged(
        nn.Linear(2, 2),
        patch,
        "want a transformers PreTrainedModel, a timm or open_clip model; got Linear",
    )
    phi = tf.PhiForCausalLM(tf.PhiConfig(**tiny.TEXT))
    unchanged(phi, patch, "want a transformers model of llava, .*got model_type 'phi'")
    bloom = tf.BloomModel(tf.BloomConfig(n_layer=1, hidden_size=8, n_head=1, vocab_size=9))
    unchanged(bloom, patch, "BloomModel: bloom is not served: .*ALiBi")
    gpt2 = tf.GPT2LMHeadModel(
        tf.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9, add_cross_attention=True)
    )
    unchanged(gpt2, patch, "GPT2LMHeadModel: gpt2 with cross-attention")
    opt = tf.OPTModel(tf.OPTConfig(**OPT, layer_norm_elementwise_affine=False))
    unchanged(opt, patch, "OPTModel: opt with layer_norm_elementwise_affine=False")
    mixed = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tiny.VISION_CONFIGS["clip"](),
            text_config=tf.PhiConfig(**tiny.TEXT),
        )
    )
    unchanged(mixed, patch, "text_config: want .*llama.*; got model_type 'phi'")
    llama = tiny.build("llama")
    unchanged(llama, lambda m: patch(m, M2PT()), "M2PT: want a vision-language model, got llama")
    unchanged(llama, lambda m: patch(m, VPT()), "want a vision tower; llama has text")
    unchanged(llama, lambda m: patch(m, "m2pt"), "want one of fastprompt.methods, got 'm2pt'")
    unchanged(llama, lambda m: patch(m, DeepPrompts(text=-1)), "length of 0 or more, got -1")
    unchanged(llama, lambda m: patch(m, backend="cudnn"), "backend: want one of auto")
    wrapped = nn.DataParallel(tiny.build("llama"))
    unchanged(wrapped, patch, "want the model inside; patch first, then wrap it")
    unchanged(torch.compile(llama), patch, "patch first, then torch.compile")


def test_patched_twice():
    model = tiny.build("llava")
    fastprompt.patch(model)
    unchanged(model, fastprompt.patch, "patched already")
    outer = tiny.build("llava")
    fastprompt.patch(outer.model.language_model, DeepPrompts(text=2))
    unchanged(outer, fastprompt.patch, "part 'model.language_model' is patched already")


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    def fail(*_):
        raise ValueError("half way")

    monkeypatch.setattr("fastprompt.trainer.attach", fail)
    unchanged(tiny.build("llava"), fastprompt.patch, "half way")


def test_gradients_that_were_there_survive_a_patch_undone():
    model, given = tiny.build("llama"), tiny.inputs("llama")
    tiny.output("llama", model, given).sum().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    fastprompt.patch(model).undo()
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())


def test_undo_puts_the_projector_back_in_the_mode_the_model_is_in():
    model = tiny.build("llava").train()
    patch = fastprompt.patch(model)
    model.eval()
    patch.undo()
    assert not any(m.training for m in model.modules())


def test_a_tap_changed_after_patching_reads_real_blocks():
    model, given = tiny.build("llava"), tiny.inputs("llava")
    fastprompt.patch(model)
    with torch.no_grad():
        want = model(**given, vision_feature_layer=-1).logits
        model.config.vision_feature_layer = model.model.config.vision_feature_layer = -1
        assert torch.equal(model(**given).logits, want)


def test_a_forward_that_stood_on_an_unread_layer_is_kept():
    """accelerate puts its own there on a dispatched model."""
    model, given = tiny.build("llava"), tiny.inputs("llava")
    last, calls = model.model.vision_tower.encoder.layers[-1], []

    def theirs(*args, **kwargs):
        calls.append(1)
        return type(last).forward(last, *args, **kwargs)

    last.forward = theirs
    patch = fastprompt.patch(model)
    with torch.no_grad():
        model(**given)
        assert not calls
        model.model.vision_tower(given["pixel_values"])
    assert calls
    patch.undo()
    assert last.forward is theirs


def test_weights_without_values_are_refused():
    model = tiny.build("llama")
    layer = model.model.layers[1]
    layer.input_layernorm.to("meta")
    unchanged(model, fastprompt.patch, "layers.1: want weights with values, got a model on")


def test_one_mask_for_the_whole_batch():
    model = tiny.build("llama")
    fastprompt.patch(model)
    ids = torch.randint(6, 60, (3, 1))
    with torch.no_grad():
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        masked = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(masked, model(input_ids=ids).logits)


def test_an_attention_set_after_patching_is_refused_at_the_forward():
    """It would switch the prompts off without a word."""
    model, given = tiny.build("llava"), tiny.inputs("llava")
    with torch.no_grad():
        before = model(**given).logits
        patch = fastprompt.patch(model)
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match=r"want attention 'fastprompt'.*got 'sdpa', set after"):
            model(**given)
        patch.undo()
        assert torch.equal(model(**given).logits, before)


@pytest.mark.filterwarnings("ignore:.*reentrant.*")
def test_reentrant_checkpointing_of_embeddings_that_the_caller_made():
    model, ids = tiny.build("llama").train(), tiny.inputs("llama")["input_ids"]
    patch, gradients = fastprompt.patch(model), []
    embeds = model.get_input_embeddings()(ids).detach()
    for reentrant in (None, True):
        if reentrant:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model(inputs_embeds=embeds).logits.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in patch.trainable.items()})
        model.zero_grad()
    assert not embeds.requires_grad  # the caller's tensor stays as it is
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain)


def test_a_tower_none_of_whose_blocks_is_read_says_so():
    model = tiny.build("llava")
    model.config.vision_feature_layer = model.model.config.vision_feature_layer = -4  # embeddings
    patch = fastprompt.patch(model)
    assert "model.vision_tower: no block's output is read" in patch.report().replace("\n    ", " ")
    with torch.no_grad():
        model(**tiny.inputs("llava"))


def _by_sdpa(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
    """An attention that somebody wrote anew: nothing of transformers' is asked."""
    q, k, v = (
        p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        for p in (self.q_proj, self.k_proj, self.v_proj)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("how", ["class", "instance"])
def test_an_attention_that_would_not_see_prompts(how):
    model = tiny.build("llama")
    attention = model.model.layers[1].self_attn
    if how == "class":
        attention.__class__ = type("Fast", (type(attention),), dict(forward=_by_sdpa))
        said = "layers.1.self_attn: want an attention that asks transformers .* got a Fast"
    else:
        attention.forward = partial(_by_sdpa, attention)
        said = "layers.1.self_attn: want LlamaAttention's own forward, got another in its place"
    assert torch.isfinite(model(input_ids=torch.arange(5, 9)[None]).logits).all()
    unchanged(model, fastprompt.patch, said)
    assert not fastprompt.supports(model)


def test_an_attention_around_transformers_own_is_served():
    model, want = tiny.build("llama"), tiny.build("llama")

    def forward(self, *args, **kwargs):
        return super(type(self), self).forward(*args, **kwargs)

    for layer in model.model.layers:
        kind = type(layer.self_attn)
        layer.self_attn.__class__ = type("Around", (kind,), dict(forward=forward))
    ids = torch.arange(5, 9)[None]
    for each in (model, want):
        torch.manual_seed(0)
        patch = fastprompt.patch(each, DeepPrompts(text=3))
        with torch.no_grad():
            for p in patch.trainable.values():
                p.normal_()
    torch.testing.assert_close(model(input_ids=ids).logits, want(input_ids=ids).logits)
    assert not torch.allclose(want(input_ids=ids).logits, tiny.build("llama")(input_ids=ids).logits)
