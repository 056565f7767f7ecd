"""What a benchmark is: how it is read, how it is scored."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastprompt.eval.answers import Predictions, right
from fastprompt.eval.questions import Question, collect


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: also its folder under ``--data``, and how its ids begin.
        read: folder of all data -> its questions. Images are not opened.
        score: questions and {id: prediction} of each of them -> name -> score.
        headline: the one score of it that is compared; ``full`` is its highest value.
        points: what each question earns, 0 to 1.
        means: score -> the part that a question belongs to; the score is ``full`` times the mean
            over the parts of the mean points in each. The headline is one of them.
        unit: questions that belong together, so that a limit does not part them.
    """

    name: str
    read: Callable[[Path], Iterator[Question]]
    score: Callable[[list[Question], Predictions], dict[str, float]]
    headline: str = "accuracy"
    full: float = 1.0
    unit: int = 1
    points: Callable[[list[Question], Predictions], list[float]] = right
    means: Mapping[str, Callable[[Question], str]] = field(
        default_factory=lambda: {"accuracy": lambda q: ""}
    )

    def questions(self, root: Path) -> list[Question]:
        """All questions. Raises InputError for what is not as the format says."""
        return collect(self.read(Path(root)), self.name)

    def limited(self, questions: list[Question], limit: int | None) -> list[Question]:
        """The first ``limit`` of each group, made up to whole units."""
        if limit is None:
            return questions
        most = -(-limit // self.unit) * self.unit
        seen: Counter[str] = Counter()
        kept = []
        for question in questions:
            seen[question.group] += 1
            if seen[question.group] <= most:
                kept.append(question)
        return kept
