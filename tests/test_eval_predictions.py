"""Predictions of others, scored; the judge; results on disk."""

import json
import weakref

import pytest
from eval_runs import ALL, make_folder, results, run, said_right, written

import fastprompt
from fastprompt.eval import Result, mm_avg
from fastprompt.eval.answers import accuracy
from fastprompt.eval.evaluation import load
from fastprompt.eval.results import radar


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("eval"))


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


def test_a_model_is_gone_before_its_judge_is_loaded(folder, tmp_path, monkeypatch):
    from fastprompt.eval import run as command

    loaded, load, judge = [], command.load_model, command.load_judge

    def watched(*args, **options):
        model, processor = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model, processor

    def alone(*args, **options):
        assert len(loaded) == 1 and loaded[0]() is None
        return judge(*args, **options)

    monkeypatch.setattr(command, "load_model", watched)
    monkeypatch.setattr(command, "load_judge", alone)
    assert run(folder, tmp_path, "--judge", folder / "judge") == 0


def test_verdicts_are_of_one_judge_as_it_was_loaded(folder, tmp_path):
    path = written(tmp_path / "p.jsonl", said_right(folder, ["vsr"]))
    more = ("--predictions", path, "--judge", folder / "judge")
    for n, weights in enumerate(((), ("--dtype", "bfloat16"), ("--four-bit",), ()), 1):
        assert run(folder, tmp_path, *more, *weights, model=False) == 0
        assert len(list((tmp_path / "verdicts").iterdir())) == min(n, 3)


# ---- results ----


def test_mm_avg_is_the_mean_of_seven():
    names = [name for name in ALL if name != "mme"]
    found = {
        name: Result(name, 9, "", 0, {"accuracy": n / 10, "judge": n / 20})
        for n, name in enumerate(names)
    }
    found["mme"] = Result("mme", 9, "", 0, {"total": 1400.0}, compared="total", full=2800.0)
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
