"""patch, report, undo, caching, refusals."""

import copy
import io
import pickle

import pytest
import tiny
import torch
import transformers as tf
from torch import nn

import fastprompt
from fastprompt import native
from fastprompt.methods import M2PT, VPT, DeepPrompts

ALL = list(tiny.FAMILIES)


def train_a_little(model, given):
    patch = fastprompt.patch_of(model)
    optimizer = torch.optim.AdamW(patch.trainable.values(), lr=0.05)
    for _ in range(2):
        tiny.output("", model, given).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ALL)
def test_undo_gives_the_old_model_bitwise(name):
    model, given = tiny.build(name), tiny.inputs(name)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    configs = {n: m.config for n, m in model.named_modules() if hasattr(m, "config")}
    with torch.no_grad():
        before = tiny.output(name, model, given)
        again = tiny.output(name, model, given)
    assert torch.equal(before, again)
    # after a first forward: transformers itself leaves a mark then
    names = {n: set(vars(m)) for n, m in model.named_modules()}
    hooks = {n: len(m._forward_hooks) for n, m in model.named_modules()}

    patch = fastprompt.patch(model)
    train_a_little(model, given)
    with torch.no_grad():
        assert not torch.equal(tiny.output(name, model, given), before)
    patch.undo()

    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert all(m.config is configs[n] for n, m in model.named_modules() if hasattr(m, "config"))
    assert names == {n: set(vars(m)) for n, m in model.named_modules()}
    assert hooks == {n: len(m._forward_hooks) for n, m in model.named_modules()}
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(tiny.output(name, model, given), before)
    fastprompt.patch(model)  # and it can be patched again


def test_another_model_of_the_same_config_is_untouched():
    first = tiny.build("llama")
    second = tf.LlamaForCausalLM(first.config)
    given = tiny.inputs("llama")
    with torch.no_grad():
        before = second(**given).logits
        fastprompt.patch(first)
        assert second.config._attn_implementation == "sdpa"
        assert torch.equal(second(**given).logits, before)


def test_defaults_follow_the_architecture():
    assert fastprompt.patch(tiny.build("llava")).method == M2PT()
    assert fastprompt.patch(tiny.build("vit")).method == VPT()
    assert fastprompt.patch(tiny.build("qwen2")).method == DeepPrompts(text=10)


def test_report_says_what_trains_and_what_was_skipped():
    model = tiny.build("llava")
    patch = fastprompt.patch(model, M2PT(vision_tokens=4, text_tokens=3))
    report = patch.report()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert f"trains  {trained:,} of {total:,} parameters" in report
    assert "4 prompt rows × 2 of 3 blocks" in report and "3 prompt rows × 3 of 3 blocks" in report
    assert list(patch.skipped) == ["model.vision_tower.encoder.layers.2"]
    assert "multi_modal_projector" in report and "nothing reads its output" in report
    shapes = {n: list(p.shape) for n, p in patch.trainable.items() if "fastprompt" in n}
    assert len(shapes) == 5 and shapes["model.language_model.layers.0.fastprompt.tokens"] == [3, 32]


def test_the_unread_block_runs_only_when_called_directly():
    model, given = tiny.build("llava"), tiny.inputs("llava")
    fastprompt.patch(model)
    last = model.model.vision_tower.encoder.layers[-1]
    calls = []
    last.mlp.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(**given)
        assert not calls
        model.model.vision_tower(given["pixel_values"])
        assert len(calls) == 1
        model(**given, vision_feature_layer=-1)  # another tap reads it
        assert len(calls) == 2
        with pytest.raises(ValueError):
            model(input_ids=given["input_ids"], inputs_embeds=torch.zeros(1))
        model.model.vision_tower(given["pixel_values"])  # an error in between leaves nothing behind
        assert len(calls) == 3


