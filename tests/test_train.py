"""Whole runs on a tiny LLaVA: killed and resumed, run again, on a full disk; the best kept."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import QUIET, At, config_of, same, train, trained
from safetensors.torch import load_file
from transformers import TrainerCallback

import fastprompt
from fastprompt.__main__ import main
from fastprompt.train import (
    TrainConfig,
    TrainingError,
    make_trainer,
    prepare_data,
    prepare_model,
    rerun,
)
from fastprompt.train.progress import KeepBest, read_metrics
from fastprompt.train.run_folder import last_checkpoint

ROOT = Path(__file__).parent.parent

KILLED = """
import os, signal, sys
import fastprompt.train.trainer as trainer
from rich.console import Console
from fastprompt.train import TrainConfig, train
from runs import At

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

path, where = sys.argv[1:]
callbacks = []
if where.isdecimal():
    callbacks = [At(int(where), die)]
else:  # while the checkpoint of step 12 is written: all of it is there, but its name
    whole = trainer.publish
    trainer.publish = lambda staged, final: die() if "-12" in final.name else whole(staged, final)
train(TrainConfig.load(path), resume=True, console=Console(quiet=True), callbacks=callbacks)
"""


def killed(config, tmp_path, where):
    """Runs ``config`` in a process of its own, which is killed there."""
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    run = [sys.executable, "-c", KILLED, str(tmp_path / "c.yaml"), where]
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_twice_and_resumed_is_never_interrupted(shared, tmp_path):
    held = [str(shared / "held.jsonl")]
    config = config_of(shared, tmp_path / "a", eval_data=held, accumulate=2, epochs=4)
    want = train(config)
    assert len(want.losses) == 16 and sorted(want.evaluations) == [4, 8, 12, 16]

    config = replace(config, out=str(tmp_path / "b"))
    killed(config, tmp_path, "7")
    folder = tmp_path / "b"
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert [e["step"] for e in read_metrics(folder / "metrics.jsonl") if "loss" in e][-1] == 6
    killed(config, tmp_path, "saving")
    assert sorted(p.name for p in folder.glob("*checkpoint-*")) == [
        ".checkpoint-12.partial", "checkpoint-4", "checkpoint-8",
    ]  # fmt: skip
    result = train(config, resume=True)
    assert result.losses == want.losses and result.evaluations == want.evaluations
    assert same(trained(result), trained(want))
    for name in ("prompts", "best"):
        assert same(*(load_file(tmp_path / run / name / "prompts.safetensors") for run in "ab"))
    assert sorted(p.name for p in folder.glob("*checkpoint-*")) == [
        "checkpoint-12", "checkpoint-16",
    ]  # fmt: skip


VARIANTS = {
    "end of an epoch": dict(batch_size=5, save_every=6),
    "packed": dict(pack=True, max_length=160, batch_size=1),
    "no buckets": dict(bucket=False, order_seed=9),
    "workers": dict(workers=2),
    "bfloat16": dict(dtype="bfloat16"),
    "projector": dict(method="projector"),
    "four bits": dict(four_bit=True),
    "dropout": {},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_interrupted_and_resumed(name, shared, tmp_path):
    config = config_of(shared, tmp_path / "a", **VARIANTS[name])
    if name == "dropout":  # each step draws numbers
        folder = shutil.copytree(shared / "model", tmp_path / "model")
        of_model = json.loads((folder / "config.json").read_text())
        of_model["text_config"]["attention_dropout"] = 0.3
        (folder / "config.json").write_text(json.dumps(of_model))
        config = replace(config, model=str(folder))
    want = train(config)
    config = replace(config, out=str(tmp_path / "b"))
    kill = At(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    result = train(config, callbacks=[kill])
    assert result.interrupted and max(result.losses) == 6
    assert (tmp_path / "b" / "checkpoint-6").is_dir() and not (tmp_path / "b" / "prompts").exists()
    result = train(config, resume=True)
    assert not result.interrupted and result.losses == want.losses
    assert same(trained(result), trained(want))


class Spoil(TrainerCallback):
    """The third step computes with infinities."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def hook(module, given):
            return (given[0] * torch.inf,) if self.state.global_step == 2 else None

        self.state = state
        model.model.language_model.norm.register_forward_pre_hook(hook)


