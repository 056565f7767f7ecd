"""Kernels are compiled, not only interpreted: see compile_targets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "script",
    [
        "compile_targets.py",
        "compile_select_targets.py",
        "compile_block_targets.py",
        "compile_fp8_targets.py",
    ],
)
def test_every_kernel_compiles_for_every_card(script):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(HERE.parent)
    run = [sys.executable, HERE / script]
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
