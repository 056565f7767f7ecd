"""Every family under autocast: as near to float64 as literal rows under autocast are."""

import copy
from statistics import median

import pytest
import tiny
import torch
import zoo
from test_exactness import relative
from test_families import method_for

import fastprompt
from fastprompt.concatenation import concatenate

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DRAWS = 5  # one input alone can sit at a kink of a ReLU: the median of some is asked


def run(model, prompts, given, name, autocast=None):
    """(The output, all prompts' gradients) of one forward and backward, in float64."""
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = tiny.output(name, model, given)
    torch.manual_seed(3)
    direction = torch.randn(out.shape, dtype=torch.float64)
    (64 * direction * out).sum().backward()  # scaled as float16 wants it
    gradients = torch.cat([p.tokens.grad.double().flatten() for p in prompts.values()])
    for prompt in prompts.values():
        prompt.tokens.grad = None
    return out.detach().double(), gradients


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
    ratios = []
    for seed in range(DRAWS):
        given = zoo.inputs(name, torch.float32, seed)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        wants = run(exact, kept, wide, name)
        gots = run(ours, prompts, given, name, autocast)
        peers = run(theirs, written, given, name, autocast)
        assert all(torch.isfinite(got).all() for got in gots)
        errors = [[relative(x, want) for x, want in zip(xs, wants, strict=True)]
                  for xs in (gots, peers)]  # fmt: skip
        assert errors[0][0] < 0.5, "not near at all"
        least = torch.finfo(autocast).eps / 4
        ratios.append([got / max(peer, least) for got, peer in zip(*errors, strict=True)])
    for what, found in zip(("output", "gradients"), zip(*ratios, strict=True), strict=True):
        assert median(found) < 2, (what, found)
