"""Two processes by a user's own loop: DDP, accelerate's too; FSDP2, which splits prompts with their
blocks."""

import json

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import two
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import fastprompt
from fastprompt import loading
from fastprompt.methods import M2PT, DeepPrompts

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

STEPS, P = 3, 4
CASES = [(how, weights) for how in ("accelerate", "fsdp") for weights in ("dense", "four_bit")]
CASES += [("ddp", "dense"), ("ddp", "images"), ("fsdp", "images")]
# in each of two processes, on its half of the rows: every case in turn
WORKER = """
import json, sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastprompt
import test_own_loops as own

torch.set_num_threads(1)
folder, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)
mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
for how, weights in own.CASES:
    (model, patch), given = own.patched(folder, weights), own.rows(weights, rank)
    if how == "fsdp":
        for tower in patch.anatomy.towers:
            for block in tower.blocks:
                fully_shard(block.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses = own.train(model, own.adamw(patch), given)
    elif how == "ddp":
        losses = own.train(DistributedDataParallel(model), own.adamw(patch), given)
    else:
        wrapped, optimizer = accelerator.prepare(model, own.adamw(patch))
        losses = own.train(wrapped, optimizer, given, accelerator.backward)
        model = accelerator.unwrap_model(wrapped)
    out, learned = folder / f"{how}-{weights}", patch.trainable.values()
    fastprompt.save(model, out)
    found = dict(losses=losses, kinds=sorted({type(p).__name__ for p in learned}))
    found["held"] = sum(getattr(p, "to_local", lambda: p)().numel() for p in learned)
    for p in learned:
        p.data.zero_()
    dist.barrier()
    fastprompt.load(model, out)
    found["after"] = own.loss(model.train(), given).item()
    (out / f"{rank}.json").write_text(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""


def patched(folder, weights):
    four_bit = dict(quantization_config=loading.four_bit(torch.float32))
    options = four_bit if weights == "four_bit" else {}
    if weights == "images":
        model = AutoModelForImageTextToText.from_pretrained(folder / "seeing")
        method = M2PT(P, P)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
        method = DeepPrompts(text=P)
    torch.manual_seed(1)
    return model, fastprompt.patch(model, method)


def adamw(patch):
    return torch.optim.AdamW(patch.param_groups(prompt_lr=0.1))


def rows(weights, rank=None):
    """Four rows; those of one of two processes."""
    name = "llava" if weights == "images" else "llama"
    given = tiny.inputs(name, batch=4)
    return given if rank is None else {key: value[rank::2] for key, value in given.items()}


def loss(model, given):
    return model(**given, labels=given["input_ids"]).loss


def train(model, optimizer, given, backward=torch.Tensor.backward):
    """Losses of a few steps."""
    losses = []
    model.train()
    for _ in range(STEPS):
        value = loss(model, given)
        backward(value)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(The folder of both processes' results, what they said.)"""
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "model")
    tiny.llava().save_pretrained(folder / "seeing")
    (folder / "worker.py").write_text(WORKER)
    return folder, two(str(folder / "worker.py"), str(folder))


@pytest.mark.parametrize("how, weights", CASES)
def test_two_processes_are_one(job, how, weights):
    folder, done = job
    assert done.returncode == 0, done.stderr[-3000:]
    out = folder / f"{how}-{weights}"
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]

    model, patch = patched(folder, weights)
    want = train(model, adamw(patch), rows(weights))
    got = [sum(each) / 2 for each in zip(*(f["losses"] for f in found), strict=True)]
    assert got == pytest.approx(want, rel=1e-6) and len({*want}) == STEPS
    after = sum(f["after"] for f in found) / 2
    assert after == pytest.approx(loss(model.train(), rows(weights)).item(), rel=1e-6)

    numbers = sum(p.numel() for p in patch.trainable.values())
    splits = how == "fsdp"
    assert [f["held"] for f in found] == [numbers / (1 + splits)] * 2
    assert [f["kinds"] for f in found] == [["DTensor" if splits else "Parameter"]] * 2

    fresh, _ = patched(folder, weights)
    fastprompt.load(fresh, out)
    for name, p in fastprompt.patch_of(fresh).trainable.items():
        torch.testing.assert_close(p, patch.trainable[name], rtol=1e-4, atol=1e-6)


def test_what_all_processes_hold_in_the_root(tmp_path):
    """After a forward FSDP2 leaves it whole: what is written there would be lost."""
    model, given = tiny.build("llava"), tiny.inputs("llava")
    patch = fastprompt.patch(model, M2PT(2, 3))
    fastprompt.save(model, tmp_path / "first")
    dist.init_process_group("gloo", f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for tower in patch.anatomy.towers:
            for block in tower.blocks:
                fully_shard(block.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match="want it before fully_shard"):
            fastprompt.patch(fully_shard(tiny.build("llama"), mesh=mesh))

        def loss():
            return model.train()(**given, labels=given["input_ids"]).loss

        want = loss().item()
        with torch.no_grad():
            for p in patch.trainable.values():
                p.add_(torch.ones_like(p))
            model.eval()(**given)
        fastprompt.load(model, tmp_path / "first")
        loss().backward()
        assert loss().item() == pytest.approx(want, rel=1e-6)
        with torch.no_grad():
            model.eval()(**given)
        model.save_pretrained(tmp_path / "second", is_main_process=False)  # all are asked
        with pytest.raises(ValueError, match="undo: want whole weights, got split ones"):
            patch.undo()
    finally:
        dist.destroy_process_group()
    first, second = (load_file(f) for f in sorted(tmp_path.rglob("*.safetensors")))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
