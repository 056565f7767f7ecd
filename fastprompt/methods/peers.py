"""What prompts are compared with: LoRA, full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastprompt.families import TEXT, Anatomy
from fastprompt.methods.base import Adapted, Method


@dataclass(frozen=True)
class Peer(Method):
    """Base of methods without prompts."""

    def lengths(self) -> dict[str, int]:
        return {}

    def trains(self) -> tuple[str, ...]:
        return ()

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if anatomy.tower(TEXT) is None:
            raise ValueError(f"{self!r}: want a language model, got {anatomy.family}")


@dataclass(frozen=True)
class LoRA(Peer):
    """PEFT's LoRA (Hu et al., arXiv 2106.09685) at every linear layer of a language model's blocks.

    Blocks then run as transformers has them, not as one node.

    Args:
        rank: of each adapter; its alpha is twice that.
    """

    rank: int = 8

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoRA: want a rank of 1 or more, got {self.rank!r}")

    def adapt(self, model: nn.Module, anatomy: Anatomy) -> Adapted:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ValueError(f"LoRA: want the package peft; {error}") from error
        tower = anatomy.tower(TEXT)
        linear = {
            f"{block.name}.{name}": module
            for block in tower.blocks
            for name, module in block.layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        before = {n for n, _ in model.named_parameters()}
        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=list(linear))
        inject_adapter_in_model(config, model)
        names = [n for n, p in model.named_parameters() if p.requires_grad and n not in before]
        for name in names:
            p = model.get_parameter(name)
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        what = f"LoRA of rank {self.rank} at {len(linear)} layers, trains"
        return Adapters(names, {tower.name: what}, model, linear)


class Adapters(Adapted):
    def __init__(
        self,
        names: list[str],
        replaced: dict[str, str],
        model: nn.Module,
        linear: dict[str, nn.Module],
    ):
        super().__init__(names, replaced)
        self.model, self.linear = model, linear

    def undo(self) -> None:
        for name, module in self.linear.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, module)
        vars(self.model).pop("peft_config", None)


@dataclass(frozen=True)
class FullTuning(Peer):
    """The projector and the whole language model train, as in LLaVA's own instruction tuning; the
    vision tower is frozen. For small models in float32: their weights are kept twice, for undo."""

    def adapt(self, model: nn.Module, anatomy: Anatomy) -> Adapted:
        parts = [anatomy.parts[part] for part in ("projector", "lm_head") if part in anatomy.parts]
        parts.append(anatomy.tower(TEXT).name)
        inside = tuple(f"{part}." for part in parts if part)
        found = {n: p for n, p in model.named_parameters() if n.startswith(inside) or "" in parts}
        low = {p.dtype for p in found.values()} - {torch.float32, torch.float64}
        if low:
            raise ValueError(
                f"FullTuning: want float32 weights (smaller updates are lost), got {low.pop()}"
            )
        for p in found.values():
            p.requires_grad_(True)
        return Values(list(found), dict.fromkeys(filter(None, parts), "trains"), model)


class Values(Adapted):
    def __init__(self, names: list[str], replaced: dict[str, str], model: nn.Module):
        super().__init__(names, replaced)
        self.model = model
        self.kept = {n: model.get_parameter(n).detach().to("cpu", copy=True) for n in names}

    @torch.no_grad()
    def undo(self) -> None:
        for name, value in self.kept.items():
            self.model.get_parameter(name).copy_(value)
