"""The Markdown tables: one a model; and what each probe said."""

from benchmarks.field.case import WORKS

HEAD = ("step, ms", "peak, MiB", "accuracy", "trains", "lines", "breaks")
TITLES = {
    "tiny": "a tiny Llama, float32",
    "demo": "the demo's LLaVA (SmolLM2-135M, DINOv2 ViT-S) in NF4",
}


def markdown(rows: list[dict]) -> str:
    """The tables that the README holds."""
    models = dict.fromkeys(row["model"] for row in rows)
    return "\n\n".join(_of(model, [r for r in rows if r["model"] == model]) for model in models)


def _of(model: str, rows: list[dict]) -> str:
    steps = next((f", {row['steps']} steps" for row in rows if "steps" in row), "")
    ruler = ("---", *["---:"] * (len(HEAD) - 1), "---")
    lines = [(TITLES[model] + steps, *HEAD), ruler, *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: dict) -> tuple[str, ...]:
    title, written = row["title"], str(row["lines"])
    if row["status"] != "measured":
        said = f"{row['status']}: {row['reason']}".replace("|", "\\|")
        return title, "–", "–", "–", "–", written, said
    peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    step = f"{row['step_ms']:.{0 if row['step_ms'] >= 100 else 1}f}"
    accuracy = f"{_accuracy(row['before'])} → {_accuracy(row)}"
    return title, step, peak, accuracy, f"{row['trains']:,}", written, broken(row)


def _accuracy(found: dict) -> str:
    macro = f" ({found['macro']:.3f})" if "macro" in found else ""
    return f"{found['accuracy']:.3f}{macro}"


def broken(row: dict) -> str:
    """Names of the probes that do not work, and how: wrong, or an error."""
    found = row["probes"]
    names = [f"{name} ({said.partition(':')[0]})" for name, said in found.items() if said != WORKS]
    return ", ".join(names) or f"none of {len(found)}"


def details(rows: list[dict]) -> str:
    """What every probe that does not work said, a line each."""
    return "\n".join(
        f"* {row['title']}, {row['model']}, {name}: {said}"
        for row in rows
        for name, said in row.get("probes", {}).items()
        if said != WORKS
    )
