"""Pictures of the Instruction-ViT demo: kinds, learning curves, accuracy and time against k."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is wanted
import matplotlib.pyplot as plt


def draw(parts: dict[str, dict], folder: Path) -> None:
    """One file for each part that has been run."""
    for name, draw_part in {
        "kinds": _kinds, "adapting": _adapting, "selection": _selection
    }.items():  # fmt: skip
        if name in parts:
            figure = draw_part(parts[name])
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=120)
            plt.close(figure)


def _kinds(part: dict) -> plt.Figure:
    figure, (axes, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    rows = part["scores"]
    values, errors = [r["mean"] for r in rows.values()], [r["sd"] for r in rows.values()]
    axes.bar(range(len(rows)), values, yerr=errors, capsize=3)
    axes.set_xticks(range(len(rows)), rows, rotation=30, ha="right")
    low = min(v - e for v, e in zip(values, errors, strict=True))
    axes.set(title=f"{part['data']}: accuracy by kind of prompt", ylim=(max(0, low - 0.05), None))
    axes.grid(axis="y", alpha=0.3)
    drawn = right.imshow(part["similarity"], cmap="viridis")
    places = range(len(part["names"]))
    right.set_xticks(places, part["names"], rotation=90, fontsize="x-small")
    right.set_yticks(places, part["names"], fontsize="x-small")
    right.set(title="mixed: cosine of CLS to prompts", xlabel="prompt", ylabel="image's class")
    figure.colorbar(drawn, ax=right)
    return figure


def _adapting(part: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for kind, curve in part["curves"].items():
        left.plot([max(int(s), 1) for s in curve], list(curve.values()), marker="o", label=kind)
    left.axhline(part["probe"], linestyle="--", color="grey", label="linear probe")
    left.set(title="accuracy by training step", xlabel="step", xscale="log", ylim=(0, 1))
    for kind, few in part["shots"].items():
        right.plot([int(n) for n in few], list(few.values()), marker="o", label=kind)
    right.set(
        title="accuracy by images a class", xlabel="images a class", xscale="log", ylim=(0, 1)
    )
    for axes in (left, right):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    return figure


def _selection(part: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    ks = list(part["by_k"])
    for art in ("google", "twitter"):
        left.plot(
            range(len(ks)), [part["by_k"][k][art]["accuracy"] for k in ks], marker="o", label=art
        )
    left.set(title=f"accuracy, {part['classes']} classes", xlabel="classes kept", ylim=(0, 1))
    own = [part["by_k"][k]["ms_per_image"] for k in ks]
    encode = [0.0 if k == "all" else part["by_k"][k]["ms_encoding"] for k in ks]
    right.bar([str(k) for k in ks], own, label="backbone and selection")
    right.bar([str(k) for k in ks], encode, bottom=own, label="encoder's pass")
    right.set(title="ms an image", xlabel="classes kept", yscale="log")
    left.set_xticks(range(len(ks)), [str(k) for k in ks])
    for axes in (left, right):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    return figure
