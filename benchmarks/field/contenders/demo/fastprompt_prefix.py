"""fastprompt's prefix tuning, whose keys and values begin as a sentence's; what PEFT's computes."""

import torch

import fastprompt
from fastprompt.methods import PrefixTuning


def tune(model, start):
    projector = float32_projector(model)
    patch = fastprompt.patch(model, PrefixTuning(10))
    projector.requires_grad_(True)
    fastprompt.prefill(patch, start["input_ids"])
    return model


def float32_projector(model):
    projector = model.model.multi_modal_projector.float()
    projector.register_forward_pre_hook(lambda module, args: args[0].float())
    projector.register_forward_hook(lambda module, args, out: out.bfloat16())
    return projector


def save(model, folder):
    projector = model.model.multi_modal_projector.requires_grad_(False)
    fastprompt.save(model, folder)  # which takes what is frozen for the base model's
    torch.save(projector.state_dict(), f"{folder}/projector.pt")


def load(model, folder):
    float32_projector(model).load_state_dict(torch.load(f"{folder}/projector.pt"))
    fastprompt.load(model, folder)
    return model
