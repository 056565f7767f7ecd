"""Whether ``patch.undo()`` gives the old model back, bit for bit and hook for hook."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastprompt


def check_undo(model: nn.Module, output: Callable[[], Tensor]) -> None:
    """Patch the model, train it a little, undo. ``output`` runs it; equal twice in a row."""
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    configs = {n: m.config for n, m in model.named_modules() if hasattr(m, "config")}
    with torch.no_grad():
        before = output()
        assert torch.equal(before, output())
    # after a first forward: transformers itself leaves a mark then
    names = {n: set(vars(m)) for n, m in model.named_modules()}
    hooks = {n: len(m._forward_hooks) for n, m in model.named_modules()}

    patch = fastprompt.patch(model)
    optimizer = torch.optim.AdamW(patch.trainable.values(), lr=0.05)
    for _ in range(2):
        output().square().mean().backward()
        assert all(p.grad is not None for p in patch.trainable.values())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert not torch.equal(output(), before)
    patch.undo()

    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert all(m.config is configs[n] for n, m in model.named_modules() if hasattr(m, "config"))
    assert names == {n: set(vars(m)) for n, m in model.named_modules()}
    assert hooks == {n: len(m._forward_hooks) for n, m in model.named_modules()}
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(output(), before)
