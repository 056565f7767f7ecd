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
    # 4 bits a weight of 32 layers of 7B and the 23 of CLIP-L that are read, norms and scales aside
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 23 * 12 * 1024**2
    assert sent.split == linear / 2


def test_rings():
    assert Traffic(trained=100, split=0, cards=1).ddp == 0
    assert Traffic(trained=100, split=0, cards=2).ddp == 400  # each sends the whole once
    assert Traffic(trained=100, split=800, cards=4).ddp == 600
    assert Traffic(trained=100, split=800, cards=4).fsdp == 3 / 4 * (1600 + 800)


def test_training_counts_the_same(shared, tmp_path):
    """`fastprompt train --shard`, whose count is held against what is sent, of the same model."""
    pytest.importorskip("PIL")
    from runs import config_of

    from fastprompt.train import prepare_model
    from fastprompt.train.distributed import sent_bytes
    from fastprompt.train.sharding import gathered_bytes

    patch = prepare_model(config_of(shared, tmp_path))
    trained = list(patch.trainable.values())
    split = sum(
        p.numel() * p.element_size()
        for tower in patch.anatomy.towers for block in tower.blocks
        for p in block.layer.parameters() if p.ndim > 1 and not p.requires_grad
    )  # fmt: skip
    for cards in (2, 4, 8):
        own = sent_bytes(trained, cards) + gathered_bytes(patch, cards)
        assert own == Traffic(sum(p.numel() for p in trained), split, cards).fsdp


def test_the_page_has_what_the_command_prints(capsys):
    scaling.main()
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line in page or line.split(": ")[1] in page
