"""The compiled part missing, foreign, cut short or told to be another: torch goes on, and it is
said once."""

import importlib
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastprompt import native, native_elementwise

ops = importlib.import_module("fastprompt.ops.nf4_linear")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
FORMATS = [(kind, nested) for kind in ("nf4", "fp4") for nested in (False, True)]


def test_a_missing_native_part_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastprompt._native", None)  # import raises ImportError
    load = native._load.__wrapped__
    with pytest.warns(UserWarning, match="native part is not usable .*torch serves"):
        module, why = load()
    assert module is None and "_native" in why


def test_a_foreign_native_part_is_refused(monkeypatch):
    foreign = type(sys)("fastprompt._native")
    foreign.ABI, foreign.__file__ = -1, "old.so"
    monkeypatch.setitem(sys.modules, "fastprompt._native", foreign)
    with pytest.warns(UserWarning, match=r"another version: old\.so"):
        assert native._load.__wrapped__()[0] is None


def imported(tmp_path, module=None, **environment):
    """What a process says that uses fastprompt, with a native part of these bytes (None: this one),
    and how often it warns of it."""
    script = """
import warnings, torch
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as said:
    from fastprompt import native, native_elementwise
    from fastprompt.ops.packed import Packed
    from fastprompt.ops.nf4_linear import nf4_linear
    w = Packed(torch.zeros(128, dtype=torch.uint8), torch.ones(16), torch.ones(4), None, None, None,
               64, 1, 4, 64, "nf4")
    assert torch.equal(nf4_linear(torch.ones(2, 64), w), torch.full((2, 4), 64.0))
    nf4_linear(torch.ones(2, 64), w)
    print(native.isa(), native.multipliers(), native.why_missing(), sep="|")
print(sum("fastprompt" in str(w.message) for w in said))
"""
    package = Path(native.__file__).parent
    if module is not None:
        shutil.copytree(package, tmp_path / "fastprompt", ignore=shutil.ignore_patterns("_native*"))
        (tmp_path / "fastprompt" / f"_native{EXTENSION_SUFFIXES[0]}").write_bytes(module)
        package = tmp_path / "fastprompt"
    env = os.environ | {"PYTHONPATH": str(package.parent)} | environment
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said, warned = done.stdout.splitlines()
    return *said.split("|"), int(warned)


@needs_native
def test_a_native_part_that_is_cut_short(tmp_path):
    """The loader itself would die of it."""
    whole = Path(native.compiled()[0].__file__).read_bytes()
    isa, _, why, warned = imported(tmp_path, whole[: len(whole) // 2])
    assert isa == "torch" and "cut short: " in why and warned == 1


@needs_native
def test_without_avx(tmp_path):
    isa, found, why, warned = imported(tmp_path, FASTPROMPT_ISA="portable")
    assert (isa, found, why, warned) == ("portable", "('portable',)", "None", 0)


@pytest.mark.filterwarnings("error")
def test_what_was_asked_for_is_no_warning(monkeypatch):
    monkeypatch.setenv("FASTPROMPT_NATIVE", "0")
    assert native._load.__wrapped__() == (None, "FASTPROMPT_NATIVE=0")


@needs_native
def test_the_best_instruction_set_allowed(monkeypatch):
    module = SimpleNamespace(
        variants=lambda: ["avx512", "avx2", "portable"],
        multipliers=lambda: ["amx", "avx512_bf16", "avx512", "avx2", "portable"],
    )
    monkeypatch.setattr(native, "_load", lambda: (module, None))
    monkeypatch.setattr(native, "_numbers", native._numbers.__wrapped__)
    assert native.isa() == "avx512" and native.multipliers()[0] == "amx"
    monkeypatch.setenv("FASTPROMPT_ISA", "amx")  # what multiplies alone is no choice for all
    with pytest.raises(ValueError, match=r"FASTPROMPT_ISA: want one of .* here, got 'amx'"):
        native.multipliers()
    monkeypatch.setenv("FASTPROMPT_ISA", "avx2")
    assert native.variants() == native.multipliers() == ("avx2", "portable")
    assert native._module(None) == (module, 1) and native._module("portable") == (module, 2)
    assert native._module(None, "multipliers") == (module, 3)
    assert native_elementwise._module(None) == (module, "avx2")
    with pytest.raises(ValueError, match=r"variant: want one of \('avx2', 'portable'\), got 'avx5"):
        native._module("avx512")
    monkeypatch.setenv("FASTPROMPT_ISA", "sse9")
    with pytest.raises(ValueError, match=r"FASTPROMPT_ISA: want one of \['avx512'.*got 'sse9'"):
        native.isa()


def test_without_native(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "not built"))
    assert not native.available() and native.isa() == "torch" and native.why_missing()
    with pytest.raises(RuntimeError, match="not built"):
        native.decode_4bit(torch.empty(2), torch.empty(1), torch.empty(16), torch.empty(1), 64)
