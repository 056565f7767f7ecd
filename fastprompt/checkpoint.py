"""Save and load what trains, and nothing else: one safetensors file with its card inside.

The card (method, base model, shapes, version) is the file's own metadata, so that weights and card
are replaced in one step and never disagree. It is written beside it as JSON too, for people.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME

from fastprompt import methods
from fastprompt.files import replace
from fastprompt.patching import Patch, patch, patch_of
from fastprompt.samples import base_sample, same_base

WEIGHTS = "prompts.safetensors"
CARD = "card.json"
FORMAT = 1


def save(model: nn.Module, folder: str | Path, *, weights: str = WEIGHTS) -> Path:
    """Write the prompts and the other trained parts of a patched model.

    Args:
        model: a patched model.
        folder: made if it is not there. Files of other names in it stay.
        weights: the file's name in it.

    Returns:
        The path of the file written. It appears whole or not at all.

    Raises:
        ValueError: the model is not patched.
    """
    done = patch_of(model)
    tensors = {name: p.detach().contiguous().cpu() for name, p in done.trainable.items()}
    card = _card(done, tensors)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "fastprompt": json.dumps(card)}
    replace(folder / weights, lambda part: save_file(tensors, part, metadata=metadata))
    replace(folder / CARD, lambda part: part.write_text(json.dumps(card, indent=1) + "\n"))
    return folder / weights


def load(model: nn.Module, folder: str | Path) -> Patch:
    """Put saved prompts (and other trained parts) into a model, patching it if it is not yet.

    Args:
        model: the same base model as when they were saved, dense or 4-bit.
        folder: what `save` wrote, or a checkpoint folder of Trainer's.

    Returns:
        The model's `Patch`.

    Raises:
        ValueError: no such file, a truncated or foreign one, another base model, another method,
            a missing key or another length. The model is then as it was.
    """
    path = _find(Path(folder))
    card, tensors = _read(path)
    method = methods.from_card(card["method"])
    from_here = "_fastprompt_patch" not in vars(model)
    done = patch(model, method) if from_here else patch_of(model)
    try:
        _check(path, card, tensors, done, method)
    except BaseException:
        if from_here:
            done.undo()
        raise
    with torch.no_grad():
        for name, p in done.trainable.items():
            p.copy_(tensors[name])
    done.refresh()
    return done


def read_card(folder: str | Path) -> dict:
    """The card of a checkpoint: method, base model, shapes, version."""
    return _read(_find(Path(folder)))[0]


# ---- the card ----


def _card(done: Patch, tensors: dict[str, Tensor]) -> dict:
    from fastprompt import __version__

    config = done.model.config
    return {
        "format": FORMAT,
        "fastprompt": __version__,
        "method": done.method.card(),
        "base": {
            "class": type(done.model).__name__,
            "name": config.name_or_path or "",
            "model_type": config.model_type,
            "sample": base_sample(done.model),
        },
        "tensors": {n: {"shape": list(t.shape), "dtype": str(t.dtype)} for n, t in tensors.items()},
    }


# ---- files ----


def _find(folder: Path) -> Path:
    if folder.is_file():
        return folder
    for name in (WEIGHTS, SAFE_WEIGHTS_NAME):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: want {WEIGHTS} or {SAFE_WEIGHTS_NAME} in it, found neither")


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: want a whole safetensors file; {error}") from error
    if "fastprompt" not in metadata:
        raise ValueError(f"{path}: want a file that fastprompt wrote; it has no card")
    card = json.loads(metadata["fastprompt"])
    if card.get("format") != FORMAT:
        raise ValueError(f"{path}: want format {FORMAT}, got {card.get('format')}")
    lacks = ", ".join(sorted({"method", "base", "tensors"} - card.keys()))
    if lacks or "sample" not in card["base"]:
        raise ValueError(f"{path}: want a whole card; it lacks {lacks or 'a sample'}")
    return card, tensors


def _check(path: Path, card: dict, tensors: dict[str, Tensor], done: Patch, method) -> None:
    if done.method != method:
        raise ValueError(f"{path}: holds {method}; the model is patched with {done.method}")
    base, kind = card["base"], done.model.config.model_type
    if base.get("model_type") != kind:
        raise ValueError(f"{path}: was trained on a {base.get('model_type')}, got a {kind}")
    if not same_base(base["sample"], base_sample(done.model)):
        raise ValueError(
            f"{path}: was trained on {base['class']} {base['name']!r}; "
            f"this {type(done.model).__name__} has other weights"
        )
    check_tensors(str(path), tensors, done)


def check_tensors(where: str, tensors: dict[str, Tensor], done: Patch) -> None:
    """Raises ValueError unless ``tensors`` are those that train, each of its parameter's shape."""
    trainable = done.trainable
    missing, unknown = trainable.keys() - tensors.keys(), tensors.keys() - trainable.keys()
    if missing or unknown:
        raise ValueError(
            f"{where}: want {sorted(trainable)[:3]}… ({len(trainable)} tensors); "
            f"missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}"
        )
    for name, p in trainable.items():
        if tensors[name].shape != p.shape:
            raise ValueError(
                f"{where}: {name}: want {list(p.shape)}, got {list(tensors[name].shape)}"
            )
