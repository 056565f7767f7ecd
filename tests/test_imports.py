"""Imports of our own that stand inside functions, where only a rare path would miss them."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("fastprompt", "benchmarks")


@pytest.mark.parametrize("package", OURS)
def test_every_import_finds_its_name(package):
    missing, seen = [], 0
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
                for name in node.names:
                    seen += 1
                    if not _finds(node.module, name.name):
                        missing.append(f"{file.name}: {node.module}.{name.name}")
    assert seen and not missing


def _finds(module: str, name: str) -> bool:
    try:
        return hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None
    except ModuleNotFoundError as e:
        return not (e.name or "").startswith(OURS)  # what an extra brings may be absent
