"""What transformers' Trainer needs to train a patched model and to write small checkpoints.

Trainer refuses a 4-bit model unless it is marked as one with adapters, saves through
``model.save_pretrained``, and on resume loads ``model.safetensors`` into the model without asking
for every key. So a patched model is marked, and its ``save_pretrained`` writes what trains under
that name: Trainer's own checkpointing, resuming and best-model loading then work unchanged.
"""

from pathlib import Path

from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME

from fastprompt import shards
from fastprompt.adapters import configs
from fastprompt.prompts import CHILD

_MARK = "_hf_peft_config_loaded"
_QUIET = "_keys_to_ignore_on_save"
_MISSING = object()


class SaveWhatTrains:
    """Stands in for ``model.save_pretrained``; a plain object, so deepcopy and pickle keep it."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, save_directory: str | Path, is_main_process: bool = True, **kwargs) -> None:
        """Write prompts and other trained parts as ``save_directory/model.safetensors``, and
        adapters that transformers put on as it does.

        Every other argument of transformers' ``save_pretrained`` says how to write a backbone,
        which this does not.
        """
        from fastprompt import checkpoint, patching

        if configs(self.model) and vars(self.model).get(_MARK):  # by transformers' add_adapter
            save = type(self.model).save_pretrained
            save(self.model, save_directory, is_main_process=is_main_process, **kwargs)
        shards.reshard(self.model)
        split = any(map(shards.is_shard, patching.patch_of(self.model).trainable.values()))
        if is_main_process or split:  # of shards all processes have to be asked
            checkpoint.save(self.model, save_directory, weights=SAFE_WEIGHTS_NAME, fold=False)


def check_resumed(model: nn.Module, state: dict, prefix: str, *rest) -> None:
    """Before ``load_state_dict``: prompts of another method or length raise a ValueError.

    Trainer resumes with ``strict=False``, which would take a part of them. A state without
    prompts (the base model's own) is not ours to check.
    """
    from fastprompt import checkpoint, patching

    if not vars(model).get(patching.ATTRIBUTE):
        return
    done = patching.patch_of(model)
    names = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    prompts = {name for name in names if CHILD in name.split(".")}
    if prompts:
        ours = {n: t for n, t in names.items() if n in done.trainable or n in prompts}
        checkpoint.check_tensors("the state to load", ours, done.trainable)


def attach(model: nn.Module) -> tuple[nn.Module, dict, object]:
    """Returns what `detach` takes."""
    handle = model.register_load_state_dict_pre_hook(check_resumed)
    kept = {name: vars(model).get(name, _MISSING) for name in (_MARK, _QUIET, "save_pretrained")}
    model.save_pretrained = SaveWhatTrains(model)
    if getattr(model, "is_quantized", False):
        setattr(model, _MARK, True)
    # what a checkpoint may lack without Trainer's warning
    setattr(model, _QUIET, _frozen_keys(model))
    return model, kept, handle


def detach(attached: tuple[nn.Module, dict, object]) -> None:
    model, kept, handle = attached
    handle.remove()
    for name, value in kept.items():
        if value is not _MISSING:
            setattr(model, name, value)
        else:
            vars(model).pop(name, None)


def _frozen_keys(model: nn.Module) -> set[str]:
    """The keys that ``load_state_dict`` would miss in a file of what trains alone."""
    keys = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        buffers = {n for n in module._buffers if n not in module._non_persistent_buffers_set}
        tensors = {n: t for n, t in (module._parameters | module._buffers).items() if t is not None}
        for name, tensor in tensors.items():
            if name in module._parameters and tensor.requires_grad:
                continue
            if name in module._parameters or name in buffers:
                keys.add(f"{prefix}.{name}" if prefix else name)
    return keys
