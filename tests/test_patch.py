"""patch, report, undo, caching."""

import copy
import io
import pickle

import pytest
import tiny
import torch
import transformers as tf
from undone import check_undo

import fastprompt
from fastprompt import native
from fastprompt.methods import M2PT, VPT, DeepPrompts

ALL = list(tiny.FAMILIES)


@pytest.mark.parametrize("name", ALL)
def test_undo_gives_the_old_model_bitwise(name):
    model, given = tiny.build(name), tiny.inputs(name)
    check_undo(model, lambda: tiny.output(name, model, given))
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
    from fastprompt import attention, masks

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
        monkeypatch.setattr(masks, "_is_sliding_window", lambda function: False)
        want = run()
    assert any(given is not None and given.ndim == 4 for given in seen)
    torch.testing.assert_close(got, want)


def test_the_report_of_the_machine_says_which_backend_runs():
    text = fastprompt.report()
    backend = "native" if native.available() else "vendor"
    assert f"torch {torch.__version__}" in text and f"cpu: attention backend {backend}" in text
    assert "compiled part" in text
