"""Check, then time and peak memory, of competing providers on one shape.

Times: each provider in turn, several times over, so that a clock or a neighbour that drifts hits
all alike; the samples of all turns together give the median. On CUDA by events around each step,
with the L2 cache emptied before it (as triton.testing.do_bench does); on the CPU by wall clock.

Peak memory: what one step holds at its worst beyond what was held before it, results included. On
CUDA by the caching allocator. On the CPU by the allocations and frees that torch.profiler records:
every tensor, also those inside of an operator, but not the scratch that a library (oneDNN, MKL, a
C++ vector) takes for itself.
"""

import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.floor import floor_ms
from benchmarks.registry import Benchmark, NotMeasured, Provider, Step


@dataclass(frozen=True)
class Effort:
    turns: int = 5  # of each provider
    turn_ms: float = 50.0  # about so long a turn
    warm_ups: int = 2


QUICK = Effort(turns=2, turn_ms=5.0, warm_ups=1)
MAX_STEPS = 100  # in a turn


def run_shape(
    benchmark: Benchmark,
    model: str,
    shape,
    dtype: torch.dtype,
    device: str,
    providers: dict[str, Provider],
    skipped: dict[str, str],
    effort: Effort,
) -> list[dict]:
    """One row for each mode and provider, those of ``skipped`` ({name: reason}) too."""
    torch.manual_seed(0)
    if any(p.compiles for name, p in providers.items() if name not in skipped):
        torch.compiler.reset()  # else the shapes of one run add up to dynamo's limit of recompiles
    try:
        case, rows = benchmark.case(shape, dtype, device), []
    except NotMeasured as why:
        case, rows, skipped = None, [], dict.fromkeys(providers, str(why))
    for mode in benchmark.modes:
        common = about(benchmark, model, shape, dtype, device, mode)
        found, steps = {}, {}
        say(f"{model} {shape}, {mode}: checking")
        for name, provider in providers.items():
            say(f" {name}")
            if name in skipped:
                found[name] = dict(status="not measured", reason=skipped[name])
            else:
                found[name], step = prepare(benchmark, provider, case, mode, device)
                if step:
                    steps[name] = step
        say("; timing\n")
        measured = measure(steps, device, effort)
        for name, verdict in found.items():
            rows.append({**common, "provider": name, **verdict, **measured.get(name, {})})
            if benchmark.rate and name in measured:
                rows[-1]["tokens_per_s"] = shape.tokens / rows[-1]["median_ms"] * 1e3
        set_against_baseline(rows[-len(found) :], benchmark.baseline)
    return rows


def about(benchmark: Benchmark, model: str, shape, dtype, device: str, mode: str) -> dict:
    """What the rows of one mode of a shape have in common."""
    common = dict(benchmark=benchmark.name, model=model, shape=str(shape), size=asdict(shape))
    common |= dict(dtype=str(dtype).removeprefix("torch."), mode=mode)
    if benchmark.cost:
        cost = benchmark.cost(shape, mode, dtype.itemsize)
        common["floor_ms"] = floor_ms(*cost, dtype, device, benchmark.in_turn)
    return common


def prepare(benchmark, provider, case, mode, device) -> tuple[dict, Step | None]:
    """Run a provider once and judge what it gave; a Step only if it may be timed."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            step = provider.build(case, mode)
            results = step.results(step.run())
            synchronize(device)  # what goes wrong on the device belongs to this provider
        except NotMeasured as why:
            return dict(status="not measured", reason=str(why)), None
        except Exception as error:  # anyone's code may raise anything, and a row says what
            reason = _reason(error, said)
            if not provider.ours or isinstance(error, torch.OutOfMemoryError):
                return dict(status="not measured", reason=reason), None
            traceback.print_exc()
            return dict(status="failed", reason=reason), None
    if provider.exempt:
        return dict(status="measured", unchecked=provider.exempt), step
    verdict = benchmark.judge(case, mode, results)
    found = dict(worst=verdict.name, error_over_limit=_json_number(verdict.share))
    if verdict.right:
        return dict(status="measured", **found), step
    reason = f"{verdict.name} is off by {verdict.share:.3g} times its limit"
    return dict(status="wrong", reason=reason, **found), None


def _reason(error: Exception, said: list[warnings.WarningMessage]) -> str:
    """The error in a line. SDPA says why a backend does not serve in warnings, not in its error."""
    lines = str(error).strip().splitlines() or [""]
    reasons = [str(w.message).split(" (Triggered")[0] for w in said]
    if "No available kernel" in lines[0]:
        lines[0] += " " + "; ".join(
            r for r in reasons if not r.endswith("because:") and "runtime disabled" not in r
        )
    return f"{type(error).__name__}: {lines[0]}"[:300]


def say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def _json_number(x: float) -> float | str:
    return x if abs(x) < float("inf") else str(x)  # JSON knows no inf and no nan


def set_against_baseline(rows: list[dict], baseline: str) -> None:
    base = next((row.get("median_ms") for row in rows if row["provider"] == baseline), None)
    for row in rows:
        if base and "median_ms" in row:
            row["speedup"] = base / row["median_ms"]


# ---- time and memory ----


def measure(steps: dict[str, Step], device: str, effort: Effort) -> dict[str, dict]:
    """{name: median, 20th and 80th percentile in ms, number of samples, peak memory in MiB}."""
    clock = clock_of(device)
    reps, peaks, samples = {}, {}, {name: [] for name in steps}
    for name, step in steps.items():
        for _ in range(effort.warm_ups):
            step.run()
        once = clock(step.run, 1)[0]
        reps[name] = max(1, min(MAX_STEPS, round(effort.turn_ms / max(once, 1e-3))))
        peaks[name] = _peak_mib(step.run, device)
    for _ in range(effort.turns):
        for name, step in steps.items():
            # the first of a turn finds cold caches and an empty queue: run it, do not count it
            samples[name] += clock(step.run, reps[name] + 1)[1:]
    return {name: quantiles(samples[name]) | dict(peak_mib=peaks[name]) for name in steps}


def clock_of(device: str) -> Callable[[Callable, int], list[float]]:
    """(run, times) -> milliseconds of each."""
    return _cuda_ms if device == "cuda" else _cpu_ms


def quantiles(samples: list[float]) -> dict:
    low, middle, high = torch.tensor(samples).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return dict(median_ms=middle, p20_ms=low, p80_ms=high, samples=len(samples))


def _cpu_ms(run: Callable, times: int) -> list[float]:
    samples = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        samples.append(1e3 * (time.perf_counter() - start))
    return samples


def _cuda_ms(run: Callable, times: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    torch.cuda.synchronize()
    for start, end in events:
        _larger_than_l2().zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


@cache
def _larger_than_l2() -> torch.Tensor:
    return torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")


def _peak_mib(run: Callable, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        held += nbytes
        peak = max(peak, held)
    return peak / 2**20


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
