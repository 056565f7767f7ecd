"""A patched model inside what people wrap models in."""

import pytest
import tiny
import torch
import torch.distributed as dist
from encoders import build, images
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


def test_ddp_trains_the_prompt_set_in_use(one_process):
    model, given = tiny.build("llama").train(), tiny.inputs("llama")
    patch = fastprompt.patch(model)
    patch.add("other", text=3)
    patch.use("other")
    want = step(model, model, given)
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        loss, gradients = step(model, wrapped, given)
        torch.testing.assert_close(loss, want[0])
        assert all(gradients[key].any() for key in patch.trainable)
    assert all(p.tokens.grad is None for p in patch.sets["default"].prompts.values())


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


# ---- Instruction-ViT ----

LABELS = torch.tensor([0, 6, 3, 3])


def instructed(model, wrapped):
    """The loss, and every gradient of what trains; none is left."""
    loss = wrapped(images(), LABELS).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("options", [dict(), dict(train_k=3), dict(features="encoder")], ids=str)
def test_ddp_around_instruction_vit(options, one_process):
    model = build(kind="mixed", **options).train()
    want = instructed(model, model)
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        torch.testing.assert_close(instructed(model, wrapped), want)


def test_ddp_with_several_tasks_and_one_a_batch(one_process):
    model = build().train()
    model.set_classes(["red", "blue"], task="colours")
    batches, want = (("default", LABELS), ("colours", LABELS % 2)), {}
    for task, labels in batches:
        model(images(), labels, task=task).loss.backward()
        want[task] = model.tasks[task].rows.grad.clone()
        model.zero_grad()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for task, labels in batches * 2:
        wrapped(images(), labels, task=task).loss.backward()
        torch.testing.assert_close(model.tasks[task].rows.grad, want[task])
        model.zero_grad()


@pytest.mark.parametrize("options", [dict(), dict(train_k=3), dict(top_k=3)], ids=str)
def test_torch_compile_of_instruction_vit(options):
    model = build(kind="mixed", **options).train()
    want = instructed(model, model)
    torch._dynamo.reset()
    torch.testing.assert_close(instructed(model, torch.compile(model, backend="aot_eager")), want)
    model.eval()
    with torch.no_grad():
        logits = model(images()).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(images()).logits, logits)
