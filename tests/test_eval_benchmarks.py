"""Benchmarks: each file format as it is published, scores against cases worked by hand."""

import json
import random

import benchmark_files as files
import numpy as np
import pytest

from fastprompt.eval import BENCHMARKS, InputError
from fastprompt.eval.answers import plain, soft_accuracy, vqa
from fastprompt.eval.benchmarks import mme, pope

NAMES = list(BENCHMARKS)


@pytest.fixture
def data(tmp_path):
    return files.everything(tmp_path)


def refused(name, root):
    with pytest.raises(InputError) as error:
        BENCHMARKS[name].questions(root)
    return str(error.value)


def right(questions):
    return {q.id: q.answers[0] for q in questions}


# ---- all of them ----


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_have_the_highest_score(name, data):
    benchmark = BENCHMARKS[name]
    questions = benchmark.questions(data)
    assert all(q.id.startswith(f"{name}/") and q.open().mode == "RGB" for q in questions)
    assert all(q.where.split(":")[0].startswith(str(data / name)) for q in questions)
    scores = benchmark.score(questions, right(questions))
    assert scores[benchmark.headline] == pytest.approx(benchmark.full)
    nothing = benchmark.score(questions, dict.fromkeys(right(questions)))
    assert nothing[benchmark.headline] == 0


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_joined_by_id(name, data):
    benchmark, rng = BENCHMARKS[name], random.Random(0)
    questions = benchmark.questions(data)
    said = {q.id: rng.choice([*q.answers, "yes", "no", "cat"]) for q in questions}
    once = benchmark.score(questions, said)
    for _ in range(3):
        rng.shuffle(questions)
        other = benchmark.score(questions, dict(rng.sample(list(said.items()), len(said))))
        assert other == pytest.approx(once, abs=1e-12)


@pytest.mark.parametrize("name", ["vsr", "snli_ve", "pope", "mme"])
def test_ids_do_not_depend_on_the_order_of_a_file(name, data):
    benchmark = BENCHMARKS[name]
    before = {q.id: (q.text, q.answers) for q in benchmark.questions(data)}
    for ending in ("txt", "json", "jsonl"):
        for path in (data / name).rglob(f"*.{ending}"):
            path.write_text("\n".join(reversed(path.read_text().split("\n"))))
    assert {q.id: (q.text, q.answers) for q in benchmark.questions(data)} == before


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_there_is_named(name, tmp_path):
    assert str(tmp_path) in refused(name, tmp_path) and name in refused(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("pope", "question_id"),
        ("pope", "label"),
        ("vsr", "caption"),
        ("snli_ve", "pairID"),
        ("snli_ve", "Flickr30K_ID"),
        ("textvqa", "question_id"),
        ("textvqa", "answers"),
    ],
)
def test_a_row_without_a_field_is_named(name, key, data):
    path = next((data / name).glob("*.json*"))
    if name == "textvqa":
        content = json.loads(path.read_text())
        del content["data"][1][key]
        path.write_text(json.dumps(content))
        place = f"{path}: data[1]: want '{key}'"
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        del rows[1][key]
        files.lines(path, rows)
        place = f"{path}:2: want '{key}'"
    assert place in refused(name, data)


@pytest.mark.parametrize("name", ["pope", "vsr", "snli_ve"])
def test_lines_that_are_no_rows_are_named(name, data):
    path = next((data / name).glob("*.json*"))
    good = path.read_bytes()
    first = good.splitlines(keepends=True)[0]
    path.write_bytes(good + first)
    assert f"{path}:{good.count(b'{') + 1}: " in refused(name, data)
    assert f"is also at {path}:1" in refused(name, data)
    for bad in (b"{", b"\xff\xfe", b"[1]"):
        path.write_bytes(first + bad + b"\n")
        assert f"{path}:2: want" in refused(name, data)
    path.write_bytes(b"\n")
    assert f"{path}: want" in refused(name, data)
    path.write_bytes(first.replace(b'abel": ', b'abel": "maybe", "x": '))
    assert f"{path}:1: want a label" in refused(name, data)


