"""Do class prompts help, and is it their content? Ten classes, few images, several seeds."""

from collections.abc import Callable
from dataclasses import replace
from statistics import mean, stdev

import torch
from torch import Tensor

from fastprompt.demo.instruction import learning, models, small
from fastprompt.demo.instruction.encoder import DualEncoder
from fastprompt.demo.instruction.learning import Recipe, accuracy
from fastprompt.demo.instruction.pixels import normalised
from fastprompt.instruction import InstructionViT

SHOTS = 16  # exemplars a class
VALIDATION = 1000  # images
# what recipes were picked among: changes to `Recipe`, and options of the model
CANDIDATES: dict[str, tuple[dict, dict]] = {
    "default": ({}, {}),
    "head lr * 2": (dict(head_lr=1e-2), {}),
    "prompt lr / 4": (dict(prompt_lr=5e-3), {}),
    "projection lr / 3": (dict(projection_lr=1e-3), {}),
    "not standardised": (dict(head_lr=2e-2), dict(standardise=False)),
    "alignment 0": ({}, dict(alignment=0.0)),
    "alignment 1": ({}, dict(alignment=1.0)),
    "temperature 0.3": ({}, dict(temperature=0.3)),
    "token scale 0.3": ({}, dict(token_scale=0.3)),
    "token scale 3": ({}, dict(token_scale=3.0)),
}
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of the linear probe
WATCHED = (0, 10, 30, 100, 300, 1000)


