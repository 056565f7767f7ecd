"""PEFT's LoRA of rank 4 at queries and values."""

from peft import LoraConfig, PeftModel, get_peft_model


def tune(model, start):
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]
    )
    return get_peft_model(model, config)


def save(model, folder):
    model.save_pretrained(folder)


def load(model, folder):
    return PeftModel.from_pretrained(model, folder)
