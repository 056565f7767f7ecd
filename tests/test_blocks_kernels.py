"""Whole blocks as CUDA runs them: every op by Triton (its interpreter here), 4-bit weights that
share an input multiplied as one."""

import importlib

import pytest
import torch
from compare import assert_as_accurate
from frozen import NF4
from test_blocks import block_call

from fastprompt.blocks import products

OPS = ["dequantize_4bit", "gelu", "layer_norm", "rms_norm", "rope", "swiglu"]


@pytest.fixture
def launched(monkeypatch):
    """The ops that went to Triton."""
    found = set()

    def watched(name):
        def by_triton(x, backend):
            ours = x.dtype != torch.float64 and x.numel() > 0
            found.update([name] * ours)
            return ours

        return by_triton

    for name in OPS:
        module = importlib.import_module(f"fastprompt.ops.{name}")
        monkeypatch.setattr(module, "by_triton", watched(name))
    monkeypatch.setattr(products, "side_by_side", lambda x: x.dtype != torch.float64)
    return found


_ROWS = [pytest.param(policy, *NF4.values, False, marks=NF4.marks) for policy in ("speed", "low")]


@pytest.mark.parametrize("policy, kind, apart", [*_ROWS, ("balanced", "dense", True)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "clip_vision"])
def test_never_less_accurate_than_twice_eager(name, policy, kind, apart, launched):
    """``apart``: as the embeddings of SigLIP's patches lie, which a convolution made."""
    calls = {
        key: block_call(name, *key, kind)
        for key in ((torch.float32, policy), (torch.float32, "off"), (torch.float64, "off"))
    }
    torch.manual_seed(3)
    x = torch.randn(3, 64, 33).transpose(1, 2) if apart else torch.randn(3, 33, 64)
    tensors = [x.requires_grad_(), torch.randn(5, 64, requires_grad=True)]
    assert_as_accurate(
        lambda x, tokens: calls[torch.float32, policy](x, tokens),
        lambda x, tokens: calls[x.dtype, "off"](x, tokens),
        tensors,
        torch.randn(3, 33, 64),
    )
    rotary = {"rms_norm", "rope", "swiglu"}
    assert launched >= (rotary if name in ("llama", "qwen3") else {"gelu", "layer_norm"})
    assert ("dequantize_4bit" in launched) == (kind == "nf4")
