"""Break one line at a time; some test must fail.  python tests/mutate.py [FILE ...]

Every line of the given files that computes something (device code of the Triton kernels, the
vendors' merge, csrc's attention, 4-bit products and elementwise work by default) gets one change:
an operator or a function swapped for another. A copy of the repository with that one change runs
the tests that the file answers to (C++ is compiled for this machine's best instruction set alone,
and linked with what `setup.py build_ext --inplace` left in build/). What survives is printed;
tests/README.md records the last run and says of each survivor why it may live.
"""

import argparse
import functools
import io
import os
import re
import shutil
import signal
import subprocess
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
    OPS + "quantize_rows_triton.py": "triton",
    OPS + "fp8_linear_triton.py": "triton",
    "csrc/attention_blocks.h": "avx512 or avx2 or neon",
    "csrc/attention_single.h": "(avx512 or avx2 or neon) and (single or sets_of)",
    "csrc/norms_blocks.h": "(avx512 or avx2 or neon) and not activations and not rotation",
    "csrc/activations_blocks.h": "(avx512 or avx2 or neon) and not norm",
    "csrc/rotation_blocks.h": "(avx512 or avx2 or neon) and not norm and not activations",
    "csrc/rows.h": "avx512 or avx2 or neon",
    "csrc/product_blocks.h": "avx512 or avx2 or neon",
    "csrc/product_panels.h": "avx512_bf16",
    "csrc/product_amx.cpp": "amx",
    "csrc/product_bf16.cpp": "avx512_bf16",
}
OWN_TESTS = {  # of those that TESTS are not about
    OPS + "norms_triton.py": "tests/test_norms.py",
    OPS + "activations_triton.py": "tests/test_activations.py",
    OPS + "rope_triton.py": "tests/test_rope.py",
    OPS + "dequantize_4bit_triton.py": "tests/test_dequantize_4bit.py",
    OPS + "quantize_rows_triton.py": "tests/test_fp8.py",
    OPS + "fp8_linear_triton.py": "tests/test_fp8.py",
    "csrc/attention_blocks.h": "tests/test_native_attention.py",
    "csrc/attention_single.h": "tests/test_native_attention.py",
    "csrc/norms_blocks.h": "tests/test_native_elementwise.py",
    "csrc/activations_blocks.h": (
        "tests/test_native_activations.py tests/test_native_elementwise.py"
    ),
    "csrc/rotation_blocks.h": "tests/test_native_elementwise.py",
    "csrc/rows.h": "tests/test_native_elementwise.py",
    "csrc/product_blocks.h": "tests/test_native_product.py",
    "csrc/product_panels.h": "tests/test_native_product.py",
    "csrc/product_amx.cpp": "tests/test_native_product.py",
    "csrc/product_bf16.cpp": "tests/test_native_product.py",
}
ELEMENTWISE = ("norms", "activations", "rotation", "rows")  # what csrc/elementwise_*.cpp include
SWAPS = {
    "+": "-", "-": "+", "*": "+", "//": "*", "/": "*", "%": "+", "<": "<=", "<=": "<", ">": ">=",
    ">=": ">", "&": "|", "+=": "-=", "*=": "+=", "==": "!=", "and": "or", "or": "and",
    "exp2": "exp", "log2": "log", "exp": "exp2", "log": "log2", "maximum": "minimum", "minimum":
    "maximum", "max": "min", "min": "max", "sum": "max", "True": "False", "False": "True",
    "exp_": "exp2_", "mul_": "add_", "sub_": "add_", "amax": "amin", "logaddexp": "maximum",
}  # fmt: skip
CPP = re.compile(r"(?<= )(&&|\|\||[=!<>+*-]=|[-+*/%<>])(?= )|\b(most|least|true|false|memset)\b")
CPP_SWAPS = SWAPS | {
    "&&": "||", "||": "&&", "!=": "==", "-=": "+=", "most": "least", "least": "most",
    "true": "false", "false": "true", "memset": "(void)sizeof",
}  # fmt: skip
WORDS = SURVIVED, KILLED, BROKEN = "SURVIVED", "killed", "does not compile"
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


def cpp_mutations(source: str) -> list[tuple[int, str, str]]:
    """`mutations` of C++; a line may hold several operators, and the first is changed."""
    found = []
    for row, line in enumerate(source.splitlines(), 1):
        code = line.partition("//")[0]
        swap = CPP.search(code)
        if swap and not code.lstrip().startswith(("#", "template", "constexpr", "using")):
            new = line[: swap.start()] + CPP_SWAPS[swap.group()] + line[swap.end() :]
            found.append((row, line, new))
    return found


