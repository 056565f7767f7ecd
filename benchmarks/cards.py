"""The largest batch of 1,024 tokens that trains on cards of 6 to 46 GB, for LLaVAs of 7B to 72B.

    python -m benchmarks cards             # on a GPU: measured under a cap on torch's allocator
    python -m benchmarks cards --predict   # anywhere: computed from bytes (`card_bytes`)

A cap is `torch.cuda.set_per_process_memory_fraction`; GB are 2**30 bytes. Both ways recompute
everything: ``ref`` writes prompt rows and checkpoints each layer, ``fastprompt`` has
memory="offload". Where the test card does not hold all layers, as many run as it holds; the bytes
of the rest are taken off the cap, and the row says so.
"""

import argparse
import contextlib
import gc
import multiprocessing
import sys
from dataclasses import replace

import torch

from benchmarks import report, training
from benchmarks.card_bytes import OURS, REF, WAYS, Card
from benchmarks.isolated import Meter
from benchmarks.llava import LANGUAGE, Tuning
from benchmarks.m2pt_step import Case
from benchmarks.training import ALL, HOST

CAPS = (6, 8, 11, 12, 16, 22, 24, 46)
GB = 2**30
MOST = 64  # no larger batch is looked for
SHARE = 0.9  # of the test card, for layers


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cards", description=__doc__)
    parser.add_argument("--predict", action="store_true", help="compute from bytes, run nothing")
    parser.add_argument("--models", nargs="+", choices=LANGUAGE, default=list(LANGUAGE))
    parser.add_argument("--caps", nargs="+", type=int, default=CAPS, metavar="GB")
    parser.add_argument("--json", metavar="FILE", help="write every row to FILE")
    parser.add_argument("--commit", help="what to report as the commit where git does not know")
    given = parser.parse_args(arguments)
    if not given.predict and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --predict computes the table")
    words = sys.argv[2:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks cards", *map(str, words)])
    env = report.environment("cpu" if given.predict else "cuda", given.commit, command)
    print(report.header(env))
    rows = []
    for model in given.models:
        shape = Tuning(1, LANGUAGE[model])
        for way in WAYS:
            new = predicted(shape, way, given.caps)
            if not given.predict:
                new = _in_a_process(shape, way, new)
            rows += [dict(model=model, way=way) | row for row in new]
            if given.json:
                report.write_json(given.json, env, rows)
    print_table(rows, given.caps)
    return 0


def predicted(shape: Tuning, way: str, caps: tuple[int, ...]) -> list[dict]:
    """Computed rows, one a cap; batch 0: it does not train there."""
    card = Card(shape, way)
    common = dict(how="computed", resident_gb=round(card.resident / GB, 3))
    return [
        dict(cap_gb=cap, batch=(batch := card.largest(cap * GB)), **common)
        | dict(peak_gb=round((card.resident + card.step(batch)) / GB, 3) if batch else None)
        for cap in caps
    ]


def print_table(rows: list[dict], caps: tuple[int, ...]) -> None:
    """Model and way by cap; a star marks what was computed."""
    print("\nlargest batch of 1,024 tokens; * computed from bytes, not measured; - does not train")
    print("".join(["model  way         resident ", *(f"{cap:>5} GB" for cap in caps)]))
    for model, way in dict.fromkeys((row["model"], row["way"]) for row in rows):
        these = [row for row in rows if (row["model"], row["way"]) == (model, way)]
        cells = (
            (str(row["batch"]) if row["batch"] else "-") + "*" * (row["how"] != "measured")
            for row in these
        )
        resident = f"{these[0]['resident_gb']:.1f} GB"
        print(f"{model:<7}{way:<12}{resident:>8}  " + "".join(f"{cell:>8}" for cell in cells))
    for how in dict.fromkeys(row["how"] for row in rows):
        if how not in ("measured", "computed"):
            print(f"* also: {how}")


# ---- on a card ----


def _in_a_process(shape: Tuning, way: str, rows: list[dict]) -> list[dict]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, shape, way, rows))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{shape}, {way}: its process ended with {process.exitcode}") from None
    finally:
        process.join()


def _send(sender, shape: Tuning, way: str, rows: list[dict]) -> None:
    sender.send(measured(shape, way, rows))


def measured(shape: Tuning, way: str, rows: list[dict]) -> list[dict]:
    """``rows`` with what was found on this card; those whose weights alone exceed the cap stay
    computed. Caps ascend, and each begins at the batch that the one before it trained."""
    card, total = Card(shape, way), torch.cuda.get_device_properties(0).total_memory
    some = layers_held(card, int(total * SHARE))
    left_out = shape.text.layers - some
    case = Case(replace(shape, text=replace(shape.text, layers=some)), torch.bfloat16, "cuda")
    steps = _Steps(case, way)
    how = "measured"
    if left_out:
        how = f"measured with {some} of {shape.text.layers} layers, the rest computed"
    found, batch = [], 0
    for row in sorted(rows, key=lambda row: row["cap_gb"]):
        if row["cap_gb"] * GB < card.resident:
            found.append(row)
            continue

        def fits(batch: int, cap: int = row["cap_gb"] * GB) -> bool:
            cap -= left_out * (card.one_layer + batch * card.kept("text"))
            return cap > 0 and steps.fits(batch, min(1.0, cap / total))

        batch = largest(fits, batch)
        found.append(row | dict(batch=batch, how=how, peak_gb=steps.peak_gb.get(batch)))
    return found


def layers_held(card: Card, memory: int) -> int:
    """How many layers of the language model ``memory`` holds beside a row's step."""
    missing = card.resident + card.step(1) - memory
    return max(1, card.shape.text.layers - max(0, -(-missing // card.one_layer)))


def largest(fits, known: int = 0) -> int:
    """The largest batch up to `MOST` for which ``fits`` holds, as it does for ``known``."""
    low, high = known, max(1, 2 * known)
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    high = min(high, MOST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class _Steps:
    """Training steps of one model at any batch."""

    def __init__(self, case: Case, way: str):
        self.case, self.model, self.peak_gb = case, case.model(), {}
        if way == REF:
            self.context = training.checkpointing(self.model, ALL)
            self.trained = training.literal(case, self.model)
        elif way == OURS:
            self.context = contextlib.nullcontext
            self.trained = training.patched(case, self.model, HOST)

    def fits(self, batch: int, fraction: float) -> bool:
        """Whether two steps (AdamW's moments come with the first) stay under the cap."""
        case = self.case
        case.shape = replace(case.shape, B=batch)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(fraction)
        meter, step = Meter(case.device), None
        try:
            meter.start()
            step = training.step_of(case, self.model, self.trained, self.context)
            step.run(), step.run()
            torch.cuda.synchronize()
            self.peak_gb[batch] = meter.peak() / 1024
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            del step
            for p in self.trained.values():
                p.grad = None


if __name__ == "__main__":
    sys.exit(main())
