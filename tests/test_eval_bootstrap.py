"""95% intervals over images: against closed cases and a plain loop over the same draws."""

import json
import random
from math import comb
from pathlib import Path

import benchmark_files as files
import numpy as np
import pytest

from fastprompt.eval import BENCHMARKS, Question, vqa
from fastprompt.eval.bootstrap import PERCENTILES, intervals
from fastprompt.eval.evaluation import Task, score

OWN = vqa("own.json")


def asked(rows: list[tuple[str, str, str]]) -> list[Question]:
    """Questions of (image, answer, group)."""
    return [
        Question(f"own/{n}", Path(image), "?", (answer,), group=group)
        for n, (image, answer, group) in enumerate(rows)
    ]


def test_one_question_an_image_is_binomial():
    n, p, draws = 30, 0.6, 20000
    questions = asked([(str(i), "yes", "") for i in range(n)])
    said = {q.id: "yes" if i < n * p else "no" for i, q in enumerate(questions)}
    chance = np.cumsum([comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
    expected = [int((chance < q / 100).sum()) / n for q in PERCENTILES]
    found = intervals(OWN, questions, said, resamples=draws)["accuracy"]
    assert found == pytest.approx(expected, abs=1e-12) and expected == [13 / 30, 23 / 30]


def test_two_images_have_three_outcomes():
    # a: three right answers, b: a wrong one. Draws aa 1, ab and ba 3/4, bb 0: never 1/2 between.
    questions = asked([("a", "yes", ""), ("a", "yes", ""), ("a", "yes", ""), ("b", "no", "")])
    said = {q.id: "yes" for q in questions}
    assert intervals(OWN, questions, said)["accuracy"] == (0, 1)
    # the recall of "no" is left out of a mean where no image asks for it: aa 1, ab 1/2, bb 0
    few = {intervals(OWN, questions, said, resamples=1, seed=s)["accuracy"] for s in range(40)}
    assert few == {(0, 0), (0.75, 0.75), (1, 1)}
    few = {
        intervals(OWN, questions, said, resamples=1, seed=s)["balanced_accuracy"] for s in range(40)
    }
    assert few == {(0, 0), (0.5, 0.5), (1, 1)}


def test_an_images_questions_are_drawn_together():
    rows, rng = [(str(i), "yes", "") for i in range(20)], random.Random(1)
    answers = [rng.choice(["yes", "no"]) for _ in rows]
    once, five = asked(rows), asked([row for row in rows for _ in range(5)])
    said = [dict(zip([q.id for q in once], answers, strict=True))]
    said.append({q.id: answers[n // 5] for n, q in enumerate(five)})
    alone, together = (
        intervals(OWN, q, s)["accuracy"] for q, s in zip((once, five), said, strict=True)
    )
    assert alone == together
    apart = asked([(str(n), "yes", "") for n in range(100)])
    low, high = intervals(OWN, apart, said[1])["accuracy"]
    assert together[0] < low < high < together[1]


def test_every_score_is_recomputed_on_each_draw():
    rng, draws = random.Random(0), 120
    questions = asked(
        [
            (rng.choice("abcdefgh"), rng.choice(["x", "y", "z"]), rng.choice("pqr"))
            for _ in range(24)
        ]
    )
    said = {q.id: rng.choice(["x", "y", "z", *q.answers]) for q in questions}
    names = sorted({str(q.image) for q in questions})
    drawn = np.random.default_rng(7).integers(len(names), size=(draws, len(names)))
    found = {name: [] for name in OWN.means}
    for draw in drawn[:50], drawn[50:100], drawn[100:]:
        for images in draw:
            again = [q for i in images for q in questions if str(q.image) == names[i]]
            scores = OWN.score(again, said)
            for name in found:
                found[name].append(scores[name])
    got = intervals(OWN, questions, said, resamples=draws, seed=7)
    for name, values in found.items():
        assert got[name] == pytest.approx(np.percentile(values, PERCENTILES), abs=1e-12)
    assert got == intervals(OWN, questions, said, resamples=draws, seed=7)
    assert got != intervals(OWN, questions, said, resamples=draws, seed=8)


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_means_of_points_are_the_scores(name, tmp_path):
    benchmark, rng = BENCHMARKS[name], random.Random(3)
    questions = benchmark.questions(files.everything(tmp_path))
    assert benchmark.headline in benchmark.means
    for _ in range(3):
        said = {q.id: rng.choice([*q.answers, *q.answers, "No", "", None]) for q in questions}
        points, scores = benchmark.points(questions, said), benchmark.score(questions, said)
        for means, part in benchmark.means.items():
            by_part = {}
            for q, point in zip(questions, points, strict=True):
                by_part.setdefault(part(q), []).append(point)
            mean = np.mean([np.mean(each) for each in by_part.values()])
            assert scores[means] == pytest.approx(benchmark.full * mean, abs=1e-12)


def test_intervals_are_beside_the_scores(tmp_path):
    files.everything(tmp_path / "data")
    tasks = {}
    for name in ("mme", "pope", "cifar10"):
        every = BENCHMARKS[name].questions(tmp_path / "data")
        tasks[name] = Task(BENCHMARKS[name], every, every)
    said = {q.id: q.answers[0] for task in tasks.values() for q in task.every}
    said["cifar10/0"] = "none"
    results = score(tasks, said, tmp_path, about={})
    assert results["mme"].intervals == {"total": (2800, 2800)}
    assert results["pope"].intervals == {"accuracy": (1, 1)}
    assert results["cifar10"].intervals == {"accuracy": (0, 1)}  # of three images
    found = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert found["cifar10"]["intervals"] == {"accuracy": [0, 1]}
    assert found["mme"]["headline"] == 1
    table = (tmp_path / "results.md").read_text()
    assert "| mme | 28 | 0 | total 2800.0 | 2800.0 to 2800.0 |" in table
    assert "| cifar10 | 3 | 0 | accuracy 0.667 | 0.000 to 1.000 |" in table
    assert "| cifar10 | other | 0.333 |  |" in table
