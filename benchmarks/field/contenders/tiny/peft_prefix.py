"""PEFT's prefix tuning: free keys and values of 10 virtual tokens in every layer."""

from peft import PeftModel, PrefixTuningConfig, get_peft_model


def tune(model, start):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10)
    return get_peft_model(model, config)


def save(model, folder):
    model.save_pretrained(folder)


def load(model, folder):
    return PeftModel.from_pretrained(model, folder)
