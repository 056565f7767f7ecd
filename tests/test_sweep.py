"""Sweeps of a tiny LLaVA: killed and gone on with, a run that fails, Ctrl-C, plans."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import benchmark_files
import conversations
import pytest
import torch
import yaml
from runs import config_of, train

from fastprompt.__main__ import main
from fastprompt.sweep import Plan, read_plan, run_plan, running
from fastprompt.sweep.running import state
from fastprompt.train import TrainingError
from fastprompt.train.progress import read_metrics

ROOT = Path(__file__).parent.parent
TINY = dict(
    batch_size=4, max_steps=3, learning_rate=1e-2, dtype="float32", vision_tokens=3, text_tokens=2,
    save_every=1, hold_out=6, keep=4, workers=0,
)  # fmt: skip


def write(path, **plan):
    path.write_text(yaml.safe_dump(plan))
    return str(path)


def options(shared, out):
    data = str(shared / "data.jsonl")
    return ["--model", str(shared / "model"), "--data", data, "--out", str(out)]


@pytest.fixture
def inline(monkeypatch):
    """Runs in this process; the list of what was called."""
    called = []

    def call(self, command, log, environment):
        called.append((command[0], environment.get("CUDA_VISIBLE_DEVICES")))
        return main(command)

    monkeypatch.setattr(running._Processes, "_call", call)
    return called


# ---- whole sweeps ----


def test_killed_and_gone_on_with(shared, tmp_path, monkeypatch, capsys):
    """The sweep, then its run are killed after a checkpoint; the same command does the rest."""
    model = conversations.save_llava(tmp_path / "model", chat_template=conversations.LLAVA)
    benchmark_files.vsr(tmp_path / "benchmarks")
    out, base = tmp_path / "out", TINY | dict(max_steps=20, eval_every=1000)
    plan = write(tmp_path / "p.yaml", base=base, runs=dict(m2pt={}), eval=dict(tasks=["vsr"]))
    command = ["sweep", plan, "--model", str(model), "--data", str(shared / "data.jsonl")]
    command += ["--out", str(out), "--benchmarks", str(tmp_path / "benchmarks")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    process = subprocess.Popen([sys.executable, "-m", "fastprompt", *command])
    folder = out / "m2pt" / "seed-0"
    while not list(folder.glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.02)
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")  # one of its threads began it
    (child,) = [int(pid) for task in tasks for pid in task.read_text().split()]
    process.kill()
    process.wait()
    # a run outlives its sweep, and meanwhile nobody else may write there
    log = folder.with_name("seed-0.log")
    with open(log) as held, pytest.raises(BlockingIOError):
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(child, signal.SIGKILL)
    with open(log) as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # once it is gone
    assert not (folder / "result.json").exists()
    assert main(command) == 0
    assert "| m2pt | 1 |" in capsys.readouterr().out
    assert "resuming from checkpoint-" in log.read_text()
    scores = json.loads((out / "results.json").read_text())["runs"][0]["scores"]
    assert scores.keys() == {"loss", "accuracy", "vsr"}
    options = base | dict(model=str(model), seed=0)
    want = train(config_of(shared, tmp_path / "whole", **options))
    got = read_metrics(folder / "metrics.jsonl")
    assert {e["step"]: e["loss"] for e in got if "loss" in e} == want.losses


def test_finished_runs_are_passed_over(shared, tmp_path, inline, capsys):
    runs = dict(m2pt={}, wrong=dict(method="full", dtype="bfloat16"), text=dict(method="text"))
    plan = write(tmp_path / "p.yaml", base=TINY, runs=runs, seeds=[0, 1])
    command = ["sweep", plan, *options(shared, tmp_path / "out")]
    assert main([*command, "--list"]) == 0
    said = capsys.readouterr().out
    assert said.count("to do") == 6 and "tasks after training: none" in said and not inline
    assert main([*command, "--only", "m2pt", "--seeds", "1"]) == 0
    assert len(inline) == 1
    capsys.readouterr()
    assert main(command) == 1  # two fail, the others are made
    said = capsys.readouterr().out
    assert "6 runs, 1 of them finished" in said and len(inline) == 6
    assert "failed: wrong seed 0, wrong seed 1" in said
    assert "| m2pt | 2 |" in said and "| text | 2 |" in said and " ± " in said
    folder = tmp_path / "out"
    assert {p.name for p in folder.iterdir()} == {
        "m2pt", "text", "wrong", "results.json", "results.md", "line.png",
    }  # fmt: skip
    assert (folder / "text" / "seed-1" / "result.json").is_file()
    assert main(command) == 1 and len(inline) == 8
    # other options in the same folder: refused before anything runs
    capsys.readouterr()
    assert main([*command, "--learning-rate", "0.5"]) == 2
    assert "learning_rate: 0.01, now 0.5" in capsys.readouterr().out and len(inline) == 8
    assert main([*command, "--list", "--learning-rate", "0.5"]) == 2


# ---- how runs are run ----


@pytest.fixture
def plan(shared, tmp_path):
    path = write(tmp_path / "p.yaml", base=TINY, runs=dict(a={}, b={}, c={}))
    over = dict(model=str(shared / "model"), data=str(shared / "data.jsonl"))
    return read_plan(path, tmp_path / "out", over=over)


def finish(command):
    """What a training leaves, in short."""
    folder = Path(yaml.safe_load(Path(command[2]).read_text())["out"])
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")


def test_tasks_are_looked_for_before_anything_trains(shared, tmp_path, inline, capsys):
    plan = write(tmp_path / "p.yaml", base=TINY, eval=dict(tasks=["vsr"]))
    command = ["sweep", plan, *options(shared, tmp_path / "out")]
    assert main([*command, "--benchmarks", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().out and not inline
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "not asked, for want of --benchmarks FOLDER: vsr" in said and len(inline) == 1


def test_ctrl_c_stops_each_run_once(plan, monkeypatch):
    sent, said = [], []
    asked = threading.Event()

    class Child:
        def __init__(self, *args, **kwargs):
            assert kwargs["start_new_session"]
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

        def send_signal(self, number):
            sent.append(number)
            asked.set()

        def wait(self):
            assert asked.wait(60)
            return 130

    monkeypatch.setattr(subprocess, "Popen", Child)
    report = run_plan(plan, say=said.append)
    assert report.interrupted and not report.failed and not report.finished
    assert sent == [signal.SIGINT]
    assert [line for line in said if line.endswith("fastprompt train")] == [
        "a seed 0: fastprompt train"
    ]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_jobs_have_cards_of_their_own(plan, monkeypatch):
    monkeypatch.setattr(running, "_cards", lambda: ["4", "7"])
    seen, both = [], threading.Barrier(2, timeout=60)

    def call(self, command, log, environment):
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        if len(seen) <= 2:
            both.wait()
        finish(command)
        return 0

    monkeypatch.setattr(running._Processes, "_call", call)
    report = run_plan(plan, jobs=2, say=lambda text: None)
    assert len(report.finished) == 3 and sorted(seen[:2]) == ["4", "7"]


def test_a_run_that_another_process_is_at(plan, monkeypatch):
    monkeypatch.setattr(running._Processes, "_call", lambda self, command, *rest: finish(command))
    log = plan.runs[1].folder.with_name("seed-0.log")
    log.parent.mkdir(parents=True)
    with open(log, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        report = run_plan(plan, say=lambda text: None)
    assert report.finished == ["a seed 0", "c seed 0"]
    assert "another process is at it" in report.failed["b seed 0"]
    assert [state(run, plan) for run in plan.runs] == ["finished", "to do", "finished"]


def test_a_run_that_leaves_nothing_has_failed(plan, monkeypatch):
    monkeypatch.setattr(running._Processes, "_call", lambda *given: 0)
    report = run_plan(plan, say=lambda text: None)
    assert len(report.failed) == 3 and "want a result" in report.failed["a seed 0"]


def test_a_full_disk_fails_its_run_alone(plan, monkeypatch):
    def call(self, command, log, environment):
        if "/b/" in command[2]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return finish(command)

    monkeypatch.setattr(running._Processes, "_call", call)
    report = run_plan(plan, say=lambda text: None)
    assert report.finished == ["a seed 0", "c seed 0"]
    assert "No space left" in report.failed["b seed 0"]


def test_a_trained_run_is_asked_again_what_it_was_not_asked(plan, monkeypatch):
    called = []

    def call(self, command, log, environment):
        called.append(command[0])
        if command[0] == "train":
            return finish(command)
        path = Path(command[command.index("--output") + 1], "results.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")

    monkeypatch.setattr(running._Processes, "_call", call)

    def run(*tasks, **more):
        called.clear()
        asks = Plan(plan.runs[:1], dict(tasks=[*tasks], data="b") | more)
        assert run_plan(asks, say=lambda text: None).failed == {}
        assert state(asks.runs[0], asks) == "finished"
        return called

    assert run("vsr") == ["train", "eval"]
    assert run("vsr") == []
    for tasks, more in ((["vsr", "pope"], {}), (["pope"], {}), (["pope"], dict(limit=3))):
        assert run(*tasks, **more) == ["eval"] and run(*tasks, **more) == []
    assert state(plan.runs[0], plan) == "finished"  # of a plan that asks nothing


def test_a_failed_run_says_how_it_ended(plan, monkeypatch):
    def call(self, command, log, environment):
        log.write(b"one\n\ntwo\nthree\nfour \xff\n")
        log.flush()
        return 3 if "/b/" in command[2] else finish(command)

    monkeypatch.setattr(running._Processes, "_call", call)
    said = []
    report = run_plan(plan, say=said.append)
    assert report.finished == ["a seed 0", "c seed 0"] and list(report.failed) == ["b seed 0"]
    assert report.failed["b seed 0"].endswith("b/seed-0.log:\n  two\n  three\n  four \ufffd")
    assert report.failed["b seed 0"].startswith("exit status 3;")
    assert f"b seed 0: failed\n{report.failed['b seed 0']}" in said


def test_an_evaluation_has_the_runs_options(plan):
    config = plan.runs[0].config
    config = type(config)(**vars(config) | dict(four_bit=True, template="vicuna_v1"))
    run = type(plan.runs[0])("a", 0, config)
    found = running.evaluation(run, dict(tasks=["vsr", "pope"], data="b", max_new_tokens=4))
    assert found == [
        "eval", "--model", config.model, "--prompts", f"{config.out}/prompts", "--dtype", "float32",
        "--output", f"{config.out}/eval", "--four-bit", "--template", "vicuna_v1", "--tasks",
        "vsr", "pope", "--data", "b", "--max-new-tokens", "4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "template"),
    [
        (dict(template="vicuna_v1"), ["--template", "vicuna_v1"]),
        (dict(method="projector"), ["--template", "plain"]),  # as it trains then
        (dict(method="projector", template="chatml"), ["--template", "chatml"]),
        (dict(), []),
    ],
)
def test_an_evaluation_speaks_as_the_run_did(options, template, plan):
    config = plan.runs[0].config
    run = type(plan.runs[0])("a", 0, type(config)(**vars(config) | options))
    found = running.evaluation(run, dict(questions=["q.jsonl"], images="i"))
    end = ["--questions", "q.jsonl", "--images", "i"]
    assert found[found.index(f"{config.out}/eval") + 1 :] == template + end
    found = running.evaluation(run, dict(questions=["q.jsonl"], chat_template="c.jinja"))
    assert "--template" not in found and found[-2:] == ["--chat-template", "c.jinja"]


# ---- plans ----

GIVEN = dict(model="m", data="d")


def test_names_options_and_seeds_of_a_plan(tmp_path):
    path = write(
        tmp_path / "p.yaml",
        base=dict(text_tokens=1, vision_tokens=1, hold_out=2),
        runs={"a": {}, "b": dict(text_tokens=2, layers="top")},  # the grid goes before a run
        grid=dict(layers=["first", "0,2"]),
        tune=dict(learning_rate=["1e-3", 0.1]),
        seeds=[3, 1],
    )
    plan = read_plan(path, "out", over=GIVEN | dict(vision_tokens=9))
    assert len(plan.runs) == 16 and plan.tune == "learning_rate" and plan.eval == {}
    assert [run.seed for run in plan.runs] == [3] * 8 + [1] * 8
    last = plan.runs[-1]
    assert last.name == "b,layers=0,2,learning_rate=0.1"
    config = last.config
    assert config.out == "out/b,layers=0,2,learning_rate=0.1/seed-1" and config.seed == 1
    assert (config.layers, config.learning_rate) == ("0,2", 0.1)
    assert (config.text_tokens, config.vision_tokens) == (2, 9)  # a run's goes before all
    assert plan.runs[0].config.learning_rate == 1e-3
    assert [run.seed for run in read_plan(path, "out", over=GIVEN, seeds=[5]).runs] == [5] * 8
    alone = write(tmp_path / "q.yaml", seeds=[0])
    assert [run.name for run in read_plan(alone, "out", over=GIVEN).runs] == ["run"]


def test_evaluations_of_a_plan(tmp_path):
    path = write(tmp_path / "p.yaml", eval=dict(tasks=["vsr"], limit=3))
    assert read_plan(path, "out", over=GIVEN).eval == {}  # no data, no evaluation
    plan = read_plan(path, "out", over=GIVEN, eval=dict(data="b", tasks=["pope"]))
    assert plan.eval == dict(tasks=["pope"], limit=3, data="b")
    path = write(tmp_path / "q.yaml", eval=dict(tasks="vsr", questions="q.jsonl", images="i"))
    plan = read_plan(path, "out", over=GIVEN)
    assert plan.eval == dict(questions=["q.jsonl"], images="i")  # the tasks' files are not there


@pytest.mark.parametrize(
    "plan, words",
    [
        (dict(run={}), "want a plan of about, base, runs.*; got run"),
        ([1], "want a plan of .*; got list"),
        (dict(base=dict(text_token=3)), "base: unknown option 'text_token'; did you mean"),
        (dict(runs=dict(a=dict(foo=3))), "runs: a: unknown option 'foo'"),
        (dict(runs=["a"]), "runs: want name: options, got"),
        (dict(runs=dict(a=3)), "runs: a: want options and their values, got 3"),
        (dict(base=dict(seed=3)), "base: seed is each run's own; want none, got 3"),
        (dict(runs=dict(a=dict(out="x"))), "runs: a: out is each run's own"),
        (dict(runs={"a/b": {}}), "want letters, digits and .* in a run's name.*got 'a/b'"),
        (dict(grid=dict(layers="all")), "grid: layers: want a list of values, got 'all'"),
        (dict(grid=dict(layers=[])), "grid: layers: want a list of values"),
        (dict(grid=dict(seed=[1])), "grid: seed is each run's own"),
        (dict(seeds=[1, 1]), "seeds: want different whole numbers from 0"),
        (dict(seeds=3), "seeds: want different whole numbers from 0, got 3"),
        (dict(tune=dict(layers=["all"], init=["normal"])), "tune: want one option"),
        (dict(tune=dict(layers=["all"])), "tune: want rows held out"),
        (dict(eval=dict(task=["vsr"])), "eval: want some of tasks, .*; got task"),
        (dict(eval=dict(data="b")), "eval: want tasks beside data"),
        (dict(runs=dict(a=dict(method="lorra"))), "a: method: want one of m2pt, .* got 'lorra'"),
        (dict(base=dict(layers="top"), runs=dict(a=dict(method="lora"))), "layers: method 'lora'"),
        (dict(base=dict(init="he")), "init: want one of xavier, normal, prefill; got 'he'"),
    ],
)
def test_a_wrong_plan_is_an_error(plan, words, tmp_path):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(ValueError, match=words):
        read_plan(tmp_path / "p.yaml", "out", over=GIVEN)


def test_a_plan_that_is_none(tmp_path, capsys):
    with pytest.raises(ValueError, match="want a plan in YAML"):
        read_plan(tmp_path / "none.yaml", "out")
    path = write(tmp_path / "p.yaml", runs=dict(a={}))
    assert main(["sweep", path, "--model", "m", "--data", "d"]) == 2
    assert "want --out" in capsys.readouterr().out
    command = ["sweep", path, "--model", "m", "--data", "d", "--out", "o"]
    assert main([*command, "--only", "b"]) == 2
    assert "--only: want some of a; got b" in capsys.readouterr().out
    assert main([*command, "--jobs", "0"]) == 2 and main(["sweep", path, "--out", "o"]) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("sweep-*.yaml")), ids=str)
def test_recipes_are_plans(path):
    plan = read_plan(path, "out", over=GIVEN, eval=dict(data="benchmarks"))
    assert {run.seed for run in plan.runs} == {0, 1, 2} and plan.eval["tasks"]
    assert all(run.config.evaluates for run in plan.runs)
    about = yaml.safe_load(path.read_text())["about"]
    assert "Not run here" in about


def test_figure_1_compares_like_with_like():
    plan = read_plan(ROOT / "recipes" / "sweep-figure1.yaml", "out", over=GIVEN)
    kinds = {run.name.split(",")[0] for run in plan.runs}
    assert kinds == {"m2pt", "vpt", "ptum", "lora", "prefix", "projector", "full"}
    for name in ("epochs", "batch_size", "schedule", "template", "hold_out", "max_length"):
        assert len({getattr(run.config, name) for run in plan.runs}) == 1, name
    assert len(plan.runs) == 7 * 3 * 3 and plan.tune == "learning_rate"


def test_another_runs_folder_is_refused(shared, tmp_path, inline, plan):
    assert main(["train", "--config", write(tmp_path / "c.yaml", **TINY, seed=0),
                 *options(shared, plan.runs[2].folder), "--max-steps", "1"]) == 0  # fmt: skip
    with pytest.raises(TrainingError, match="max_steps: 1, now 3"):
        run_plan(plan)
    assert not inline
