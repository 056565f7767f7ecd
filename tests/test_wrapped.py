"""A patched model inside what people wrap models in."""

import pytest
import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastprompt


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(model, wrapped, given):
    """The loss, and every gradient of what trains; none is left."""
    loss = wrapped(**given).logits.square().mean()
    loss.backward()
    trainable = fastprompt.patch_of(model).trainable
    gradients = {name: p.grad.clone() for name, p in trainable.items()}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("name", ["llava", "llama", "vit"])
def test_ddp_finds_every_parameter_used(name, one_process):
    model, given = tiny.build(name).train(), tiny.inputs(name)
    fastprompt.patch(model)
    want = step(model, model, given)
    # without find_unused_parameters: a prompt that no loss reads would fail the second step
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        loss, gradients = step(model, wrapped, given)
        torch.testing.assert_close(loss, want[0])
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, want[1][key])


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_torch_compile_of_a_patched_model(name):
    model, given = tiny.build(name).train(), tiny.inputs(name)
    fastprompt.patch(model)
    want = step(model, model, given)
    torch._dynamo.reset()
    loss, gradients = step(model, torch.compile(model, backend="aot_eager"), given)
    torch.testing.assert_close(loss, want[0])
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, want[1][key])
