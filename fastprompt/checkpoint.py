"""Save and load what trains, and nothing else: one safetensors file with its card inside.

The card (method, base model, shapes, version) is the file's own metadata, so that weights and card
are replaced in one step and never disagree. It is written beside it as JSON too, for people.
"""

import json
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME

from fastprompt import methods, shards, undoing
from fastprompt.adapters import unwrapped
from fastprompt.families.base import join
from fastprompt.files import replace
from fastprompt.hub import README, model_card
from fastprompt.methods import Method
from fastprompt.patching import ATTRIBUTE, Patch, patch, patch_of
from fastprompt.prompts import CHILD
from fastprompt.samples import base_sample, same_base

WEIGHTS = "prompts.safetensors"
CARD = "card.json"
FORMAT = 1


def save(
    model: nn.Module, folder: str | Path, *, weights: str = WEIGHTS, fold: bool = True
) -> Path:
    """Write the prompts and the other trained parts of a patched model, and a projector that was
    loaded into it. Where FSDP2 split them, all processes call it and the first writes.

    Args:
        model: a patched model.
        folder: made if it is not there. Files of other names in it stay, and so does a README.md,
            which is written if there is none: a model card for people and the hub.
        weights: the file's name in it.
        fold: write what a method's prompts are made from as the prompts that it makes (prefix
            tuning's MLP), which compute the same. Without, training can go on from the file.

    Returns:
        The path of the file written. It appears whole or not at all.

    Raises:
        ValueError: the model is not patched, or its prompts are baked.
    """
    done = patch_of(model)
    if done.baked:
        raise ValueError("save: want prompts as they were trained, got baked ones; save before")
    done._check_outside("save")
    shards.reshard(done.model)
    method = done.method.folded() if fold else done.method
    found = _folded(done) if method != done.method else done.trainable
    given = done._not_of_base()
    found = found | {name: done.model.get_parameter(name) for name in given}
    return write(done, method, found, given, Path(folder), weights)


def write(
    done: Patch,
    method: Method,
    tensors: dict[str, Tensor],
    given: Collection[str],
    folder: Path,
    weights: str = WEIGHTS,
) -> Path:
    """A checkpoint of what a method of the patch's trains, and of what is ``given`` beside it."""
    learned = [*tensors.values()]
    tensors = {name: shards.whole(p).contiguous().cpu() for name, p in tensors.items()}
    card = _card(done, method, tensors, given)
    if shards.writes_files(learned):
        _write(folder, weights, tensors, card)
    shards.wait_for_files(learned)
    return folder / weights


def _write(folder: Path, weights: str, tensors: dict[str, Tensor], card: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "fastprompt": json.dumps(card)}
    replace(folder / weights, lambda part: save_file(tensors, part, metadata=metadata))
    replace(folder / CARD, lambda part: part.write_text(json.dumps(card, indent=1) + "\n"))
    if weights == WEIGHTS and not (folder / README).exists():  # somebody's own words stay
        replace(folder / README, lambda part: part.write_text(model_card(card), encoding="utf-8"))


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
    path, model = _find(Path(folder)), unwrapped(model)
    card, tensors = _read(path)
    method = methods.from_card(card["method"])
    from_here = ATTRIBUTE not in vars(model)
    done = patch(model, method) if from_here else patch_of(model)
    done._check_outside("load")
    shards.reshard(done.model)
    try:
        _check(path, card, tensors, done, method)
    except BaseException:
        if from_here:
            done.undo()
        raise
    given = tuple(card.get("given", ()))
    undoing.remember(done._undo, model, [name for name in given if name not in done._names])
    for name, value in tensors.items():
        shards.fill(model.get_parameter(name), value)
    done.given = given
    done.refresh()
    return done


def read(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """A checkpoint's card (method, base model, shapes, version) and its tensors, without a model.

    Raises:
        ValueError: no such file, a truncated or foreign one.
    """
    return _read(_find(Path(folder)))


def read_card(folder: str | Path) -> dict:
    """The card alone; raises what `read` does."""
    return read(folder)[0]


# ---- the card ----


def _folded(done: Patch) -> dict[str, Tensor]:
    """What trains, with prompts in the place of what makes them."""
    tensors = {}
    for name, p in done.trainable.items():
        owner, child, _ = f".{name}".rpartition(f".{CHILD}.")
        if not child:
            tensors[name] = p
            continue
        prompt = join(owner[1:], CHILD)
        folded = done.model.get_submodule(prompt).folded()
        tensors |= {f"{prompt}.{n}": tensor for n, tensor in folded.items()}
    return tensors


def _card(done: Patch, method: Method, tensors: dict[str, Tensor], given: Collection[str]) -> dict:
    from fastprompt import __version__

    return {
        "format": FORMAT,
        "fastprompt": __version__,
        "method": method.card(),
        "base": {
            "class": type(done.model).__name__,
            "name": _name(done.model),
            "model_type": model_type(done),
            "sample": base_sample(done.model, without=given),
        },
        "given": tuple(given),
        "tensors": {n: {"shape": list(t.shape), "dtype": str(t.dtype)} for n, t in tensors.items()},
    }


def model_type(done: Patch) -> str:
    """What tells models of other kinds apart, where they have no config the family."""
    config = getattr(done.model, "config", None)
    return done.anatomy.family if config is None else config.model_type


def _name(model: nn.Module) -> str:
    config, timms = getattr(model, "config", None), getattr(model, "pretrained_cfg", None)
    return (timms or {}).get("architecture", "") if config is None else config.name_or_path or ""


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
    check_base(path, card, done)
    given = card.get("given", ())
    frozen = {name: p for name, p in done.model.named_parameters() if name in given}
    check_tensors(str(path), tensors, done.trainable | frozen)


def check_base(path: str | Path, card: dict, done: Patch) -> None:
    """Raises ValueError unless the card is of a checkpoint of this base model."""
    base, kind = card["base"], model_type(done)
    if base.get("model_type") != kind:
        raise ValueError(f"{path}: was trained on a {base.get('model_type')}, got a {kind}")
    given = card.get("given", ())
    if not same_base(base["sample"], base_sample(done.model, without=given)):
        raise ValueError(
            f"{path}: was trained on {base['class']} {base['name']!r}; "
            f"this {type(done.model).__name__} has other weights"
        )


def check_tensors(where: str, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raises ValueError unless ``tensors`` are those wanted, each of its parameter's shape."""
    missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or unknown:
        raise ValueError(
            f"{where}: want {sorted(wanted)[:3]}… ({len(wanted)} tensors); "
            f"missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}"
        )
    for name, p in wanted.items():
        if tensors[name].shape != p.shape:
            raise ValueError(
                f"{where}: {name}: want {list(p.shape)}, got {list(tensors[name].shape)}"
            )
