"""Training steps, each provider in a process of its own: its peak memory is then its own, and what
it changes for good (classes of transformers, compiler caches) meets no other.

First a process finds the truth and the limits (`Benchmark.truth`), then each provider runs. Its
peak memory is all that its process held at once since its model was there: on CUDA the allocator's
peak, the model included; on the CPU peak resident memory above the loaded model's.
"""

import multiprocessing
import tempfile
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness, registry
from benchmarks.harness import Effort
from benchmarks.registry import Benchmark, NotMeasured, Provider, Step

TURN_MS = 3000.0  # a step of a 7B model takes a second at most
FEWEST, MOST = 5, 30  # steps that are timed
TRUTH = "the truth"  # in a provider's place


class Meter:
    """Peak memory since `start`, in MiB; None where nobody says."""

    def __init__(self, device: str):
        self.device, self.before = device, 0.0

    def start(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            self.before = _resident()

    def peak(self) -> float | None:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        peak = _resident()
        return None if peak is None else peak - self.before


def _resident() -> float | None:
    """Highest resident memory of this process since `clear_refs`; Linux alone tells."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


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
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        job = (benchmark.name, shape, dtype, device, effort, str(Path(folder) / "truth.pt"))
        harness.say(f"{model} {shape}: {TRUTH}")
        true = _in_a_process(job, benchmark.modes[0], TRUTH)
        if true["status"] == "not measured":  # as bitsandbytes is absent: nobody can run
            skipped = dict.fromkeys(providers, true["reason"])
        untold = "" if true["status"] == "found" else f"no truth: {true['reason']}"
        for mode in benchmark.modes:
            common = harness.about(benchmark, model, shape, dtype, device, mode)
            harness.say(f"\n {mode}:")
            found = []
            for name in providers:
                harness.say(f" {name}")
                if name in skipped:
                    row = dict(status="not measured", reason=skipped[name])
                else:
                    row = _in_a_process(job, mode, name, untold)
                if common.get("floor_ms") and "median_ms" in row:
                    row["over_floor"] = row["median_ms"] / common["floor_ms"]
                found.append({**common, "provider": name, **row})
            harness.set_against_baseline(found, benchmark.baseline)
            rows += found
    harness.say("\n")
    return rows


def _in_a_process(job: tuple, mode: str, provider: str, untold: str = "") -> dict:
    """What `_row` gives for it, in a new process; also where that process dies."""
    if job[3] == "cuda":
        context = multiprocessing.get_context("spawn")  # a forked process could not use the card
    else:  # forked from a server that has imported what takes seconds, and computed nothing
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.m2pt_step", "bitsandbytes.nn"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, *job, mode, provider, untold))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return dict(status="failed", reason=f"its process ended with {process.exitcode}")
    finally:
        process.join()


def _send(sender: Connection, *job) -> None:
    sender.send(_row(*job))


def _row(
    name: str,
    shape,
    dtype: torch.dtype,
    device: str,
    effort: Effort,
    truth_file: str,
    mode: str,
    who: str,
    untold: str,
) -> dict:
    """``untold``: why there is no truth to compare with; empty if there is."""
    benchmark = registry.load(name)
    try:
        case = benchmark.case(shape, dtype, device)
        if who == TRUTH:
            torch.save(benchmark.truth(case), truth_file)
            return dict(status="found")
    except NotMeasured as why:
        return dict(status="not measured", reason=str(why))
    except Exception as error:
        traceback.print_exc()
        return dict(status="failed", reason=f"{type(error).__name__}: {error}"[:300])
    case.meter, case.truth_file = Meter(device), truth_file
    provider = benchmark.providers[who]
    provider = replace(provider, exempt=provider.exempt or untold)
    row, step = harness.prepare(benchmark, provider, case, mode, device)
    if step is None:
        return row
    row["peak_mib"] = case.peak
    row |= _time(step, device, effort)
    row["tokens_per_s"] = shape.tokens / row["median_ms"] * 1e3
    if device == "cuda":
        row["kernels"] = _kernels(step)
    return row


def _time(step: Step, device: str, effort: Effort) -> dict:
    clock = harness.clock_of(device)
    for _ in range(effort.warm_ups):
        step.run()
    once = clock(step.run, 1)[0]
    times = (
        2 if effort == harness.QUICK else max(FEWEST, min(MOST, round(TURN_MS / max(once, 1e-3))))
    )
    return harness.quantiles(clock(step.run, times))


def _kernels(step: Step) -> int:
    """Kernels that one step runs on the card; copies and fills by the driver are none."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        step.run()
        torch.cuda.synchronize()
    events = recorded.profiler.kineto_results.events()
    on_card = [e.name() for e in events if e.device_type() == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_card)
