"""What fp8 products cost in accuracy, beside bfloat16's own: ``python -m benchmarks.fp8_error``.

1. Gradients of layers as wide as a 7B's (random weights in NF4), of the prompts and of the input,
   against the same weights in float32: bfloat16, fp8, and fp8 with its gradients in e5m2.
2. The demo's model, trained some steps from the same start in bfloat16 and in fp8: both losses.

On the CPU fp8 is emulated: the same rounding, sums in float32 (a GPU's are a little coarser).
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import fastprompt
from benchmarks import llava, report
from benchmarks.llava import Language, Tuning
from fastprompt.blocks import fp8
from fastprompt.methods import M2PT, DeepPrompts
from fastprompt.ops.quantize_rows import E5M2

BF16 = torch.bfloat16
FORMS = {"bf16": "auto", "fp8": "fp8", "fp8, gradients in e5m2": "fp8"}  # name -> compute


# ---- gradients at 7B's width ----


def gradients(s: Tuning, device: str) -> dict[str, dict[str, float]]:
    """Form -> what -> relative error: of the loss, the input's gradient, each layer's prompts'."""
    torch.manual_seed(0)
    model = llava.build(s, BF16, device).train()
    given = llava.inputs(s, BF16, BF16, device)
    ids, labels = given["input_ids"], given["labels"]
    x = model.get_input_embeddings()(ids).detach()
    found = {}
    for name, compute in FORMS.items():
        with _gradients_in(E5M2) if "e5m2" in name else _gradients_in(fp8.GRADIENT):
            found[name] = _loss_and_gradients(model, x, labels, s.textual, compute)
    model.float()  # what is not 4-bit; 4-bit weights are decoded straight to float32
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    truth = _loss_and_gradients(model, x.float(), labels, s.textual, "auto")
    return {
        name: {what: _relative(got[what], truth[what]) for what in truth}
        for name, got in found.items()
    }


def _loss_and_gradients(
    model: nn.Module, x: Tensor, labels: Tensor, prompts: int, compute: str
) -> dict[str, Tensor]:
    patch = fastprompt.patch(model, DeepPrompts(text=prompts), compute=compute)
    torch.manual_seed(1)
    with torch.no_grad():
        for prompt in patch.prompts.values():
            prompt.tokens.copy_(torch.randn(prompt.tokens.shape) * 0.1)
    x = x.detach().requires_grad_()
    loss = model(inputs_embeds=x, labels=labels, use_cache=False).loss
    loss.backward()
    found = {"loss": loss.detach(), "input": x.grad}
    found |= {f"prompts {i}": p.grad for i, p in enumerate(patch.trainable.values())}
    patch.undo()
    return found


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@contextmanager
def _gradients_in(dtype: torch.dtype) -> Iterator[None]:
    before, fp8.GRADIENT = fp8.GRADIENT, dtype
    try:
        yield
    finally:
        fp8.GRADIENT = before


# ---- the demo's model ----


def curves(steps: int, images: int, cache: str | None) -> dict:
    """The losses of each step in bfloat16 and in fp8, from the same prompts on the same batches."""
    from fastprompt.demo import data, language
    from fastprompt.demo import model as assembled
    from fastprompt.demo.packing import Packer
    from fastprompt.demo.training import History, Recipe, Split, beginning, train

    recipe = Recipe(steps, images=images)
    tokenizer = language.tokenizer(cache)
    packer, model = Packer(tokenizer, recipe.size), assembled.model(cache)
    pupils = Split.of(data.images(cache, "train"), data.load(cache, "train"))
    method = M2PT(vision_tokens=20, text_tokens=10)
    start = beginning(tokenizer, pupils.images, recipe.size, method)
    losses = {}
    for name in ("bf16", "fp8"):
        torch.manual_seed(recipe.seed)
        patch = fastprompt.patch(model, method, compute=FORMS[name])
        fastprompt.prefill(patch, *start)

        def each_step(step: int, history: History, name: str = name) -> None:
            print(f"{name} step {step}: loss {history.losses[-1]:.4f}", flush=True)

        losses[name] = train(model, packer, pupils, recipe, each_step).losses
        products = next(x for x in patch.report().splitlines() if name == "bf16" or "in fp8" in x)
        patch.undo()
    return dict(recipe=asdict(recipe), products=products.strip(), losses=losses)


# ---- both ----


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_error", description=__doc__)
    parser.add_argument("--layers", type=int, default=2, help="of 7B's width; 0: no gradients")
    parser.add_argument("--tokens", type=int, default=64, help="in a row")
    parser.add_argument("--quick", action="store_true", help="narrow layers")
    parser.add_argument("--steps", type=int, default=40, help="of the demo's model; 0: none")
    parser.add_argument("--images", type=int, default=24, help="a step")
    parser.add_argument("--cache", help="where the demo's wheels are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to be written; what it has beside stays")
    given = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    words = sys.argv[1:] if arguments is None else arguments
    env = report.environment(
        given.device, None, "python -m benchmarks.fp8_error " + shlex.join(words)
    )
    record = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}

    if given.layers:
        width = (
            (128, 384, given.layers, 2, 2) if given.quick else (4096, 11008, given.layers, 32, 32)
        )
        s = Tuning(1, Language(*width, 256), None, N=given.tokens, answer=given.tokens // 2)
        start = time.perf_counter()
        errors = gradients(s, given.device)
        seconds = round(time.perf_counter() - start, 1)
        record["gradients"] = env | dict(shape=str(s), errors=errors, seconds=seconds)
        print(f"relative error against float32, {s}")
        print(f"{'':<24}" + "".join(f"{what:>12}" for what in errors["bf16"]))
        for name, row in errors.items():
            print(f"{name:<24}" + "".join(f"{error:>12.2e}" for error in row.values()))
        _write(record, given.json)
    if given.steps:
        record["curve"] = env | curves(given.steps, given.images, given.cache)
        _write(record, given.json)
    return 0


def _write(record: dict, file: Path | None) -> None:
    if file:
        file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
