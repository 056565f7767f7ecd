"""Where a block does not run as one node: the layer's own forward, with a reason in the report."""

import pytest
import test_maple
import tiny
import torch
import transformers as tf
from frozen import gradients, is_fused, model_of, pair, relative, run
from torch import nn

import fastprompt
from fastprompt import viz
from fastprompt.methods import DeepPrompts, MaPLe, PrefixTuning


def unfused(name, models, reason, given=None, count=1):
    """``models`` agree, and ``count`` blocks of the first say why they are no node."""
    given = given or tiny.inputs(name, torch.float64)
    got, want = (run(name, model, given) for model in models)
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or relative(a, b) < 1e-10
    patch = fastprompt.patch_of(models[0])
    blocks = [b for b in patch.blocks.values() if b.reason is not None]
    assert len(blocks) + len(patch.unfused) == count, patch.report()
    assert reason in patch.report()


def fused_again(name, model):
    run(name, model, tiny.inputs(name, torch.float64))
    assert is_fused(model)


HOOKS = {
    "register_forward_hook": lambda m, args, out: out * 1.5,
    "register_forward_pre_hook": lambda m, args: (args[0] * 1.5,),
    "register_full_backward_hook": lambda m, into, out: (into[0] * 1.5,),
    "register_full_backward_pre_hook": lambda m, out: (out[0] * 1.5,),
}