def test_prompt_keys_are_computed_once_per_forward_and_kept_in_evaluation():
    model, given = tiny.build("llama"), tiny.inputs("llama", batch=4)
    patch = fastprompt.patch(model)
    calls = []
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_hook(lambda m, args, out: calls.append(args[0].shape[1]))

    def prompt_calls():
        with torch.no_grad():
            out = model(**given).logits
        count, calls[:] = calls.count(10), []
        return count, out

    assert prompt_calls()[0] == 1
    count, before = prompt_calls()
    assert count == 0
    tokens = patch.trainable["model.layers.0.fastprompt.tokens"]
    with torch.no_grad():
        tokens.add_(1.0)
    count, after = prompt_calls()
    assert count == 1 and not torch.equal(before, after)
    tokens.data.zero_()  # leaves no trace: the user says so
    assert prompt_calls()[0] in (0, 1)
    patch.refresh()
    assert prompt_calls()[0] == 1
    model.train()
    assert prompt_calls()[0] == 1
    model.eval()
    with torch.inference_mode():
        model(**given)
    calls.clear()
    model(**given).logits.sum().backward()  # nothing from inference_mode may sit in this graph
    assert tokens.grad is not None
    calls.clear()
    with torch.no_grad():
        attention.k_proj.weight.mul_(1.5)
    assert prompt_calls()[0] == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert prompt_calls()[0] == 1


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["llama", "llava", "vit"])
def test_copies_are_models_of_their_own(name, copied):
    model, given = tiny.build(name), tiny.inputs(name)
    fastprompt.patch(model)
    # before any forward: a hook of transformers' own cannot be pickled after one
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    else:
        other = pickle.load(io.BytesIO(pickle.dumps(model)))
    with torch.no_grad():
        want = tiny.output(name, model, given)
        for p in fastprompt.patch_of(other).trainable.values():
            p.add_(1.0)
        assert torch.equal(tiny.output(name, model, given), want)
        changed = tiny.output(name, other, given)
    assert not torch.equal(changed, want)
    fastprompt.patch_of(other).undo()
    with torch.no_grad():
        undone = tiny.output(name, other, given)
        assert torch.equal(tiny.output(name, model, given), want)
    fastprompt.patch_of(model).undo()
    with torch.no_grad():
        torch.testing.assert_close(tiny.output(name, model, given), undone)


def test_a_bfloat16_projector_trains_in_float32_and_comes_back():
    model, given = tiny.build("llava", torch.bfloat16), tiny.inputs("llava", torch.bfloat16)
    old = model.model.multi_modal_projector
    with torch.no_grad():
        before = model(**given).logits
    patch = fastprompt.patch(model, M2PT(vision_tokens=0, text_tokens=0))
    assert all(p.dtype == torch.float32 for p in patch.trainable.values()) and patch.trainable
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, before)
    assert "float32 copy" in patch.report()
    patch.undo()
    assert model.model.multi_modal_projector is old


def test_lm_head_trains_apart_from_tied_embeddings():
    model, given = tiny.build("llava", tie_word_embeddings=True), tiny.inputs("llava")
    fastprompt.patch(model, M2PT(2, 2, train_lm_head=True))
    model.tie_weights()
    model(**given).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert model.get_input_embeddings().weight.grad is None


def test_attention_dropout_in_training_is_served_and_reported():
    model = tiny.build("llama", attention_dropout=0.5)
    patch = fastprompt.patch(model)
    assert "attention dropout 0.5" in patch.report()
    given = tiny.inputs("llama")
    model.train()
    torch.manual_seed(0)
    first = model(**given).logits
    assert not torch.equal(first, model(**given).logits)
    first.sum().backward()
    assert all(p.grad.any() for p in patch.trainable.values())
    model.eval()
    assert torch.equal(model(**given).logits, model(**given).logits)


def test_packed_rows_arrive_as_a_4d_mask_and_equal_rows_apart():
    """Two texts in one row, told apart by position_ids alone (transformers' packing)."""
    model = tiny.build("llama", torch.float64)
    fastprompt.patch(model, DeepPrompts(text=4))
    ids = torch.randint(6, 60, (1, 11))
    positions = torch.tensor([[*range(5), *range(6)]])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        apart = [model(input_ids=part).logits for part in (ids[:, :5], ids[:, 5:])]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-6, atol=1e-6)