def test_an_image_that_is_broken_is_named_with_its_question(data):
    path = data / "vsr" / "images" / "000000050403.jpg"
    question = BENCHMARKS["vsr"].questions(data)[0]
    for bad in (b"not a picture", path.read_bytes()[:200]):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"test\.jsonl:1: want an image in"):
            question.open()


def test_a_limit_is_of_each_group_and_keeps_pairs(data):
    files.mme(data, images=3)
    questions = BENCHMARKS["mme"].questions(data)
    for limit, kept in ((1, 2), (2, 2), (3, 4), (9, 6)):
        few = BENCHMARKS["mme"].limited(questions, limit)
        assert len(few) == kept * 14 and BENCHMARKS["mme"].score(few, right(few))["total"] == 2800
    questions = BENCHMARKS["pope"].questions(data)
    assert [q.group for q in BENCHMARKS["pope"].limited(questions, 1)] == list(pope.CATEGORIES)
    assert BENCHMARKS["pope"].limited(questions, None) == questions


# ---- MME ----


def test_mme_points(tmp_path):
    files.mme(tmp_path, images=2)
    questions = BENCHMARKS["mme"].questions(tmp_path)
    assert len(questions) == 2 * 2 * 14
    said = {q.id: "Yes, it is." for q in questions}  # one of each pair is right
    said |= {q.id: "No" for q in questions if q.group == "OCR" and "/0001/Is this noth" in q.id}
    scores = BENCHMARKS["mme"].score(questions, said)
    assert (scores["count/acc"], scores["count/acc+"]) == (0.5, 0)
    assert (scores["OCR/acc"], scores["OCR/acc+"]) == (0.75, 0.5)
    assert (scores["perception"], scores["cognition"]) == (9 * 50 + 125, 4 * 50)
    assert scores["total"] == 775 and scores["other"] == 0
    said |= {q.id: "Perhaps" for q in questions if q.group == "scene"}
    scores = BENCHMARKS["mme"].score(questions, said)
    assert scores["total"] == 725 and scores["other"] == pytest.approx(1 / 14)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        (" no, it is not", "no"),
        ("Nobody", "no"),
        ("It is. Yes", "other"),
        ("I know", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_the_first_four_letters(said, read):
    assert mme.yes_or_no(said) == read


def test_mme_writes_what_its_own_tool_reads(tmp_path):
    files.mme(tmp_path)
    questions = BENCHMARKS["mme"].questions(tmp_path)
    mme.write_results(questions, {q.id: "yes\tor\nno" for q in questions}, tmp_path / "out")
    assert sorted(p.stem for p in (tmp_path / "out").iterdir()) == sorted(files.SUBTASKS.split())
    for name in ("OCR", "posters"):
        written = (tmp_path / "out" / f"{name}.txt").read_text().splitlines()
        assert written == [
            f"0000.jpg\tIs this {name}? Please answer yes or no.\tYes\tyes or no",
            "0000.jpg\tIs this nothing? Please answer yes or no.\tNo\tyes or no",
        ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("one?\tYes\n", ": want two questions about an image, got 1"),
        ("one?\tYes\ntwo?\n", ":2: want question<tab>answer, got 'two?'"),
        ("one?\tYes\ntwo?\tor three?\tNo\n", ":2: want question<tab>answer, got"),
        ("one?\tYes\n\ntwo?\tMaybe\n", ":3: want a label of"),
    ],
)
def test_mme_texts_that_are_not_pairs_are_named(text, said, data):
    path = data / "mme" / "scene" / "questions_answers_YN" / "0000.txt"
    path.write_text(text)
    assert f"{path}{said}" in refused("mme", data)
    path.write_bytes(b"one?\tYes\n\xff\tNo\n")
    assert f"{path}: want UTF-8" in refused("mme", data)
    path.unlink()
    assert "want text files of questions" in refused("mme", data)