@pytest.mark.parametrize("where", ["mlp.down_proj", "self_attn.q_proj", "input_layernorm", "mlp"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_inside_a_block(kind, where):
    models = pair("llama", "speed")
    fused_again("llama", models[0])
    added = [getattr(m.model.layers[1].get_submodule(where), kind)(HOOKS[kind]) for m in models]
    unfused("llama", models, f"model.layers.1: {where} has hooks")
    for handle in added:
        handle.remove()
    fused_again("llama", models[0])


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_the_layer_itself_run_around_it(kind):
    models = pair("llama", "speed")
    for m in models:
        getattr(m.model.layers[1], kind)(HOOKS[kind])
    unfused("llama", models, "blocks  3 of 3", count=0)
    assert is_fused(models[0])


def test_hidden_states_are_recorded_and_leave_blocks_as_they_are():
    models = pair("llama", "speed")
    given = dict(tiny.inputs("llama", torch.float64), output_hidden_states=True)
    got, want = (m(**given).hidden_states for m in models)
    assert is_fused(models[0]) and len(got) == 4
    assert all(relative(a, b) < 1e-10 for a, b in zip(got, want, strict=True))
    assert any(m._forward_hooks for m in models[0].model.layers[0].modules())  # left for good
    fused_again("llama", models[0])


def test_what_trains_inside_a_block():
    models = pair("llama", "speed")
    for m in models:
        m.model.layers[0].post_attention_layernorm.weight.requires_grad_(True)
    unfused("llama", models, "model.layers.0: post_attention_layernorm.weight trains")
    assert models[0].model.layers[0].post_attention_layernorm.weight.grad is None  # zeroed by run
    for m in models:
        m.model.layers[0].post_attention_layernorm.weight.requires_grad_(False)
    fused_again("llama", models[0])


class Adapter(nn.Module):
    """What PEFT puts in a projection's place."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_a_module_that_was_replaced_after_patching():
    models = pair("llama", "speed")
    for m in models:
        torch.manual_seed(0)
        attention = m.model.layers[2].self_attn
        attention.q_proj = Adapter(attention.q_proj)
    unfused("llama", models, "model.layers.2: modules inside self_attn were replaced")


def test_modules_that_are_not_known():
    def with_adapter(model):
        attention = model.model.layers[1].self_attn
        attention.v_proj.register_module("extra", nn.Linear(2, 2))

    class TwiceRMSNorm(tf.models.llama.modeling_llama.LlamaRMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    def with_a_norm(model):
        model.model.layers[1].input_layernorm.__class__ = TwiceRMSNorm

    def with_a_forward(model):
        mlp = model.model.layers[1].mlp
        mlp.forward = lambda x, own=mlp.forward: 2 * own(x)

    def with_another_layer(model):
        layer = model.model.layers[1]
        layer.forward = lambda *args, own=layer.forward, **kwargs: own(*args, **kwargs)

    class LlamaDecoderLayer(tf.models.llama.modeling_llama.LlamaDecoderLayer):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    def with_a_class_of_its_own(model):
        model.model.layers[1].__class__ = LlamaDecoderLayer

    for change, reason in (
        (with_a_class_of_its_own, "a LlamaDecoderLayer with a forward of its own"),
        (with_adapter, "self_attn.v_proj.extra is a Linear, which frozen blocks do not know"),
        (with_a_norm, "input_layernorm is a TwiceRMSNorm with a forward of its own"),
        (with_a_forward, "mlp's forward was replaced"),
        (with_another_layer, "its forward was replaced"),
    ):
        models = []
        for memory in ("speed", "off"):
            model = model_of("llama")
            change(model)
            torch.manual_seed(5)
            fastprompt.patch(model, DeepPrompts(text=5), memory=memory)
            models.append(model.train())
        unfused("llama", models, f"model.layers.1: {reason}")
        assert list(fastprompt.patch_of(models[0]).unfused) == ["model.layers.1"]


def test_a_forward_that_is_replaced_after_patching():
    models = pair("llama", "speed")
    for m in models:
        norm = m.model.layers[1].input_layernorm
        norm.forward = lambda x, own=norm.forward: 2 * own(x)
    unfused("llama", models, "model.layers.1: input_layernorm's forward was replaced")


@pytest.mark.parametrize("activation", ["relu", "gelu_fast"])
def test_an_activation_that_is_not_known(activation):
    models = pair("vit", "speed", hidden_act=activation)
    unfused("vit", models, "which frozen blocks do not know", count=3)


@pytest.mark.parametrize(
    "name, more, reason",
    [
        ("llama", dict(attention_dropout=0.25), "attention dropout 0.25 in training"),
        ("vit", dict(attention_probs_dropout_prob=0.25), "attention dropout 0.25 in training"),
        ("clip_vision", dict(attention_dropout=0.25), "attention dropout 0.25 in training"),
        ("vit", dict(hidden_dropout_prob=0.25), "dropout 0.25 in training"),
        ("dinov2", dict(drop_path_rate=0.25), "dropout 0.25 in training"),
    ],
)
def test_dropout(name, more, reason):
    models = pair(name, "speed", **more)
    given, results = tiny.inputs(name, torch.float64), []
    for model in models:
        torch.manual_seed(11)  # both draw the same
        results.append([tiny.output(name, model, given)])
        results[-1][0].sum().backward()
        results[-1] += gradients(model)
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < 1e-10
    patch = fastprompt.patch_of(models[0])
    assert reason in patch.report() and "blocks  0 of 3" in patch.report()
    for model in models:
        model.eval()
    unfused(name, models, "blocks  3 of 3", count=0)


def test_eager_attention():
    models = pair("llama", "speed", attn_implementation="eager")
    unfused("llama", models, "eager attention, which returns its weights", count=3)


def test_attention_that_is_looked_at():
    model, _ = pair("llama", "speed", dtype=torch.float32, exact=False)
    given = tiny.inputs("llama")
    assert len(viz.attention_to_prompts(model, **given)) == 3
    from fastprompt import recorder

    seen = []
    with recorder.listening(lambda name, *_: seen.append(name)):
        model(**given)
    assert (
        len(seen) == 3 and "someone looks at its attention" in fastprompt.patch_of(model).report()
    )


def test_output_attentions_says_no_as_before():
    model, _ = pair("llama", "speed")
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        model(**tiny.inputs("llama", torch.float64), output_attentions=True)
    assert "model.layers.0: output_attentions" in fastprompt.patch_of(model).report()


def test_a_cache_that_holds_tokens_or_is_static():
    models = pair("llama", "speed")
    caches = []
    for model in models:
        with torch.no_grad():
            before = model(**tiny.inputs("llama", torch.float64, seed=3))
        caches.append(before.past_key_values)
    results = []
    for model, cache in zip(models, caches, strict=True):
        out = model(**tiny.inputs("llama", torch.float64), past_key_values=cache)
        out.logits.square().sum().backward()
        results.append([out.logits.detach(), *gradients(model)])
    assert all(relative(a, b) < 1e-10 for a, b in zip(*results, strict=True))
    report = fastprompt.patch_of(models[0]).report()
    assert "a KV cache (DynamicCache) that is not a new dynamic one" in report
    static = tf.StaticCache(models[0].config, max_cache_len=32)
    with torch.no_grad():
        models[1](**tiny.inputs("llama", torch.float64), past_key_values=static)
    model = models[0].eval()
    static.reset()
    model(**tiny.inputs("llama", torch.float64), past_key_values=static)
    assert "a KV cache (StaticCache)" in fastprompt.patch_of(model).report()


def test_accelerate_hooks_put_on_afterwards():
    hooks = pytest.importorskip("accelerate.hooks")
    models = pair("llama", "speed")
    layer = models[0].model.layers[1]
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    unfused("llama", models, "blocks  3 of 3", count=0)
    assert is_fused(models[0])
    fastprompt.patch_of(models[0]).undo()
    hooks.remove_hook_from_module(layer)
    assert layer.forward.__func__ is type(layer).forward


def test_undo_leaves_nothing(tmp_path):
    model, _ = pair("llava", "speed")
    run("llava", model, tiny.inputs("llava", torch.float64))
    patch = fastprompt.patch_of(model)
    patch.undo()
    assert not any("forward" in vars(m) for m in model.modules())
    assert patch.blocks == {} and patch.memories == {} and patch.unfused == {}


@pytest.mark.parametrize("method", [PrefixTuning(3, mlp=4), MaPLe(2, 2)], ids=["mlp", "maple"])
def test_what_makes_a_prompt_is_no_part_of_its_block(method):
    name = "llama" if isinstance(method, PrefixTuning) else "clip"
    found = []
    for memory in ("off", "low"):
        model = test_maple.build() if name == "clip" else tiny.build(name, torch.float64)
        torch.manual_seed(4)
        patch = fastprompt.patch(model, method, memory=memory)
        assert not patch.unfused
        given = test_maple.given() if name == "clip" else tiny.inputs(name, torch.float64)
        out = model(**given)
        (out.logits_per_image if name == "clip" else out.logits).square().sum().backward()
        found.append({n: p.grad for n, p in patch.trainable.items()})
    for key, want in found[0].items():
        assert relative(found[1][key], want) < 1e-5, key  # a layer's own norm is in float32
