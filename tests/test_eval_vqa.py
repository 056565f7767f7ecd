"""One's own questions: their files, their scores by hand, blank images, from end to end."""

import json
from pathlib import Path

import benchmark_files as files
import numpy as np
import pytest

from fastprompt.__main__ import main
from fastprompt.eval import BENCHMARKS, InputError, Question, Run, evaluate, vqa
from fastprompt.eval.evaluation import load
from fastprompt.eval.questions import digest

YES_NO = ["yes", "no"]
ROWS = [
    {"id": 1, "image": "a.png", "question": "is it?", "answer": "yes", "options": YES_NO},
    {"id": 2, "image": "a.png", "question": "how many?", "answer": [3, "three"], "group": "count"},
    {"id": "3", "image": "b.png", "question": "<image>\nis it not?", "answer": "No"},
]
CHAT = {
    "id": "chat",
    "image": "b.png",
    "conversations": [
        {"from": "human", "value": "<image>\nis it red?"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "is it blue?"},
        {"from": "gpt", "value": "no"},
    ],
    "options": YES_NO,
    "group": "colour",
}


def write(folder: Path, rows: list, name: str = "own.jsonl") -> Path:
    for n, image in enumerate(("a.png", "b.png", "c.png")):
        files.image(folder / image, n)
    path = folder / name
    lines = [json.dumps(row) for row in rows]
    path.write_text(f"[{', '.join(lines)}]" if name.endswith("json") else "\n".join(lines) + "\n")
    return path


def read(path: Path, **options) -> list[Question]:
    return vqa(path, **options).questions(Path())


@pytest.mark.parametrize("name", ["own.json", "own.jsonl"])
def test_rows_are_questions_wherever_their_images_are(name, tmp_path):
    path = write(tmp_path, [*ROWS, CHAT], name)
    found = read(path)
    assert [q.id for q in found] == [f"own/{n}" for n in (1, 2, 3, "chat/0", "chat/1")]
    assert [q.answers for q in found] == [("yes",), ("3", "three"), ("No",), ("yes",), ("no",)]
    texts = ["is it?", "how many?", "is it not?", "is it red?", "is it blue?"]
    assert [q.text for q in found] == texts
    assert [q.options for q in found] == [("yes", "no"), (), (), *[("yes", "no")] * 2]
    assert [q.group for q in found] == ["", "count", "", "colour", "colour"]
    assert found[0].image == tmp_path / "a.png" and found[0].open().size == (10, 12)
    assert found[3].where == (f"{path}:4" if name == "own.jsonl" else f"{path}:1[3]")
    elsewhere = read(path, images=tmp_path / "x", name="z")
    assert elsewhere[0].image == tmp_path / "x" / "a.png" and elsewhere[0].id == "z/1"


def test_a_row_without_an_id_is_its_image_and_question(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "id"} for row in ROWS]
    assert read(write(tmp_path, rows))[0].id == "own/a.png/is it?"
    with pytest.raises(InputError, match=r"own.jsonl:2: 'own/a.png/is it\?' is also at .*:1"):
        read(write(tmp_path, [rows[0], rows[0]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "want 'image'"),
        ({"image": 3}, "want a file's name in 'image', got 3"),
        ({"question": ""}, "want 'question'"),
        ({"answer": None}, "want 'answer'"),
        ({"answer": []}, "want a text, or several, in 'answer'; got []"),
        ({"answer": True}, "want a text, or several, in 'answer'; got True"),
        ({"answer": ["yes", " ."]}, "want a text, or several, in 'answer'"),
        ({"options": "yes"}, "want several different texts in 'options', got 'yes'"),
        ({"options": ["yes"]}, "want several different texts in 'options'"),
        ({"options": ["yes", "no", "No."]}, "want several different texts in 'options'"),
        ({"options": ["yes", 1]}, "want several different texts in 'options'"),
        ({"answer": "maybe"}, "want the answer among options ['yes', 'no'], got 'maybe'"),
        ({"conversations": []}, "the conversation is empty"),
        ({"conversations": CHAT["conversations"][:1]}, "ends with a question"),
        (
            {"conversations": [{"from": "system", "value": "be"}, *CHAT["conversations"]]},
            "want questions alone, got a system's turn",
        ),
    ],
)
def test_what_is_no_question_is_named(change, message, tmp_path):
    path = write(tmp_path, [ROWS[1], ROWS[0] | change])
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


def test_a_file_that_is_none_is_named(tmp_path):
    for name, text in (("x.csv", "a"), ("gone.json", None), ("empty.jsonl", "")):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=name.partition(".")[0]):
            read(tmp_path / name)
    (tmp_path / "bad.jsonl").write_bytes(b'{"id": 1')
    with pytest.raises(InputError, match=r"bad\.jsonl:1: want JSON"):
        read(tmp_path / "bad.jsonl")


