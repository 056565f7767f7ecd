import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # a bare checkout runs too
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first `import triton`

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # there are as many workers as cores: more would wait for each other

import pytest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# files that a machine without the package leaves out, and says so
NEEDS = {
    "test_linear4bit.py": "bitsandbytes",
    "test_nf4_linear.py": "bitsandbytes",
    "test_native_missing.py": "bitsandbytes",
    "test_dequantize_4bit.py": "bitsandbytes",
    "test_native.py": "hypothesis",
    "test_prompt_attention_fuzz.py": "hypothesis",
    "test_demo_parts.py": "PIL",
    "test_eval_benchmarks.py": "PIL",
    "test_eval_images.py": "PIL",
    "test_eval_models.py": "PIL",
    "test_eval_run.py": "matplotlib",
    "test_eval_predictions.py": "matplotlib",
    "test_instruction_demo.py": "matplotlib",
    "test_recipes.py": "PIL",
    "test_sweep.py": "matplotlib",
    "test_sweep_results.py": "matplotlib",
    "test_train.py": "PIL",
    "test_train_peers.py": "PIL",
    "test_train_parts.py": "PIL",
    "test_train_processes.py": "PIL",
    "test_train_sharding.py": "PIL",
    "test_train_rows.py": "PIL",
    "test_train_batches.py": "PIL",
    "test_train_templates.py": "jinja2",
}
collect_ignore = [file for file, package in NEEDS.items() if find_spec(package) is None]


def pytest_report_header() -> list[str]:
    return [f"left out: {file} ({NEEDS[file]} is not installed)" for file in collect_ignore]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU the whole suite is the GPU suite; without one, what wants one is skipped."""
    for item in items:
        if DEVICE == "cuda":
            item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder with ``model``, a tiny LLaVA; ``data.jsonl`` (30 rows); ``held.jsonl`` (8)."""
    import conversations

    folder = tmp_path_factory.mktemp("train")
    conversations.save_llava(folder / "model")
    for name, count, seed in (("data", 30, 0), ("held", 8, 1)):
        rows = conversations.rows(folder, count, seed)
        conversations.write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def device() -> str:
    torch.manual_seed(0)
    return DEVICE
