"""How far a score would move if other images had been drawn: 95% bootstrap intervals over images.

Questions about one image stand or fall together, so not questions but images are drawn: as many as
there are, with replacement, each with all of its questions. The interval is from the 2.5th to the
97.5th percentile of the score over such draws (Efron 1979, the percentile method). A part of a
score (a group, a true answer) that a draw leaves without questions is left out of its mean.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastprompt.eval.answers import Predictions
from fastprompt.eval.benchmarks import Benchmark
from fastprompt.eval.questions import Question

RESAMPLES, PERCENTILES = 1000, (2.5, 97.5)
_AT_ONCE = 50  # draws; of 10,000 questions 4 MB


def intervals(
    benchmark: Benchmark,
    questions: list[Question],
    predictions: Predictions,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """The 95% interval of each score that the benchmark has as a mean of its questions' points.

    Args:
        questions: at least one; those with one image file (else each on its own) are drawn as one.
        predictions: of each of them.
        resamples: how many draws; every score is computed on the same ones.
        seed: of the draws.

    Returns:
        Score -> (low, high), on the score's own scale.
    """
    points = np.array(benchmark.points(questions, predictions))
    images = _numbered([str(q.image) if isinstance(q.image, Path) else q.id for q in questions])
    parts = {score: _Part(map(part, questions)) for score, part in benchmark.means.items()}
    found: dict[str, list[np.ndarray]] = {score: [] for score in parts}
    for times in _draws(images.max() + 1, resamples, seed):
        weights = times[:, images]
        for score, part in parts.items():
            found[score].append(part.mean(weights, points))
    ends = {score: np.percentile(np.concatenate(f), PERCENTILES) for score, f in found.items()}
    return {
        score: (benchmark.full * float(low), benchmark.full * float(high))
        for score, (low, high) in ends.items()
    }


class _Part:
    """Which part of a score each question belongs to."""

    def __init__(self, names: Iterator[str]):
        numbers = _numbered(list(names))
        self.order = np.argsort(numbers, kind="stable")
        self.starts = np.searchsorted(numbers[self.order], np.arange(numbers.max() + 1))

    def mean(self, weights: np.ndarray, points: np.ndarray) -> np.ndarray:
        """[R] means over the parts, for questions [Q] that count ``weights`` [R, Q] times."""
        weights = weights[:, self.order]
        counts = np.add.reduceat(weights, self.starts, axis=1)
        sums = np.add.reduceat(weights * points[self.order], self.starts, axis=1)
        return np.where(counts, sums / np.maximum(counts, 1), 0).sum(1) / (counts > 0).sum(1)


def _draws(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image was drawn, [some, images] at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _AT_ONCE):
        rows = min(_AT_ONCE, resamples - start)
        drawn = rng.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images)


def _numbered(names: list[str]) -> np.ndarray:
    return np.unique(names, return_inverse=True)[1]
