"""DESIGN's code as it stands, on tiny models saved to a folder: 4-bit and dense, and resuming."""

import logging
from importlib.util import find_spec

import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

import fastprompt
from fastprompt.methods import DeepPrompts

NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
NO_BITSANDBYTES = find_spec("bitsandbytes") is None
four_bit = pytest.mark.skipif(NO_BITSANDBYTES, reason="bitsandbytes is not installed")
NF4_KINDS = [pytest.param(kind, marks=four_bit) for kind in ("nf4", "nested")]
KINDS = ["dense", *NF4_KINDS]


def options_for(kind):
    if kind == "dense":
        return {}
    more = dict(bnb_4bit_use_double_quant=kind == "nested")
    return dict(quantization_config=BitsAndBytesConfig(**NF4, **more))


AUTO = {
    "llava": AutoModelForImageTextToText,
    "llama": AutoModelForCausalLM,
    "vit": AutoModelForImageClassification,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in AUTO:
        tiny.build(name).save_pretrained(root / name)
    return root


def rows(name, count=12):
    given = tiny.inputs(name, batch=count)
    if name == "vit":
        given["labels"] = torch.arange(count) % 5
    else:
        given["labels"] = given["input_ids"].clone()
        given["labels"][:, :5] = -100
    return [{k: v[i] for k, v in given.items()} for i in range(count)]


def arguments(folder, **more):
    options = dict(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=6, learning_rate=1e-2,
        save_steps=3, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    return TrainingArguments(**(options | more))


def fresh(folders, name, kind):
    model = AUTO[name].from_pretrained(folders / name, **options_for(kind))
    torch.manual_seed(0)
    patch = fastprompt.patch(model)
    return model, patch


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", AUTO)
def test_train_checkpoint_resume(name, kind, folders, tmp_path, caplog):
    data = rows(name)
    model, patch = fresh(folders, name, kind)
    assert "trains" in patch.report()
    straight = Trainer(model, arguments(tmp_path / "a"), train_dataset=data)
    straight.train()
    fastprompt.save(model, tmp_path / "prompts")
    want = {n: p.detach().clone() for n, p in patch.trainable.items()}

    # every checkpoint holds what trains alone, and no config that would make it look whole
    for step in (3, 6):
        folder = tmp_path / "a" / f"checkpoint-{step}"
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(patch.trainable)
        assert not (folder / "config.json").exists()

    # a new process: fresh model, resumed from the middle, ends where the straight run ended
    model, patch = fresh(folders, name, kind)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-3").rename(tmp_path / "b" / "checkpoint-3")
    resumed = Trainer(model, arguments(tmp_path / "b"), train_dataset=data)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        resumed.train(resume_from_checkpoint=True)
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text
    assert all(torch.equal(p, want[n]) for n, p in patch.trainable.items())
    assert losses(resumed) == losses(straight)

    # and a checkpoint of Trainer's loads like any other
    model, patch = fresh(folders, name, kind)
    fastprompt.load(model, tmp_path / "a" / "checkpoint-6")
    assert all(torch.equal(p, want[n]) for n, p in patch.trainable.items())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("name", AUTO)
def test_frozen_blocks_train_as_the_layers_do(name, kind, bf16, folders, tmp_path):
    found = {}
    for memory in ("off", "speed", "low", "checkpointing"):
        model = AUTO[name].from_pretrained(folders / name, **options_for(kind))
        torch.manual_seed(0)
        how = "auto" if memory == "checkpointing" else memory
        patch = fastprompt.patch(model, memory=how)
        options = arguments(
            tmp_path / memory, bf16=bf16, save_strategy="no",
            gradient_checkpointing=memory == "checkpointing",
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=rows(name))
        trainer.train()
        found[memory] = losses(trainer)
        blocks = patch.blocks.values()
        assert all(b.ran and b.why_not() is None for b in blocks) and bool(blocks) != (how == "off")
    assert found["speed"] == found["low"] == found["checkpointing"]  # to the bit
    assert found["speed"] == pytest.approx(found["off"], rel=2e-2 if bf16 else 1e-4)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_best_model_and_gradient_checkpointing(kind, folders, tmp_path):
    data = rows("llava")
    model, patch = fresh(folders, "llava", kind)
    options = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    trainer = Trainer(model, options, train_dataset=data, eval_dataset=data[:4])
    trainer.train()
    best = trainer.state.best_model_checkpoint
    with safe_open(f"{best}/model.safetensors", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(n), p) for n, p in patch.trainable.items())


def test_resuming_from_prompts_of_another_length_is_refused(folders, tmp_path):
    model = AUTO["llama"].from_pretrained(folders / "llama")
    fastprompt.patch(model, DeepPrompts(text=5))
    Trainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows("llama")).train()
    for text, message in ((4, "want \\[4, 32\\], got \\[5, 32\\]"), (0, "unknown")):
        model = AUTO["llama"].from_pretrained(folders / "llama")
        patch = fastprompt.patch(model, DeepPrompts(text=text))
        before = {n: p.detach().clone() for n, p in patch.trainable.items()}
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows("llama"))
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=True)
        assert all(torch.equal(p, before[n]) for n, p in patch.trainable.items())


def test_a_whole_state_dict_still_loads(folders):
    model, patch = fresh(folders, "llava", "dense")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for p in patch.trainable.values():
            p.zero_()
    model.load_state_dict(state)
    assert all(torch.equal(p, state[n]) for n, p in patch.trainable.items())


def test_undo_takes_the_trainer_glue_away(folders, tmp_path):
    model, patch = fresh(folders, "llama", "dense")
    patch.undo()
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", NF4_KINDS)
@pytest.mark.parametrize("name", AUTO)
def test_undo_gives_a_4bit_model_back_bitwise(name, kind, folders):
    model = AUTO[name].from_pretrained(folders / name, **options_for(kind))
    given = tiny.inputs(name)
    # bitsandbytes repacks a weight at its first evaluation on some CPUs, and changes results by it
    for m in model.modules():
        if hasattr(m, "support_avx512bf16_for_cpu"):
            m.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        before = tiny.output(name, model, given)
    patch = fastprompt.patch(model)
    tiny.output(name, model, given).square().mean().backward()
    with torch.no_grad():
        for p in patch.trainable.values():
            p.add_(p.grad)
        assert not torch.equal(tiny.output(name, model, given), before)
    patch.undo()
    with torch.no_grad():
        assert torch.equal(tiny.output(name, model, given), before)
