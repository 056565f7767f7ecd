"""`fastprompt.multihead` against torch's own ``nn.MultiheadAttention``."""

import pytest
import torch
from test_exactness import relative
from torch import nn

from fastprompt import multihead, sdpa


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("given", ["one", "two", "three"])
def test_torchs_own_attention(first, dtype, given):
    """Against torch's: its masks (True is not seen), layouts, and cross-attention."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 2, batch_first=first, dtype=torch.float64)
    nn.init.normal_(theirs.in_proj_bias)
    q, k, v = torch.randn(3, 3, 5, 16, dtype=torch.float64)
    inputs = dict(one=(q, q, q), two=(q, k, k), three=(q, k, v))[given]
    B, N = (3, 5) if first else (5, 3)
    each, padding = torch.rand(2 * B, N, N) < 0.4, torch.zeros(B, N, dtype=torch.bool)
    each &= ~torch.eye(N, dtype=torch.bool)
    padding[0, -1] = True
    for mask in (None, each[0], each):  # one for all, or one for each sample and head
        for key_mask in (None, padding):
            options = dict(attn_mask=mask, key_padding_mask=key_mask, need_weights=False)
            for name, what in options.items():
                if dtype == torch.float64 and isinstance(what, torch.Tensor):
                    options[name] = torch.zeros_like(what, dtype=dtype).masked_fill(what, -1e4)
            got, none = multihead.attend(theirs, *inputs, **options)
            assert none is None and relative(got, theirs(*inputs, **options)[0]) < 1e-12


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("axes", [2, 3])
def test_torchs_own_attention_as_it_is_called_by_default(first, axes):
    """Its weights are wanted, and a sample may come without a batch."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 2, batch_first=first, dropout=0.5, dtype=torch.float64)
    q, k = torch.randn(2, *[5] * (axes - 1), 16, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.zeros([5] * (axes - 1), dtype=torch.bool)
    padding[..., -2] = True
    for options in (
        {},
        dict(attn_mask=mask, key_padding_mask=padding),
        dict(attn_mask=mask.expand(10 if axes == 3 else 2, 5, 5), average_attn_weights=False),
        dict(key_padding_mask=padding, need_weights=False),
    ):
        for train in (False, True):
            results = []
            for attend in (multihead.attend, nn.MultiheadAttention.forward):
                torch.manual_seed(1)  # of dropout
                results.append(attend(theirs.train(train), q, k, k, **options))
            (got, weights), (want, theirs_weights) = results
            assert got.shape == want.shape and relative(got, want) < 1e-12
            assert (weights is None) == (theirs_weights is None)
            if weights is not None:
                assert weights.shape == theirs_weights.shape
                assert relative(weights, theirs_weights) < 1e-12


def test_what_torchs_own_attention_is_not_asked():
    theirs, x = nn.MultiheadAttention(16, 2), torch.randn(3, 5, 16)
    with pytest.raises(ValueError, match="attn_mask beside is_causal"):
        multihead.attend(theirs, x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="inputs of 2 or 3 axes"):
        multihead.attend(theirs, *[x[0, 0]] * 3)
    with pytest.raises(ValueError, match="_attention once, got 0 calls"):  # prompts are not in them
        sdpa.run(theirs, lambda q, k, v: q, x, x, x)
