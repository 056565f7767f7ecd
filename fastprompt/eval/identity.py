"""What tells one model from another: where predictions and verdicts may be gone on with."""

from hashlib import sha256

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fastprompt.patching import ATTRIBUTE, patch_of
from fastprompt.without import seen

_SAMPLES = 64  # of each frozen parameter


@torch.no_grad()
def identity(
    model: nn.Module, processor: ProcessorMixin | PreTrainedTokenizerBase
) -> dict[str, str]:
    """Hashes of a model's weights and of its chat template.

    Of a patched model all that trains is hashed whole, and so are the prompts that forwards see
    just now (`Patch.using`, `Patch.disabled`). Of every other parameter name, shape, dtype and a
    few values are, of a 4-bit one also a few scales: a change of a single frozen number may be
    missed, another checkpoint, dtype or quantisation is not. bitsandbytes' repacking of 4-bit
    weights on the CPU rounds their scales, and so makes another model of it.

    Returns:
        "weights", and "chat template" if there is one.
    """
    found = sha256()

    def add(name: str, x: Tensor, *, whole: bool = False) -> None:
        flat = x.detach().flatten()
        if not whole:
            flat = flat[:: max(1, len(flat) // _SAMPLES)]
        found.update(f"{name} {list(x.shape)} {x.dtype}".encode())
        found.update(flat.contiguous().view(torch.uint8).cpu().numpy().tobytes())

    trained: set[str] = set()
    if ATTRIBUTE in vars(model):
        patch = patch_of(model)
        trained = set(patch.trainable)
        sets, which = seen(patch)
        found.update(f"prompts of rows: {which}".encode())
        for prompts in sets:
            found.update(b"a set")
            for block, prompt in prompts.items():
                for x in prompt.tensors():
                    add(block, x, whole=True)
    for name, p in model.named_parameters():
        add(name, p, whole=name in trained)
        for x in _scales(p):
            add(f"{name}, scales", x)
    told = {"weights": found.hexdigest()[:16]}
    if processor.chat_template:
        told["chat template"] = sha256(processor.chat_template.encode()).hexdigest()[:16]
    return told


def _scales(p: nn.Parameter) -> list[Tensor]:
    """Of a 4-bit weight; of nested ones the scales' own as well."""
    state = getattr(p, "quant_state", None)
    if state is None:
        return []
    return [state.absmax] + ([state.state2.absmax, state.offset] if state.nested else [])
