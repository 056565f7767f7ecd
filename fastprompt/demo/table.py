"""The demo's table, and the rows of those who do not look or see half."""

from rich.console import Console
from rich.table import Table

from fastprompt.demo.data import FAMILIES, Score, commonest_answer, score, seer
from fastprompt.demo.training import Split


def blind(pupils: Split, watched: Split, exam: Split) -> dict[str, Score]:
    """Scores on the whole test split without the image, or with one of its two attributes."""
    train = [q for split in (pupils, watched) for asked in split.asked for q in asked]
    test = [q for asked in exam.asked for q in asked]
    guess = commonest_answer(train)
    return {
        "commonest answer to the text": score(test, [guess[q.text] for q in test]),
        "sees colour alone": score(test, seer(train, test, "colour")),
        "sees shape alone": score(test, seer(train, test, "shape")),
    }


def show(
    console: Console, results: dict[str, Score], raced: dict[str, dict], agreement: dict[str, int]
) -> None:
    """Print accuracies, then the race."""
    accuracy = Table(title="exact match on easy-VQA's test split", title_justify="left")
    accuracy.add_column("")
    for column in ("overall", "macro", "balanced"):
        accuracy.add_column(column, justify="right")
    for name, s in results.items():
        accuracy.add_row(name, *(f"{x:.3f}" for x in (s.accuracy, s.macro, s.balanced)))
    console.print(accuracy)

    families = Table(title="by question family", title_justify="left")
    families.add_column("")
    shown = [n for n in results if n.startswith(("M²PT", "projector", "commonest"))]
    for name in shown:
        families.add_column(name, justify="right")
    for family in FAMILIES:
        families.add_row(family, *(f"{results[n].families.get(family, 0):.3f}" for n in shown))
    console.print(families)

    steps = Table(title="one training step (forward and backward)", title_justify="left")
    for column in ("", "ms", "peak MB", "against side keys"):
        steps.add_column(column, justify="left" if not column else "right")
    ours = raced["side keys"]
    for name, row in raced.items():
        peak = "–" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        ratio = f"{row['step_ms'] / ours['step_ms']:.2f}× time"
        if row["peak_mb"] and ours["peak_mb"]:
            ratio += f", {row['peak_mb'] / ours['peak_mb']:.2f}× memory"
        steps.add_row(name, f"{row['step_ms']:.0f}", peak, ratio)
    console.print(steps)
    console.print(
        "overall hides much: macro is the mean over the 8 question families, balanced the mean "
        "recall of the 13 answers. 'before' and 'blanked' are on a fixed 1,000 questions. "
        f"model.generate judged the same on {agreement['same']} of {agreement['of']} questions."
    )
