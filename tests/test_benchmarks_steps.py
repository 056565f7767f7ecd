"""Benchmarks of whole training steps: the same work in every process, and a wrong one is caught."""

import json
import os
from dataclasses import replace

import pytest
import torch

from benchmarks import isolated, llava, training, vpt_step
from benchmarks.__main__ import main
from benchmarks.floor import predicted_ms
from benchmarks.harness import QUICK
from benchmarks.m2pt_step import BENCHMARK, Case, cost
from benchmarks.registry import NotMeasured
from benchmarks.training import ALL, BALANCED, HOST, MODES, NONE
from fastprompt import linear4bit

VIT = vpt_step.BENCHMARK.shapes("cpu", True)["ViT-small"]


def rows_of(tmp_path, *arguments):
    path = tmp_path / "rows.json"
    code = main([*arguments, "--quick", "--device", "cpu", "--json", str(path)])
    return code, json.loads(path.read_text())["rows"]


def check(rows, baseline, ours):
    """Both did the same work; who has no such mode says why."""
    found = {(row["mode"], row["provider"]): row for row in rows}
    assert found[BALANCED, baseline]["reason"] == "transformers recomputes whole layers or nothing"
    for (mode, provider), row in found.items():
        if provider == ours or (provider == baseline and mode != BALANCED):
            assert row["status"] == "measured", row
            assert row["error_over_limit"] <= 1 and row["tokens_per_s"] > 0
            assert row["peak_mib"] is None or row["peak_mib"] > 0
    assert {mode for mode, _ in found} == set(MODES)


def test_vpt_step(tmp_path):
    code, rows = rows_of(tmp_path, "vpt_step")
    assert code == 0
    check(rows, "concat", "fastprompt")
    reasons = {row["provider"]: row.get("reason") for row in rows}
    assert reasons["fastprompt-graph"] == "CUDA graphs need a CUDA device"
    assert "compiler" in reasons["concat-compile"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_generate_4bit(tmp_path, monkeypatch, dtype):
    pytest.importorskip("bitsandbytes")
    code, rows = rows_of(tmp_path, "generate_4bit", "--dtype", dtype)
    found = {(row["mode"], row["provider"]): row for row in rows}
    assert code == 0 and len(found) == 4
    for (mode, _), row in found.items():
        if mode == "graph":
            assert row["reason"] == "CUDA graphs need a CUDA device"
        else:
            assert row["error_over_limit"] <= 1
            assert row["tokens_per_s"] == pytest.approx(32e3 / row["median_ms"])
    # a wrong product is noticed
    right = linear4bit.nf4_linear
    monkeypatch.setattr(linear4bit, "nf4_linear", lambda *a, **k: right(*a, **k) * 1.05)
    code, rows = rows_of(tmp_path, "generate_4bit", "--dtype", dtype)
    assert code == 1 and [row["status"] for row in rows][:2] == ["measured", "wrong"]


@pytest.mark.parametrize("shape", ["LLaVA-small b2", "Llama-small b2"])
def test_m2pt_step(tmp_path, shape):
    pytest.importorskip("bitsandbytes")
    providers = ["ref", "fastprompt"]
    if shape.startswith("Llama"):  # processes take seconds: once is enough
        providers += ["ref-liger", "peft-prefix"]
    code, rows = rows_of(tmp_path, "m2pt_step", "--shapes", shape, "--providers", *providers)
    assert code == 0
    check(rows, "ref", "fastprompt")
    others = [row for row in rows if row["provider"] in providers[2:]]
    assert all(row.get("unchecked") or row["reason"] for row in others)


def test_without_bitsandbytes_nobody_is_measured(monkeypatch):
    monkeypatch.setattr(llava, "find_spec", lambda name: None)
    case = Case(BENCHMARK.shapes("cpu", True)["LLaVA-small b2"], torch.float32, "cpu")
    with pytest.raises(NotMeasured, match="bitsandbytes is not installed"):
        training.truth(case)


def test_a_wrong_gradient_and_a_wrong_loss_are_wrong(tmp_path):
    case = vpt_step.Case(VIT, torch.float32, "cpu")
    case.truth_file = str(tmp_path / "truth.pt")
    torch.save(training.truth(case), case.truth_file)
    for policy in (NONE, BALANCED, ALL, HOST):
        step = training.side_keys(case, policy)
        right = step.results(step.run())
        assert right.keys() == {"loss", "d vit", "d classifier"}
        assert training.judge(case, policy, right).right
    for name in right:
        assert not training.judge(case, NONE, right | {name: right[name] * 1.001}).right
    later = step.results(step.run())  # the optimiser has moved the prompts
    assert not training.judge(case, NONE, later).right


def _dies(*_):
    os._exit(3)


def test_a_process_that_dies_is_a_failure(monkeypatch):
    monkeypatch.setattr(isolated, "_send", _dies)
    job = ("vpt_step", VIT, torch.float32, "cpu", QUICK, "")
    row = isolated._in_a_process(job, NONE, "concat")
    assert row == dict(status="failed", reason="its process ended with 3")


def test_without_a_truth_rows_are_unchecked():
    args = ("vpt_step", VIT, torch.float32, "cpu", QUICK, "", NONE, "fastprompt")
    row = isolated._row(*args, "no truth: OutOfMemoryError")
    assert row["status"] == "measured" and row["unchecked"] == "no truth: OutOfMemoryError"


def test_the_meter_sees_what_was_freed():
    meter = isolated.Meter("cpu")
    meter.start()
    torch.ones(2**26)  # 256 MiB
    peak = meter.peak()
    assert peak is None or 250 < peak < 400


def test_the_floor_is_that_of_the_design():
    """Section 7: at batch 4 products take 143 ms at the chip's peak, decoding 10 at least."""
    shape = llava.shapes("cuda", False)["LLaVA-1.5-7B b4"]
    moved, flops = cost(shape, NONE, 2)
    assert predicted_ms(0, flops, "H100") == pytest.approx(143, rel=0.03)
    assert predicted_ms(moved, 0, "H100") == pytest.approx(10, rel=0.2)
    both = predicted_ms(moved, flops, "H100", in_turn=True)
    assert both == pytest.approx(153, rel=0.02)
    more = [cost(shape, mode, 2)[1] for mode in (NONE, BALANCED, ALL, HOST)]
    assert more[0] < more[1] < more[2] == more[3]
    alone = replace(shape, vision=None)
    assert cost(alone, NONE, 2)[1] < flops
