"""`benchmarks.field`: lines are counted right, everybody is run, what is broken is found."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("bitsandbytes")

from benchmarks.field import generation, lines, probes, table, tiny
from benchmarks.field.__main__ import main
from benchmarks.field.case import WORKS, Case, said
from benchmarks.field.contenders import CONTENDERS

USER = '''"""A docstring."""

import torch
from torch import (
    nn,
)

SEED = 0  # no function, no import


def tune(model, start):
    """Another."""
    # a comment

    model.head = nn.Linear(
        3,  # in
        4,
    )
    return model


def load(model, folder):
    return tune(torch.load(folder), None)
'''


def test_lines_of_imports_and_bodies_are_counted(tmp_path):
    file = tmp_path / "user.py"
    file.write_text(USER)
    assert lines.count(file) == 1 + 3 + 4 + 1


def test_every_contender_has_its_files():
    for contender in CONTENDERS.values():
        for model in table.TITLES:
            assert 0 < lines.count(contender.file(model)) < 60
            text = contender.file(model).read_text()
            assert all(f"def {name}(model, " in text for name in ("tune", "save", "load"))


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FIELD_ADAPTERS", raising=False)
    file = tmp_path / "rows.json"
    names = ["adapters_prefix", "concatenation", "fastprompt_deep"]
    options = ["--quick", "--threads", "1", "--models", "tiny", "--json", str(file)]
    assert main(["--only", *names, *options]) == 0
    absent, literal, ours = json.loads(file.read_text())["rows"]
    assert absent["reason"] == "adapters is not installed" and absent["lines"]
    assert ours["status"] == literal["status"] == "measured"
    assert ours["trains"] == literal["trains"] == 4 * 10 * 64
    assert ours["steps"] == len(ours["losses"]) == 3 and ours["step_ms"] > 0
    assert all(word == WORKS for word in ours["probes"].values()), ours["probes"]
    for broken in ("generate", "static cache"):  # it knows of no cache
        assert literal["probes"].pop(broken) != WORKS
    assert "(use_cache=False: works)" in capsys.readouterr().out
    for works in ("checkpointing", "save and load", "length of logits"):
        assert literal["probes"][works] == WORKS


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tiny.prepare(tmp_path_factory.mktemp("tiny"), steps=2, taught=1)


def broken(task, **changes):
    """fastprompt's own contender with some functions in place of its own."""
    module = CONTENDERS["fastprompt_deep"].module("tiny")
    functions = {name: getattr(module, name) for name in ("tune", "save", "load")}
    return Case(SimpleNamespace(**{**functions, **changes}), task)


def test_a_load_that_forgets(task):
    case = broken(task, load=lambda model, folder: model)
    assert probes.save_and_load(case).startswith("wrong: logits are off by")
    assert probes.save_and_load(broken(task)) == WORKS


def changed(change):
    """A `tune` that does something more to the model."""

    def tune(model, start):
        model = CONTENDERS["fastprompt_deep"].module("tiny").tune(model, start)
        change(model)
        return model

    return tune


def test_checkpointing_that_changes_gradients_or_keeps_everything(task):
    def doubles(model):
        enable = model.gradient_checkpointing_enable

        def worse(**options):
            enable(**options)
            next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: 2 * g)

        model.gradient_checkpointing_enable = worse

    found = probes.checkpointing(broken(task, tune=changed(doubles)), reentrant=False)
    assert found == "wrong: gradients are off by 100.0%"

    def nothing(model):
        model.gradient_checkpointing_enable = lambda **options: None

    found = probes.checkpointing(broken(task, tune=changed(nothing)), reentrant=False)
    assert found == "wrong: it keeps as much as without"


def test_a_generate_that_stops_or_strays(task):
    def strays(model):
        generate = model.generate

        def other(**given):
            out = generate(**given)
            out[:, -2] = (out[:, -2] + 1) % 64
            return out

        model.generate = other

    found = generation.generate(broken(task, tune=changed(strays)))
    assert found.startswith("wrong: ") and "of 16 tokens are not the likeliest" in found

    def stops(model):
        generate = model.generate
        model.generate = lambda **given: generate(**given)[:, :-3]

    found = generation.static_cache(broken(task, tune=changed(stops)))
    assert found == "wrong: 5 tokens came, 8 were asked for"


def test_four_bit_gradients_that_are_wrong_after_an_evaluation(task):
    def repacks(model):
        """As bitsandbytes does on some CPUs: after a forward without gradients."""
        layer = model.model.layers[0].mlp.down_proj

        def damage(module, args, out):
            if not torch.is_grad_enabled() and hasattr(module.weight, "quant_state"):
                module.weight.data[:8] = 0

        layer.register_forward_hook(damage)

    case = broken(task, tune=changed(repacks))
    assert probes.four_bit(case, 1e-3).startswith("wrong: after an evaluation")


def test_errors_are_said():
    assert said(lambda: 1 / 0) == "error: ZeroDivisionError: division by zero"
