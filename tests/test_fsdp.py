"""FSDP2 by a user's own loop: prompts split with their blocks, trained, saved and loaded."""

import json

import pytest
import tiny
import torch
from processes import two
from transformers import AutoModelForCausalLM

import fastprompt
from fastprompt import loading
from fastprompt.methods import DeepPrompts

STEPS, P = 3, 4
# in each of two processes, on its half of the rows
WORKER = """
import json, sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastprompt
import test_fsdp as own

torch.set_num_threads(1)
dist.init_process_group("gloo")
folder, four_bit = Path(sys.argv[1]), sys.argv[2] == "four_bit"
mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
model, patch = own.patched(folder, four_bit)
for block in patch.anatomy.towers[0].blocks:
    fully_shard(block.layer, mesh=mesh)
fully_shard(model, mesh=mesh)
losses = own.train(model, patch, rank)
fastprompt.save(model, folder / "prompts")
found = dict(losses=losses, kinds=sorted({type(p).__name__ for p in model.parameters()}))
found["held"] = sum(p.to_local().numel() for p in patch.trainable.values())
for p in patch.trainable.values():
    p.data.zero_()
fastprompt.load(model, folder / "prompts")
found["after"] = own.loss(model.train(), own.rows()[rank::2]).item()
(folder / f"{rank}.json").write_text(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""


def patched(folder, four_bit):
    options = dict(quantization_config=loading.four_bit(torch.float32)) if four_bit else {}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
    torch.manual_seed(1)
    return model, fastprompt.patch(model, DeepPrompts(text=P))


def rows():
    return torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(2))


def loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


def train(model, patch, rank=None):
    """Losses of a few steps; of one of two processes on its half of the rows."""
    optimizer = torch.optim.AdamW(patch.param_groups(prompt_lr=0.1))
    losses, ids = [], rows() if rank is None else rows()[rank::2]
    model.train()
    for _ in range(STEPS):
        value = loss(model, ids)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("weights", ["dense", "four_bit"])
def test_two_processes_are_one(tmp_path, weights):
    if weights == "four_bit":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    (tmp_path / "worker.py").write_text(WORKER)
    job = two(str(tmp_path / "worker.py"), str(tmp_path), weights)
    assert job.returncode == 0, job.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]

    model, patch = patched(tmp_path, weights == "four_bit")
    want = train(model, patch)
    got = [sum(each) / 2 for each in zip(*(f["losses"] for f in found), strict=True)]
    assert got == pytest.approx(want, rel=1e-6) and len({*want}) == STEPS
    assert sum(f["after"] for f in found) / 2 == pytest.approx(
        loss(model.train(), rows()).item(), rel=1e-6
    )
    numbers = sum(p.numel() for p in patch.trainable.values())
    assert [f["held"] for f in found] == [numbers / 2] * 2 and found[0]["kinds"] == ["DTensor"]

    fresh, _ = patched(tmp_path, weights == "four_bit")
    fastprompt.load(fresh, tmp_path / "prompts")
    for name, p in fastprompt.patch_of(fresh).trainable.items():
        torch.testing.assert_close(p, patch.trainable[name], rtol=1e-4, atol=1e-6)
