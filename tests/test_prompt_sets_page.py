"""What docs/prompt-sets.md shows runs as it stands there."""

import re
from pathlib import Path

import tiny
import torch

import fastprompt
from fastprompt.methods import DeepPrompts

PAGE = Path(__file__).parent.parent / "docs" / "prompt-sets.md"


def test_the_page(tmp_path):
    wide = tiny.build("llama", hidden_size=48, num_attention_heads=6)
    given = dict(
        model=tiny.build("llama"),
        batch=tiny.inputs("llama", batch=3),
        folder=tmp_path,
        features=torch.randn(7, 32),
        another_patch=fastprompt.patch(wide, DeepPrompts(text=4)),
        torch=torch,
    )
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), given)
    patch = given["patch"]
    assert [*patch.sets] == [
        *("default", "legal", "summary", "both", "mean", "third", "again", "means", "classes"),
    ]
    assert patch.in_use == "legal" and len(given["tokens"]) == 3
    assert patch.sets["both"].method.text == 12
    assert 0 < given["left"]["model.layers.1"] < 1
