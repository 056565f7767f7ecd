"""PEFT's adapters (LoRA) on the model that gets prompts; put on before the patch, or after.

A block's prompt goes through the modules that stand in the block by now, so through an adapter
around them as tokens do. Adapters stay PEFT's: what of them trains goes on training, and PEFT saves
them.
"""

from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel; any other as it is."""
    is_peft = hasattr(type(model), "get_base_model") and "base_model" in model._modules
    return model.get_base_model() if is_peft else model


def configs(model: nn.Module) -> dict[str, Any]:
    """Adapter name -> its PEFT config, of a model that PEFT has changed."""
    return getattr(model, "peft_config", None) or {}


def kinds(model: nn.Module) -> str:
    """What kinds of adapters it has, as PEFT names them."""
    return ", ".join(sorted({_kind(config) for config in configs(model).values()}))


def _kind(config: Any) -> str:
    return str(config.peft_type).rpartition(".")[2]


def refusal(model: nn.Module) -> str | None:
    """Why a model (or a PeftModel) with such adapters cannot be patched; None: it can."""
    for config in configs(model).values():
        kind = _kind(config)
        if config.is_prompt_learning or kind == "ADAPTION_PROMPT":
            return (
                f"want adapters around layers, as LoRA's; got PEFT's {kind}, which is a prompt "
                "itself"
            )
    return None


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that want a gradient for PEFT's sake, which freezes all others."""
    return [p for p in model.parameters() if p.requires_grad] if configs(model) else []


def adapted(module: nn.Module | None) -> bool:
    """Whether PEFT has put an adapter, or a copy to be saved, around what stood there."""
    return hasattr(module, "base_layer") or hasattr(module, "modules_to_save")
