"""fastprompt's M²PT, 20 visual and 10 textual prompts, which begin as images' and a sentence's."""

import fastprompt
from fastprompt.methods import M2PT


def tune(model, start):
    patch = fastprompt.patch(model, M2PT(vision_tokens=20, text_tokens=10))
    fastprompt.prefill(patch, start["input_ids"], start["pixel_values"])
    return model


def save(model, folder):
    fastprompt.save(model, folder)


def load(model, folder):
    fastprompt.load(model, folder)
    return model
