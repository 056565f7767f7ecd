"""fastprompt's deep prompts, which begin as a text; what literal concatenation computes."""

import fastprompt
from fastprompt.methods import DeepPrompts


def tune(model, start):
    patch = fastprompt.patch(model, DeepPrompts(text=10))
    fastprompt.prefill(patch, start["input_ids"])
    return model


def save(model, folder):
    fastprompt.save(model, folder)


def load(model, folder):
    fastprompt.load(model, folder)
    return model