# ---- POPE ----


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a cat", "no"),
        ("Yes. No", "yes"),
        ("NO", "yes"),
        ("None", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_words_of_the_first_sentence(said, read):
    assert pope.yes_or_no(said) == read


def test_pope_scores(tmp_path):
    files.pope(tmp_path)
    questions = BENCHMARKS["pope"].questions(tmp_path)  # yes, no, yes, no of each category
    words = {
        "adversarial": ["Yes", "Yes", "Yes", "No"],
        "popular": ["No", "No", "Yes", "No"],
        "random": ["No", "No", "No", "No"],
    }
    said = {f"pope/{c}/{n}": word for c in words for n, word in enumerate(words[c], 1)}
    scores = BENCHMARKS["pope"].score(questions, said)
    expected = {  # accuracy, precision, recall, f1, yes_ratio
        "adversarial": (3 / 4, 2 / 3, 1, 4 / 5, 3 / 4),
        "popular": (3 / 4, 1, 1 / 2, 2 / 3, 1 / 4),
        "random": (1 / 2, 0, 0, 0, 0),
    }
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    for category, values in expected.items():
        found = [scores[f"{category}/{name}"] for name in names]
        assert found == pytest.approx(values, abs=1e-12)
    means = np.mean(list(expected.values()), axis=0)
    assert [scores[name] for name in names] == pytest.approx(means, abs=1e-12)


# ---- exact match ----


def test_exact_match_looks_through_case_space_and_stops_alone():
    assert plain('  "Pickup  Truck". ') == "pickup truck"
    assert plain("a cat") != "cat" and plain("it is a cat") != "cat"


def test_other_counts_what_is_no_answer_to_any_question(data):
    questions = BENCHMARKS["snli_ve"].questions(data)
    said = dict(zip(right(questions), ("Entailment.", "contradiction", "yes"), strict=True))
    scores = BENCHMARKS["snli_ve"].score(questions, said)
    assert scores == pytest.approx({"accuracy": 1 / 3, "other": 1 / 3})


def test_vsr_takes_yes_for_true(data):
    questions = BENCHMARKS["vsr"].questions(data)
    assert [q.answers for q in questions] == [("true", "yes"), ("false", "no"), ("true", "yes")]
    said = dict(zip(right(questions), ("Yes", "False.", "no"), strict=True))
    assert BENCHMARKS["vsr"].score(questions, said)["accuracy"] == pytest.approx(2 / 3)


def test_snli_ve_of_older_files(data):
    path = data / "snli_ve" / "snli_ve_test.jsonl"
    before = BENCHMARKS["snli_ve"].questions(data)
    path.write_text(path.read_text().replace("Flickr30K_ID", "Flikr30kID"))
    assert BENCHMARKS["snli_ve"].questions(data) == before


# ---- TextVQA ----


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("The Nikon D-90", "nikon d 90"),
        ("nikon - d90", "nikon d90"),
        ("x-ray - d90", "xray d90"),
        ("Two of the 1,000", "2 of 1000"),
        ("none", "0"),
        ("3.5 U.S.A.", "3.5 usa"),
        ("dont, cant?", "don't can't"),
        ("wouldntve", "wouldntve"),
        ("wouldnt've", "wouldn't've"),
        ("somebody'd", "somebodyd"),
        ("it's a\nbird", "it 's bird"),
        ("coca/cola (zero)", "coca cola 0"),
    ],
)
def test_answers_are_normalised_as_the_server_does(said, normal):
    assert vqa(said) == normal


def test_soft_accuracy_leaves_each_annotator_out():
    answers = ("x",) * 4 + ("y",) * 3 + ("z",) * 2 + ("w",)
    # n of ten agree: n leave 9 with n-1, the others 9 with n
    assert soft_accuracy("x", answers) == 1
    assert soft_accuracy("y", answers) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert soft_accuracy("z", answers) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert soft_accuracy("w", answers) == pytest.approx((1 * 0 + 9 * 1 / 3) / 10)
    assert soft_accuracy("v", answers) == 0


def test_textvqa_scores_the_mean(data):
    questions = BENCHMARKS["textvqa"].questions(data)
    said = {"textvqa/34602": "The Dakota", "textvqa/34603": "two"}
    assert BENCHMARKS["textvqa"].score(questions, said)["accuracy"] == pytest.approx(0.95)


def test_textvqa_wants_ten_answers(data):
    path = data / "textvqa" / "TextVQA_0.5.1_val.json"
    path.write_text(path.read_text().replace('"nous les gosses", ', "", 1))
    assert f"{path}: data[0]: want 10 answers" in refused("textvqa", data)
