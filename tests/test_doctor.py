"""``fastprompt doctor``: a machine that works is well, and what is broken is named."""

import subprocess
import sys

import pytest
import torch

import fastprompt
from fastprompt import doctor, native, ops
from fastprompt.__main__ import main


def test_this_machine_is_well(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert fastprompt.report() in said and "WRONG" not in said
    for op in ("prompt_attention, bfloat16", "select_prompts", "rms_norm", "4-bit weights"):
        assert op in said


@pytest.mark.parametrize(
    ("op", "line"),
    [
        ("prompt_attention", "prompt_attention, float32"),
        ("rms_norm", "rms_norm, bfloat16"),
        ("nf4_linear", "4-bit weights"),
    ],
)
def test_a_kernel_that_is_wrong_is_named(monkeypatch, capsys, op, line):
    right = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args, **options: right(*args, **options) * 1.1)
    assert main(["doctor"]) == 1
    wrong = [x for x in capsys.readouterr().out.splitlines() if "WRONG" in x]
    assert any(line in x for x in wrong) and all(op in x or "4-bit" in x for x in wrong)


def test_wrong_prompts_are_named(monkeypatch):
    def unsorted(query, keys, prompts, k):
        indices = torch.arange(k).expand(len(query), k)
        return None, indices, torch.zeros(len(query), k)

    monkeypatch.setattr(ops, "select_prompts", unsorted)
    text, well = doctor.examine()
    assert not well and "the best cosines are missed" in text


def test_what_raises_does_not_hide_the_rest(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(ops, "rms_norm", broken)
    text, well = doctor.examine()
    assert not well and "WRONG: RuntimeError: no kernel image\n" in text
    assert "4-bit weights against bitsandbytes'" in text.splitlines()[-1]


def test_a_missing_compiled_part_is_said(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "not built here"))
    assert "missing, not built here" in fastprompt.report()


def test_the_command_line():
    run = [sys.executable, "-m", "fastprompt", "operate"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'operate'" in done.stderr
