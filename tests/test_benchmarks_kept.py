"""README's table of what a block keeps is what `benchmarks.kept` counts."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import kept

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("name", kept.MODELS)
def test_readme_says_what_is_counted(name):
    own, speed, balanced, low = re.search(rf"^\| {name} \|(.*)\|$", README, re.M)[1].split("|")
    found = kept.row(name)
    said = dict(own=own, speed=speed, balanced=balanced, low=low)
    for key, text in said.items():
        digits = len(text.strip().partition(".")[2])
        assert f"{found[key]:.{digits}f}" == text.strip(), key
    assert found["offload"] == 0


def test_storages_are_counted_once_and_shared_ones_not():
    x, shared = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)

    def run():
        y = x.exp()  # kept by itself, and twice by the products
        return y * (y * shared)

    assert kept.saved_bytes(run, [shared]) == 2 * 4 * 8 * 4  # y, and y · shared
    assert kept.saved_bytes(run) == 3 * 4 * 8 * 4