def test_the_name_of_a_published_benchmark_is_its_own(tmp_path):
    path = write(tmp_path, ROWS, "mme.jsonl")
    for name in (None, "vsr"):
        with pytest.raises(InputError, match="own questions: want another name than the published"):
            load([vqa(path, name=name)])
    assert list(load([vqa(path, name="mine")])) == ["mine"]
    files.everything(tmp_path / "data")
    assert list(load([BENCHMARKS["mme"], "vsr"], tmp_path / "data")) == ["mme", "vsr"]


def test_questions_are_told_by_what_they_ask_and_what_is_right(tmp_path):
    def told(rows):
        every = read(write(tmp_path, rows))
        return digest(every)

    first, second = ROWS[:2]
    found = {
        told([first, second]),
        told([first, second | {"question": "how few?"}]),
        told([first, second | {"answer": 4}]),
        told([first, second | {"group": "few"}]),
        told([first, second | {"id": 7}]),
        told([first]),
    }
    assert len(found) == 6
    assert told([second, first]) == told([first, second])


# ---- scores ----


def asked(answers: list[str], groups: list[str]) -> list[Question]:
    pairs = enumerate(zip(answers, groups, strict=True))
    return [Question(f"x/{n}", Path(f"{n}"), "?", (a,), group=g) for n, (a, g) in pairs]


def test_scores_by_hand():
    score = vqa("x.json").score
    questions = asked(["yes", "Yes.", "yes", "no"], ["a", "a", "b", "b"])  # two true answers
    said = dict(zip([q.id for q in questions], ["yes", "no", "Yes.", "maybe"], strict=True))
    assert score(questions, said) == pytest.approx(
        {
            "accuracy": 2 / 4,
            "balanced_accuracy": (2 / 3 + 0) / 2,
            "macro_accuracy": 1 / 2,
            "group_min": 1 / 2,
            "group_max": 1 / 2,
            "group_sd": 0,
            "a/accuracy": 1 / 2,
            "b/accuracy": 1 / 2,
            "other": 1 / 4,
        }
    )
    said["x/1"] = "yes"
    scores = score(questions, said)
    assert scores["macro_accuracy"] == pytest.approx(0.75) == scores["accuracy"]
    assert (scores["group_min"], scores["group_max"]) == (0.5, 1)
    assert scores["group_sd"] == pytest.approx(0.25)  # of these two: sqrt(mean(0.25²))
    plain = score(asked(["yes", "no"], ["", ""]), {"x/0": "yes", "x/1": None})
    assert plain == {"accuracy": 0.5, "balanced_accuracy": 0.5, "other": 0.5}


def test_rows_without_a_group_are_a_group_with_a_name(tmp_path):
    rows = [ROWS[0] | {"group": g} for g in (None, "", "a", 3, 0)] + [ROWS[0]]
    rows = [row | {"id": n} for n, row in enumerate(rows)]
    questions = read(write(tmp_path, rows))
    assert [q.group for q in questions] == ["", "", "a", "3", "0", ""]
    said = {q.id: "yes" if q.group == "a" else "no" for q in questions}
    scores = vqa("x.json").score(questions, said)
    groups = {name for name in scores if name.endswith("/accuracy")}
    assert groups == {f"{group}/accuracy" for group in ("a", "3", "0", "no group")}
    assert scores["macro_accuracy"] == 1 / 4 and scores["accuracy"] == 1 / 6


def test_groups_and_answers_weigh_the_same_whatever_their_size():
    questions = asked(["yes"] * 6 + ["no"] * 2, ["big"] * 5 + ["small"] * 3)
    majority = vqa("x.json").score(questions, {q.id: "yes" for q in questions})
    assert majority["accuracy"] == 6 / 8 and majority["balanced_accuracy"] == 0.5
    assert majority["macro_accuracy"] == pytest.approx((1 + 1 / 3) / 2)


# ---- a model ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return files.save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("score", ["exact", "rank"])
def test_the_command_asks_them(score, model, tmp_path, capsys):
    paths = [write(tmp_path, ROWS, "one.jsonl"), write(tmp_path, [CHAT], "two.json")]
    options = ["eval", "--model", str(model), "--device", "cpu", "--score", score, "--suffix", ""]
    options += ["--questions", *map(str, paths), "--images", str(tmp_path)]
    options += ["--output", str(tmp_path / "out"), "--max-new-tokens", "3"]
    assert main(options) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["tasks"]["two"]["digest"] == digest(read(paths[1]))
    assert {name: task["count"] for name, task in found["tasks"].items()} == {"one": 3, "two": 2}
    means = {"accuracy", "balanced_accuracy", "macro_accuracy"}
    assert found["tasks"]["two"]["intervals"].keys() == means
    assert found["run"]["blank"] is False
    said = (tmp_path / "out" / "predictions" / "two.jsonl").read_text()
    said = {row["id"]: row["prediction"] for row in map(json.loads, said.splitlines())}
    assert said.keys() == {"two/chat/0", "two/chat/1"}
    assert score == "exact" or set(said.values()) <= set(YES_NO)
    assert "| two | 2 | 0 | accuracy" in capsys.readouterr().out


