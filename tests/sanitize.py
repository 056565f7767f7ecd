"""Runs the tests of csrc on the CPU under the address and undefined-behaviour sanitizers.

    python setup.py build_ext --inplace && python tests/sanitize.py [PYTEST ARGUMENTS]

All its C++ is compiled anew, linked with whatever else setup.py left in build/, and put in front of
the tests in a copy of the repository. Needs GCC on Linux; some ten minutes on one core.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
TESTS = [
    *("tests/test_native.py", "tests/test_native_product.py", "tests/test_nf4_linear.py"),
    *("tests/test_native_elementwise.py", "tests/test_native_activations.py"),
    *("tests/test_native_attention.py", "tests/test_select_prompts.py"),
    # one limits its own memory, of which the sanitizer takes terabytes (none of it real); one's
    # accuracy is that of fused multiply-adds, which this build has fewer of
    *("-k", "not triton and not lack_of_memory and not normal_distribution"),
]


def build(folder: Path) -> None:
    """Replaces the folder's ``_native`` by one whose C++ is watched."""
    listed = ["ninja", "-C", next(ROOT.glob("build/temp.*")), "-t", "commands"]
    *compiling, linking = subprocess.check_output(listed, text=True).splitlines()
    for line in compiling:
        old = shlex.split(line)[-1]
        if not old.endswith(".cpp.o"):
            continue
        new = folder / Path(old).name
        watched = line.replace(" -O3 ", f" {FLAGS} ").replace(old, str(new))
        subprocess.run(watched, shell=True, check=True)
        linking = linking.replace(old, str(new))
    target = next(folder.glob("fastprompt/_native*"))
    before, _, after = linking.partition(" -o ")
    rest = after.partition(" ")[2]
    subprocess.run(f"{before} {FLAGS} -o {target} {rest}", shell=True, check=True)


def library(name: str) -> str:
    return subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="sanitize-") as name:
        folder = Path(name)
        for part in ("fastprompt", "tests", "benchmarks"):
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "pyproject.toml", folder)
        build(folder)
        environment = os.environ | {
            # the first library that a process loads, and what throws its exceptions
            "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are many
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": f"{folder}:{folder / 'tests'}",
        }
        command = [sys.executable, "-m", "pytest", "-qxs", "-n", "0", "-p", "no:cacheprovider"]
        given = sys.argv[1:] or TESTS
        return subprocess.run([*command, *given], cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
