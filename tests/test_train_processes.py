"""Two processes train as one on the same rows; one that is killed ends both, and both resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversations import processor
from runs import config_of, train
from safetensors.torch import load_file

from fastprompt.train import prepare_model
from fastprompt.train.distributed import sees, sent_bytes, zero_of_a_blank_image
from fastprompt.train.progress import read_metrics

ROOT = Path(__file__).parent.parent
KILLED = """
import os, signal, sys
from rich.console import Console
from fastprompt.train import TrainConfig, train
from fastprompt.train.distributed import rank
from runs import At

die = At(int(sys.argv[2]), lambda: rank() == 1 and os.kill(os.getpid(), signal.SIGKILL))
train(TrainConfig.load(sys.argv[1]), resume=True, console=Console(quiet=True), callbacks=[die])
"""


def two(*command):
    """Runs a Python command in two processes."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*run, *command], env=env, capture_output=True, text=True, timeout=240)


def losses(folder):
    return [e["loss"] for e in read_metrics(folder / "metrics.jsonl") if "loss" in e]


@pytest.fixture(scope="module")
def as_one(shared, tmp_path_factory):
    """One process that takes two batches of one row a step; rows 5, 11, … have no image."""
    folder = tmp_path_factory.mktemp("one")
    config = config_of(
        shared, folder / "run", batch_size=1, accumulate=2, max_steps=12, bucket=False, save_every=4
    )
    torch.set_num_threads(1)
    assert len(train(config).losses) == 12
    return folder / "run"


def options(shared, out, *more):
    config = config_of(
        shared, out, batch_size=1, accumulate=1, max_steps=12, bucket=False, save_every=4
    )
    (out.parent / "c.yaml").write_text(config.as_yaml())
    return str(out.parent / "c.yaml")


def test_two_processes_are_one(shared, as_one, tmp_path):
    out = tmp_path / "run"
    done = two("-m", "fastprompt", "train", "--config", options(shared, out))
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(as_one), rel=1e-6)
    got, want = (load_file(f / "prompts" / "prompts.safetensors") for f in (out, as_one))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-6)
    assert "2 processes; each sends" in done.stdout
    assert done.stdout.count("wrote ") == 1  # the first alone speaks


def test_accelerates_launcher(shared, as_one, tmp_path):
    """As for two cards: with --cpu it starts one process only."""
    out = tmp_path / "run"
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    env["HF_HOME"] = str(tmp_path)  # not this machine's configuration of accelerate
    given = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 "
    given += "--mixed_precision no --dynamo_backend no --module"
    run = [sys.executable, "-m", "accelerate.commands.launch", *given.split()]
    run += ["fastprompt", "train", "--config", options(shared, out)]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(out) == pytest.approx(losses(as_one), rel=1e-6)


def test_a_killed_process_ends_the_job_which_resumes(shared, as_one, tmp_path):
    out = tmp_path / "run"
    path = options(shared, out)
    (tmp_path / "killed.py").write_text(KILLED)
    done = two(str(tmp_path / "killed.py"), path, "6")
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    assert (out / "checkpoint-4").is_dir() and not (out / "prompts").exists()
    done = two("-m", "fastprompt", "train", "--config", path, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming from checkpoint-4" in done.stdout
    assert losses(out) == pytest.approx(losses(as_one), rel=1e-6)


@pytest.mark.parametrize("method", ["m2pt", "vpt", "projector", "text"])
def test_texts_alone_reach_all_that_trains(shared, tmp_path, method):
    patch = prepare_model(config_of(shared, tmp_path, method=method))
    assert sees(patch) == (method != "text")
    ids = torch.randint(20, 200, (2, 7))
    loss = patch.model(input_ids=ids, labels=ids).loss
    if sees(patch):
        zero = zero_of_a_blank_image(patch, processor().image_processor, torch.float32)
        assert zero == 0
        loss = loss + zero
    loss.backward()
    assert all(p.grad is not None for p in patch.trainable.values())


def test_sent_bytes():
    parameters = [torch.nn.Parameter(torch.zeros(3, 5)), torch.nn.Parameter(torch.zeros(1))]
    assert sent_bytes(parameters, 2) == 64 and sent_bytes(parameters, 4) == 96