def test_what_ended_a_run_may_be_skipped_when_it_goes_on(shared, tmp_path, capsys):
    """As the error says; what was left out before an interruption is still told at the end."""
    config = config_of(shared, tmp_path / "a", max_steps=6, save_every=2, on_nan="skip")
    want = train(config, callbacks=[Spoil()])
    assert [step for step, loss in want.losses.items() if loss is None] == [3]

    config = replace(config, out=str(tmp_path / "b"), on_nan="fatal", save_every=1)
    with pytest.raises(TrainingError, match="--on-nan skip leaves such steps out"):
        train(config, callbacks=[Spoil()])
    config = replace(config, on_nan="skip", save_every=2, keep=4, workers=1)
    kill = At(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(config, resume=True, callbacks=[Spoil(), kill])
    result = train(config, resume=True)
    there = sorted(p.name for p in (tmp_path / "b").glob("checkpoint-*"))
    assert there == [f"checkpoint-{n}" for n in (2, 4, 5, 6)]  # every 2, and where it ended
    assert result.losses == want.losses and same(trained(result), trained(want))
    assert result.skipped == want.skipped and "step 3: the loss is nan" in result.skipped[0]
    assert TrainConfig.load(tmp_path / "b" / "config.yaml") == config


def test_data_is_looked_at_before_a_model_is_loaded(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("fastprompt.train.preparing.prepare_model", None)
    config = config_of(shared, tmp_path / "a", data=[str(tmp_path / "none.json")])
    with pytest.raises(ValueError, match=r"none\.json"):
        train(config)
    with pytest.raises(TrainingError, match="want 1000 rows held out"):
        train(replace(config_of(shared, tmp_path / "a"), hold_out=1000))


def test_a_signal_at_the_last_step_leaves_nothing_to_do(shared, tmp_path):
    config = config_of(shared, tmp_path / "a", max_steps=3)
    kill = At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    result = train(config, callbacks=[kill])
    assert not result.interrupted and (tmp_path / "a" / "prompts").exists()


def test_resuming_wants_the_same_run(shared, tmp_path, capsys):
    config = config_of(shared, tmp_path / "a", max_steps=4)
    data = tmp_path / "d.jsonl"
    data.write_text((shared / "data.jsonl").read_text())
    config = replace(config, data=(str(data),), image_folder=str(shared))
    want = train(config, resume=True)  # nothing is there yet: from the beginning
    with pytest.raises(TrainingError, match="holds a run: go on with --resume"):
        train(config)
    with pytest.raises(TrainingError, match=r"learning_rate: 0.01, now 0.5"):
        train(replace(config, learning_rate=0.5), resume=True)
    # from the command line the options are the run's own
    assert main(["train", "--out", config.out, "--resume"]) == 0
    assert "resuming from checkpoint-4" in capsys.readouterr().out
    # it had taken all its steps, and takes no other
    again = train(config, resume=True)
    assert sorted(again.losses) == [1, 2, 3, 4] and not again.interrupted
    assert same(trained(again), trained(want))
    assert main(["train", "--out", config.out, "--resume", "--seed", "6"]) == 1
    assert "seed: 5, now 6" in capsys.readouterr().out
    data.write_text(data.read_text().replace("red", "blue"))
    with pytest.raises(TrainingError, match="the data is no longer what it was"):
        train(config, resume=True)


def test_rerun(shared, tmp_path, capsys):
    config = config_of(shared, tmp_path / "a", hold_out=6, subset=0.5, init_seed=1, max_steps=5)
    want = train(config)
    assert main(["rerun", str(tmp_path / "a")]) == 0
    assert "losses of 5 steps: the same" in capsys.readouterr().out
    run = json.loads((tmp_path / "a-rerun" / "run.json").read_text())
    assert run["command"] and run["commit"] and run["cwd"] == os.getcwd()
    assert run["again"] == str(tmp_path / "a") and run["machine"]["cpu"]
    assert run["seeds"] == dict(init=1, order=5, subset=5) and run["versions"]["torch"]
    assert run["data"] == json.loads((tmp_path / "a" / "run.json").read_text())["data"]

    # each seed matters, apart from the others
    for name in ("init_seed", "order_seed", "subset_seed"):
        other = train(replace(config, out=str(tmp_path / name), **{name: 7}))
        assert other.losses != want.losses
    # a loss that is not the same is named
    path = tmp_path / "a" / "metrics.jsonl"
    entries = read_metrics(path)
    entries[2]["loss"] += 1e-6
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    _, differences = rerun(tmp_path / "a", tmp_path / "c", QUIET)
    assert [d[:15] for d in differences] == ["loss of step 3:"]
    with pytest.raises(TrainingError, match=r"want a run's folder, with run\.json in it"):
        rerun(tmp_path, console=QUIET)
    # nothing is said of steps that were never compared
    path.write_text("".join(json.dumps(e) + "\n" for e in entries[:2]))
    capsys.readouterr()
    assert main(["rerun", str(tmp_path / "a"), "--out", str(tmp_path / "d")]) == 1
    said = capsys.readouterr().out
    assert "losses there are of 2 of 5 steps" in said and "5 steps: not the same" in said


def no_space(state, path):
    Path(path).write_bytes(b"half of i")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "fail, words",
    [
        (no_space, "No space left"),
        (lambda state, path: torch.serialization.save(state, "/dev/full"), "inline_container"),
    ],
    ids=["OSError", "torch's own"],
)
def test_a_full_disk_leaves_the_last_checkpoint(fail, words, shared, tmp_path, monkeypatch):
    config = config_of(shared, tmp_path / "a", max_steps=12)
    want = train(config)

    def full(state, path):
        return fail(state, path) if "checkpoint-8" in str(path) else save(state, path)

    save = torch.save
    monkeypatch.setattr(torch, "save", full)
    config = replace(config, out=str(tmp_path / "b"))
    message = rf"step 8: its checkpoint could not be written: .*{words}[\s\S]*checkpoint-4"
    with pytest.raises(TrainingError, match=message):
        train(config)
    left = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert left == ["checkpoint-4", "config.yaml", "metrics.jsonl", "run.json"]
    monkeypatch.undo()
    result = train(config, resume=True)
    assert result.losses == want.losses and same(trained(result), trained(want))


def test_what_else_goes_wrong_while_saving_is_no_full_disk(shared, tmp_path, monkeypatch):
    def fail(state, path):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        train(config_of(shared, tmp_path / "a", max_steps=4))


def test_a_loss_that_is_not_finite_is_never_the_best(shared, tmp_path):
    model = prepare_model(config_of(shared, tmp_path)).model
    keep, state = (
        KeepBest(tmp_path, "loss"),
        SimpleNamespace(global_step=1, is_world_process_zero=True),
    )
    for value, best in ((math.nan, None), (2.0, 2.0), (math.nan, 2.0), (1.0, 1.0)):
        keep.on_evaluate(None, state, None, model=model, metrics={"eval_loss": value})
        assert keep.read() == best


def test_the_best_by_a_held_out_metric_is_kept(shared, tmp_path):
    found = {}
    for metric in ("loss", "accuracy"):
        config = config_of(
            shared, tmp_path / metric, eval_data=[str(shared / "held.jsonl")], eval_every=2,
            epochs=4, learning_rate=1e-1, best_metric=metric, keep=1, save_every=5,
        )  # fmt: skip
        result = train(config)
        values = {step: e[metric] for step, e in result.evaluations.items()}
        pick = min if metric == "loss" else max
        best = pick(values, key=lambda step: (values[step], step if metric == "loss" else -step))
        said = json.loads((tmp_path / metric / "best" / "metric.json").read_text())
        assert said == dict(metric=metric, value=values[best], step=best)
        checkpoints = {p.name for p in (tmp_path / metric).glob("checkpoint-*")}
        assert checkpoints == {"checkpoint-32"}
        found[metric] = best
    assert found["loss"] not in (2, 32)  # it is neither the first nor the last
    # and is what gave that metric
    config = replace(config, out=str(tmp_path / "c"), best_metric="loss")
    data = prepare_data(config, QUIET)
    patch = prepare_model(config)
    fastprompt.load(patch.model, tmp_path / "loss" / "best")
    metrics = make_trainer(config, data, patch).evaluate()
    said = json.loads((tmp_path / "loss" / "best" / "metric.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(said["value"], rel=1e-6)


def test_a_killed_write_of_metrics_is_passed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_the_newest_checkpoint_is_by_number(tmp_path):
    for name in ("checkpoint-4", "checkpoint-12", "checkpoint-8", "checkpoint-x", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / ".checkpoint-16.partial" / "checkpoint-16").mkdir(parents=True)
    assert last_checkpoint(tmp_path).name == "checkpoint-12"
    assert not (tmp_path / ".checkpoint-16.partial").exists()
    assert last_checkpoint(tmp_path / "best") is None
