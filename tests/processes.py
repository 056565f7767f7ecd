"""Two processes of one job, on this machine."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def two(*command):
    """Runs a Python command in two processes."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*run, *command], env=env, capture_output=True, text=True, timeout=300)
