"""Literal concatenation by hand, for one model: M²PT's 20 visual and 10 textual rows.

What M²PT's code does, at its shortest, with rows that begin as fastprompt's `prefill` begins them.
(fastprompt/concatenation.py does it for all families.) It knows of no cache.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def tune(model, start):
    model.requires_grad_(False)
    float32_projector(model).requires_grad_(True)
    eye, tongue = model.model.vision_tower, model.model.language_model
    with torch.no_grad():
        seen = eye(start["pixel_values"], output_hidden_states=True)
        read = tongue(start["input_ids"][None], output_hidden_states=True)
    i = torch.arange(20)
    for layer, states in zip(eye.encoder.layer[:-1], seen.hidden_states, strict=False):
        add_rows(layer, states[i % len(states), 1 + i % (states.shape[1] - 1)])
    for layer, states in zip(tongue.layers, read.hidden_states, strict=False):
        add_rows(layer, states[0, :10])
    tongue.rotary_emb.forward = partial(rotate_rows, tongue.rotary_emb)
    return model


def float32_projector(model):
    projector = model.model.multi_modal_projector.float()
    projector.register_forward_pre_hook(lambda module, args: args[0].float())
    projector.register_forward_hook(lambda module, args, out: out.bfloat16())
    return projector


def add_rows(layer, rows):
    rows = rows.float() / rows.float().square().mean(-1, keepdim=True).sqrt()
    layer.rows = nn.Parameter(0.1 * rows)
    layer.forward = partial(write_rows, layer)


def write_rows(layer, hidden_states, attention_mask=None, **kwargs):
    P = len(layer.rows)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (P, 0, P, 0), value=True)
    rows = layer.rows.to(hidden_states.dtype).expand(len(hidden_states), -1, -1)
    rows = torch.cat([rows, hidden_states], dim=1)
    return type(layer).forward(layer, rows, attention_mask=attention_mask, **kwargs)[:, P:]


def rotate_rows(rotary, x, position_ids):
    first = torch.arange(10, device=x.device).expand(len(position_ids), -1)
    positions = torch.cat([first, position_ids + 10], dim=1)
    return type(rotary).forward(rotary, x, positions)


def save(model, folder):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.save(trained, f"{folder}/trained.pt")


def load(model, folder):
    trained = torch.load(f"{folder}/trained.pt")
    float32_projector(model)
    for name, rows in trained.items():
        if name.endswith(".rows"):
            add_rows(model.get_submodule(name.removesuffix(".rows")), rows)
    model.load_state_dict(trained, strict=False)
    rotary = model.model.language_model.rotary_emb
    rotary.forward = partial(rotate_rows, rotary)
    return model
