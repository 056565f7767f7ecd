"""AdapterHub's prefix tuning, without the MLP that it has by default: what PEFT's trains."""

import adapters
from adapters import PrefixTuningConfig


def tune(model, start):
    adapters.init(model)
    model.add_adapter("prompts", config=PrefixTuningConfig(flat=True, prefix_length=10))
    model.train_adapter("prompts")
    return model


def save(model, folder):
    model.save_adapter(folder, "prompts")


def load(model, folder):
    adapters.init(model)
    model.load_adapter(folder, set_active=True)
    return model
