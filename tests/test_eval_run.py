"""``fastprompt eval`` from end to end: resumed, refused, loaded as asked."""

import json
import random

import benchmark_files as files
import conversations
import pytest
import torch
import transformers as tf
from eval_runs import ALL, make_folder, results, run
from PIL import Image

import fastprompt
from fastprompt.__main__ import main
from fastprompt.eval import InputError, Result, Run, evaluate, mm_avg
from fastprompt.eval.evaluation import load
from fastprompt.eval.loading import load_judge, load_model
from fastprompt.methods import M2PT
from fastprompt.patching import patch_of
from fastprompt.train.config import TrainConfig
from fastprompt.train.preparing import prepare_model
from fastprompt.train.templates import NAMED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("eval"))


def test_the_command_runs_every_task_and_scores_what_it_wrote(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", tasks=ALL) == 0
    first = results(tmp_path / "out")
    assert list(first["tasks"]) == ALL and first["run"]["score"] == "exact"
    assert first["mm_avg"] == mm_avg(
        {name: Result(name, 1, "", 0, t["scores"]) for name, t in first["tasks"].items()}
    )
    said = capsys.readouterr().out
    assert all(f"| {name} | {t['count']} | 0 |" in said for name, t in first["tasks"].items())
    for name in ("results.md", "radar.png", "run.json", "mme_results/OCR.txt"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    lines = []
    for path in (tmp_path / "out" / "predictions").iterdir():
        lines += path.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (tmp_path / "all.jsonl").write_text("".join(lines))
    more = ("--predictions", tmp_path / "all.jsonl")
    assert run(folder, tmp_path / "again", *more, tasks=ALL, model=False) == 0
    again = results(tmp_path / "again")
    assert again["tasks"] == first["tasks"] and again["mm_avg"] == first["mm_avg"]
    assert not (tmp_path / "again" / "run.json").exists()  # it asked no model


def test_prompts_are_what_answers(folder, tmp_path):
    tasks = ("pope", "textvqa", "snli_ve")
    assert run(folder, tmp_path / "with", tasks=tasks) == 0
    plain = ["eval", "--model", str(folder / "model"), "--device", "cpu", "--tasks", *tasks]
    plain += ["--data", str(folder / "data"), "--output", str(tmp_path / "without")]
    assert main(plain) == 0
    both = [
        {p.name: p.read_text() for p in (tmp_path / name / "predictions").iterdir()}
        for name in ("with", "without")
    ]
    assert both[0].keys() == both[1].keys() and both[0] != both[1]
    assert (tmp_path / "with" / "radar.png").exists()  # of three tasks
    sums = [results(tmp_path / name)["run"]["model"] for name in ("with", "without")]
    assert len(sums[0]["prompts sha256"]) == 64 and "prompts sha256" not in sums[1]


def test_ranking_chooses_options_and_asks_open_questions(folder, tmp_path):
    tasks = ("vsr", "cifar10", "textvqa")
    assert run(folder, tmp_path, "--score", "rank", tasks=tasks) == 0
    found = results(tmp_path)["tasks"]
    assert found["vsr"]["scores"]["other"] == found["cifar10"]["scores"]["other"] == 0
    text = (tmp_path / "predictions" / "textvqa.jsonl").read_text()
    assert {json.loads(line)["id"] for line in text.splitlines()} == {
        "textvqa/34602",
        "textvqa/34603",
    }


def test_a_run_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    model, processor = files.llava(), files.processor()
    data, asked = folder / "data", []
    generate = model.generate

    def counted(**given):
        assert not model.training
        asked.append(len(given["input_ids"]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generate(**given)

    monkeypatch.setattr(model, "generate", counted)
    args = (model, processor, ["pope", "vsr"], data)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*args, tmp_path / "out", batch=5)
    path = tmp_path / "out" / "predictions" / "pope.jsonl"
    assert asked == [5, 5, 2] and len(path.read_text().splitlines()) == 10
    path.write_text(path.read_text()[:-7])  # as if it was killed while it wrote
    model.train()
    evaluate(*args, tmp_path / "out", batch=5)
    assert asked[3:] == [3, 3] and len(path.read_text().splitlines()) == 12
    whole = evaluate(*args, tmp_path / "whole", batch=5)
    assert whole == evaluate(*args, tmp_path / "out") and len(asked) == 5 + 4
    assert model.training  # as it was before
    lines = [(tmp_path / n / "predictions/pope.jsonl").read_text() for n in ("out", "whole")]
    assert sorted(lines[0].splitlines()) == sorted(lines[1].splitlines())
    path.write_text('{"id": "pope/rand')  # not one whole line
    assert evaluate(*args, tmp_path / "out") == whole


def test_a_limit_can_grow(folder, tmp_path):
    model, processor = files.llava(), files.processor()
    args = (model, processor, ["pope"], folder / "data", tmp_path)
    counts = [evaluate(*args, limit=n)["pope"].count for n in (1, 3, None, 2)]
    assert counts == [3, 9, 12, 6]
    text = (tmp_path / "predictions" / "pope.jsonl").read_text()
    assert len(text.splitlines()) == 12
    for limit in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            evaluate(*args, limit=limit)


def test_a_folder_is_one_runs_alone(folder, tmp_path, capsys):
    assert run(folder, tmp_path) == 0
    for more in (
        ("--score", "rank"),
        ("--suffix", ""),
        ("--max-new-tokens", "9"),
        ("--dtype", "float32"),
    ):
        assert run(folder, tmp_path, *more) == 1
        assert f"{tmp_path / 'run.json'}: want" in capsys.readouterr().err
    assert run(folder, tmp_path, "--batch", "1", "--limit", "2") == 0  # change no answer
    with pytest.raises(ValueError, match="score: want one of"):
        Run("best").settle(tmp_path)


def test_another_model_does_not_go_on_with_ones_predictions(folder, tmp_path):
    """`evaluate` is given no name for its model: its weights are its name."""
    model, processor = files.llava(), files.processor()
    args = (processor, ["vsr"], folder / "data", tmp_path)
    evaluate(model, *args)
    same = files.llava()
    assert evaluate(same, *args)  # another object with the same weights
    other = files.llava()
    with torch.no_grad():
        other.model.language_model.layers[1].mlp.up_proj.weight.add_(1)
    patched = files.llava()
    patch = fastprompt.patch(patched)
    changed = files.processor()
    changed.chat_template += " "
    half = files.llava().bfloat16()
    for model in (other, patched, half):
        with pytest.raises(InputError, match="but what lies there is of"):
            evaluate(model, *args)
    with pytest.raises(InputError, match="but what lies there is of"):
        evaluate(same, changed, *args[1:])
    evaluate(patched, processor, ["vsr"], folder / "data", tmp_path / "patched")
    with torch.no_grad():
        list(patch.trainable.values())[-1].view(-1)[7] += 1  # any number that trains
    with pytest.raises(InputError, match="but what lies there is of"):
        evaluate(patched, processor, ["vsr"], folder / "data", tmp_path / "patched")


def test_a_model_is_as_it_was_when_it_is_interrupted(folder, tmp_path, monkeypatch):
    model = files.llava().train()
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, files.processor(), ["vsr"], folder / "data", tmp_path)
    assert model.training


def test_a_missing_image_is_named_before_a_model_is_loaded(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastprompt.eval.run.load_model", None)
    files.vsr(tmp_path / "data")
    (tmp_path / "data" / "vsr" / "images" / "000000401552.jpg").unlink()
    more = ("--data", tmp_path / "data")
    assert run(folder, tmp_path / "out", *more) == 1
    assert "want an image in" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_missing_image_is_named_before_a_model_is_asked(tmp_path):
    files.vsr(tmp_path / "data")
    files.pope(tmp_path / "data")
    gone = tmp_path / "data" / "vsr" / "images" / "000000401552.jpg"
    gone.unlink()
    with pytest.raises(InputError) as error:
        evaluate(None, None, ["pope", "vsr"], tmp_path / "data", tmp_path / "out")
    assert f"test.jsonl:3: want an image in {gone}" in str(error.value)
    assert "1 of 3 questions" in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [("--four-bit",), ("--dtype", "bfloat16")])
def test_weights_can_be_smaller(more, folder, tmp_path):
    assert run(folder, tmp_path, *more) == 0
    assert results(tmp_path)["tasks"]["vsr"]["count"] == 3


def test_a_model_is_loaded_as_asked(tmp_path):
    files.llava().save_pretrained(tmp_path / "model")
    processor = files.processor()
    processor.chat_template = processor.tokenizer.pad_token = None
    processor.save_pretrained(tmp_path / "model")
    files.save_judge(tmp_path / "judge")
    (tmp_path / "chat").write_text(files.CHAT)
    chat = tmp_path / "chat"
    model, processor = load_model(tmp_path / "model", chat_template=chat, four_bit=True)
    assert processor.chat_template == files.CHAT and processor.tokenizer.pad_token == "</s>"
    judge, tokenizer = load_judge(tmp_path / "judge", four_bit=True)
    assert tokenizer.pad_token == "<pad>" and not judge.training
    for loaded in (model, judge):
        assert {m.compute_dtype for m in four_bit(loaded).values()} == {torch.bfloat16}
        assert loaded.dtype == torch.bfloat16  # and not the checkpoint's
    judge, _ = load_judge(tmp_path / "judge", four_bit=True, dtype="float32")
    assert {m.compute_dtype for m in four_bit(judge).values()} == {torch.float32}
    assert load_judge(tmp_path / "judge")[0].dtype == torch.float32  # the checkpoint's
    _, processor = load_model(tmp_path / "model", template="chatml")
    assert processor.chat_template == NAMED["chatml"].jinja
    for bad, message in ((dict(dtype="int4"), "dtype: want"), (dict(template="x"), "template: w")):
        with pytest.raises(InputError, match=message):
            load_model(tmp_path / "model", **bad)


def four_bit(model):
    return {n: m for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}


def test_train_and_eval_load_the_same_4_bit_model(folder, tmp_path):
    conversations.write_jsonl(tmp_path / "r.jsonl", conversations.rows(tmp_path, 2))
    shared = dict(model=str(folder / "model"), data=str(tmp_path / "r.jsonl"), out=str(tmp_path))
    options = dict(four_bit=True, method="text", memory="off")
    trained = prepare_model(TrainConfig.of(shared | options)).model
    evaluated, _ = load_model(folder / "model", four_bit=True)
    a, b = four_bit(trained), four_bit(evaluated)
    assert a.keys() == b.keys() and len(a) > 10
    assert not any("projector" in name or "lm_head" in name for name in a)
    for name in a:
        states = [each[name].weight.quant_state for each in (a, b)]
        for fact in ("quant_type", "blocksize", "nested", "dtype"):
            assert getattr(states[0], fact) == getattr(states[1], fact), (name, fact)
        assert states[0].nested and states[0].quant_type == "nf4"
        assert states[0].state2.blocksize == states[1].state2.blocksize
        assert a[name].compute_dtype == b[name].compute_dtype
        assert torch.equal(a[name].weight.data, b[name].weight.data)
    assert trained.dtype == evaluated.dtype


def test_a_projector_that_was_loaded_and_does_not_train_is_evaluated_too(folder, tmp_path):
    """Else a run of `fastprompt train --method vpt --projector FILE` is scored without it."""
    aligned = files.llava()
    stage1 = fastprompt.patch(aligned, M2PT(0, 0))
    with torch.no_grad():
        for p in stage1.trainable.values():
            p.add_(torch.randn_like(p))
    fastprompt.save(aligned, tmp_path / "stage1")
    shared = dict(model=str(folder / "model"), data="none", out=str(tmp_path), dtype="float32")
    given = dict(projector=str(tmp_path / "stage1"), method="vpt", vision_tokens=2)
    patch = prepare_model(TrainConfig.of(shared | given))
    assert all("fastprompt" in name for name in patch.trainable)
    fastprompt.save(patch.model, tmp_path / "prompts")
    found, _ = load_model(folder / "model", prompts=tmp_path / "prompts")
    for name, p in patch.model.named_parameters():
        assert torch.equal(p, found.get_parameter(name)), name
    assert patch_of(found).given == patch.given and len(patch.given) == 4
    assert not any(found.get_parameter(name).requires_grad for name in patch.given)
    also, _ = load_model(
        folder / "model", prompts=tmp_path / "prompts", projector=tmp_path / "stage1"
    )
    assert torch.equal(also.get_parameter(patch.given[0]), aligned.get_parameter(patch.given[0]))
    alone, _ = load_model(folder / "model", projector=tmp_path / "stage1")
    assert torch.equal(alone.get_parameter(patch.given[0]), aligned.get_parameter(patch.given[0]))
    with pytest.raises(InputError, match=r"--projector: .*want a file"):
        load_model(folder / "model", projector=tmp_path / "gone")


def test_prompts_that_the_projector_sees_find_room(folder, tmp_path):
    model = tf.AutoModelForImageTextToText.from_pretrained(folder / "model")
    fastprompt.patch(model, M2PT(3, 2, visual_prompts="context"))
    fastprompt.save(model, tmp_path / "prompts")
    model, processor = load_model(folder / "model", prompts=tmp_path / "prompts")
    image = Image.new("RGB", (16, 16))
    given = processor(images=image, text="<image>\nWhat is it?", return_tensors="pt")
    assert model(**given).logits.isfinite().all()


@pytest.mark.parametrize("option", ["--limit", "--batch", "--max-new-tokens"])
def test_counts_are_from_one(option, folder, tmp_path, capsys):
    for bad in ("0", "-1", "many"):
        with pytest.raises(SystemExit):
            run(folder, tmp_path, f"{option}={bad}")
        assert f"{option}: want a number from 1" in capsys.readouterr().err


def test_prompts_want_a_model(folder, tmp_path, capsys):
    more = ("--predictions", tmp_path, "--prompts", tmp_path)
    with pytest.raises(SystemExit):
        run(folder, tmp_path, *more, model=False)
    assert "want --prompts and --projector with --model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tasks: want some of"):
        load(["vsr", "gqa"], tmp_path)
