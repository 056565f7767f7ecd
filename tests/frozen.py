"""Models whose blocks run as one node, beside the same models without, for `test_blocks*.py`."""

import copy
from importlib.util import find_spec

import pytest
import tiny
import torch
from test_exactness import method_for
from torch import nn

import fastprompt
from fastprompt.blocks.memory import POLICIES as POLICIES  # tests take it from here

NF4 = pytest.param(
    "nf4", marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes")
)


def quantize(model, compute=None, nested=True):
    """Every linear layer of a model's blocks as bitsandbytes' Linear4bit, in place."""
    from bitsandbytes.nn import Linear4bit

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and ".layer" in f".{name}":
            new = Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None,
                compute_dtype=compute, compress_statistics=nested, quant_type="nf4",
            )  # fmt: skip
            new.load_state_dict(layer.state_dict())
            new.weight.data = new.weight.data.float()
            new = new.to("cpu").requires_grad_(False)
            if new.bias is not None:
                new.bias.data = new.bias.data.to(layer.weight.dtype)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    return model


def model_of(name, kind="dense", dtype=torch.float64, exact=True, **more):
    model = tiny.build(name, dtype, **more)
    if exact and dtype == torch.float64:
        tiny.in_float64(model)
    return quantize(model, torch.float64 if exact else None) if kind == "nf4" else model


def pair(name, policy, kind="dense", method=None, dtype=torch.float64, exact=True, **more):
    """(patched with ``policy``, patched with blocks off), in training, with the same prompts."""
    model = model_of(name, kind, dtype, exact, **more)
    models = []
    for each, how in ((model, policy), (copy.deepcopy(model), "off")):
        patch = fastprompt.patch(each, method or method_for(name), memory=how)
        torch.manual_seed(5)
        with torch.no_grad():
            for p in patch.trainable.values():
                p.normal_()
        models.append(each.train())
    return models


def run(name, model, given, loss=None):
    """Output and the gradients of all that trains, and of every input that wants one."""
    out = tiny.output(name, model, given)
    if loss is not None:
        loss(out).backward()
    else:
        torch.manual_seed(7)
        out.backward(torch.randn_like(out))
    return [out.detach(), *gradients(model)]


def gradients(model):
    found = [p.grad for p in fastprompt.patch_of(model).trainable.values()]
    model.zero_grad()
    return found


def relative(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def is_fused(model):
    blocks = fastprompt.patch_of(model).blocks
    return bool(blocks) and all(b.ran and b.why_not() is None for b in blocks.values())


def kept(model, given, name):
    """Bytes that a forward keeps for backward: of storages, each once; of weights none."""
    frozen = (*model.parameters(), *model.buffers())
    weights = {p.untyped_storage().data_ptr() for p in frozen}
    found: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        held.append(x)  # alive, so that no address is taken twice
        return x

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = tiny.output(name, model, given)
    assert out.requires_grad
    return sum(found.values())
