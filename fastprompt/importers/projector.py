"""A projector that was trained before: our own stage 1, or LLaVA's ``mm_projector.bin``."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprompt import undoing
from fastprompt.adapters import unwrapped
from fastprompt.families import anatomy
from fastprompt.importers.shards import Shards
from fastprompt.patching import ATTRIBUTE, patch_of
from fastprompt.share import is_4bit

# LLaVA: model.mm_projector.weight (linear), model.mm_projector.0.weight, .2.weight (two layers);
# transformers: multi_modal_projector.linear_1.weight, .linear_2.weight; ours: the model's own names
_NAME = re.compile(r"(?:.*\.)?(?:mm_projector|multi_modal_projector)\.(?:(.+)\.)?(weight|bias)")

Layers = list[dict[str, Tensor]]  # "weight" [out, in] and perhaps "bias" [out], in order


def load_projector(model: nn.Module, path: str | Path) -> nn.Module:
    """Put a trained projector into a vision-language model, patched or not.

    Args:
        model: a LLaVA; its projector is changed in place: under a patch that trains it, the copy
            that trains; under one that does not, `fastprompt.save` writes it beside what trains.
        path: what `fastprompt.save` wrote of a method that trains the projector, LLaVA's
            ``mm_projector.bin`` (linear, or the two layers of LLaVA-1.5), a checkpoint of
            transformers' LLaVA, or a folder with one of these. Nothing else in it is read.

    Returns:
        The model's projector.

    Raises:
        ValueError: no projector in the file, a damaged file, another number of layers, another
            shape, or a 4-bit projector. The model is then as it was.
    """
    model = unwrapped(model)
    done = patch_of(model) if ATTRIBUTE in vars(model) else None
    parts = anatomy(model) if done is None else done.anatomy
    if "projector" not in parts.parts:
        raise ValueError(f"load_projector: want a vision-language model, got {parts.family}")
    layers = read_projector(Shards.at(path))
    if not layers:
        raise ValueError(
            f"{path}: want a projector (mm_projector.*, multi_modal_projector.*) in it"
        )
    name = parts.parts["projector"]
    projector = model.get_submodule(name)
    check_projector(projector, layers, path)
    if done is not None:  # frozen, it is still no longer the base model's
        names = (f"{name}.{n}" for n, _ in projector.named_parameters())
        done.given = tuple(n for n in names if n not in done.trainable)
        undoing.remember(done._undo, done.model, done.given)
    fill_projector(projector, layers)
    return projector


def read_projector(shards: Shards) -> Layers:
    """The layers of the projector in a checkpoint; none where it holds none."""
    found: dict[str, dict[str, str]] = {}
    for name in shards.files:
        match = _NAME.fullmatch(name)
        if match:
            found.setdefault(match[1] or "", {})[match[2]] = name
    ordered = sorted(found, key=lambda layer: [int(n) for n in re.findall(r"\d+", layer)])
    tensors = shards.read([name for layer in found.values() for name in layer.values()])
    return [{leaf: tensors[name] for leaf, name in found[layer].items()} for layer in ordered]


def check_projector(projector: nn.Module, layers: Layers, path: str | Path) -> None:
    """Raise a ValueError unless ``layers`` fit the linear layers of a projector."""
    own = _linears(projector)
    if any(is_4bit(linear) for linear in own):
        raise ValueError(
            "load_projector: want a dense projector, got a 4-bit one: patch the model first (what "
            "trains is dense), or load it with "
            "llm_int8_skip_modules=['model.multi_modal_projector']"
        )
    want, got = _shapes([dict(m.named_parameters()) for m in own]), _shapes(layers)
    if want != got:
        raise ValueError(f"{path}: want a projector of {want}, got one of {got}")


def fill_projector(projector: nn.Module, layers: Layers) -> None:
    with torch.no_grad():
        for linear, layer in zip(_linears(projector), layers, strict=True):
            for leaf, value in layer.items():
                linear.get_parameter(leaf).copy_(value)


def _linears(projector: nn.Module) -> list[nn.Linear]:
    return [m for m in projector.modules() if isinstance(m, nn.Linear)]


def _shapes(layers: Layers) -> str:
    each = (
        ", ".join(f"{leaf} {list(layer[leaf].shape)}" for leaf in sorted(layer, reverse=True))
        for layer in layers
    )
    return f"{len(layers)} linear layer{'s' * (len(layers) != 1)} ({'; '.join(each)})"
