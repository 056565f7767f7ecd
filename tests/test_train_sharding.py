"""Blocks split over two processes train as one does; a process that is killed ends both, and both
resume. What is sent and held is counted."""

import json
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from processes import two
from runs import config_of, train
from safetensors.torch import load_file
from tiny import llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastprompt
from fastprompt.train import TrainingError, prepare_model, sharding
from fastprompt.train.distributed import sent_bytes
from fastprompt.train.progress import read_metrics

STEPS, SAVED, KILLED = 4, 2, 3
CASES = {
    "dense": {},
    "four_bit": dict(four_bit=True, memory="low"),
    "projector": dict(method="projector"),
    "text": dict(method="text", four_bit=True, accumulate=2),
}
if find_spec("peft"):
    CASES["lora"] = dict(method="lora", four_bit=True)
# in each process: every case in turn, what was counted of it as JSON; then a run that is killed
WORKER = """
import json, os, signal, sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import fastprompt
from fastprompt.train import TrainConfig, sharding, trainer
from fastprompt.train.distributed import rank
from runs import At, train

torch.set_num_threads(1)
sent = dict(gathered=0, reduced=0)


class Count(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        sent.update(gathered=0, reduced=0)

    def on_step_end(self, *args, **kwargs):
        found["steps"].append(dict(sent))


class DDP(sharding.DistributedDataParallel):
    def __init__(self, model):
        super().__init__(model)
        self.register_comm_hook(None, self.count)

    @staticmethod
    def count(state, bucket):
        sent["reduced"] += bucket.buffer().nbytes
        return allreduce_hook(dist.group.WORLD, bucket)


def gather(output, part, **more):
    sent["gathered"] += output.nbytes - part.nbytes
    return own_gather(output, part, **more)


def shard(patch, *more):
    before = list(patch.model.parameters())
    found["described"] = sharding.describe(patch, config)
    wrapped = own_shard(patch, *more)
    after = {id(p) for p in patch.model.parameters()}
    found["left"] = sum(p.untyped_storage().nbytes() for p in before if id(p) not in after)
    return wrapped


own_gather, own_shard = dist.all_gather_single, trainer.shard
dist.all_gather_single, trainer.shard, sharding.DistributedDataParallel = gather, shard, DDP
folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.yaml")):
    found, config, callbacks = {"steps": []}, TrainConfig.load(path), [Count()]
    if path.stem == "z_killed":
        kill = lambda: rank() == 1 and os.kill(os.getpid(), signal.SIGKILL)
        callbacks.append(At(int(sys.argv[2]), kill))
    model = train(config, callbacks=callbacks).model
    parts = [p for p in model.parameters() if isinstance(p, DTensor)]
    found["split"] = sum(p.numel() * p.element_size() for p in parts)
    found["own"] = sum(p.to_local().nbytes for p in parts)
    prompts = fastprompt.patch_of(model).prompts.values()
    found["cached"] = sum(p._cached is not None for p in prompts)
    (folder / f"{path.stem}-{rank()}.json").write_text(json.dumps(found))
"""


def options(shared, out, case, processes=2, **more):
    """Rows 5, 11, … have no image: also the sixth of those held out."""
    own = dict(
        batch_size=1, accumulate=1, max_steps=STEPS, bucket=False, save_every=SAVED,
        eval_data=[str(shared / "held.jsonl")],
    )  # fmt: skip
    own |= CASES[case] | more
    own["accumulate"] *= 2 // processes
    return config_of(shared, out, **own)


@pytest.fixture(scope="module")
def job(shared, tmp_path_factory):
    """(The folder of the two processes' runs, what they said.)"""
    folder = tmp_path_factory.mktemp("two")
    for name in CASES:
        config = options(shared, folder / name, name, shard=True)
        (folder / f"{name}.yaml").write_text(config.as_yaml())
    config = options(shared, folder / "killed", "dense", shard=True)
    (folder / "z_killed.yaml").write_text(config.as_yaml())
    (folder / "worker.py").write_text(WORKER)
    return folder, two(str(folder / "worker.py"), str(folder), str(KILLED))


@pytest.fixture(scope="module")
def alone(shared, tmp_path_factory):
    """Case -> its run by one process that takes twice as many batches of one row a step."""
    folder, done = tmp_path_factory.mktemp("one"), {}
    torch.set_num_threads(1)

    def of(case):
        if case not in done:
            done[case] = train(options(shared, folder / case, case, processes=1))
        return done[case]

    return of


def losses(folder, key="loss"):
    return [e[key] for e in read_metrics(folder / "metrics.jsonl") if key in e]


def counted(job, case):
    folder, done = job
    files = [folder / f"{case}-{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(job, alone, case):
    folder, _ = job
    counted(job, case)
    want = alone(case).folder
    assert losses(folder / case) == pytest.approx(losses(want), rel=1e-6)
    held = losses(want, "eval_loss")
    assert losses(folder / case, "eval_loss") == pytest.approx(held, rel=1e-6) and len(held) == 2
    got, want = (load_file(f / "prompts" / "prompts.safetensors") for f in (folder / case, want))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-6)


