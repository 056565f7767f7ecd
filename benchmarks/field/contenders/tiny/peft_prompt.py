"""PEFT's prompt tuning: 10 soft tokens before the text."""

from peft import PeftModel, PromptTuningConfig, get_peft_model


def tune(model, start):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10)
    return get_peft_model(model, config)


def save(model, folder):
    model.save_pretrained(folder)


def load(model, folder):
    return PeftModel.from_pretrained(model, folder)
