"""``fastprompt eval`` from end to end: resumed, rescored, refused; results on disk."""

import json
import random
from argparse import Namespace

import benchmark_files as files
import pytest
import torch
import transformers as tf
from PIL import Image

import fastprompt
from fastprompt.__main__ import main
from fastprompt.eval import BENCHMARKS, InputError, Result, Run, evaluate, mm_avg, predictions
from fastprompt.eval.answers import accuracy
from fastprompt.eval.evaluation import load
from fastprompt.eval.results import radar
from fastprompt.eval.run import load_judge, load_model
from fastprompt.methods import M2PT

ALL = list(BENCHMARKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a model and prompts for it, none of which any test changes."""
    root = tmp_path_factory.mktemp("eval")
    files.everything(root / "data")
    files.save_model(root / "model")
    files.save_judge(root / "judge")
    model = files.llava()
    patch = fastprompt.patch(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in patch.trainable.values():
            p.add_(torch.randn_like(p))
    fastprompt.save(model, root / "prompts")
    return root


def run(folder, output, *more, tasks=("vsr",), model=True):
    source = ["--model", str(folder / "model"), "--prompts", str(folder / "prompts")]
    options = ["--tasks", *tasks, "--data", str(folder / "data"), "--output", str(output)]
    return main(["eval", *(source if model else []), *options, "--device", "cpu", *map(str, more)])


def results(output):
    return json.loads((output / "results.json").read_text())


def said_right(folder, tasks=ALL):
    found = load(tasks, folder / "data")
    return {q.id: q.answers[0] for task in found.values() for q in task.every}


def written(path, said):
    path.parent.mkdir(parents=True, exist_ok=True)
    predictions.append(path, said)
    return path


# ---- a model ----


def test_the_command_runs_every_task_and_scores_what_it_wrote(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", tasks=ALL) == 0
    first = results(tmp_path / "out")
    assert list(first["tasks"]) == ALL and first["run"]["score"] == "exact"
    assert first["mm_avg"] == mm_avg(
        {name: Result(name, 1, 0, t["scores"]) for name, t in first["tasks"].items()}
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


def test_a_missing_image_is_named_before_a_model_is_asked(tmp_path):
    files.vsr(tmp_path / "data")
    files.pope(tmp_path / "data")
    gone = tmp_path / "data" / "vsr" / "images" / "000000401552.jpg"
    gone.unlink()
    with pytest.raises(InputError) as error:
        evaluate(None, None, ["pope", "vsr"], tmp_path / "data", tmp_path / "out")
    assert f"test.jsonl:3: want an image in {gone}" in str(error.value)
    assert "1 of 3 questions" in str(error.value) and not (tmp_path / "out").exists()


# ---- predictions ----


def test_predictions_alone_need_neither_model_nor_images(folder, tmp_path, capsys):
    for name in ("pope", "vsr"):
        data = tmp_path / "data" / name
        data.mkdir(parents=True)
        for path in (folder / "data" / name).glob("*.json*"):
            (data / path.name).write_text(path.read_text())
    said = said_right(folder, ["pope", "vsr"])
    pope = {k: v for k, v in said.items() if k.startswith("pope")}
    a = written(tmp_path / "a.jsonl", pope)
    b = written(tmp_path / "b.jsonl", {k: v for k, v in said.items() if k not in pope})
    more = ("--predictions", a, b)
    assert run(tmp_path, tmp_path / "out", *more, tasks=("pope", "vsr"), model=False) == 0
    found = results(tmp_path / "out")["tasks"]
    assert found["pope"]["headline"] == found["vsr"]["headline"] == 1
    assert "no radar plot" in capsys.readouterr().out
    more += ("--limit", 1)
    assert run(tmp_path, tmp_path / "few", *more, tasks=("pope", "vsr"), model=False) == 0
    assert results(tmp_path / "few")["tasks"]["pope"]["count"] == 3
    assert run(tmp_path, tmp_path / "out", "--predictions", a, a, model=False, tasks=["pope"]) == 1
    assert f"{a}:1: a second prediction for 'pope/adversarial/1'" in capsys.readouterr().err


def test_missing_predictions_are_an_error_unless_they_are_to_be_wrong(folder, tmp_path, capsys):
    said = said_right(folder)
    kept = {k: v for n, (k, v) in enumerate(said.items()) if n % 2}
    path = written(tmp_path / "some.jsonl", kept)
    assert run(folder, tmp_path, "--predictions", path, tasks=ALL, model=False) == 1
    message = capsys.readouterr().err
    assert "14 of 28 questions have no prediction, the first is 'mme/existence/0000/" in message
    assert "--missing-is-wrong" in message and not (tmp_path / "results.json").exists()
    more = ("--predictions", path, "--missing-is-wrong")
    assert run(folder, tmp_path, *more, tasks=ALL, model=False) == 0
    found = results(tmp_path)["tasks"]
    assert found["mme"]["missing"] == 14 and found["mme"]["scores"]["total"] == 14 * 50
    assert found["pope"]["missing"] == 6 and found["pope"]["scores"]["accuracy"] == 0.5
    for name in ("vsr", "snli_ve", "cifar10", "textvqa"):
        task = found[name]
        assert task["headline"] == pytest.approx(1 - task["missing"] / task["count"])
    assert sum(task["missing"] for task in found.values()) == len(said) - len(kept)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "vsr/x/y", "prediction": "true"}', "no question has the id 'vsr/x/y'"),
        ('{"prediction": "true"}', 'want {"id": …, "prediction": …}'),
        ('{"id": "vsr/a"}', 'want {"id": …, "prediction": …}'),
        ('["vsr/a", "true"]', 'want {"id": …, "prediction": …}'),
        ('{"id": "vsr/a", "prediction": true}', "want text for id and prediction"),
        ('{"id": "vsr/a", "predic', "want JSON in UTF-8"),
    ],
)
def test_predictions_that_are_wrong_are_named(line, message, folder, tmp_path, capsys):
    path = written(tmp_path / "p.jsonl", dict(list(said_right(folder, ["vsr"]).items())[:1]))
    twice = path.read_text()
    with open(path, "a") as file:
        file.write(f"\n{line}\n")
    assert run(folder, tmp_path / "o", "--predictions", path, model=False) == 1
    assert f"fastprompt eval: {path}:3: {message}" in capsys.readouterr().err
    path.write_text(twice * 2)
    assert run(folder, tmp_path / "o", "--predictions", path, model=False) == 1
    assert f"{path}:2: a second prediction for 'vsr/" in capsys.readouterr().err


def test_files_that_are_not_there_are_named(folder, tmp_path, capsys):
    gone = tmp_path / "gone"
    assert run(folder, tmp_path / "o", "--predictions", gone, model=False) == 1
    assert str(gone) in capsys.readouterr().err
    assert run(folder, tmp_path / "o", "--prompts", tmp_path) == 1  # no weights in it
    assert f"--prompts: {tmp_path}: want prompts.safetensors" in capsys.readouterr().err


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
    options = Namespace(model=tmp_path / "model", prompts=None, chat_template=tmp_path / "chat")
    vars(options).update(four_bit=True, dtype="auto", device="cpu", judge=tmp_path / "judge")
    model, processor = load_model(options)
    assert processor.chat_template == files.CHAT and processor.tokenizer.pad_token == "</s>"
    judge, tokenizer = load_judge(options)
    assert tokenizer.pad_token == "<pad>" and not judge.training
    for loaded in (model, judge):
        kinds = {type(m).__name__: m for m in loaded.modules()}
        assert kinds["Linear4bit"].compute_dtype == torch.bfloat16
    options.dtype = "float32"
    kinds = {type(m).__name__: m for m in load_judge(options)[0].modules()}
    assert kinds["Linear4bit"].compute_dtype == torch.float32


def test_prompts_that_the_projector_sees_find_room(folder, tmp_path):
    model = tf.AutoModelForImageTextToText.from_pretrained(folder / "model")
    fastprompt.patch(model, M2PT(3, 2, visual_prompts="context"))
    fastprompt.save(model, tmp_path / "prompts")
    options = Namespace(model=folder / "model", prompts=tmp_path / "prompts", chat_template=None)
    vars(options).update(four_bit=False, dtype="float32", device="cpu")
    model, processor = load_model(options)
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
    assert "want --prompts with --model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tasks: want some of"):
        load(["vsr", "gqa"], tmp_path)


# ---- the judge ----


def test_a_judge_is_a_score_more_and_goes_on_too(folder, tmp_path):
    path = written(tmp_path / "p.jsonl", said_right(folder, ["vsr", "pope"]))
    more = ("--predictions", path, "--judge", folder / "judge")
    assert run(folder, tmp_path / "out", *more, tasks=("vsr", "pope"), model=False) == 0
    verdicts = next((tmp_path / "out" / "verdicts").glob("pope-*.jsonl"))
    rows = [json.loads(line) for line in verdicts.read_text().splitlines()]
    assert len(rows) == 12 and results(tmp_path / "out")["tasks"]["pope"]["scores"]["judge"] == 0
    rows[0]["prediction"] = "Yes."
    verdicts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(folder, tmp_path / "out", *more, tasks=("vsr", "pope"), model=False) == 0
    found = results(tmp_path / "out")["tasks"]["pope"]["scores"]
    assert found["judge"] == pytest.approx(1 / 12) and found["accuracy"] == 1
    path.write_text(path.read_text().replace('"yes"', '"Yes"', 1))  # other predictions, judged anew
    assert run(folder, tmp_path / "out", *more, tasks=("vsr", "pope"), model=False) == 0
    found = results(tmp_path / "out")
    assert found["tasks"]["pope"]["scores"]["judge"] == 0
    assert found["run"] == {"predictions": [str(path)], "judge": str(folder / "judge")}
    assert found["versions"]["fastprompt"] == fastprompt.__version__
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    more += ("--missing-is-wrong",)
    assert run(folder, tmp_path / "few", *more, tasks=("vsr", "pope"), model=False) == 0
    counts = [len(p.read_text().splitlines()) for p in (tmp_path / "few/verdicts").iterdir()]
    assert sum(counts) == 12 + 3 - 1  # what is missing is not asked about


# ---- results ----


def test_mm_avg_is_the_mean_of_seven():
    names = [name for name in ALL if name != "mme"]
    found = {
        name: Result(name, 9, 0, {"accuracy": n / 10, "judge": n / 20})
        for n, name in enumerate(names)
    }
    found["mme"] = Result("mme", 9, 0, {"total": 1400.0})
    assert mm_avg(found) == pytest.approx(0.3) and mm_avg(found, "judge") == pytest.approx(0.15)
    assert found["mme"].headline == 0.5
    del found["mnist"]
    assert mm_avg(found) is None


def test_a_radar_plot_of_several_runs(tmp_path):
    runs = {"m2pt": dict(a=0.1, b=0.5, c=1.0), "vpt": dict(c=0.2, b=0.4, a=0.3)}
    radar(runs, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    for bad in ({"m2pt": dict(a=1, b=1)}, runs | {"x": dict(a=1, b=1, d=1)}):
        with pytest.raises(ValueError, match="the same three tasks"):
            radar(bad, tmp_path / "no.png")


def test_scores_are_also_a_table(folder, tmp_path):
    path = written(tmp_path / "p.jsonl", said_right(folder, ["mme", "vsr"]))
    assert run(folder, tmp_path, "--predictions", path, tasks=("mme", "vsr"), model=False) == 0
    table = (tmp_path / "results.md").read_text()
    assert "| mme | 28 | 0 | total 2800.0 |" in table and "| vsr | other | 0.000 |" in table
    assert "| mme | OCR/acc+ | 1.000 |" in table


def test_accuracy_is_of_the_questions_asked(folder):
    questions = load(["vsr"], folder / "data")["vsr"].every
    assert accuracy(questions[:2], {q.id: "true" for q in questions})["accuracy"] == 0.5
