"""PEFT's prefix and prompt tuning: its checkpoints in, ours out as its prefix tuning.

A folder of PEFT's holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``)
with one tensor, ``prompt_embeddings``:

* prefix tuning: [P, L·2·Hkv·d], for each of L blocks keys, then values, as they lie in a cache:
  keys rotated as positions 0 .. P-1;
* prompt tuning and P-tuning: [P, D], embeddings in front of the text's. No token before them
  depends on the text, so that the keys and values they lead to are a prefix, too, and the same for
  every text.

Under learned positions PEFT lets the text count on from P.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastprompt import attention
from fastprompt.families import TEXT, Block, anatomy
from fastprompt.files import replace
from fastprompt.importers.shards import Shards
from fastprompt.methods import PrefixTuning
from fastprompt.patching import ATTRIBUTE, Patch, patch, patch_of
from fastprompt.prefill import hidden_states, keys_values_of
from fastprompt.prefix_cache import check_rotation, prefix_cache, sliding_window
from fastprompt.prompts import CHILD
from fastprompt.rotation import unrotate

CONFIG, WEIGHTS, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
_PREFIX, _INPUT = "PREFIX_TUNING", ("PROMPT_TUNING", "P_TUNING")


@torch.no_grad()
def load_peft(model: nn.Module, folder: str | Path) -> Patch:
    """Put a PEFT prefix, prompt or P-tuning checkpoint into a causal language model.

    Args:
        model: the same base model, not patched; dense or 4-bit. It computes what PEFT's model does.
        folder: of ``PeftModel.save_pretrained``.

    Sliding windows hide PEFT's prompts from later tokens and never ours, which is warned of.

    Returns:
        Its `Patch`, of `PrefixTuning`; under learned positions with ``position_offset=P``.

    Raises:
        ValueError: another kind of checkpoint, another shape, a model that is no causal language
            model of ours, or is patched. The model is then as it was.
    """
    kind, rows = _read(Path(folder))
    if ATTRIBUTE in vars(model):
        raise ValueError(f"load_peft: want a model that is not patched, got {patch_of(model)!r}")
    parts = anatomy(model)
    tower = parts.tower(TEXT)
    towers = [t for t in parts.towers if t.kind == TEXT]
    if len(towers) != 1 or (tower.rotary is None and tower.counts is None):
        raise ValueError(f"load_peft: want a causal language model, got {parts.family}")
    check_rotation("load_peft", tower)
    P, widths = len(rows), [2 * block.kv_width for block in tower.blocks]
    want = sum(widths) if kind == _PREFIX else tower.embeddings.weight.shape[-1]
    if rows.ndim != 2 or rows.shape[1] != want:
        raise ValueError(f"{folder}: want {TENSOR} [P, {want}], got {list(rows.shape)}")
    if kind == _PREFIX:
        prefixes = [_unrotated(block, part) for block, part in
                    zip(tower.blocks, rows.split(widths, dim=1), strict=True)]  # fmt: skip
    else:
        prefixes = _of_embeddings(model, rows.to(tower.embeddings.weight))
    if sliding_window(tower) is not None:
        warnings.warn(
            "load_peft: sliding windows hide PEFT's prompts from later tokens, and never ours",
            stacklevel=2,
        )
    done = patch(model, PrefixTuning(P, position_offset=P if tower.rotary is None else 0))
    for block, prefix in zip(done.anatomy.tower(TEXT).blocks, prefixes, strict=True):
        getattr(block.layer, CHILD).tokens.copy_(prefix)
    done.refresh()
    return done


def _unrotated(block: Block, rows: Tensor) -> Tensor:
    """[P, 2, Hkv, d] of a block's [P, 2·Hkv·d], whose keys are rotated as positions from 0 on."""
    k, v = rows.unflatten(1, (2, *block.kv_heads)).transpose(0, 2).unbind(1)  # [Hkv, P, d]
    if block.rotary is not None:
        k = unrotate(k.to(block.rotary.inv_freq.device), block.rotary, 0)
    return torch.stack([k.to(v.device), v]).permute(2, 0, 1, 3)


def _of_embeddings(model: nn.Module, rows: Tensor) -> list[Tensor]:
    """[P, 2, Hkv, d] of each block, to which embeddings [P, D] in front of a text lead."""
    done = patch(model, PrefixTuning(len(rows)))
    try:
        tower = done.anatomy.tower(TEXT)
        sides = [vars(block.attention)[attention.ATTRIBUTE] for block in tower.blocks]
        states = hidden_states(done, tower, tower.blocks, rows)
        return [keys_values_of(side, x) for side, x in zip(sides, states, strict=True)]
    finally:
        done.undo()


def _read(folder: Path) -> tuple[str, Tensor]:
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: want a folder with PEFT's {CONFIG}; {error!r}") from error
    if kind not in (_PREFIX, *_INPUT):
        raise ValueError(f"{folder}: want {_PREFIX}, {' or '.join(_INPUT)}; got {kind}")
    files = [folder / name for name in (WEIGHTS, "adapter_model.bin")]
    shards = Shards.at(next((file for file in files if file.is_file()), files[0]))
    names = [name for name in shards.files if name.split(".")[-1] == TENSOR]
    if len(names) != 1:
        raise ValueError(f"{folder}: want {TENSOR} in it, got {', '.join(shards.files)}")
    return kind, shards.read(names)[names[0]].float()


@torch.no_grad()
def save_peft(model: nn.Module, folder: str | Path) -> Path:
    """Write the language model's prompts, of whatever method, as PEFT's prefix tuning.

    ``PeftModel.from_pretrained(base, folder)`` then computes what the patched model does. It is as
    `prefix_cache`: what does not carry over (visual prompts, a projector) is warned of.

    Args:
        model: patched, with prompts of one length in every block of its language model.
        folder: made if it is not there; gets ``adapter_config.json`` and the weights.

    Returns:
        The path of the weights.

    Raises:
        ValueError: what `prefix_cache` refuses; learned positions but for prefixes whose tokens
            count on from P (``PrefixTuning(position_offset=P)``), since PEFT's do.
    """
    done = patch_of(model)
    tower = done.anatomy.tower(TEXT)
    learned = tower is not None and tower.rotary is None
    cache = prefix_cache(model, dtype=torch.float32, positions=learned)
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    Hkv, P, d = layers[0].shape[1:]
    if learned and done.method.position_of_first(tower) != P:
        raise ValueError(
            f"save_peft: PEFT's tokens count on from {P} under learned positions, these from "
            f"{done.method.position_of_first(tower)}"
        )
    rows = torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1)  # [L, 2, Hkv, P, d] -> [P, …]
    config = {
        "peft_type": _PREFIX,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": done.model.config.name_or_path or None,
        "inference_mode": True,
        "num_virtual_tokens": P,
        "token_dim": Hkv * d,
        "num_transformer_submodules": 1,
        "num_attention_heads": Hkv,
        "num_layers": len(layers),
        "encoder_hidden_size": Hkv * d,
        "prefix_projection": False,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {TENSOR: rows.contiguous().cpu()}
    replace(folder / WEIGHTS, lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    replace(folder / CONFIG, lambda part: part.write_text(json.dumps(config, indent=2) + "\n"))
    return folder / WEIGHTS
