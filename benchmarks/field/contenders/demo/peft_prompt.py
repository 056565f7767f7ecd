"""PEFT's prompt tuning of the language model; 10 soft tokens begin as a sentence's."""

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model


def tune(model, start):
    projector = float32_projector(model)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=10,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=start["text"],
        tokenizer_name_or_path=start["tokenizer"],
    )
    model = get_peft_model(model, config)
    projector.requires_grad_(True)
    return model


def float32_projector(model):
    projector = model.model.multi_modal_projector.float()
    projector.register_forward_pre_hook(lambda module, args: args[0].float())
    projector.register_forward_hook(lambda module, args, out: out.bfloat16())
    return projector


def save(model, folder):
    model.save_pretrained(folder)
    projector = model.base_model.model.multi_modal_projector
    torch.save(projector.state_dict(), f"{folder}/projector.pt")


def load(model, folder):
    float32_projector(model).load_state_dict(torch.load(f"{folder}/projector.pt"))
    return PeftModel.from_pretrained(model, folder)