class Bench:
    """The data set with everything that frozen models make of it, once."""

    def __init__(self, encoder: DualEncoder, train: int, test: int, cache: str | None):
        self.encoder, self.cache = encoder, cache
        self.data = small.load(train, VALIDATION, test)
        self.train_pixels = normalised(self.data.train.images)
        self.validation_pixels = normalised(self.data.validation.images)
        self.test_pixels = normalised(self.data.test.images)
        every = (self.train_pixels, self.test_pixels, self.validation_pixels)
        self.seen = tuple(encoder.seen(pixels) for pixels in every)
        self.classes = len(self.data.names)

    def shots(self, count: int) -> list[Tensor]:
        """For each class the places of its first ``count`` training images."""
        labels = self.data.train.labels
        return [(labels == c).nonzero().flatten()[:count] for c in range(self.classes)]

    def baselines(self, places: Tensor | None = None) -> dict[str, float]:
        """Linear probe and nearest prototype, of all training images or those at ``places``.

        The probe's penalty is picked on the validation images, as the models' recipes were.
        """
        x, labels = self.seen[0], self.data.train.labels
        if places is not None:
            x, labels = x[places], labels[places]
        cls = x.shape[1] // 2  # what was seen is CLS, then the mean patch; heads read CLS
        _, test, validation = self.seen
        found = {}
        for name, width in {"linear probe": cls, "linear probe, patches too": 2 * cls}.items():
            given = x[:, :width], labels

            def probe(of: Tensor, penalty: float, given=given, width=width) -> Tensor:
                return learning.linear_probe(*given, of[:, :width], self.classes, penalty)

            right = {
                p: accuracy(probe(validation, p), self.data.validation.labels) for p in PENALTIES
            }
            best = max(right, key=right.__getitem__)
            found[name] = accuracy(probe(test, best), self.data.test.labels)
        got = learning.nearest_prototype(x[:, :cls], labels, test[:, :cls], self.classes)
        return found | {"nearest prototype": accuracy(got, self.data.test.labels)}

    def run(
        self,
        kind: str,
        recipe: Recipe,
        seed: int,
        *,
        places: Tensor | None = None,
        watched: tuple[int, ...] = (),
        validating: bool = False,
        **options: object,
    ) -> tuple[torch.nn.Module, learning.History, float]:
        """A model of the kind, trained and tested: (model, history, accuracy).

        validating: test on the images that recipes are picked on.
        """
        torch.manual_seed(seed)
        shots = SHOTS if places is None else max(1, len(places) // self.classes)
        exemplars = [self.encoder.mapped(self.seen[0][own]) for own in self.shots(shots)]
        names, template = self.data.names, self.data.template
        model = models.build(kind, self.encoder, names, exemplars, template, self.cache, **options)
        among = torch.arange(len(self.train_pixels)) if places is None else places
        generator = torch.Generator().manual_seed(seed)

        def batch(step: int) -> learning.Batch:
            drawn = torch.randint(len(among), (recipe.batch,), generator=generator)
            chosen = among[drawn]
            return self.train_pixels[chosen], self.data.train.labels[chosen], None

        pixels, labels = self.test_pixels, self.data.test.labels
        if validating:
            pixels, labels = self.validation_pixels, self.data.validation.labels

        def score() -> float:
            return accuracy(learning.logits(model, pixels, None)[0], labels)

        model.train()
        history = learning.train(model, batch, recipe, score, watched)
        return model, history, score()

    def similarity(self, model: InstructionViT) -> list[list[float]]:
        """Mean cosine of CLS, for the test images of each class, to each prompt's output."""
        cosine, _ = learning.logits(model, self.test_pixels, None, predict="cosine")
        rows = [cosine[self.data.test.labels == c].mean(0) for c in range(self.classes)]
        return (torch.stack(rows) * model.temperature).tolist()


def kinds(bench: Bench, recipe: Recipe, seeds: int, say: Callable[[str], None]) -> dict:
    """Accuracy of every kind, mean and standard deviation over seeds, and the baselines."""
    scores: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for kind in models.KINDS:
        for seed in range(seeds):
            model, history, got = bench.run(kind, recipe, seed)
            if kind == "mixed" and seed == 0:
                similarity = bench.similarity(model)
            scores.setdefault(kind, []).append(got)
            seconds[kind] = history.seconds / recipe.steps
        say(
            f"{bench.data.name}, {kind}: {_text(scores[kind])}, {seconds[kind] * 1e3:.0f} ms a step"
        )
    rows = {
        kind: dict(mean=mean(s), sd=stdev(s) if seeds > 1 else 0.0, all=s)
        for kind, s in scores.items()
    }
    for name, got in bench.baselines().items():
        rows[name] = dict(mean=got, sd=0.0, all=[got])
        say(f"{bench.data.name}, {name}: {got:.3f}")
    return dict(
        data=bench.data.name, names=bench.data.names, scores=rows, step_seconds=seconds,
        similarity=similarity,
    )  # fmt: skip


def recipes(
    bench: Bench, steps: int, kinds: tuple[str, ...], say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Accuracy on the images kept for this, of each kind by each of `CANDIDATES`; one seed."""
    found: dict[str, dict[str, float]] = {}
    for name, (changes, options) in CANDIDATES.items():
        # VPT knows none of the options, and without prompts they change nothing but the head
        own = [k for k in kinds if not options or k not in ("none", "VPT")]
        for kind in own:
            recipe = Recipe(steps, **changes)
            _, _, got = bench.run(kind, recipe, 0, validating=True, **options)
            found.setdefault(kind, {})[name] = got
        say(f"{name}: " + ", ".join(f"{kind} {found[kind][name]:.3f}" for kind in own))
    return found


def adapting(
    bench: Bench, recipe: Recipe, shots: tuple[int, ...], say: Callable[[str], None]
) -> dict:
    """Learning curves, steps to 95% of the linear probe, and accuracy from a few shots a class."""
    probe = bench.baselines()["linear probe"]
    curves, reached = {}, {}
    for kind in ("none", "text", "mixed", "VPT"):
        watched = tuple(step for step in WATCHED if step <= recipe.steps)
        _, history, got = bench.run(kind, recipe, 0, watched=watched)
        curve = history.accuracy | {recipe.steps: got}
        enough = [step for step, value in curve.items() if value >= 0.95 * probe]
        curves[kind], reached[kind] = curve, min(enough, default=None)
        say(f"{kind}: " + ", ".join(f"{step} steps {value:.3f}" for step, value in curve.items()))
    few = replace(recipe, steps=min(100, recipe.steps))
    from_few: dict[str, dict[int, float]] = {}
    for count in shots:
        places = torch.cat(bench.shots(count))
        from_few.setdefault("linear probe", {})[count] = bench.baselines(places)["linear probe"]
        for kind in ("none", "text", "mixed"):
            _, _, got = bench.run(kind, few, 0, places=places)
            from_few.setdefault(kind, {})[count] = got
        say(f"{count} a class: " + ", ".join(f"{k} {v[count]:.3f}" for k, v in from_few.items()))
    return dict(probe=probe, curves=curves, steps_to_95_percent_of_probe=reached, shots=from_few)


def _text(scores: list[float]) -> str:
    sd = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{mean(scores):.3f}{sd}"
