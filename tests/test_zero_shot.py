"""What the zero-shot runs are not to see is not in what they train on."""

import json

import pytest

pytest.importorskip("PIL", reason="the demo extra is not installed")

from fastprompt.demo import data, wheels
from fastprompt.demo.data import Question, family
from fastprompt.demo.instruction import emoji
from fastprompt.demo.zero_shot import asking, prepare, run, shapes, table
from fastprompt.demo.zero_shot.shapes import Pair, is_seen, pairs, phrasing
from fastprompt.eval import run as evaluation
from fastprompt.train.config import TrainConfig

SAID = {
    # what names a shape takes it as there; a "no" to "is there not" says that it is
    0: [("what color is the circle?", "red")],
    1: [("is there not a triangle?", "no"), ("is there a teal shape in the image?", "yes")],
    2: [("is there a circle?", "no"), ("is no triangle present?", "yes"), ("what color is the "
         "shape?", "gray")],  # so it is a rectangle
    3: [("is there a circle?", "no"), ("what color is the shape?", "blue")],  # of two shapes one
    4: [("what is the black shape?", "triangle")],
}  # fmt: skip


def test_what_is_on_an_image_is_known_from_its_answers():
    questions = [Question(text, answer, i) for i, said in SAID.items() for text, answer in said]
    assert pairs(questions) == {
        0: Pair("circle", "red"),
        1: Pair("triangle", "teal"),
        2: Pair("rectangle", "gray"),
        4: Pair("triangle", "black"),
    }


@pytest.mark.parametrize(
    ("text", "answer", "seen"),
    [
        ("what shape is in the image?", "circle", True),
        ("what shape is present?", "circle", False),  # Z2
        ("what color is the shape?", "red", True),
        ("what is the color of the circle?", "red", False),  # Z2
        ("is there a red shape?", "yes", True),
        ("is no blue shape present?", "yes", False),  # Z2
        ("is there a circle?", "yes", False),  # Z1
        ("does the image not contain a circle?", "no", False),  # Z1
    ],
)
def test_each_rule_keeps_a_question_out(text, answer, seen):
    question = Question(text, answer, 0)
    assert is_seen(question, {0: Pair("circle", "red")}) is seen
    assert not is_seen(question, {0: Pair("circle", "blue")})  # Z3
    assert not is_seen(question, {})


def test_six_pairs_of_every_shape_and_no_colour_twice():
    assert len(shapes.UNSEEN_PAIRS) == 6
    assert {shape for shape, _ in shapes.UNSEEN_PAIRS} == set(data.SHAPES)
    assert len({colour for _, colour in shapes.UNSEEN_PAIRS}) == 6


def test_an_unseen_phrasing_has_a_seen_one_of_the_same_family():
    for name, text in shapes.UNSEEN_PHRASINGS.items():
        text = text.replace("SHAPE", "circle").replace("COLOUR", "red")
        said = prepare._said_otherwise(Question(text, "yes", 0))
        assert family(said) == name != "" and said.text != text
        assert is_seen(said, {0: Pair("circle", "red")})
        assert phrasing(said.text) != shapes.UNSEEN_PHRASINGS[name]
    with pytest.raises(ValueError, match="no other phrasing"):
        prepare._said_otherwise(Question("why?", "yes", 0))


def test_files_that_were_cut_short_are_written_again(tmp_path, monkeypatch):
    """`prepare` without its data, and with one that fails when questions are made."""
    for name in ("_model", "_pictures", "_conversations", "_write"):
        monkeypatch.setattr(prepare, name, lambda *args: [])
    several = [Question("what shape is in the image?", "circle", 0)] * 500
    monkeypatch.setattr(prepare.data, "load", lambda cache, split: several)
    monkeypatch.setattr(prepare.data, "images", lambda cache, split: [])
    monkeypatch.setattr(prepare.pictures, "captions", lambda cache: [])
    monkeypatch.setattr(prepare, "is_seen", lambda question, shown: True)
    monkeypatch.setattr(prepare, "asked", lambda *args: {"z1": [{"id": 1}]})
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(prepare.json, "dumps", lambda row: 1 / 0)
        prepare.prepare(tmp_path)
    prepare.prepare(tmp_path)
    assert (tmp_path / "questions" / "z1.jsonl").read_text() == '{"id": 1}\n'


