"""Patched language models with and without the fused loss, labelled input, gradients."""

import copy
import importlib

import pytest
import tiny
import torch
import torch.nn.functional as F

import fastprompt

op = importlib.import_module("fastprompt.ops.linear_cross_entropy")
NAMES = ["llama", "qwen3", "llava"]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(op, "CHUNK", 3 * 64)  # three rows of tiny vocabularies


def pair(name, dtype=torch.float64, **options):
    """(patched, patched with logits=True), in training, with the same prompts."""
    model, made = tiny.build(name, dtype), []
    if dtype == torch.float64:
        tiny.in_float64(model)
    for each, logits in ((model, False), (copy.deepcopy(model), True)):
        torch.manual_seed(3)
        fastprompt.patch(each, logits=logits, **options)
        made.append(each.train())
    return made


def labelled(name, dtype=torch.float64, **more):
    given = tiny.inputs(name, dtype, **more)
    labels = given["input_ids"].clone()
    labels[:, :5] = -100
    labels[0, 7] = -100
    return dict(given, labels=labels)


def gradients(model):
    found = [p.grad for p in fastprompt.patch_of(model).trainable.values()]
    model.zero_grad()
    return found


def is_fused(model):
    return fastprompt.patch_of(model).loss.why_not() is None


def by_hand(logits, labels, count=None):
    """In the dtype of the logits: transformers' own casts them to float32."""
    reduction = "mean" if count is None else "sum"
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction
    )
    return loss if count is None else loss / count
