"""Prompts that VPT's released code (github.com/KMnP/vpt) trained, into a ViT.

Its trainer writes ``prompt_ep{epoch}.pth``, a pickled dict of numpy arrays: ``shallow_prompt``
[1, P, D], and under VPT-deep ``deep_prompt`` [L-1, P, D], of the blocks from the second on. A
state dict of its whole model (alone, or as "model" in a checkpoint) names them
``….prompt_embeddings`` and ``….deep_prompt_embeddings``, beside ``….prompt_proj.weight`` and
``.bias`` if rows are narrower than the model (``MODEL.PROMPT.PROJECT``).
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastprompt.families import VISION, anatomy
from fastprompt.importers.shards import Shards
from fastprompt.methods import VPT
from fastprompt.patching import ATTRIBUTE, Patch, patch, patch_of
from fastprompt.prompts import CHILD

_NAMES = dict(shallow_prompt="prompt_embeddings", deep_prompt="deep_prompt_embeddings")


@torch.no_grad()
def load_vpt(model: nn.Module, path: str | Path) -> Patch:
    """Put released VPT prompts into a vision model: of the first block, or of all.

    Args:
        model: the same ViT, not patched. A classifier's head trains under `VPT` and stays as it is.
        path: a file of prompts, or a state dict of the released code's whole model.

    Returns:
        Its `Patch`, of ``VPT(P, deep=...)``.

    Raises:
        ValueError: another kind of file, another shape or number of blocks, rows that want a
            projection which the file does not hold, a model that is patched or no vision model.
            The model is then as it was.
    """
    path = Path(path)
    rows = _read(path)
    if ATTRIBUTE in vars(model):
        raise ValueError(f"load_vpt: want a model that is not patched, got {patch_of(model)!r}")
    parts = anatomy(model)
    tower = parts.tower(VISION)
    if tower is None:
        raise ValueError(f"load_vpt: want a vision model, got {parts.family}")
    width, depth = tower.blocks[0].like.weight.shape[0], len(tower.blocks)
    if rows.shape[-1] != width:
        raise ValueError(
            f"{path}: want rows of width {width}, got {list(rows.shape)} (a prompt with a "
            "projection is whole in a checkpoint of the model alone)"
        )
    if len(rows) not in (1, depth):
        raise ValueError(f"{path}: want prompts of 1 block or of {depth}, got {len(rows)}")
    done = patch(model, VPT(rows.shape[1], deep=len(rows) > 1))
    layers = [b.layer for b in done.anatomy.tower(VISION).blocks if hasattr(b.layer, CHILD)]
    for layer, tokens in zip(layers, rows, strict=True):
        getattr(layer, CHILD).tokens.copy_(tokens)
    done.refresh()
    return done


def _read(path: Path) -> Tensor:
    """[blocks, P, D] float32, projected."""
    found = _arrays(path)
    if not found:
        shards = Shards.at(path)
        ends = {name.split(".")[-1]: name for name in shards.files}
        names = [ends[end] for end in _NAMES.values() if end in ends]
        names += [n for n in shards.files if n.split(".")[-2:-1] == ["prompt_proj"]]
        tensors = {".".join(n.split(".")[-2:]): t for n, t in shards.read(names).items()}
        ends = {name.split(".")[-1]: t.float() for name, t in tensors.items()}
        found = {key: ends[end] for key, end in _NAMES.items() if end in ends}
        weight, bias = (tensors.get(f"prompt_proj.{leaf}") for leaf in ("weight", "bias"))
        if weight is not None:
            found = {key: rows @ weight.float().T + bias.float() for key, rows in found.items()}
    if "shallow_prompt" not in found:
        raise ValueError(
            f"{path}: want prompts of VPT's released code ({' or '.join(_NAMES)}; "
            f"{' or '.join(_NAMES.values())}), found none"
        )
    return torch.cat([found[key] for key in _NAMES if key in found])


def _arrays(path: Path) -> dict[str, Tensor]:
    """What a file of numpy arrays holds, read without executing anything; {} of another file."""
    made = np._core.multiarray._reconstruct  # numpy 1, with which they were written, named it so:
    numpy = [np.ndarray, np.dtype, np.dtypes.Float32DType, made]
    numpy.append((made, "numpy.core.multiarray._reconstruct"))
    try:
        with torch.serialization.safe_globals(numpy):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError):
        return {}
    arrays = found.items() if isinstance(found, dict) else ()
    return {k: torch.from_numpy(a).float() for k, a in arrays if isinstance(a, np.ndarray)}
