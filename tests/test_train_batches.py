"""Order, packing and collation; and that packed rows train as the same rows alone."""

import conversations
import numpy as np
import pytest
import tiny
import torch

import fastprompt
from fastprompt.methods import M2PT
from fastprompt.train.batches import ABOUT, Collator, Example, Examples, Order, pack
from fastprompt.train.checking import Problems, Rows, check
from fastprompt.train.preparing import PACKED
from fastprompt.train.templates import IGNORE, ChatTemplate

LENGTHS = np.random.default_rng(0).integers(5, 60, 103)


def test_an_epoch_has_every_row_once_and_depends_on_seed_and_epoch_alone():
    for bucket in (False, True):
        order = Order(LENGTHS, 4, seed=1, bucket=bucket)
        first = list(order)
        assert sorted(first) == list(range(103)) and list(order) == first
        order.set_epoch(1)
        assert list(order) != first and sorted(order) == sorted(first)
        assert list(Order(LENGTHS, 4, seed=2, bucket=bucket)) != first
        again = Order(LENGTHS, 4, seed=1, bucket=bucket)
        again.set_epoch(1)
        assert list(again) == list(order)


def test_buckets_hold_rows_of_similar_length():
    def padding(bucket):
        order = np.array(list(Order(LENGTHS, 4, seed=0, bucket=bucket)))[:100].reshape(-1, 4)
        batches = LENGTHS[order]
        return (batches.max(axis=1, keepdims=True) - batches).sum(), batches.mean(axis=1)

    (loose, _), (tight, means) = padding(False), padding(True)
    assert tight < 0.2 * loose
    assert not (np.diff(means) >= 0).all()  # batches come in no order of length


def test_packing_loses_nothing_and_fits():
    bins = pack(LENGTHS, 64, seed=0)
    assert sorted(np.concatenate(bins)) == list(range(103))
    sums = np.array([LENGTHS[b].sum() for b in bins])
    assert (sums <= 64).all() and sums.mean() > 0.85 * 64
    assert [b.tolist() for b in pack(LENGTHS, 64, seed=0)] == [b.tolist() for b in bins]
    assert [b.tolist() for b in pack(LENGTHS, 64, seed=1)] != [b.tolist() for b in bins]
    many = pack(np.full(1000, 33), 64, seed=0)  # more open bins than are looked at
    assert len(many) == 1000


def example(*ids, pixels=None, **more):
    labels = [IGNORE, *ids[1:]]
    return Example(list(ids), labels, pixels, f"r{ids[0]}", "f:1", **more)


def test_padding_and_packing_of_a_batch():
    image = torch.ones(3, 2, 2)
    rows = [[example(1, 2, 3, pixels=image)], [example(4, 5)]]
    batch = Collator(9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3], [IGNORE, 5, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["pixel_values"].shape == (1, 3, 2, 2) and "position_ids" not in batch
    assert batch[ABOUT]["tokens"] == 5 and batch[ABOUT]["rows"] == ["r1 (f:1)", "r4 (f:1)"]

    rows = [[example(1, 2, 3), example(4, 5)], [example(6, 7, 8)]]
    batch = Collator(9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist()[0] == [IGNORE, 2, 3, IGNORE, 5]
    assert "attention_mask" not in batch and "pixel_values" not in batch
    assert batch[ABOUT]["tokens"] == 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(checked rows, template, processor), some without an image."""
    folder = tmp_path_factory.mktemp("rows")
    path = conversations.write_jsonl(folder / "d.jsonl", conversations.rows(folder, 12))
    processor = conversations.processor()
    template = ChatTemplate(processor, "auto", 4)
    found = check(Rows([str(path)]), template, Problems(), max_length=200)
    return found, template, processor


PROMPTS = M2PT(vision_tokens=3, text_tokens=2)
PACKED_AS = {
    **{family: (family, {}, PROMPTS) for family in PACKED},
    # whose window is shorter than a row
    "window": ("mistral", dict(sliding_window=7), PROMPTS),
    # whose language model keeps transformers' own attention
    "projector": ("llama", {}, M2PT(0, 0)),
}


@pytest.mark.parametrize("name", PACKED_AS)
def test_packed_rows_train_as_rows_alone(name, data, monkeypatch):
    """Loss and every gradient, in float64, of images and texts mixed."""
    monkeypatch.setitem(tiny.TEXT, "vocab_size", 272)
    monkeypatch.setitem(tiny.TEXT, "max_position_embeddings", 512)
    checked, template, processor = data
    family, options, method = PACKED_AS[name]
    for option, value in options.items():
        monkeypatch.setitem(tiny.TEXT, option, value)
    torch.manual_seed(0)
    model = tiny.llava(text=family).double()
    assert options.items() <= vars(model.config.text_config).items()
    model.config.image_token_id = model.model.config.image_token_id = 4
    tiny.in_float64(model)
    trainable = fastprompt.patch(model, method).trainable
    with torch.no_grad():
        for p in trainable.values():
            p.add_(torch.randn_like(p), alpha=0.1)
    model.train()

    def gradients(bins):
        examples = Examples(checked, template, processor, torch.float64, bins)
        batch = Collator(3)([examples[i] for i in range(len(examples))])
        count = batch["labels"].ne(IGNORE).sum()
        del batch[ABOUT]
        loss = model(**batch, num_items_in_batch=count, use_cache=False).loss
        return loss.detach(), torch.autograd.grad(loss, list(trainable.values()))

    bins = pack(checked.lengths, 200, seed=0)
    assert 1 < len(bins) < 8 and len({len(b) for b in bins}) > 1
    want_loss, want = gradients(None)
    # in the bins' order: the sum is the same
    loss, found = gradients(bins)
    assert torch.allclose(loss, want_loss, rtol=1e-10, atol=0)
    for a, b in zip(found, want, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


def test_a_row_that_went_bad_trains_nothing(data):
    checked, template, processor = data
    examples = Examples(checked, template, processor, torch.float32)
    at = next(i for i in range(12) if checked.rows[i].image is not None)
    path = checked.rows[at].image.path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        (bad,) = examples[at]
    finally:
        path.write_bytes(whole)
    assert bad.pixels is None and set(bad.labels) == {IGNORE}
    assert bad.problem.kind == "broken image" and bad.problem.where == checked.rows.where(at)
    batch = Collator(3)([examples[5], [bad]])
    assert batch[ABOUT]["problems"] == [bad.problem]


def test_a_row_that_the_processor_refuses_trains_nothing(data, monkeypatch):
    checked, template, processor = data
    examples = Examples(checked, template, processor, torch.float32)
    refused = next(i for i in range(12) if checked.rows[i].image is not None)
    sizes = []

    def process(images, **more):
        sizes.append(images[0].size)
        raise RuntimeError("not enough memory: you tried to allocate 30105600000 bytes")

    monkeypatch.setattr(examples, "process", process)
    (bad,) = examples[refused]
    assert sizes == [(24, 24)] and bad.pixels is None and set(bad.labels) == {IGNORE}
    assert bad.id == checked.rows[refused].id and bad.problem.where == bad.where
    assert bad.problem.kind == "image processor"
    assert bad.problem.reason.startswith("of 24 × 24 pixels: RuntimeError: not enough memory")
    assert examples[5][0].problem is None  # has no image
