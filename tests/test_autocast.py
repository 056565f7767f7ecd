"""Every family under autocast: as near to float64 as literal rows under autocast are."""

import copy

import pytest
import tiny
import torch
import zoo
from test_exactness import relative
from test_families import method_for

import fastprompt
from fastprompt.concatenation import concatenate

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def run(model, prompts, name, dtype, autocast=None):
    """The output and every prompt's gradient, in float64, of one forward and backward."""
    given = zoo.inputs(name, dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = tiny.output(name, model, given)
    out.double().square().mean().backward()
    return [out.detach().double(), *(p.tokens.grad.double() for p in prompts.values())]


@pytest.mark.parametrize("autocast", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("name", list(zoo.ROWS))
def test_autocast(name, autocast):
    exact = zoo.build(name)
    ours, theirs = (copy.deepcopy(exact).float() for _ in range(2))
    kept = concatenate(exact, method_for(name))
    prompts = fastprompt.patch(ours, method_for(name)).prompts
    written = concatenate(theirs, method_for(name))
    torch.manual_seed(2)
    with torch.no_grad():
        for key, prompt in kept.items():
            prompt.tokens.normal_(std=0.5)
            prompts[key].tokens.copy_(prompt.tokens)
            written[key].tokens.copy_(prompt.tokens)
    wants = run(exact, kept, name, torch.float64)
    gots = run(ours, prompts, name, torch.float32, autocast)
    peers = run(theirs, written, name, torch.float32, autocast)
    for what, got, want, peer in zip(["output", *prompts], gots, wants, peers, strict=True):
        assert torch.isfinite(got).all(), what
        assert relative(got, want) < 2 * relative(peer, want) + 1e-4, what
