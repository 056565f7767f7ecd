"""The runner: it names what it left out, and gives no time to a provider that is wrong."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import check, floor, harness, registry, shapes
from benchmarks.__main__ import main
from benchmarks.programs import programs
from benchmarks.prompt_attention import BENCHMARK, cost
from benchmarks.registry import NotMeasured, Provider, Step

QUICK = ["prompt_attention", "--quick", "--device", "cpu", "--shapes", "SmolLM2-135M"]


@pytest.fixture
def run(tmp_path):
    """Runs the command line; gives its exit code and what it wrote as JSON."""

    def run(*arguments):
        path = tmp_path / "rows.json"
        code = main([*arguments, "--json", str(path)])
        return code, json.loads(path.read_text())

    return run


def with_results(change):
    """The eager provider, with its results changed before they are judged."""
    eager = BENCHMARK.providers["eager"].build

    def build(case, mode):
        step = eager(case, mode)
        return Step(step.run, lambda given: change(step.results(given)))

    return Provider(build, "wrong on purpose")


def test_list_names_everything(capsys):
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    for name in ("prompt_attention", "ViT-B/16", *BENCHMARK.modes, *BENCHMARK.providers):
        assert name in listed


def test_every_provider_is_measured_or_has_a_reason(run):
    code, written = run(*QUICK)
    assert code == 0
    assert written["device"] and written["commit"] and written["versions"]["torch"]
    rows = {(row["mode"], row["provider"]): row for row in written["rows"]}
    assert rows.keys() == {(m, p) for m in BENCHMARK.modes for p in BENCHMARK.providers}
    for (_, provider), row in rows.items():
        if row["status"] == "not measured":
            assert row["reason"]
            continue
        assert row["status"] == "measured", row
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["peak_mib"] > 0
        assert row["speedup"] > 0
        assert provider.startswith("bare") or row["error_over_limit"] <= 1
    measured = {name for (_, name), row in rows.items() if row["status"] == "measured"}
    assert measured >= {"rows-sdpa", "concat-sdpa", "eager", "fastprompt", "bare-sdpa"}


@pytest.mark.parametrize(
    "change",
    [
        lambda results: results | dict(out=results["out"] * 1.001),
        lambda results: results | dict(out=results["out"] * float("nan")),
        lambda results: results | dict(out=results["out"].half()),
        lambda results: results | dict(out=results["out"].transpose(1, 2)),
        lambda results: {},
    ],
    ids=["off", "nan", "dtype", "shape", "nothing"],
)
def test_a_wrong_provider_gets_no_time(run, monkeypatch, capsys, change):
    monkeypatch.setitem(BENCHMARK.providers, "bad", with_results(change))
    code, written = run(*QUICK, "--providers", "bad")
    assert code == 1
    assert {row["status"] for row in written["rows"]} == {"wrong"}
    assert not any("median_ms" in row or "peak_mib" in row for row in written["rows"])
    printed = capsys.readouterr()
    assert "WRONG" in printed.out
    assert "WRONG" in printed.err


def test_a_wrong_prompt_gradient_is_wrong_in_its_modes_alone(run, monkeypatch):
    def change(results):
        return {n: t * 0.99 if n == "dprompt_k" else t for n, t in results.items()}

    monkeypatch.setitem(BENCHMARK.providers, "bad", with_results(change))
    code, written = run(*QUICK, "--providers", "bad")
    assert code == 1
    assert [row["status"] for row in written["rows"]] == ["measured", "wrong", "wrong"]
    assert written["rows"][1]["worst"] == "dprompt_k"


@pytest.mark.parametrize(
    ("error", "ours", "status", "code"),
    [
        (NotMeasured("no such card"), True, "not measured", 0),
        (ValueError("no such card"), False, "not measured", 0),
        (ValueError("no such card"), True, "failed", 1),
    ],
)
def test_an_error_is_a_reason_or_our_failure(run, monkeypatch, error, ours, status, code):
    def build(case, mode):
        raise error

    monkeypatch.setitem(BENCHMARK.providers, "bad", Provider(build, "raises", ours=ours))
    got, written = run(*QUICK, "--providers", "bad")
    assert got == code
    assert {row["status"] for row in written["rows"]} == {status}
    assert "no such card" in written["rows"][0]["reason"]


def test_a_whole_case_may_have_a_reason(run, monkeypatch):
    def case(shape, dtype, device):
        raise NotMeasured("no such library")

    monkeypatch.setattr(registry, "load", lambda name: replace(BENCHMARK, case=case))
    code, written = run(*QUICK)
    assert code == 0
    assert len(written["rows"]) == len(BENCHMARK.modes) * len(BENCHMARK.providers)
    assert {row["reason"] for row in written["rows"]} == {"no such library"}


def test_a_benchmark_without_shapes_for_a_device_says_so(monkeypatch, capsys):
    other = replace(BENCHMARK, shapes=lambda device, quick: {}, dtypes={})
    monkeypatch.setattr(registry, "load", lambda name: other)
    assert main(["--device", "cpu"]) == 0
    assert "not measured: it has no shapes for cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_benchmark"], "no benchmark no_such_benchmark; there are: prompt_attention"),
        (["--shapes", "ViT-X"], "no shape ViT-X; there are: ViT-B/16"),
        (["--providers", "eagre"], "no provider eagre; there are: rows-sdpa"),
    ],
)
def test_an_unknown_name_says_what_there_is(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_cpu_peak_is_exact():
    def step():
        first = torch.empty(2**20, dtype=torch.uint8)
        second = torch.empty(2**21, dtype=torch.uint8)  # 3 MiB at once
        del first
        return second, torch.empty(2**19, dtype=torch.uint8)

    step()
    assert harness._peak_mib(step, "cpu") == 3


def test_judge_takes_the_worst_and_zero_is_exact():
    truth = dict(out=torch.ones(4, dtype=torch.float64), dq=torch.zeros(4, dtype=torch.float64))
    limits = dict(out=check.limit(torch.ones(4), truth["out"]), dq=0.0)
    right = dict(out=torch.ones(4), dq=torch.zeros(4))
    assert check.judge(right, truth, limits, torch.float32).right
    verdict = check.judge(right | dict(dq=torch.full((4,), 1e-9)), truth, limits, torch.float32)
    assert verdict == ("dq", float("inf"))


@pytest.mark.parametrize(
    ("model", "ms"), [("ViT-B/16", 0.155), ("CLIP-L/336", 0.203), ("LLaMA-7B", 0.315)]
)
def test_floor_is_the_one_of_the_design(monkeypatch, model, ms):
    shape = shapes.attention("cuda", quick=False)[model]
    bound = cost(shape, BENCHMARK.modes[1], 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert floor.floor_ms(*bound, torch.bfloat16, "cuda") == pytest.approx(ms, rel=0.01)
    assert floor.floor_ms(*bound, torch.float32, "cuda") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card that nobody measured")
    assert floor.floor_ms(*bound, torch.bfloat16, "cuda") is None


@pytest.mark.parametrize("model", ["ViT-B/16", "CLIP-L/336", "LLaMA-7B", "Llama-8B"])
def test_programs_add_up_to_the_whole(model):
    """All programs' FLOPs are those of the products, but for what the last blocks do in vain."""
    shape = shapes.attention("cuda", quick=False)[model]
    flops = {p.kernel: p.programs * p.flops for p in programs(shape)}
    forward, both = (cost(shape, mode, 2)[1] for mode in BENCHMARK.modes[:2])
    assert forward <= flops["fwd"] <= 1.35 * forward
    # backward by flash attention is seven products: dq's three, and four of keys and prompts
    assert 1.4 * (both - forward) <= sum(flops.values()) - flops["fwd"] <= 2 * (both - forward)


def test_the_parts_of_frozen_blocks(run):
    code, written = run("frozen_ops", "--quick", "--device", "cpu")
    assert code == 0
    rows = {row["provider"]: row for row in written["rows"] if row["mode"] == "forward+backward"}
    assert rows["fastprompt"]["error_over_limit"] <= 1 and rows["copy"]["unchecked"]
    assert "liger" in rows["liger"]["reason"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_competitor_runs(run):
    """Compilers too, since each provider is named; what a card lacks (cuDNN) has its reason."""
    code, written = run("prompt_attention", "--quick", "--providers", *BENCHMARK.providers)
    assert code == 0
    measured = {row["provider"] for row in written["rows"] if row["status"] == "measured"}
    assert measured >= {"rows-flash", "concat-flash", "flex", "compile", "eager", "fastprompt"}
