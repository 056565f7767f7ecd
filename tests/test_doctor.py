"""``fastprompt doctor``: a machine that works is well, and what is broken is named."""

import subprocess
import sys

import pytest
import torch

import fastprompt
from fastprompt import doctor, native, native_cuda, ops
from fastprompt.__main__ import main
from fastprompt.ops import nf4_linear_cuda


def test_this_machine_is_well(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert fastprompt.report() in said and "WRONG" not in said
    for op in (*set(ops.__all__) - {"sum_of", "nf4_linear", "quantize_rows"}, "4-bit weights"):
        assert f"cpu  {op}" in said
    assert "prompt_attention, 4-D mask, bfloat16" in said


@pytest.mark.parametrize(
    ("op", "line"),
    [
        ("prompt_attention", "prompt_attention, float32"),
        ("rms_norm", "rms_norm, bfloat16"),
        ("layer_norm", "layer_norm, float32"),
        ("swiglu", "swiglu, bfloat16"),
        ("gelu", "gelu, float32"),
        ("cosine_logits", "cosine_logits, bfloat16"),
        ("linear_cross_entropy", "linear_cross_entropy, bfloat16"),
        ("dequantize_4bit", "dequantize_4bit against"),
        ("nf4_linear", "4-bit weights"),
    ],
)
def test_a_kernel_that_is_wrong_is_named(monkeypatch, capsys, op, line):
    right = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args, **options: right(*args, **options) * 1.1)
    assert main(["doctor"]) == 1
    wrong = [x for x in capsys.readouterr().out.splitlines() if "WRONG" in x]
    assert any(line in x for x in wrong) and all(op in x or "4-bit" in x for x in wrong)


def test_a_rotation_that_is_wrong_is_named(monkeypatch):
    monkeypatch.setattr(ops, "rope", lambda q, k, cos, sin, right=ops.rope: right(q, k, cos, -sin))
    wrong = [line for line in doctor.examine()[0].splitlines() if "WRONG" in line]
    assert len(wrong) == 2 and all("rope, " in line for line in wrong)


def test_a_card_without_fp8_is_told_of(monkeypatch):
    monkeypatch.setattr(doctor, "report", str)
    monkeypatch.setattr(doctor, "_devices", lambda: ["cuda:0"])
    monkeypatch.setattr(doctor, "_checks", lambda device: [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    text, well = doctor.examine()
    assert well and "cuda:0  fp8: not here, capability 8.0" in text


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


def test_cubins_are_listed(monkeypatch):
    monkeypatch.setattr(native_cuda, "archs", lambda: (80, 90))
    assert "few tokens): for sm_80, sm_90" in fastprompt.report()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    reasons = {0: None, 1: "too old"}
    monkeypatch.setattr(nf4_linear_cuda, "why_not", lambda device: reasons[device.index])
    assert doctor._cuda_kernels() == "for sm_80, sm_90; cuda:0 active; cuda:1 not used, too old"
    monkeypatch.setattr(native_cuda, "archs", tuple)
    assert doctor._cuda_kernels().startswith("none, the compiled part is missing")


def test_the_command_line():
    run = [sys.executable, "-m", "fastprompt", "operate"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'operate'" in done.stderr
