"""What the README says of the tree and of what is served is so."""

import re
from pathlib import Path

import fastprompt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_support_table_names_every_family_and_method():
    table = README.split("## What is supported")[1].split("\n## ")[0]
    for name in fastprompt.supported():
        assert f"`{name}`" in table, name
    for method in ("M2PT", "VPT", "DeepPrompts"):
        assert method in table


def test_every_link_leads_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_file_tree_is_the_tree():
    tree = (ROOT / "docs" / "structure.md").read_text().split("```")[1]
    inside = {name for line in tree.splitlines() if line.startswith("  ")
              for name in re.findall(r"[\w/]+\.py|\w+/", line[:20])}  # fmt: skip
    there = {p.name for p in (ROOT / "fastprompt").glob("*.py")} - {"__init__.py"}
    there |= {f"{p.name}/" for p in (ROOT / "fastprompt").iterdir() if (p / "__init__.py").exists()}
    assert inside == there
    top = re.findall(r"^(\w+)/", tree, re.MULTILINE)
    assert all((ROOT / name).is_dir() for name in top)
