"""What many cards send: the arithmetic against sizes known from elsewhere."""

from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import Traffic


def test_numbers_of_llava_7b():
    sent = scaling.traffic("7B", 8)
    prompts = 10 * 4096 * 32 + 20 * 1024 * 23
    projector = (1024 * 4096 + 4096) + scaling.LAST
    assert sent.trained == prompts + projector
    # 4.127 bits a weight of 32 layers of 7B and 24 of CLIP-L, norms aside
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 24 * 12 * 1024**2
    assert sent.packed == pytest.approx(linear * 4.127 / 8, rel=1e-3)


def test_rings():
    assert Traffic(trained=100, packed=0, cards=1).ddp == 0
    assert Traffic(trained=100, packed=0, cards=2).ddp == 400  # each sends the whole once
    assert Traffic(trained=100, packed=800, cards=4).ddp == 600
    assert Traffic(trained=100, packed=800, cards=4).fsdp == 3 / 4 * (1600 + 400)


def test_the_page_has_what_the_command_prints(capsys):
    scaling.main()
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line in page or line.split(": ")[1] in page
