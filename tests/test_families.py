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
from fastprompt.trained import dense_weight

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