def test_blank_images_have_a_folder_and_a_label_of_their_own(model, tmp_path, monkeypatch, capsys):
    path, shown = write(tmp_path, ROWS), []
    opened = Question.open
    monkeypatch.setattr(Question, "open", lambda q: shown.append(opened(q)) or shown[-1])
    options = ["eval", "--model", str(model), "--device", "cpu", "--questions", str(path)]
    options += ["--output", str(tmp_path / "out")]
    assert main(options) == 0
    true, shown[:] = [np.array(image) for image in shown], []
    assert len(true) == 3 and all(image.std() > 0 for image in true)
    before = (tmp_path / "out" / "results.json").read_text()
    assert main([*options, "--blank"]) == 0
    mean = [round(255 * c) for c in files.processor().image_processor.image_mean]
    assert len(shown) == 3 and all(image.size == (10, 12) for image in shown)
    assert all((np.array(image) == mean).all() for image in shown)
    assert (tmp_path / "out" / "results.json").read_text() == before
    blank = tmp_path / "out" / "blank"
    assert json.loads((blank / "results.json").read_text())["run"]["blank"] is True
    assert json.loads((blank / "run.json").read_text())["blank"] is True
    assert len((blank / "predictions" / "own.jsonl").read_text().splitlines()) == 3
    assert (blank / "results.md").read_text().startswith("| task, on blank images |")
    assert "| task, on blank images |" in capsys.readouterr().out


def test_a_processor_that_knows_no_mean_has_no_blank_colour(tmp_path):
    own, processor = vqa(write(tmp_path, [CHAT])), files.processor()
    processor.image_processor.image_mean = None
    with pytest.raises(InputError, match="blank: want a processor with an image_mean"):
        evaluate(files.llava(), processor, [own], None, tmp_path / "o", blank=True)


def test_evaluate_takes_them_and_blanks_them(tmp_path):
    own = vqa(write(tmp_path, [CHAT]))
    llava, processor = files.llava(), files.processor()
    processor.image_processor.image_mean = [0.0, 0.5, 1.0]
    seen = []
    processor_call = type(processor).__call__

    class Watched(type(processor)):
        def __call__(self, *args, **given):
            seen.extend(given["images"])
            return processor_call(self, *args, **given)

    processor.__class__ = Watched
    run = Run(max_new_tokens=2, suffix="")
    found = evaluate(llava, processor, [own], None, tmp_path / "o", run=run, blank=True)
    assert found["own"].count == 2 and not (tmp_path / "o" / "run.json").exists()
    assert (tmp_path / "o" / "blank" / "results.json").exists()
    assert len(seen) == 2 and all(image.getpixel((3, 4)) == (0, 128, 255) for image in seen)
    both = [own, vqa(tmp_path / "own.jsonl", name="own")]
    with pytest.raises(InputError, match="different names, got 'own' twice"):
        evaluate(llava, processor, both, None, tmp_path / "o")
    with pytest.raises(ValueError, match="data: want the folder of"):
        evaluate(llava, processor, ["vsr"], None, tmp_path / "o")


def test_a_question_that_was_edited_is_not_answered_by_what_was_said_before(
    model, tmp_path, capsys
):
    options = ["eval", "--model", str(model), "--device", "cpu", "--output", str(tmp_path / "out")]
    options += ["--questions", str(write(tmp_path, ROWS))]
    assert main(options) == 0
    relabelled = [ROWS[0] | {"answer": "no"}, *ROWS[1:]]
    write(tmp_path, relabelled)
    assert main(options) == 0  # the answer is the scores' matter
    said = tmp_path / "out" / "predictions" / "own.jsonl"
    for change in (
        {"question": "is it then?"},
        {"image": "c.png"},
        {"options": ["yes", "no", "?"]},
    ):
        write(tmp_path, [ROWS[0] | change, *ROWS[1:]])
        assert main(options) == 1
        assert "'own/1' was another question then" in capsys.readouterr().err
        again = ["eval", "--predictions", str(said), *options[5:]]
        assert main(again) == 1
        assert "'own/1' was another question then" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "want --tasks or --questions"),
        (["--tasks", "vsr"], "want --data with --tasks"),
        (["--questions", "x.json", "--blank"], "want --blank with --model"),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path, capsys):
    source = ["--predictions", "p.jsonl"] if "--blank" in options else ["--model", "m"]
    with pytest.raises(SystemExit):
        main(["eval", *source, "--output", str(tmp_path), *options])
    assert message in capsys.readouterr().err