@functools.cache
def cpp_commands(file: str) -> tuple[str, str, str]:
    """How setup.py's ninja compiles what the file is part of (a header: for this machine's best
    instruction set), into which object, and how it links."""
    ask = [sys.executable, "-c", "from fastprompt import native; print(native.isa())"]
    isa = subprocess.check_output(ask, cwd=ROOT, text=True).strip()
    listed = ["ninja", "-C", next(ROOT.glob("build/temp.*")), "-t", "commands"]
    lines = subprocess.check_output(listed, text=True).splitlines()
    unit = Path(file).stem.partition("_")[0]
    unit = "elementwise" if unit in ELEMENTWISE else unit
    isa = "bf16" if file.endswith("panels.h") else isa
    source = f"{unit}_{isa}.cpp" if file.endswith(".h") else Path(file).name
    compiling = next(line for line in lines if line.endswith(f"{source}.o"))
    return compiling.replace(" -O3 ", " -O1 "), compiling.split()[-1], lines[-1]


def compile_cpp(folder: Path, file: str) -> bool:
    """Puts the folder's own object behind its `_native`; False where it does not compile."""
    compiling, old, linking = cpp_commands(file)
    own, target = folder / "own.o", next(folder.glob("fastprompt/_native*"))
    compiling = compiling.replace(f"{ROOT}/csrc", f"{folder}/csrc").replace(old, str(own))
    linking = re.sub(r"-o \S+", f"-o {target}", linking.replace(old, str(own)))
    target.unlink()
    done = subprocess.run(compiling, shell=True, capture_output=True)
    return done.returncode == 0 and not subprocess.run(linking, shell=True, check=True).returncode


def copy_of_the_repository() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    for part in ("fastprompt", "tests", "benchmarks", "csrc", "pyproject.toml"):
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


def outcome(job: tuple[str, int, str, str]) -> str:
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
    signal.alarm(300 if file.startswith("csrc") else 3600)  # a loop without end is noticed, too
    selection = ["-k", FILES[file], "-x", "-q", "--assert=plain", "--tb=no"]
    for plugin in ("logging", "cacheprovider", "xdist", "faulthandler"):
        selection += ["-p", f"no:{plugin}"]
    try:
        if file.startswith("csrc") and not compile_cpp(folder, file):
            return BROKEN
        tests = OWN_TESTS[file].split() if file in OWN_TESTS else TESTS
        failed = (
            pytest.main([*selection, *tests], plugins=[SlowLast]) == pytest.ExitCode.TESTS_FAILED
        )
        return KILLED if failed else SURVIVED
    finally:
        shutil.rmtree(folder)


def attempt(job: tuple[str, int, str, str]) -> tuple[tuple, str]:
    """What became of it, in a child that may crash or hang: a wild pointer is noticed, too."""
    child = os.fork()
    if child == 0:
        os._exit(WORDS.index(outcome(job)))
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):  # crashed, or took an hour (SIGALRM)
        return job, signal.Signals(os.WTERMSIG(status)).name
    return job, WORDS[os.WEXITSTATUS(status)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=list(FILES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--skip", type=int, default=0, help="so many lines are done already")
    given = parser.parse_args()
    texts = {f: (ROOT / f).read_text() for f in given.files}
    found = {
        f: (cpp_mutations if f.startswith("csrc") else mutations)(text) for f, text in texts.items()
    }
    jobs = [(f, *m) for f in given.files for m in found[f]][given.skip :]
    words = []
    for file in given.files:
        if file.startswith("csrc"):
            cpp_commands(file)  # asked for once, before anything is forked
    with get_context("fork").Pool(given.jobs, maxtasksperchild=1) as pool:
        # unbroken, everything must pass, or nothing below means anything
        first = {f: text.splitlines()[0] for f, text in texts.items()}
        whole = {(FILES[f], OWN_TESTS.get(f)): (f, 1, first[f], first[f]) for f in given.files}
        controls = pool.map_async(attempt, whole.values())
        for (file, row, old, new), word in pool.imap(attempt, jobs):
            words.append(word)
            print(f"{word} {file}:{row}: {old.strip()}  ->  {new.strip()}", flush=True)
        if not all(word == SURVIVED for _, word in controls.get()):
            raise SystemExit("tests fail before anything is broken: the list above means nothing")
    lives, broken = words.count(SURVIVED), words.count(BROKEN)
    print(f"{len(words) - broken} lines broken, {len(words) - broken - lives} noticed, {lives} not")


if __name__ == "__main__":
    main()
