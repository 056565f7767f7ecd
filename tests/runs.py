"""Runs of training on a tiny LLaVA, for the tests of `fastprompt.train`."""

from pathlib import Path

import torch
from rich.console import Console
from transformers import TrainerCallback

import fastprompt
from fastprompt.train import TrainConfig
from fastprompt.train import train as _train

QUIET = Console(quiet=True)


def train(config, **more):
    return _train(config, console=QUIET, **more)


def config_of(shared: Path, out: Path, **more) -> TrainConfig:
    """Of the session's folder ``shared`` (see conftest)."""
    options = dict(
        model=str(shared / "model"), data=[str(shared / "data.jsonl")], out=str(out), batch_size=4,
        epochs=2, learning_rate=1e-2, dtype="float32", vision_tokens=3, text_tokens=2, save_every=4,
        seed=5,
    )  # fmt: skip
    return TrainConfig(**(options | more))


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def trained(result):
    return {n: p.detach().clone() for n, p in fastprompt.patch_of(result.model).trainable.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
