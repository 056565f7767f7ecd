"""Break one line at a time; some test must fail.  python tests/mutate.py [FILE ...]

Every line of the given files that computes something (device code of the Triton kernels and the
vendors' merge by default) gets one change: an operator or a function swapped for another. A copy
of the repository with that one change runs the tests that the file answers to. What survives is
printed; tests/README.md records the last run and says of each survivor why it may live.
"""

import argparse
import io
import os
import shutil
import signal
import sys
import tempfile
import tokenize
from multiprocessing import get_context
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}

import pytest
import torch._dynamo.testing  # noqa: F401 (so that no child imports these again)
import transformers  # noqa: F401
import triton.testing  # noqa: F401

ROOT = Path(__file__).parent.parent
OPS = "fastprompt/ops/"
TESTS = [  # in an order in which most lines are noticed soon
    "tests/test_prompt_attention_sets.py", "tests/test_prompt_attention.py", "tests/test_vendors.py"
]  # fmt: skip
SLOW = ("many_short", "decoding", "own_set", "checkpointing", "bit_for_bit")  # these last
TRITON = "triton and not float16 and not bfloat16 and not long_sums and not not_hidden and not wide"
FILES = {  # file -> what selects its tests
    OPS + "prompt_attention_kernels.py": TRITON,
    OPS + "prompt_attention_gradients.py": TRITON + " and not decoding and not many_short",
    OPS + "prompt_attention_triton.py": TRITON,
    OPS + "prompt_attention_merge.py": "vendor",
    OPS + "products.py": "vendor",
    OPS + "norms_triton.py": "triton and not float16 and not dtype1",
    OPS + "activations_triton.py": "triton and not float16 and not dtype1",
    OPS + "rope_triton.py": "triton and not float16 and not dtype1",
    OPS + "dequantize_4bit_triton.py": "triton",
}
OWN_TESTS = {  # of those that TESTS are not about
    OPS + "norms_triton.py": "tests/test_norms.py",
    OPS + "activations_triton.py": "tests/test_activations.py",
    OPS + "rope_triton.py": "tests/test_rope.py",
    OPS + "dequantize_4bit_triton.py": "tests/test_dequantize_4bit.py",
}
SWAPS = {
    "+": "-", "-": "+", "*": "+", "//": "*", "/": "*", "%": "+", "<": "<=", "<=": "<", ">": ">=",
    ">=": ">", "&": "|", "+=": "-=", "*=": "+=", "==": "!=", "and": "or", "or": "and",
    "exp2": "exp", "log2": "log", "exp": "exp2", "log": "log2", "maximum": "minimum", "minimum":
    "maximum", "max": "min", "min": "max", "sum": "max", "True": "False", "False": "True",
    "exp_": "exp2_", "mul_": "add_", "sub_": "add_", "amax": "amin", "logaddexp": "maximum",
}  # fmt: skip
SURVIVED = "SURVIVED"
SKIP = ("import", "@", '"""', "assert", "#", "def ", "raise")


def mutations(source: str) -> list[tuple[int, str, str]]:
    """(line number, the line, the line changed), one for each line that computes."""
    lines, found, inside = [*source.splitlines(), ""], {}, False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        line = lines[row - 1]
        if token.type == tokenize.NAME and token.string == "def":
            inside = True
        if not inside or row in found or line.strip().startswith(SKIP):
            continue
        swap = SWAPS.get(token.string)
        if swap is None or swap == token.string or token.type not in (tokenize.OP, tokenize.NAME):
            continue
        before = line[:column].rstrip()
        if token.string in "+-*" and (not before or before[-1] in "(,=[:*"):
            continue  # a sign, or unpacking
        found[row] = line[:column] + swap + line[column + len(token.string) :]
    return [(row, lines[row - 1], new) for row, new in sorted(found.items())]


def copy_of_the_repository() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    for part in ("fastprompt", "tests", "benchmarks", "pyproject.toml"):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    return folder


class SlowLast:
    """A plugin of pytest's: most lines are noticed by a quick test."""

    @staticmethod
    def pytest_collection_modifyitems(items: list) -> None:
        items.sort(key=lambda item: any(word in item.name for word in SLOW))


def survives(job: tuple[str, int, str, str]) -> bool:
    """Runs in a process of its own, forked from one that has torch already."""
    file, row, _, new = job
    folder = copy_of_the_repository()
    path = folder / file
    lines = path.read_text().splitlines(keepends=True)
    lines[row - 1] = new + "\n"
    path.write_text("".join(lines))
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.stdout = sys.stderr = io.StringIO()
    signal.alarm(3600)  # a loop without end is noticed, too
    selection = [
        "-k",
        FILES[file],
        "-x",
        "-q",
        "--assert=plain",
        "-p",
        "no:logging",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--tb=no",
    ]
    try:
        tests = [OWN_TESTS[file]] if file in OWN_TESTS else TESTS
        return pytest.main([*selection, *tests], plugins=[SlowLast]) != pytest.ExitCode.TESTS_FAILED
    finally:
        shutil.rmtree(folder)


def attempt(job: tuple[str, int, str, str]) -> tuple[tuple, str]:
    """What became of it, in a child that may crash or hang: a wild pointer is noticed, too."""
    child = os.fork()
    if child == 0:
        os._exit(0 if survives(job) else 1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):  # crashed, or took an hour (SIGALRM)
        return job, signal.Signals(os.WTERMSIG(status)).name
    return job, SURVIVED if os.WEXITSTATUS(status) == 0 else "killed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=list(FILES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--skip", type=int, default=0, help="so many lines are done already")
    given = parser.parse_args()
    jobs = [(f, *m) for f in given.files for m in mutations((ROOT / f).read_text())][given.skip :]
    lives = 0
    with get_context("fork").Pool(given.jobs, maxtasksperchild=1) as pool:
        # unbroken, everything must pass, or nothing below means anything
        first = {f: (ROOT / f).read_text().splitlines()[0] for f in given.files}
        whole = {(FILES[f], OWN_TESTS.get(f)): (f, 1, first[f], first[f]) for f in given.files}
        controls = pool.map_async(attempt, whole.values())
        for (file, row, old, new), word in pool.imap(attempt, jobs):
            lives += word == SURVIVED
            print(f"{word} {file}:{row}: {old.strip()}  ->  {new.strip()}", flush=True)
        if not all(word == SURVIVED for _, word in controls.get()):
            raise SystemExit("tests fail before anything is broken: the list above means nothing")
    print(f"{len(jobs)} lines broken, {len(jobs) - lives} noticed, {lives} not")


if __name__ == "__main__":
    main()
