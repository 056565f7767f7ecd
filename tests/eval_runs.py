"""A folder to evaluate in, and ``fastprompt eval`` on it, for tests."""

import json

import benchmark_files as files
import torch

import fastprompt
from fastprompt.__main__ import main
from fastprompt.eval import BENCHMARKS
from fastprompt.eval.evaluation import load

ALL = list(BENCHMARKS)


def run(folder, output, *more, tasks=("vsr",), model=True):
    source = ["--model", str(folder / "model"), "--prompts", str(folder / "prompts")]
    options = ["--tasks", *tasks, "--data", str(folder / "data"), "--output", str(output)]
    return main(["eval", *(source if model else []), *options, "--device", "cpu", *map(str, more)])


def results(output):
    return json.loads((output / "results.json").read_text())


def said_right(folder, tasks=ALL):
    found = load(tasks, folder / "data")
    return {q.id: q.answers[0] for task in found.values() for q in task.every}


def written(path, said):
    """As others write predictions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"id": name, "prediction": text}) for name, text in said.items())
    path.write_text("\n".join(lines) + "\n")
    return path


def make_folder(root):
    """Data, a model and prompts for it, none of which any test changes."""
    files.everything(root / "data")
    files.save_model(root / "model")
    files.save_judge(root / "judge")
    model = files.llava()
    patch = fastprompt.patch(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in patch.trainable.values():
            p.add_(torch.randn_like(p))
    fastprompt.save(model, root / "prompts")
    return root
