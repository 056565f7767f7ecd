"""Every family of `zoo.py`: exactness, generation, 4-bit, gradient checkpointing, padding, undo."""

import copy

import pytest
import tiny
import torch
import zoo
from test_exactness import relative
from torch import nn

import fastprompt
from fastprompt.concatenation import concatenate
from fastprompt.methods import DeepPrompts
from fastprompt.ops import dequantize_4bit

ALL = list(zoo.ROWS)
GENERATES = [name for name, row in zoo.ROWS.items() if row.generates]
P = 3


@pytest.fixture
def wide(monkeypatch):
    """transformers computes rotations, norms and softmax in float32: here in float64."""
    for name in ("float", "float32"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def method_for(name, rows=P):
    row = zoo.ROWS[name]
    return DeepPrompts(vision=rows * row.vision, text=rows * row.text, train_head=False)


def pair(name, model=None):
    """The same model with side keys and with literal rows, and the same prompts in both."""
    ours = zoo.build(name) if model is None else model
    theirs = copy.deepcopy(ours)
    patch = fastprompt.patch(ours, method_for(name))
    written = concatenate(theirs, method_for(name))
    assert patch.prompts.keys() == written.keys()
    torch.manual_seed(2)
    with torch.no_grad():
        for key, prompt in patch.prompts.items():
            written[key].tokens.copy_(prompt.tokens.normal_())
    return ours, theirs, patch, written


@pytest.mark.parametrize("name", ALL)
def test_output_and_every_prompt_gradient(name, wide):
    given = zoo.inputs(name)
    base = tiny.output(name, zoo.build(name), given)
    ours, theirs, patch, written = pair(name)
    got, want = tiny.output(name, ours, given), tiny.output(name, theirs, given)
    assert relative(got, want) < 1e-10
    assert relative(base, want) > 1e-3, "the prompts do nothing"
    direction = torch.randn_like(want)
    got.backward(direction)
    want.backward(direction)
    for key, prompt in patch.prompts.items():
        assert prompt.tokens.grad.any(), key
        assert relative(prompt.tokens.grad, written[key].tokens.grad) < 1e-10, key


def gradients(name, checkpointing=None):
    """Output and prompts' gradients in training, with a kind of gradient checkpointing or none."""
    model = zoo.build(name)
    patch = fastprompt.patch(model, method_for(name))
    torch.manual_seed(3)
    for p in patch.trainable.values():
        p.data.normal_()
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    torch.manual_seed(4)
    out = tiny.output(name, model, zoo.inputs(name))
    out.square().sum().backward()
    return [out, *(p.grad for p in patch.trainable.values())]


@pytest.mark.filterwarnings("ignore:.*(gradient_checkpointing_enable|reentrant).*")
@pytest.mark.parametrize("name", ALL)
def test_gradient_checkpointing_changes_nothing(name):
    plain = gradients(name)
    for kind in ("reentrant", "other"):
        for old, new in zip(plain, gradients(name, kind), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_undo_gives_the_old_model_bitwise(name):
    model, given = zoo.build(name, torch.float32), zoo.inputs(name, torch.float32)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    configs = {n: m.config for n, m in model.named_modules() if hasattr(m, "config")}
    with torch.no_grad():
        before = tiny.output(name, model, given)
    names = {n: set(vars(m)) for n, m in model.named_modules()}
    hooks = {n: len(m._forward_hooks) for n, m in model.named_modules()}
    patch = fastprompt.patch(model)
    tiny.output(name, model, given).square().sum().backward()
    with torch.no_grad():
        for p in patch.trainable.values():
            assert p.grad is not None
            p -= 0.1 * p.grad.sign()
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


def four_bit(model):
    """The model with every linear layer of its blocks in NF4, and the same with those decoded."""
    from bitsandbytes.nn import Linear4bit
    from transformers.pytorch_utils import Conv1D

    whole = copy.deepcopy(model)
    for tower in fastprompt.families.anatomy(model).towers:
        for block in tower.blocks:
            for name, layer in list(block.layer.named_modules()):
                if not isinstance(layer, (nn.Linear, Conv1D)):
                    continue
                weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
                new = Linear4bit(
                    *weight.T.shape, layer.bias is not None, torch.float64, quant_type="nf4"
                )
                new.weight.data = weight.data.float().contiguous()
                if layer.bias is not None:
                    new.bias.data = layer.bias.data
                new = new.to("cpu").requires_grad_(False)
                block.layer.set_submodule(name, new)
                old = whole.get_submodule(f"{block.name}.{name}")
                decoded = dequantize_4bit((new.weight, new.weight.quant_state)).to(weight.dtype)
                old.weight.data = decoded.T if isinstance(layer, Conv1D) else decoded
    return model, whole


@pytest.mark.parametrize("name", ALL)
def test_four_bit_weights(name):
    pytest.importorskip("bitsandbytes")
    packed, whole = four_bit(zoo.build(name))
    given = zoo.inputs(name)
    ours, theirs = (fastprompt.patch(model, method_for(name)) for model in (packed, whole))
    torch.manual_seed(2)
    with torch.no_grad():
        for key, prompt in ours.prompts.items():
            theirs.prompts[key].tokens.copy_(prompt.tokens.normal_())
    got, want = tiny.output(name, packed, given), tiny.output(name, whole, given)
    assert relative(got, want) < 1e-6
    direction = torch.randn_like(want)
    got.backward(direction)
    want.backward(direction)
    for key, prompt in ours.prompts.items():
        assert relative(prompt.tokens.grad, theirs.prompts[key].tokens.grad) < 1e-5, key
    assert "in 4-bit" in ours.report()


def longer(name, given, tokens):
    """The inputs with one more token in each sample."""
    more = dict(given, input_ids=torch.cat([given["input_ids"], tokens], dim=1))
    kinds = dict(attention_mask=1, token_type_ids=zoo.ROWS[name].next_type, mm_token_type_ids=0)
    for key, fill in kinds.items():
        if key in given:
            row = torch.full_like(tokens, fill, dtype=given[key].dtype)
            more[key] = torch.cat([given[key], row], dim=1)
    return more


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATES)
def test_generate_gives_the_reference_tokens(name, cache):
    ours, theirs, *_ = pair(name)
    given = zoo.inputs(name)
    start, steps = given["input_ids"].shape[1], 5
    with torch.no_grad():
        whole = given
        for _ in range(steps):
            whole = longer(name, whole, theirs(**whole).logits[:, -1:].argmax(-1))
        got = ours.generate(
            **given, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=None,
            pad_token_id=0, **dict(cache_implementation="static") if cache == "static" else {},
        )  # fmt: skip
    assert torch.equal(got[:, start:], whole["input_ids"][:, start:])


@pytest.mark.parametrize("name", GENERATES)
def test_left_padding_changes_nothing(name):
    model, given = zoo.build(name), zoo.inputs(name)
    patch = fastprompt.patch(model, method_for(name))
    with torch.no_grad():
        for prompt in patch.prompts.values():
            prompt.tokens.normal_()
        padded, pad = dict(given), torch.zeros(2, 2, dtype=torch.long)
        padded.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            if key in padded:
                padded[key] = torch.cat([pad.to(padded[key].dtype), padded[key]], dim=1)
        if patch.anatomy.tower("text").rotary is None:  # learned positions count from the padding
            padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        got, want = model(**padded).logits[:, 2:], model(**given).logits
    assert relative(got, want) < 1e-5  # float32 rotation
