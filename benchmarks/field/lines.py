"""Lines that a user writes: counted in the file that runs, so that the count cannot drift.

Counted are the lines of imports and of what stands inside functions, as ruff formats them. Not
counted are empty lines, comments, docstrings, and what this benchmark's own shape asks for: a
function's ``def`` line, and ``return name``.
"""

import ast
from pathlib import Path


def count(file: str | Path) -> int:
    """Lines of user code in a contender's file."""
    tree = ast.parse(Path(file).read_text())
    counted: set[int] = set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            counted |= _lines(node)
        elif isinstance(node, ast.FunctionDef):
            counted |= set().union(*map(_lines, filter(_of_the_user, node.body)))
    written = Path(file).read_text().splitlines()
    return sum(not _blank(written[number - 1]) for number in counted)


def _lines(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, node.end_lineno + 1))


def _of_the_user(node: ast.stmt) -> bool:
    if isinstance(node, ast.Return):
        return not isinstance(node.value, ast.Name)
    return not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _blank(line: str) -> bool:
    return not line.strip() or line.strip().startswith("#")
