"""What works on a tuned tiny model: tried, never remembered.

Each probe gives "works", "wrong: …" with a number, or "error: …" where the contender's code raised.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.field import generation
from benchmarks.field.case import WORKS, Case, results, said, verdict
from benchmarks.field.learning import train
from benchmarks.field.tasks import Batch, Task, load_model

FOUR_BIT_STEPS = 20  # that a 4-bit model is trained for


def checkpointing(case: Case, reentrant: bool) -> str:
    """The same gradients, and less is kept; reentrant mode may want inputs that want gradients."""
    truth, limits = case.truth()
    plain = kept_bytes(case.model(), case.batch)

    def tried(inputs_want_gradients: bool) -> str:
        model = case.model()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=dict(use_reentrant=reentrant)
        )
        if inputs_want_gradients:
            model.enable_input_require_grads()
        found = verdict(results(model, case.batch), truth, limits)
        if found == WORKS and kept_bytes(model, case.batch) >= plain:
            return "wrong: it keeps as much as without"
        return found

    found = said(lambda: tried(False))
    if found == WORKS or not reentrant:
        return found
    return f"{found} (after enable_input_require_grads(): {said(lambda: tried(True))})"


def kept_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that autograd keeps between a forward and its backward, each storage once."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(**batch).loss  # held until all is counted: storages must not be used again
    total = sum(kept.values())
    del loss
    return total


def four_bit(case: Case, rate: float) -> str:
    """A 4-bit model computes what its weights' values do, after an evaluation too, and learns."""
    with tempfile.TemporaryDirectory() as folder:
        decode(case.task.model, Path(folder))
        truth, limits = case.truth(folder)
    model, logits = case.model(four_bit=True), {"logits": truth.pop("logits")}
    wrong = []
    for when in ("", "after an evaluation "):  # `results` ends in one
        got = results(model, case.batch)
        wrong.append(verdict(got, truth, limits, when))
    wrong.append(verdict(got, logits, limits))
    torch.manual_seed(0)
    model = case.module.tune(load_model(case.task.model, True, torch.float32), case.task.start)
    losses = train(model, (case.task.batches * FOUR_BIT_STEPS)[:FOUR_BIT_STEPS], rate, rate).losses
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    if not last < first:
        wrong.append(f"wrong: the loss went from {first:.2f} to {last:.2f}")
    said = [word.removeprefix("wrong: ") for word in wrong if word != WORKS]
    return f"wrong: {', '.join(said)}" if said else WORKS


def decode(folder: str, to: Path) -> None:
    """Save a dense model with the values of the 4-bit one's weights."""
    from bitsandbytes.functional import dequantize_4bit

    packed, dense = load_model(folder, True, torch.float32), load_model(folder, False)
    for name, module in packed.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            values = dequantize_4bit(module.weight.data, state)
            dense.get_submodule(name).weight.data.copy_(values)
    dense.save_pretrained(to)


def save_and_load(case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder:
        fresh = load_model(case.task.model, False)
        return same_after_loading(case.module, case.model(), fresh, case.batch, folder)


@torch.no_grad()
def same_after_loading(
    module: ModuleType, model: nn.Module, fresh: nn.Module, batch: Batch, folder: str
) -> str:
    """Saved and loaded into a ``fresh`` model it gives the same logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    want = model.eval()(**inputs).logits.float()
    module.save(model, folder)
    got = module.load(fresh, folder).eval()(**inputs).logits.float()
    off = float(torch.dist(got, want) / want.norm())
    return WORKS if off <= 1e-6 else f"wrong: logits are off by {off:.1%}"


@torch.no_grad()
def length(case: Case) -> str:
    """Logits stand at the places of the inputs."""
    ids = case.batch["input_ids"]
    logits = case.model().eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    found, want = logits.shape[1], ids.shape[1]
    return WORKS if found == want else f"wrong: {found} for {want} tokens"


PROBES: dict[str, Callable[[Case, float], str]] = {
    "generate": lambda case, rate: generation.generate(case),
    "static cache": lambda case, rate: generation.static_cache(case),
    "left padding": lambda case, rate: generation.left_padding(case),
    "checkpointing": lambda case, rate: checkpointing(case, reentrant=False),
    "reentrant checkpointing": lambda case, rate: checkpointing(case, reentrant=True),
    "4-bit": four_bit,
    "save and load": lambda case, rate: save_and_load(case),
    "length of logits": lambda case, rate: length(case),
}


def all_of(module: ModuleType, task: Task, rate: float) -> dict[str, str]:
    """Every probe's word on a contender; ``rate``: the learning rate of the 4-bit model's steps."""
    case = Case(module, task)
    return {name: said(lambda p=probe: p(case, rate)) for name, probe in PROBES.items()}
