"""fastprompt's deep prompts: 10 rows before every block, as literal concatenation computes them."""

import fastprompt
from fastprompt.methods import DeepPrompts


def tune(model, start):
    fastprompt.patch(model, DeepPrompts(text=10))
    return model


def save(model, folder):
    fastprompt.save(model, folder)


def load(model, folder):
    fastprompt.load(model, folder)
    return model
