"""Prompt sets in files: each is an ordinary checkpoint, and all of them are a folder of those."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from fastprompt import checkpoint, methods, undoing
from fastprompt.adapters import unwrapped
from fastprompt.files import replace
from fastprompt.patching import ATTRIBUTE, Patch, patch_of
from fastprompt.sets.sets import FIRST

INDEX = "sets.json"  # names, and which of them is in use


def save_sets(model: nn.Module, folder: str | Path) -> Path:
    """Write every prompt set of a patched model to a folder of its own in ``folder``.

    Each is a checkpoint that `load` and `Patch.load` read, with the projector or head that goes
    with it, so that a shared one is there several times.

    Returns:
        The path of the list of sets, written last.

    Raises:
        ValueError: the model is not patched, or cannot have several sets.
    """
    done, folder = patch_of(model), Path(folder)
    if INDEX in done.sets:
        raise ValueError(f"save_sets: want a set of another name than its list's, {INDEX!r}")
    for name in done.sets:
        done.save(name, folder / name)
    # first what `load_sets` begins with: a set that shares the patch's projector or head
    first = sorted(done.sets, key=lambda n: (done.sets[n].parts is not None, n != done.in_use))
    index = dict(in_use=done.in_use, sets=first)
    replace(folder / INDEX, lambda part: part.write_text(json.dumps(index, indent=1) + "\n"))
    return folder / INDEX


def load_sets(model: nn.Module, folder: str | Path) -> Patch:
    """Put all sets that `save_sets` wrote into a model, patching it if it is not yet.

    The set that was in use then is in use again. Sets that shared a projector or head share it
    again; a model that is patched wants the method of the first of them.

    Returns:
        The model's `Patch`.

    Raises:
        ValueError: no such folder, a patch that has several sets already, or what `load` refuses.
            An unpatched model is then as it was; a patched one keeps what was read before.
    """
    folder = Path(folder)
    index = _index(folder / INDEX)
    model = unwrapped(model)
    from_here = ATTRIBUTE not in vars(model)
    if not from_here and list(patch_of(model).sets) != [FIRST]:
        raise ValueError(
            f"load_sets: want a patch with no set but {FIRST!r}, got {list(patch_of(model).sets)}"
        )
    first, *others = index["sets"]
    done = checkpoint.load(model, folder / first)
    try:
        done._of_sets().rename(FIRST, first)
        for name in others:
            done.load(name, folder / name)
        done.use(index["in_use"])
    except BaseException:
        if from_here:
            done.undo()
        raise
    return done


def _index(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent}: want what save_sets wrote, found no {path.name}")
    index = json.loads(path.read_text())
    if index.get("in_use") not in index.get("sets", []):
        raise ValueError(f"{path}: want the sets' names and the one in use, got {index}")
    return index


@torch.no_grad()
def load_set(done: Patch, name: str, folder: str | Path) -> None:
    """See `Patch.load`."""
    sets = done._of_sets()
    sets.check_new(name)
    card, tensors = checkpoint.read(folder)
    made = sets.new(methods.from_card(card["method"]))
    own, given = made.tensors(), card.get("given", ())
    with sets.shared():
        checkpoint.check_base(folder, card, done)
        parts = sets.parts() | {n: p for n, p in done.model.named_parameters() if n in given}
        checkpoint.check_tensors(str(folder), tensors, parts | own)
        made.parts = sets.differing({key: tensors[key] for key in parts})
        undoing.remember(done._undo, done.model, {*(made.parts or ())} - {*done._names})
    for key, p in own.items():
        p.copy_(tensors[key])
    sets.add(name, made)


def save_set(done: Patch, name: str, folder: str | Path) -> Path:
    """See `Patch.save`."""
    sets = done._of_sets()
    with sets.shared():
        each = sets[name]
        parts = sets.parts() | (each.parts or {})
        given = [key for key in parts if key not in done._names]
        return checkpoint.write(done, each.method, parts | each.tensors(), given, Path(folder))
