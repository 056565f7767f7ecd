"""PEFT's LoRA of rank 4 at the language model's queries and values."""

from peft import LoraConfig, PeftModel, get_peft_model


def tune(model, start):
    float32_projector(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*\.[qv]_proj",
        modules_to_save=["multi_modal_projector"],
    )
    return get_peft_model(model, config)


def float32_projector(model):
    projector = model.model.multi_modal_projector.float()
    projector.register_forward_pre_hook(lambda module, args: args[0].float())
    projector.register_forward_hook(lambda module, args, out: out.bfloat16())


def save(model, folder):
    model.save_pretrained(folder)


def load(model, folder):
    float32_projector(model)
    return PeftModel.from_pretrained(model, folder)
