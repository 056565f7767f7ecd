"""What a run is made of: methods, learning rates, held-out scores, bad rows, what is said."""

import io
import json
import math
import os
import re
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import conversations
import pytest
import tiny
import torch
import zoo
from rich.console import Console
from runs import QUIET, At, config_of, same, train, trained
from transformers import AutoModelForImageTextToText, TrainerCallback, TrainingArguments
from transformers.quantizers.quantizers_utils import should_convert_module

import fastprompt
from fastprompt.__main__ import main
from fastprompt.loading import four_bit
from fastprompt.train import (
    TrainingError,
    make_trainer,
    prepare_data,
    prepare_model,
    preparing,
    progress,
    run,
    showing,
)
from fastprompt.train import options as options_file
from fastprompt.train import train as train_aloud
from fastprompt.train.progress import read_metrics
from fastprompt.train.rows import Problem


def test_held_out_loss_and_accuracy_are_of_rows(shared, tmp_path):
    """Against one row at a time, whatever the batches."""
    config = config_of(shared, tmp_path, eval_data=[str(shared / "held.jsonl")], batch_size=3)
    data = prepare_data(config, QUIET)
    patch = prepare_model(config)
    trainer = make_trainer(config, data, patch)
    metrics = trainer.evaluate()
    losses, right = [], []
    for i in range(len(data.held_out)):
        batch = trainer.data_collator([trainer.eval_dataset[i]])
        labels = batch.pop("labels")[0, 1:]
        del batch["about"]
        given = {name: x.to(patch.model.device) for name, x in batch.items()}
        with torch.no_grad():
            logits = patch.model.eval()(**given).logits[0, :-1].double().cpu()
        due = labels != -100
        losses += torch.nn.functional.cross_entropy(
            logits[due], labels[due], reduction="none"
        ).tolist()
        right.append(bool((logits.argmax(-1) == labels)[due].all()))
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics["eval_accuracy"] == sum(right) / len(right)


def test_groups_have_their_own_learning_rate(shared, tmp_path):
    config = config_of(
        shared, tmp_path, projector_lr=0.0, head_lr=3e-3, train_lm_head=True, warmup=0, max_steps=1
    )
    data = prepare_data(config, QUIET)
    patch = prepare_model(config)
    before = {n: p.detach().clone() for n, p in patch.trainable.items()}
    trainer = make_trainer(config, data, patch)
    trainer.train()
    rates = [(g["initial_lr"], len(g["params"])) for g in trainer.optimizer.param_groups]
    assert rates == [(1e-2, 5), (0.0, 4), (3e-3, 1)]
    for name, p in patch.trainable.items():
        moved = (p - before[name]).abs().max()
        # Adam's first step is the learning rate itself
        rate = 1e-2 if "tokens" in name else 0 if "projector" in name else 3e-3
        assert moved <= rate * 1.01 and (rate == 0) == (moved == 0), name


def test_the_optimiser_and_its_schedule(shared, tmp_path):
    """The paper's: AdamW without decay, a linear warm-up, a cosine; by what is logged."""
    config = config_of(shared, tmp_path / "a", max_steps=10, warmup=0.2)
    train(config)
    rates = [e["learning_rate"] for e in read_metrics(tmp_path / "a" / "metrics.jsonl")]
    cosine = [0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(8)]
    assert rates == pytest.approx([1e-2 * x for x in [0, 0.5, *cosine]])

    data, patch = prepare_data(config, QUIET), prepare_model(config)
    for decay in (0.0, 0.1):
        trainer = make_trainer(replace(config, weight_decay=decay), data, patch)
        optimiser = trainer.create_optimizer()
        assert type(optimiser) is torch.optim.AdamW
        assert {g["weight_decay"] for g in optimiser.param_groups} == {decay}


