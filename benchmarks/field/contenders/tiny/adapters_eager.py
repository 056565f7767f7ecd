"""AdapterHub's prefix tuning as in `adapters_prefix`, under eager attention."""

import adapters
from adapters import PrefixTuningConfig


def tune(model, start):
    model.set_attn_implementation("eager")
    adapters.init(model)
    model.add_adapter("prompts", config=PrefixTuningConfig(flat=True, prefix_length=10))
    model.train_adapter("prompts")
    return model


def save(model, folder):
    model.save_adapter(folder, "prompts")


def load(model, folder):
    model.set_attn_implementation("eager")
    adapters.init(model)
    model.load_adapter(folder, set_active=True)
    return model
