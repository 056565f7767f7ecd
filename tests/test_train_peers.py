"""The peers of prompts through the same trainer; prompts in some blocks, that begin from data."""

import json

import pytest
import torch
from runs import QUIET, At, config_of, same, train, trained

import fastprompt
from fastprompt.prefill import prefill
from fastprompt.train import make_trainer, prepare_data, prepare_model
from fastprompt.train.progress import peak_memory


class Stop(Exception):
    pass


def stop():
    raise Stop


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_a_peer_resumes_exactly(method, shared, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")
    more = dict(method=method, max_steps=4, save_every=2, learning_rate=1e-3, hold_out=6)
    want = train(config_of(shared, tmp_path / "a", **more))
    config = config_of(shared, tmp_path / "b", **more)
    with pytest.raises(Stop):
        train(config, callbacks=[At(3, stop)])
    assert not (tmp_path / "b" / "result.json").exists()
    result = train(config, resume=True)
    assert result.losses == want.losses and len(want.losses) == 4
    assert same(trained(result), trained(want))
    model = prepare_model(config_of(shared, tmp_path / "c")).model
    fastprompt.patch_of(model).undo()
    fastprompt.load(model, tmp_path / "b" / "prompts")
    assert same({n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
                trained(want))  # fmt: skip


def test_the_result_of_a_run(shared, tmp_path):
    config = config_of(
        shared, tmp_path / "a", max_steps=5, save_every=3, hold_out=6, layers="first",
    )  # fmt: skip
    result = train(config)
    said = json.loads((tmp_path / "a" / "result.json").read_text())
    patch = fastprompt.patch_of(result.model)
    assert said["trainable"] == sum(p.numel() for p in patch.trainable.values())
    assert said["parameters"] == sum(p.numel() for p in result.model.parameters())
    assert len(patch.prompts) == 2 and said["steps"] == 5
    assert sorted(result.evaluations) == [3, 5]  # the end is always asked
    assert said["held_out"] == result.evaluations[5]
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    seconds = [e["seconds"] for e in entries]
    assert seconds == sorted(seconds) and seconds[0] > 0 and said["seconds"] == seconds[-1]
    assert 2**20 < said["memory"] <= peak_memory()


def test_seconds_count_on(shared, tmp_path):
    """Those of a process that was stopped count, as far as its steps do."""
    config = config_of(shared, tmp_path, max_steps=4, save_every=2)
    with pytest.raises(Stop):
        train(config, callbacks=[At(3, stop)])
    path = tmp_path / "metrics.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        entry |= {"seconds": entry["seconds"] + 1000, "memory": 2**60}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    train(config, resume=True)
    said = json.loads((tmp_path / "result.json").read_text())
    assert 1000 < said["seconds"] < 1600 and said["memory"] == 2**60


def test_prompts_that_begin_from_the_data(shared, tmp_path):
    config = config_of(shared, tmp_path, init="prefill", vision_tokens=5, text_tokens=70)
    data, patch = prepare_data(config, QUIET), prepare_model(config)
    random = [p.tokens.clone() for p in patch.prompts.values()]
    make_trainer(config, data, patch)
    got = [p.tokens.detach().clone() for p in patch.prompts.values()]
    assert not any(torch.equal(a, b) for a, b in zip(random, got, strict=True))
    # the first rows of the data, without the places of images: one row alone is too short
    examples = data.examples(config, data.train, packed=False)
    first = [examples[i][0] for i in range(8)]
    ids = [i for e in first for i in e.ids if i != 4]
    assert len(first[0].ids) < 70 <= len(ids)
    pixels = torch.stack([e.pixels for e in first if e.pixels is not None][:5])
    prefill(patch, torch.tensor(ids), pixels)
    assert all(torch.equal(p.tokens, b) for p, b in zip(patch.prompts.values(), got, strict=True))