@pytest.mark.parametrize("command", ["ask", "table"])
def test_a_run_is_a_folder(command, tmp_path, capsys):
    log = tmp_path / "seed-0.log"  # as seed-* finds it
    log.write_text("")
    given = [str(tmp_path)] * (command == "ask")
    with pytest.raises(SystemExit):
        run.main([command, *given, str(tmp_path), str(log)])
    assert f"want a run's folder, got {log}" in capsys.readouterr().err


def test_a_run_is_asked_greedily_and_by_rank_with_and_without_its_images(tmp_path):
    folder = tmp_path / "m2pt" / "seed-0"
    folder.mkdir(parents=True)
    config = TrainConfig(model="model", data=("seen.json",), out=str(folder), four_bit=True)
    (folder / "config.yaml").write_text(config.as_yaml())
    given = [evaluation._parser().parse_args(c) for c in asking.commands(tmp_path, folder)]
    assert [(g.score, g.blank) for g in given] == [
        ("exact", False), ("exact", True), ("rank", False), ("rank", True),
    ]  # fmt: skip
    assert all(g.four_bit and g.dtype == "bfloat16" and g.suffix == "" for g in given)
    assert {path.stem for path in given[0].questions} == set(asking.EXACT)


def test_the_table_is_over_seeds_and_of_one_run_with_its_interval(tmp_path):
    for seed, value in enumerate((0.5, 0.7)):
        for column in table.COLUMNS:
            path = tmp_path / f"m2pt/seed-{seed}/eval" / column.folder / "results.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            found = json.loads(path.read_text())["tasks"] if path.exists() else {}
            scores = found.get(column.task, {}).get("scores", {}) | {column.score: value}
            ends = {name: [value - 0.1, value + 0.1] for name in scores}
            found[column.task] = dict(scores=scores, intervals=ends)
            path.write_text(json.dumps(dict(tasks=found)))
    runs = [tmp_path / f"m2pt/seed-{seed}" for seed in (0, 1)]
    assert "| m2pt | 2 | 0.600 ± 0.141 |" in table.markdown({"m2pt": runs})
    assert "| one | 1 | 0.500 (0.400–0.600) |" in table.markdown({"one": runs[:1]})
    with pytest.raises(ValueError, match="want a run that was asked"):
        table.markdown({"m2pt": [tmp_path]})


@pytest.mark.skipif(
    not (wheels.cache_folder() / wheels.WHEELS["data"].file).exists()
    or not (wheels.cache_folder() / f"emoji-datasource-google-{emoji.VERSION}.tgz").exists(),
    reason="easy-VQA or the emoji are not cached",
)
def test_nothing_of_what_is_asked_of_the_real_data_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_model", lambda folder, cache: None)
    prepare.prepare(tmp_path)
    train = json.loads((tmp_path / "seen.json").read_text())
    said = [Question(row["conversations"][0]["value"].split("\n")[1], "", 0) for row in train]
    assert len(said) == 15277
    assert {family(q) for q in said} == set(shapes.SEEN_FAMILIES)
    unseen = {(family(q), phrasing(q.text)) for q in said} & set(shapes.UNSEEN_PHRASINGS.items())
    assert not unseen
    sizes = {len(json.loads((tmp_path / f"families-{n}.json").read_text())) for n in (1, 2, 4, 6)}
    assert sizes == {5326}
    for name in (*asking.EXACT, "z5"):
        lines = (tmp_path / "questions" / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len({row["id"] for row in rows}) == len(rows)
        assert all((tmp_path / row["image"]).is_file() and "/train/" not in row["image"]
                   and row["answer"] in row["options"] for row in rows)  # fmt: skip
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert not [row for row in captions if "circle" in row["caption"] or "square" in row["caption"]]
