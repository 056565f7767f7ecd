"""An `InstructionViT` on disk: what trains, and the classes with the encoder's features of them."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastprompt.files import replace
from fastprompt.instruction.class_prompts import ClassPrompts
from fastprompt.instruction.head import Head
from fastprompt.samples import base_sample, same_base

if TYPE_CHECKING:
    from fastprompt.instruction.model import InstructionViT

FILE = "instruction.safetensors"
FORMAT = 2  # 1 had no gain
OPTIONS = ("alignment", "temperature", "train_k", "train_others", "top_k", "predict")


def save(model: "InstructionViT", folder: str | Path) -> Path:
    """Write one file, whole or not at all; see `InstructionViT.save`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    card = {
        "format": FORMAT,
        "kind": model.kind,
        "features": model.features,
        "widths": [model.encoder.width, model.backbone.width],
        "encoder": model.encoder.fingerprint,
        "token_order": model.backbone.order,
        "standardise": model.standard is not None,
        "backbone": base_sample(model.backbone),
        "options": {name: getattr(model, name) for name in OPTIONS},
        "tasks": {
            name: {"names": own.names, "templates": own.templates, "head": name in model.heads}
            for name, own in model.tasks.items()
        },
    }
    metadata = {"format": "pt", "fastprompt-instruction": json.dumps(card)}
    tensors = {name: t.detach().cpu().contiguous() for name, t in _own(model).items()}
    replace(folder / FILE, lambda part: save_file(tensors, part, metadata=metadata))
    return folder / FILE


def load(model: "InstructionViT", folder: str | Path) -> None:
    """Read what `save` wrote; see `InstructionViT.load`. The model is as it was after an error."""
    path = Path(folder) / FILE
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get("fastprompt-instruction", "{}"))
            # copied: else a later change of the file would change the model
            tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: want a whole safetensors file; {error}") from error
    if card.get("format") != FORMAT:
        raise ValueError(f"{path}: want format {FORMAT}, got {card.get('format')}")
    card.setdefault("standardise", False)
    for what, here in (
        ("kind", model.kind),
        ("features", model.features),
        ("widths", [model.encoder.width, model.backbone.width]),
        ("token_order", model.backbone.order),
        ("standardise", model.standard is not None),
        ("encoder", None if model.features == "encoder" else model.encoder.fingerprint),
    ):
        if here is not None and card[what] != here:
            raise ValueError(f"{path}: {what}: want {card[what]!r}, got a model with {here!r}")
    other = {n: x for n, x in card["options"].items() if n in OPTIONS and x != getattr(model, n)}
    if other:
        here = {name: getattr(model, name) for name in other}
        warnings.warn(f"{path} was saved with {other}; this model has {here}", stacklevel=3)
    if not same_base(card["backbone"], base_sample(model.backbone)):
        raise ValueError(f"{path}: was trained on another backbone than this one")
    before = dict(model.tasks), dict(model.heads)
    device = next(model.backbone.parameters()).device
    try:
        for name, own in card["tasks"].items():
            keys, rows = (tensors[f"tasks.{name}.{part}"] for part in ("keys", "rows"))
            model.tasks[name] = ClassPrompts.of(
                own["names"], own["templates"], model.kind, model.features, rows, keys
            ).to(device)
            if own["head"]:
                model.heads[name] = Head(model.backbone.width, len(keys)).to(device)
            elif name in model.heads:
                del model.heads[name]
        others = tuple(
            f"{holder}.{name}."
            for holder in ("tasks", "heads")
            for name in model.tasks.keys() - card["tasks"].keys()
        )
        own = {n: t for n, t in _own(model).items() if not n.startswith(others)}
        _fill(path, own, tensors)
        model._kept_rows.clear()
    except BaseException:
        for holder, old in zip((model.tasks, model.heads), before, strict=True):
            holder.clear()
            holder.update(old)
        raise


def _own(model: "InstructionViT") -> dict[str, Tensor]:
    """What trains, the gain that it trained with, and all of the tasks, by name."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own |= {f"heads.{name}": t for name, t in model.heads.state_dict(keep_vars=True).items()}
    own["gain"] = model.gain
    if model.standard is not None:
        own |= {f"standard.{name}": t for name, t in model.standard.named_buffers()}
    return own | {f"tasks.{name}": t for name, t in model.tasks.state_dict(keep_vars=True).items()}


def _fill(path: Path, own: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        raise ValueError(f"{path}: missing {missing[:3]}, unknown {unknown[:3]}")
    for name, t in own.items():
        if t.shape != tensors[name].shape:
            got = list(tensors[name].shape)
            raise ValueError(f"{path}: {name}: want {list(t.shape)}, got {got}")
    with torch.no_grad():
        for name, t in own.items():
            t.copy_(tensors[name])
