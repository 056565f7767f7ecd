"""One contender on one task: ``python -m benchmarks.field.run CONTENDER TASK JOB``.

The jobs, each in a process of its own where it is to be measured:

    rates   each learning rate for some steps on fresh models: loss on watched rows; and the exam
            before training
    train   the run that is measured, its exam, generation, what a checkpoint gives back
    probes  what works, on the tiny model: see `probes`

Its last line is its result as JSON; an error of the contender's own is one, too.
"""

import argparse
import json
import math
import sys
import tempfile
import traceback
from importlib.metadata import version

import torch
import transformers
from torch import nn

from benchmarks.field import generation, probes
from benchmarks.field.case import in_a_line, said
from benchmarks.field.contenders import CONTENDERS, Contender
from benchmarks.field.learning import examine, scores, train
from benchmarks.field.tasks import Task
from benchmarks.isolated import Meter

SEED = 0
ASKED = 16  # rows that are generated


def tuned_model(contender: Contender, task: Task) -> nn.Module:
    torch.manual_seed(SEED)
    return contender.module(task.name).tune(task.fresh_model(), task.start)


def rates(contender: Contender, task: Task, given: argparse.Namespace) -> dict:
    model = tuned_model(contender, task)
    before = scores(task, examine(model, task.exam)[0])
    watched = {}
    for rate in given.rates if len(given.rates) > 1 else []:
        model = tuned_model(contender, task)
        train(model, task.batches[: given.rate_steps], rate, task.projector_rate)
        loss = examine(model, task.watched)[1]
        watched[rate] = loss if math.isfinite(loss) else sys.float_info.max
    best = min(watched, key=watched.get) if watched else given.rates[0]
    return dict(
        before=before, watched={str(rate): loss for rate, loss in watched.items()}, rate=best
    )


def measure(contender: Contender, task: Task, given: argparse.Namespace) -> dict:
    module = contender.module(task.name)
    model, meter = task.fresh_model(), Meter("cpu")
    meter.start()
    torch.manual_seed(SEED)
    model = module.tune(model, task.start)
    [rate] = given.rates
    history = train(model, task.batches, rate, task.projector_rate)
    found = dict(
        step_ms=history.median_ms,
        peak_mib=meter.peak(),
        losses=[x if math.isfinite(x) else None for x in history.losses],
        trains=sum(p.numel() for p in model.parameters() if p.requires_grad),
        steps=len(history.losses),
    )
    right, loss = examine(model, task.exam)
    found |= scores(task, right) | dict(exam_loss=loss if math.isfinite(loss) else None)
    if task.name == "demo":  # the tiny model's are probes
        found["probes"] = {
            "generate": said(lambda: generation.answers(model, task.exam[0], ASKED)),
            "save and load": said(lambda: _there_and_back(module, model, task)),
        }
    return found


def _there_and_back(module, model: nn.Module, task: Task) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return probes.same_after_loading(module, model, task.fresh_model(), task.exam[0], folder)


def probe(contender: Contender, task: Task, given: argparse.Namespace) -> dict:
    [rate] = given.rates
    return dict(probes=probes.all_of(contender.module("tiny"), task, rate))


JOBS = dict(rates=rates, train=measure, probes=probe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("task", help="a file of tasks.Task")
    parser.add_argument("jobs", nargs="+", choices=JOBS)
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--rate-steps", type=int, default=0)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    contender = CONTENDERS[given.contender]
    try:
        task = Task.load(given.task)
        found = {}
        for job in given.jobs:
            found |= JOBS[job](contender, task, given)
    except Exception as error:  # of anyone's code: the row says it
        traceback.print_exc()
        found = dict(error=in_a_line(error))
    found["transformers"] = transformers.__version__
    if contender.needs:
        found["package"] = f"{contender.needs} {version(contender.needs)}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