METHODS = {
    "m2pt": {"vision", "language", "projector"},
    "vpt": {"vision"},
    "text": {"language"},
    "projector": {"projector"},
    "prefix": {"language"},
    "lora": {"language"},
    "full": {"language", "projector"},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_what_they_name(method, shared, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")
    config = config_of(shared, tmp_path, method=method)
    patch = prepare_model(config)
    parts = {w for w in METHODS["m2pt"] for name in patch.trainable if f".{w}" in f".{name}"}
    parts |= {"projector"} if any("multi_modal_projector" in n for n in patch.trainable) else set()
    assert parts == METHODS[method]


def test_a_prefix_has_its_own_layers_and_beginning(shared, tmp_path):
    options = dict(method="prefix", text_tokens=50)
    first = prepare_model(config_of(shared, tmp_path, layers="first", **options)).prompts
    (std,) = (p.tokens.std().item() for p in first.values())
    assert std == pytest.approx(1, rel=0.1)  # as PEFT's, where nothing is said
    prompts = prepare_model(config_of(shared, tmp_path, init="xavier", **options)).prompts
    assert len(prompts) > 1 and all(p.tokens.abs().max() < 0.5 for p in prompts.values())


def test_rows_are_no_longer_than_the_model_reads(shared, tmp_path):
    """Its context is 512 tokens."""
    assert prepare_data(config_of(shared, tmp_path), QUIET).max_length == 512
    assert prepare_data(config_of(shared, tmp_path, max_length=90), QUIET).max_length == 90


def test_stage_1_speaks_plainly(shared, tmp_path):
    config = config_of(shared, tmp_path, method="projector")
    assert prepare_data(config, QUIET).template.name == "plain"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bit(shared, tmp_path):
    config = config_of(shared, tmp_path / "a", four_bit=True, max_steps=3, memory="low")
    result = train(config)
    model = result.model
    assert model.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    dense = AutoModelForImageTextToText.from_pretrained(config.model)
    exact = dense.model.multi_modal_projector.linear_2.weight
    prepare = prepare_model(replace(config, out="b"))
    began = prepare.model.model.multi_modal_projector.linear_2.weight
    assert torch.equal(began, exact)  # it was never in 4 bits
    assert not torch.equal(model.model.multi_modal_projector.linear_2.weight, exact)
    fastprompt.load(prepare.model, tmp_path / "a" / "prompts")
    assert same({n: p.detach() for n, p in prepare.trainable.items()}, trained(result))


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "idefics3"])
def test_projectors_are_not_loaded_in_four_bit(name):
    model = zoo.build(name)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    dense = four_bit(torch.bfloat16).llm_int8_skip_modules
    whole = {n for n in names if not should_convert_module(n, dense)}
    projector = fastprompt.families.anatomy(model).parts["projector"]
    assert whole == {n for n in names if n.startswith(projector) or n == "lm_head"}
    assert len(whole) > 1


def test_a_loss_that_is_none_is_fatal_or_skipped(shared, tmp_path):
    config = config_of(shared, tmp_path / "a", max_steps=6)

    def spoil(patch):
        """The 3rd step computes with infinities."""
        calls = []

        def hook(module, given):
            calls.append(1)
            return (given[0] * torch.inf,) if len(calls) == 3 else None

        patch.model.model.language_model.norm.register_forward_pre_hook(hook)

    def run(on_nan):
        settings = replace(config, on_nan=on_nan)
        data = prepare_data(settings, QUIET)
        patch = prepare_model(settings)
        spoil(patch)
        seen = []
        watch = At(2, lambda: seen.append({n: p.clone() for n, p in patch.trainable.items()}))
        trainer = make_trainer(settings, data, patch, [watch])
        return trainer, patch, seen

    trainer, patch, seen = run("fatal")
    with pytest.raises(
        TrainingError, match=r"step 3: the loss is nan; its rows: row-0-\d+ \(.*:\d+"
    ):
        trainer.train()
    assert same(seen[0], {n: p.detach() for n, p in patch.trainable.items()})
    assert trainer.state.global_step == 2

    trainer, patch, seen = run("skip")
    after = At(3, lambda: seen.append({n: p.clone() for n, p in patch.trainable.items()}))
    trainer.add_callback(after)
    trainer.train()
    assert same(*seen) and trainer.state.global_step == 6
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True, True, True]
    assert [s[:7] for s in trainer.skipped] == ["step 3:"]
    assert all(p.isfinite().all() for p in patch.trainable.values())


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_leaves_its_step_out(clip, shared, tmp_path):
    config = config_of(shared, tmp_path, max_steps=4, on_nan="skip", clip=clip, save_every=0)
    data, patch, calls = prepare_data(config, QUIET), prepare_model(config), []

    def spoil(grad):
        calls.append(1)
        return grad * torch.inf if len(calls) == 3 else grad

    prompt = next(iter(patch.prompts.values())).tokens
    prompt.register_hook(spoil)
    seen = []
    watch = [At(i, lambda: seen.append(prompt.detach().clone())) for i in (2, 3, 4)]
    trainer = make_trainer(config, data, patch, watch)
    trainer.train()
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    (said,) = trainer.skipped
    assert said.startswith("step 3: the gradient is not finite; its rows: row-0-")


