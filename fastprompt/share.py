"""How much of a model trains: counts, and the share that `trainable_share` and the report give."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from fastprompt import families, linear4bit, placement
from fastprompt.methods import Method, check, default_for
from fastprompt.methods.base import new_prompts
from fastprompt.prompts import row_like

if TYPE_CHECKING:
    from fastprompt.patching import Patch


class Share(NamedTuple):
    """How much of a model trains.

    Attributes:
        trained: numbers that train, by part: "prompts", "projector", "lm_head", "head".
        total: numbers in the model, prompts included.
    """

    trained: dict[str, int]
    total: int

    def percent(self, *without: str) -> float:
        """Of all numbers, those that train but for some parts."""
        counted = (n for part, n in self.trained.items() if part not in without)
        return 100 * sum(counted) / max(1, self.total)


def trainable_share(model: nn.Module, method: Method | None = None) -> Share:
    """What `patch` with this method would train; nothing changes, and "meta" models will do.

    Raises:
        ValueError: a model or a method that is not served, or a model that is patched already.
    """
    if hasattr(model, "_fastprompt_patch"):
        raise ValueError("trainable_share: want a model before its patch, whose report says it")
    anatomy = families.anatomy(model)
    method = default_for(anatomy) if method is None else method
    check(method, anatomy)
    if type(method).adapt is not Method.adapt:
        raise ValueError(f"{method}: want a method of prompts; of others, count patch.trainable")
    towers = [t for t in anatomy.towers if method.lengths().get(t.kind) and t.blocks]
    prompts, beside = new_prompts(method, towers)
    pools = [(method.pool(tower), row_like(tower.blocks[0].like)) for tower in towers]
    keys = [pool.method.shared_keys(like) for pool, like in pools if pool is not None]
    made = [*prompts.values(), *(module for _, module in beside), *filter(None, keys)]
    trained, total = {"prompts": sum(map(count, made))}, count(model)
    total += trained["prompts"]
    for part in method.trains():
        if part in anatomy.parts:
            trained[part] = count(model.get_submodule(anatomy.parts[part]))
            total += trained[part] * (part == "lm_head" and is_tied(model))  # a copy of its own
    return Share(trained, total)


def share_of(patch: Patch) -> str:
    """As a percentage, for a vision-language model with lm_head and without."""
    own, total = sum(p.numel() for p in patch.trainable.values()), count(patch.model)
    text, parts = f"{100 * own / max(1, total):.3f}%", patch.anatomy.parts
    if "projector" not in parts or "lm_head" not in parts:
        return text
    lm_head = patch.model.get_submodule(parts["lm_head"])
    head, trained = count(lm_head), {id(p) for p in patch.trainable.values()}
    if "lm_head" in patch.method.trains():
        return f"{text}; without lm_head {100 * (own - head) / total:.3f}%"
    if any(id(p) in trained for p in lm_head.parameters()):  # with all that is around it
        return text
    total += head * is_tied(patch.model)  # a copy of its own
    return f"{text}; with lm_head {100 * (own + head) / total:.3f}%"


def count(model: nn.Module) -> int:
    """Numbers in a model, shared ones once; a packed 4-bit weight counts what it decodes to."""
    packed = {id(m.weight): numel(m) for m in model.modules() if is_4bit(m)}
    total = sum(packed.get(id(p), p.numel()) for p in model.parameters())
    if placement.offloaded(model) and hasattr(model, "lm_head") and is_tied(model):
        first, last = _tables(model)  # offloaded, a shared weight is two
        total -= first.numel() * (first is not last)
    return total


def is_tied(model: nn.Module) -> bool:
    """Whether the head's weight is the embeddings', too."""
    first, last = _tables(model)
    offloaded = first.is_meta and last.is_meta and first.shape == last.shape
    return first is last or (offloaded and model.config.get_text_config().tie_word_embeddings)


def _tables(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def is_4bit(module: nn.Module) -> bool:
    """Whether the module is a linear layer with a packed 4-bit weight."""
    return hasattr(module, "weight") and linear4bit.state_of(module) is not None


def numel(linear: nn.Linear) -> int:
    """Of its weight, also where that is packed."""
    return linear.in_features * linear.out_features
