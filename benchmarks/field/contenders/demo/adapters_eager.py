"""AdapterHub's prefix tuning of the language model inside the LLaVA, under eager attention."""

import adapters
import torch
from adapters import PrefixTuningConfig


def tune(model, start):
    model.requires_grad_(False)
    float32_projector(model).requires_grad_(True)
    language = model.model.language_model
    language.set_attn_implementation("eager")
    adapters.init(language)
    language.add_adapter("prompts", config=PrefixTuningConfig(flat=True, prefix_length=10))
    language.train_adapter("prompts")
    return model


def float32_projector(model):
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model.model.multi_modal_projector.float()


def save(model, folder):
    model.model.language_model.save_adapter(folder, "prompts")
    torch.save(model.model.multi_modal_projector.state_dict(), f"{folder}/projector.pt")


def load(model, folder):
    float32_projector(model).load_state_dict(torch.load(f"{folder}/projector.pt"))
    model.model.language_model.set_attn_implementation("eager")
    adapters.init(model.model.language_model)
    model.model.language_model.load_adapter(folder, set_active=True)
    return model