def test_one_process_takes_one_card_of_several(shared, tmp_path, monkeypatch):
    def on_cards(**options):
        return TrainingArguments(**options | dict(use_cpu=False))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or they would be set up
    monkeypatch.setattr(options_file, "TrainingArguments", on_cards)
    assert on_cards(output_dir=str(tmp_path)).n_gpu == 2  # which Trainer would wrap
    assert options_file.arguments(config_of(shared, tmp_path)).n_gpu == 1


def test_memory_is_trainings(shared, tmp_path, monkeypatch):
    used = [1]

    class Evaluates(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            used[0] = 9

    used[0] = 5  # what loading and prefill took
    monkeypatch.setattr(progress, "peak_memory", lambda: used[0])
    monkeypatch.setattr(progress, "forget_peak", lambda: used.__setitem__(0, 1))
    config = config_of(shared, tmp_path, max_steps=4, save_every=2, hold_out=4)
    train(config, callbacks=[Evaluates()])
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert {e["memory"] for e in entries if "loss" in e} == {1}
    assert [e["memory"] for e in entries if "eval_loss" in e] == [9, 9]
    assert json.loads((tmp_path / "result.json").read_text())["memory"] == 1


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_tokens_of_an_image_in_the_estimate(vision):
    tower = tiny.llava(vision=vision).model.vision_tower
    states = tower(torch.zeros(1, 3, 16, 16)).last_hidden_state
    assert showing._image_tokens(tower) == states.shape[1]


def test_tensorboard(shared, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(config_of(shared, tmp_path, max_steps=3, tensorboard=True))
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    seen = events.EventAccumulator(str(file)).Reload()
    assert [e.step for e in seen.Scalars("train/loss")] == [1, 2, 3]
    assert [e.value for e in seen.Scalars("train/loss")] == pytest.approx([*result.losses.values()])


def test_images_that_break_while_training(shared, tmp_path):
    folder = tmp_path / "d"
    rows = conversations.rows(folder, 6)
    path = conversations.write_jsonl(folder / "d.jsonl", rows)
    # one row a step: a step whose only row is bad changes nothing, and its loss is 0
    config = config_of(shared, tmp_path / "a", data=[str(path)], epochs=1, batch_size=1)

    def break_them():
        for row in rows[:3]:
            (folder / row["image"]).unlink()

    result = train(config, callbacks=[At(1, break_them)])
    assert len(result.losses) == 6 and len(result.problems) in (2, 3)
    assert sorted(result.losses.values())[: len(result.problems)] == [0.0] * len(result.problems)
    listed = (tmp_path / "a" / "bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in listed] == ["missing image"] * len(listed)
    assert len(listed) == len(result.problems)

    # a run that goes on lists what it met before, though it is whole again
    conversations.rows(folder, 6)
    config = replace(config, out=str(tmp_path / "c"), save_every=1)
    stop = At(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = train(config, callbacks=[At(1, break_them), stop])
    conversations.rows(folder, 6)
    assert before.interrupted and before.problems
    assert [*train(config, resume=True).problems] == [*before.problems]

    conversations.rows(folder, 6)
    config = replace(config, out=str(tmp_path / "b"), on_bad_row="fatal")
    with pytest.raises(TrainingError, match=r"bad row: .*d\.jsonl:\d: missing image"):
        train(config, callbacks=[At(1, break_them)])


def test_bad_rows_of_all_processes_are_listed(shared, tmp_path, monkeypatch):
    others = [Problem("d.jsonl:9", "row-9", "missing image", "gone")]
    monkeypatch.setattr(run, "of_all", lambda mine: mine + others)
    result = train(config_of(shared, tmp_path, max_steps=1, save_every=0))
    assert list(result.problems) == others
    assert "d.jsonl:9" in (tmp_path / "bad_rows.jsonl").read_text()


def test_bad_rows_are_left_out_and_listed(shared, tmp_path, capsys):
    rows = conversations.rows(tmp_path, 8)
    rows[3]["conversations"].pop()
    path = conversations.write_jsonl(tmp_path / "d.jsonl", rows)
    config = config_of(shared, tmp_path / "a", data=[str(path)], max_steps=2)
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 0
    said = capsys.readouterr().out
    assert "bad rows, left out: 1" in said and f"{path}:4 (id row-0-3): the conversation" in said
    assert main(["inspect-data", "--config", str(tmp_path / "c.yaml"), "--count", "2"]) == 1
    said = capsys.readouterr().out
    assert "⟦" in said and "row-0-1" in said and "row-0-2" not in said and "no answer" in said
    options = ["--config", str(tmp_path / "c.yaml"), "--on-bad-row", "fatal", "--out", "x"]
    assert main(["train", *options]) == 1
    assert "error: bad row" in capsys.readouterr().out


def test_dry_run_writes_nothing(shared, tmp_path, capsys):
    config = config_of(shared, tmp_path / "a", hold_out=5)
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    patch = prepare_model(config)
    count = sum(p.numel() for p in patch.trainable.values())
    assert f"trains  {count:,} of" in said and "25 train, 5 held out" in said
    assert "steps    14 of 4 × 1 rows" in said  # 2 epochs of 7 batches
    assert "<image>×4" in said and "<|im_end|>⟧" in said and "kept by blocks" in said
    assert not (tmp_path / "a").exists()


def test_steps_of_a_dry_run_are_the_trainers(shared, tmp_path):
    for more in (dict(accumulate=3), dict(epochs=1.5), dict(batch_size=7), dict(max_steps=3)):
        config = config_of(shared, tmp_path / "a", save_every=0, **more)
        data = prepare_data(config, QUIET)
        trainer = make_trainer(config, data, prepare_model(config))
        count = trainer.steps()
        trainer.train()
        assert trainer.state.global_step == count, more


def test_a_projector_to_start_from(shared, tmp_path, monkeypatch):
    """What reads it is tested where it is; here: it is asked, of a patched model."""
    asked = []

    def load_projector(model, path):
        asked.append((fastprompt.patch_of(model).model is model, path))

    importers = SimpleNamespace(load_projector=load_projector)
    monkeypatch.setitem(sys.modules, "fastprompt.importers", importers)
    prepare_model(config_of(shared, tmp_path))
    assert not asked
    prepare_model(config_of(shared, tmp_path, projector="mm_projector.bin"))
    assert asked == [(True, "mm_projector.bin")]


def test_longer_images_make_room_in_the_processor(shared, tmp_path):
    """`Patch.prepare` is asked before an image's tokens are counted."""

    class Prepares:
        def prepare(self, processor):
            processor.num_additional_image_tokens += 3

    config = config_of(shared, tmp_path, visual_prompts="raw")
    assert prepare_data(config, QUIET, Prepares()).template.image_tokens == 7
    assert prepare_data(replace(config, visual_prompts="drop"), QUIET).template.image_tokens == 4


def test_refusals_of_options(shared, tmp_path, monkeypatch, capsys):
    config = config_of(shared, tmp_path, pack=True)
    patch = prepare_model(config)
    data = prepare_data(config, QUIET)
    patch.anatomy.tower("text").family = "gpt"
    with pytest.raises(TrainingError, match="pack: want a language model of llama"):
        make_trainer(config, data, patch)
    monkeypatch.setattr(preparing, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="tensorboard: want the package"):
        make_trainer(replace(config, pack=False, tensorboard=True), data, patch)
    with pytest.raises(TrainingError, match="want eval_data or hold_out, got both"):
        prepare_data(replace(config, hold_out=2, eval_data=config.data), QUIET)
    options = ["--data", *config.data, "--out", str(tmp_path / "x")]
    assert main(["train", "--model", str(tmp_path / "none"), *options]) == 2
    assert "error: " in capsys.readouterr().out
    conversations.tokenizer().save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TrainingError, match="want the processor of a vision-language model"):
        prepare_data(replace(config, model=str(tmp_path / "text")), QUIET)


def test_what_is_seen(shared, tmp_path):
    """A bar on a terminal, lines elsewhere; both end with the last step."""
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=100, soft_wrap=True)
        config = config_of(shared, tmp_path / str(terminal), hold_out=4, max_steps=5)
        train_aloud(config, console=console)
        said = out.getvalue()
        for word in ("26 rows, 4 held out", "5 steps of 4 rows", "tokens/s", "0:00 left"):
            assert word in said, (terminal, word)
        assert re.search(r"\d [MG]B  ", said)
        assert "held-out loss" in said and "5/5" in said