def test_a_sliding_window_hides_tokens_but_never_prompts():
    short = tiny.build("mistral", torch.float64, sliding_window=4)
    fastprompt.patch(short, DeepPrompts(text=3))
    ids = torch.randint(6, 60, (1, 12))
    with torch.no_grad():
        whole = short(input_ids=ids).logits
        shorter = short(input_ids=ids[:, :4]).logits
    torch.testing.assert_close(whole[:, :4], shorter)
    wide = tiny.build("mistral", torch.float64, sliding_window=None)
    wide.load_state_dict(short.state_dict(), strict=False)
    fastprompt.patch(wide, DeepPrompts(text=3))
    wide.load_state_dict(short.state_dict())
    with torch.no_grad():
        assert not torch.allclose(wide(input_ids=ids).logits[:, -1], whole[:, -1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sliding_window_is_no_4d_mask_and_gives_the_same(side, monkeypatch):
    from fastprompt import attention

    model = tiny.build("mistral", torch.float64, sliding_window=4).eval()
    fastprompt.patch(model, DeepPrompts(text=3))
    ids, mask = torch.randint(6, 60, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(8, 11)] = 0
    seen, whole = [], attention.attention_forward

    def watch(module, q, k, v, given, *args, **kwargs):
        seen.append(given)
        return whole(module, q, k, v, given, *args, **kwargs)

    def run():
        options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, min_new_tokens=6)
        return (
            model(input_ids=ids, attention_mask=mask).logits[mask.bool()],
            model(input_ids=ids).logits,
            model.generate(input_ids=ids, attention_mask=mask, **options),
        )

    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS._global_mapping, "fastprompt", watch)
    with torch.no_grad():
        got = run()
        assert all(given is None or given.ndim == 2 for given in seen)
        monkeypatch.setattr(attention, "_is_sliding_window", lambda function: False)
        want = run()
    assert any(given is not None and given.ndim == 4 for given in seen)
    torch.testing.assert_close(got, want)


def test_the_report_of_the_machine_says_which_backend_runs():
    text = fastprompt.report()
    backend = "native" if native.available() else "vendor"
    assert f"torch {torch.__version__}" in text and f"cpu: attention backend {backend}" in text
    assert "compiled part" in text


# ---- bad input: a ValueError, and the model as it was ----


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
    unchanged(nn.Linear(2, 2), patch, "want a transformers PreTrainedModel, got Linear")
    gpt2 = tf.GPT2LMHeadModel(
        tf.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9, bos_token_id=1, eos_token_id=1)
    )
    unchanged(gpt2, patch, "want a transformers model of llava, vit.*got model_type 'gpt2'")
    mixed = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tiny.VISION_CONFIGS["clip"](),
            text_config=tf.PhiConfig(**tiny.TEXT),
        )
    )
    unchanged(mixed, patch, "model.language_model: want one of .*llama.*; got PhiModel")
    llama = tiny.build("llama")
    unchanged(llama, lambda m: patch(m, M2PT()), "M2PT: want a vision-language model, got llama")
    unchanged(llama, lambda m: patch(m, VPT()), "want a vision tower; llama has text")
    unchanged(llama, lambda m: patch(m, "m2pt"), "want one of fastprompt.methods, got 'm2pt'")
    unchanged(llama, lambda m: patch(m, DeepPrompts(text=-1)), "length of 0 or more, got -1")
    unchanged(llama, lambda m: patch(m, backend="cudnn"), "backend: want one of auto")
    vit = tiny.build("vit")
    unchanged(vit, lambda m: patch(m, VPT(deep=False)), "want deep=True")
    llava = tiny.build("llava")
    unchanged(llava, lambda m: patch(m, M2PT(visual_prompts="raw")), "want 'drop', got 'raw'")
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


def test_offloaded_weights_are_refused():
    model = tiny.build("llama")
    layer = model.model.layers[1]
    layer.input_layernorm.to("meta")
    unchanged(model, fastprompt.patch, "layers.1: want weights on a device, got offloaded")


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