def test_files_are_as_without_shards(shared, job, alone, tmp_path):
    folder, _ = job
    counted(job, "four_bit")
    results = [f / "result.json" for f in (folder / "four_bit", alone("four_bit").folder)]
    ours, theirs = (json.loads(path.read_text()) for path in results)
    assert all(ours[key] == theirs[key] for key in ("trainable", "parameters", "steps"))
    patch = prepare_model(options(shared, tmp_path, "four_bit"))
    fastprompt.load(patch.model, folder / "four_bit" / "prompts")  # as fastprompt eval does
    for name, p in fastprompt.patch_of(alone("four_bit").model).trainable.items():
        torch.testing.assert_close(patch.trainable[name], p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_what_is_held_and_sent(shared, job, tmp_path, case):
    patch = prepare_model(options(shared, tmp_path, case))
    trained = sum(p.numel() * p.element_size() for p in patch.trainable.values())
    frozen = sum(
        p.numel() * p.element_size()
        for tower in patch.anatomy.towers for block in tower.blocks
        for p in block.layer.parameters() if p.ndim > 1 and not p.requires_grad
    )  # fmt: skip
    for found in counted(job, case):
        assert found["split"] == frozen and found["own"] == frozen / 2
        assert found["left"] == 0  # of the weights as they were
        batches = CASES[case].get("accumulate", 1)
        sent = dict(reduced=trained, gathered=batches * sharding.gathered_bytes(patch, 2))
        # after an evaluation FSDP2 fetches one block too many, once
        assert found["steps"][:SAVED] == SAVED * [sent]
        assert sent_bytes(list(patch.trainable.values()), 2) == trained
        said = f"1/2 of {found['split']:,} bytes of frozen blocks, and sends {sent['gathered']:,} a"
        assert said in found["described"]
        assert found["cached"] == 0


def test_shards_of_one_size(shared, tmp_path):
    """Of 3 processes: 32 rows in shards of 11, 48 of 16, 16 of 6. All blocks go twice."""
    patch = prepare_model(options(shared, tmp_path, "dense"))
    vision = (4 * 11 + 16) * 32 + 11 * 48
    text = (2 * 11 + 2 * 6 + 2 * 16) * 32 + 11 * 48
    assert sharding.gathered_bytes(patch, 3) == 2 * 4 * 2 * (2 * vision + 3 * text)


def test_there_is_no_way_back_from_shards(shared, tmp_path):
    patch = prepare_model(options(shared, tmp_path, "dense"))
    dist.init_process_group("gloo", f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        sharding.shard(patch, None, torch.float32)
        trained = list(patch.trainable)
        with pytest.raises(ValueError, match="undo: want whole weights, got split ones"):
            patch.undo()
    finally:
        dist.destroy_process_group()
    assert not patch.undone and list(patch.trainable) == trained


def test_a_killed_process_ends_the_job_which_resumes(job, alone):
    folder, done = job
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    out = folder / "killed"
    assert (out / f"checkpoint-{SAVED}").is_dir() and not (out / "prompts").exists()
    path = str(folder / "z_killed.yaml")
    done = two("-m", "fastprompt", "train", "--config", path, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"resuming from checkpoint-{SAVED}" in done.stdout
    assert "each holds 1/2 of" in done.stdout and "FSDP2-wrapped" not in done.stderr
    assert losses(out) == pytest.approx(losses(alone("dense").folder), rel=1e-6)


@pytest.mark.parametrize("more, count, said", [
    (dict(shard=True), 1, "two processes or more"),
    (dict(shard=True, method="full"), 2, "leaves the blocks frozen, got full"),
])  # fmt: skip
def test_what_is_refused(shared, tmp_path, monkeypatch, more, count, said):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    with pytest.raises(TrainingError, match=said):
        prepare_model(config_of(shared, tmp_path, **more))


def test_accelerates_own_fsdp_is_refused(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match=r"--use_fsdp.*--shard"):
        prepare_model(config_of(shared, tmp_path))


def test_prompts_that_are_sharded_themselves_are_not_cached(tmp_path):
    """By a user's own fully_shard: what it gathers into keeps its version."""
    model = llama().eval()
    patch = fastprompt.patch(model)
    ids = torch.randint(3, 60, (1, 5))
    dist.init_process_group("gloo", f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in patch.anatomy.towers[0].blocks:
            fully_shard(block.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with torch.no_grad():
            before = model(input_ids=ids).logits
            for p in patch.trainable.values():
                p.to_local().add_(1.0)
            after = model(input_ids=ids).logits
        assert all(prompt._cached is None for prompt in patch.prompts.values())
    finally:
        dist.destroy_process_group()
    assert not torch.allclose(before, after)
