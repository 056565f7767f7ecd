"""What prompts are compared with: against PEFT's own, there and back."""

import copy

import pytest
import tiny
import torch
from test_exactness import greedy, relative

import fastprompt
from fastprompt.methods import FullTuning, LoRA, PrefixTuning
from fastprompt.rotation import rotate

P = 4


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def random_(patch):
    torch.manual_seed(7)
    with torch.no_grad():
        for p in patch.trainable.values():
            p.normal_()


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_prefix_tuning_is_pefts(name):
    peft = pytest.importorskip("peft")
    ours = tiny.build(name, torch.float64)
    tiny.in_float64(ours)
    theirs = copy.deepcopy(ours)
    options = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(theirs, options, autocast_adapter_dtype=False)
    weight = theirs.prompt_encoder["default"].embedding.weight
    patch = fastprompt.patch(ours, PrefixTuning(P))
    random_(patch)
    text = patch.anatomy.tower("text")
    parts = []
    for block in text.blocks:
        tokens = block.layer.fastprompt.tokens  # [P, 2·Hkv·d], keys first
        keys, values = tokens.view(P, 2, -1, block.head_dim).permute(1, 2, 0, 3)
        parts += [rotate(keys, block.rotary, 0), values]  # each [Hkv, P, d]
    whole = torch.stack(parts).permute(2, 0, 1, 3).reshape(P, -1)  # as PEFT lays them out
    assert weight.shape == whole.shape
    with torch.no_grad():
        weight.copy_(whole)
    ours.train(), theirs.train()
    given = tiny.inputs(name, torch.float64)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    got = ours(**given, use_cache=False).logits
    want = theirs.double()(**given).logits
    assert relative(got, want) < 1e-6  # the rotation of theirs, by transformers in float32
    direction = torch.randn_like(want)
    want.backward(direction)
    # to our rows through the same arithmetic that made PEFT's of them
    expected = torch.autograd.grad(
        (whole * weight.grad).sum(), [p for p in patch.trainable.values()]
    )
    got.backward(direction)
    for p, grad in zip(patch.trainable.values(), expected, strict=True):
        assert relative(p.grad, grad) < 1e-6
    assert sum(p.numel() for p in patch.trainable.values()) == weight.numel()


def test_generate_with_a_prefix():
    """Against whole forwards without a cache."""
    model = tiny.build("llama", torch.float64)
    random_(fastprompt.patch(model, PrefixTuning(P)))
    given = tiny.inputs("llama")
    with torch.no_grad():
        want = greedy(model, given, 5)
        got = model.generate(
            **given, attention_mask=torch.ones_like(given["input_ids"]), max_new_tokens=5,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert torch.equal(got, want)


def test_lora_is_pefts():
    peft = pytest.importorskip("peft")
    ours = tiny.build("llava", torch.float64)
    theirs = copy.deepcopy(ours.model.language_model)
    patch = fastprompt.patch(ours, LoRA(3))
    random_(patch)
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    options = peft.LoraConfig(r=3, lora_alpha=6, target_modules=sorted(kinds))
    theirs = peft.get_peft_model(theirs, options, autocast_adapter_dtype=False).double()
    found = dict(theirs.base_model.model.named_parameters())
    prefix = "model.language_model."
    assert {prefix + n for n, p in found.items() if p.requires_grad} == set(patch.trainable)
    with torch.no_grad():
        for name, p in patch.trainable.items():
            found[name.removeprefix(prefix)].copy_(p)
    ids = tiny.inputs("llama")["input_ids"]
    got = ours.model.language_model(input_ids=ids).last_hidden_state
    assert relative(got, theirs(input_ids=ids).last_hidden_state) < 1e-12
    assert "LoRA of rank 3 at 21 layers, trains" in patch.report()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", [LoRA(2), FullTuning()])
def test_the_report_of_a_language_model_that_trains(method, tied):
    if isinstance(method, LoRA):
        pytest.importorskip("peft")
    model = tiny.build("llava", tie_word_embeddings=tied)
    patch = fastprompt.patch(model, method)
    own = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    report, total = patch.report(), sum(p.numel() for p in model.parameters())
    share = 100 * sum(own.values()) / total
    assert f"trains  {sum(own.values()):,} of {total:,} parameters ({share:.3f}%" in report
    assert ("with lm_head" in report) == isinstance(method, LoRA)  # the other trains it already
    skipped = report.partition("\nskipped")[2]
    assert "model.vision_tower: 0 vision tokens" in skipped and "language_model" not in skipped
    assert "nothing reads its output: no prompt, and not run by LlavaModel" in skipped


METHODS = [LoRA(2), FullTuning(), PrefixTuning(P)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_there_and_back(method, tmp_path):
    if isinstance(method, LoRA):
        pytest.importorskip("peft")
    model, given = tiny.build("llava"), tiny.inputs("llava")
    model.requires_grad_(False)
    with torch.no_grad():
        base, before = model(**given).logits, state(model)
        patch = fastprompt.patch(model, method)
        if not isinstance(method, PrefixTuning):
            assert relative(model(**given).logits, base) < 1e-6  # it begins as the base model
    random_(patch)
    model.train()
    model(**given, labels=given["input_ids"]).loss.backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got == set(patch.trainable)
    assert not any("vision" in name for name in got)
    with torch.no_grad():
        changed = model.eval()(**given).logits
    fastprompt.save(model, tmp_path)
    other = tiny.build("llava")
    assert fastprompt.load(other, tmp_path).method == method
    with torch.no_grad():
        assert torch.equal(other.eval()(**given).logits, changed)
    patch.undo()
    assert equal(state(model), before) and relative(changed, base) > 1e-2
    with torch.no_grad():
        assert torch.equal(model(**given).logits, base)
    fastprompt.patch(model, method)  # and again


def test_full_tuning_is_the_projector_and_the_language_model():
    patch = fastprompt.patch(tiny.build("llava"), FullTuning())
    count = sum(p.numel() for p in patch.trainable.values())
    model = patch.model
    parts = (model.model.language_model, model.model.multi_modal_projector, model.lm_head)
    assert count == sum(p.numel() for part in parts for p in part.parameters())


def test_lora_is_float32_beside_bfloat16():
    pytest.importorskip("peft")
    model = tiny.build("llava", torch.bfloat16)
    patch = fastprompt.patch(model, LoRA(2))
    assert {p.dtype for p in patch.trainable.values()} == {torch.float32}
    given = {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny.inputs("llava").items()
    }
    assert model(**given).logits.dtype == torch.bfloat16


def test_refusals():
    with pytest.raises(ValueError, match=r"want float32 weights .*got torch.bfloat16"):
        fastprompt.patch(tiny.build("llava", torch.bfloat16), FullTuning())
    with pytest.raises(ValueError, match="LoRA: want a rank of 1 or more, got 0"):
        fastprompt.patch(tiny.build("llama"), LoRA(0))
    with pytest.raises(ValueError, match="want a language model, got"):
        fastprompt.patch(tiny.build("vit"), FullTuning())
    with pytest.raises(ValueError, match="want a method of prompts"):
        fastprompt.trainable_share(tiny.build("llava"), LoRA(2))
    model = tiny.build("llava", torch.bfloat16)
    before = state(model)
    with pytest.raises(ValueError):
        fastprompt.patch(model, FullTuning())
    assert equal(state(model), before)
