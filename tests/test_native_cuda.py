"""Where csrc/cuda's kernels are not there or do not serve: said, and with what reason."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastprompt import native, native_cuda
from fastprompt.ops import nf4_linear_cuda

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "module, capability, said",
    [
        (SimpleNamespace(CUDA_ARCHS=""), (9, 0), "built without CUDA kernels"),
        (SimpleNamespace(CUDA_ARCHS="86 90"), (7, 5), "sm_86, sm_90; the card is sm_75"),
        (SimpleNamespace(CUDA_ARCHS="86 90"), (8, 0), "the card is sm_80"),
        (SimpleNamespace(CUDA_ARCHS="86 90", cuda_why_not=lambda: "too old"), (8, 9), "too old"),
        (SimpleNamespace(CUDA_ARCHS="86 90", cuda_why_not=lambda: ""), (9, 0), None),
        (None, (9, 0), "not built"),
    ],
)
def test_why_not(monkeypatch, module, capability, said):
    monkeypatch.setattr(native, "_load", lambda: (module, "not built" if module is None else None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    why = native_cuda.why_not(GPU)
    assert why is None if said is None else said in why
    monkeypatch.setenv("FASTPROMPT_CUDA", "0")
    assert native_cuda.why_not(GPU) == "FASTPROMPT_CUDA=0"


@pytest.fixture
def capturing(monkeypatch):
    """Nothing is known of any GPU; a graph is captured while it is not empty."""
    capturing = []
    monkeypatch.setattr(nf4_linear_cuda, "_found", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(nf4_linear_cuda, "_trial", lambda device: "it is wrong")
    return capturing


@pytest.mark.filterwarnings("error")
def test_said_once_for_each_gpu(monkeypatch, capturing):
    why_not, other = nf4_linear_cuda.why_not, torch.device("cuda", 1)
    monkeypatch.setattr(native_cuda, "why_not", lambda device: "too old" if device.index else None)
    with pytest.warns(UserWarning, match=r"not usable on cuda:0 \(it is wrong\); 4-bit weights"):
        assert why_not(GPU) == "it is wrong"
    with pytest.warns(UserWarning, match=r"not usable on cuda:1 \(too old\)"):
        assert why_not(other) == "too old"
    assert why_not(GPU) == "it is wrong" and why_not(other) == "too old"
    assert why_not(torch.device("cpu")) == "a cpu device"


@pytest.mark.filterwarnings("error")
def test_what_was_asked_for_is_no_warning(monkeypatch, capturing):
    monkeypatch.setenv("FASTPROMPT_CUDA", "0")
    assert nf4_linear_cuda.why_not(GPU) == native_cuda.OFF == "FASTPROMPT_CUDA=0"
    monkeypatch.delenv("FASTPROMPT_CUDA")
    monkeypatch.setattr(native, "_load", lambda: (None, native.OFF))
    assert nf4_linear_cuda.why_not(torch.device("cuda", 1)) == native.OFF == "FASTPROMPT_NATIVE=0"


def test_no_trial_while_a_graph_is_captured(monkeypatch, capturing):
    monkeypatch.setattr(native_cuda, "why_not", lambda device: None)
    monkeypatch.setattr(nf4_linear_cuda, "_trial", lambda device: None)
    capturing.append(1)
    assert "capture" in nf4_linear_cuda.why_not(GPU)
    capturing.clear()
    assert nf4_linear_cuda.why_not(GPU) is None
    capturing.append(1)
    assert nf4_linear_cuda.why_not(GPU) is None


def test_no_driver():
    module = native.compiled()[0]
    if module is None or torch.cuda.is_available():
        pytest.skip("needs the compiled part and no driver")
    assert module.cuda_why_not() in (
        "no CUDA driver is found (libcuda.so.1)", "built without CUDA kernels",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"CUDA"):
        module.cuda_launch("nf4_forward_bf16_8", 0, [1, 1, 256], [0] * 9, [64] * 6, 1.0, 0)


@pytest.mark.parametrize(
    "nvcc, said",
    [
        (None, "no nvcc in .*, CUDA_HOME"),
        (
            "echo 'Cuda compilation tools, release 12.4, V12.4.1'",
            "want release 13, got release 12.4",
        ),
        ("echo something else", "want release 13, got no version"),
        ("echo 'release 13.0' && test $1 = --version", "does not work here:\nrelease 13.0"),
        ("echo 'Cuda compilation tools, release 13.2, V13.2.1'", ""),
    ],
)
def test_which_nvcc_is_taken(tmp_path, monkeypatch, nvcc, said):
    (tmp_path / "bin").mkdir()
    if nvcc:
        path = tmp_path / "bin" / "nvcc"
        path.write_text(f"#!/bin/sh\n{nvcc}\n")
        path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("FASTPROMPT_CUDA", raising=False)
    setup = Path(__file__).parent.parent / "setup.py"
    defined = {"__file__": str(setup)}
    exec(setup.read_text().partition("native = Extension(")[0], defined)
    found, why = defined["find_nvcc"]()
    assert (found is None) == bool(said)
    assert re.search(said, why) if said else why == ""
    monkeypatch.setenv("FASTPROMPT_CUDA", "0")
    assert defined["find_nvcc"]() == (None, "FASTPROMPT_CUDA=0")
