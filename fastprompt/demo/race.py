"""One training step of side keys against literal concatenation: time and peak memory.

Each contender runs in a process of its own, so that its peak memory is its own:
``python -m fastprompt.demo.race CONTENDER`` prints its figures as JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import fastprompt
from fastprompt import linear4bit
from fastprompt.concatenation import concatenate
from fastprompt.demo import data, language
from fastprompt.demo import model as assembled
from fastprompt.demo.packing import Packer
from fastprompt.demo.training import Recipe, Split, step_loss
from fastprompt.methods import M2PT
from fastprompt.trained import trained_copy

CONTENDERS = {
    "side keys": "fastprompt, memory='auto': on this machine all is kept",
    "side keys, memory='low'": "fastprompt, of each block its input alone is kept",
    "concatenation": "rows written into every block, fastprompt's 4-bit products",
    "concatenation, bitsandbytes": "rows written into every block, bitsandbytes' products",
}


def race(
    method: M2PT, recipe: Recipe, cache: str | None, steps: int, threads: int
) -> dict[str, dict]:
    """Figures of every contender: ``step_ms`` (median) and ``peak_mb`` above the loaded model."""
    results = {}
    for name in CONTENDERS:
        arguments = [
            name, "--vision", method.vision_tokens, "--text", method.text_tokens,
            "--images", recipe.images, "--questions", recipe.questions, "--size", recipe.size,
            "--steps", steps, "--threads", threads,
        ]  # fmt: skip
        arguments += ["--cache", cache] if cache else []
        done = subprocess.run(
            [sys.executable, "-m", "fastprompt.demo.race", *map(str, arguments)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
        results[name] = json.loads(done.stdout.splitlines()[-1])
    return results


def _prepare(model: nn.Module, contender: str, method: M2PT) -> list[nn.Parameter]:
    torch.manual_seed(0)
    if contender.startswith("side keys"):
        memory = "low" if "low" in contender else "auto"
        return list(fastprompt.patch(model, method, memory=memory).trainable.values())
    prompts = concatenate(model, method)
    model.model.multi_modal_projector = trained_copy(model.model.multi_modal_projector)
    if contender == "concatenation":
        linear4bit.adopt(model)
    else:  # or its first evaluation would make every later gradient wrong
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    projector = model.model.multi_modal_projector.parameters()
    return [*(prompt.tokens for prompt in prompts.values()), *projector]


def _peak_mb() -> float | None:
    """Highest resident memory since the last `_reset_peak`; None where Linux does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    sizes = dict(vision=20, text=10, images=24, questions=3, size=56, steps=4)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cache")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    model = assembled.model(given.cache)
    packer = Packer(language.tokenizer(given.cache), given.size)
    split = Split.of(data.images(given.cache, "train"), data.load(given.cache, "train"))
    part = split.part(list(range(given.images)))
    batch = packer.pack(part.images, [asked[: given.questions] for asked in part.asked])
    parameters = _prepare(model, given.contender, M2PT(given.vision, given.text))
    model.train()

    def step() -> float:
        start = time.perf_counter()
        torch.autograd.grad(step_loss(model, batch), parameters)
        return 1000 * (time.perf_counter() - start)

    _reset_peak()
    before = _peak_mb()
    step()  # warm-up; its peak is the step's
    after = _peak_mb()
    times = [step() for _ in range(given.steps)]
    peak = None if before is None else after - before
    print(json.dumps(dict(step_ms=statistics.median(times), peak_mb=peak, steps=given.steps)))


if __name__ == "__main__":
    main()
