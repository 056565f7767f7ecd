"""Literal concatenation by hand, for one model: 10 rows before every block, cut off behind it.

What the code of VPT and M²PT does, at its shortest, with rows that begin as fastprompt's `prefill`
begins them. (fastprompt/concatenation.py does it for all families.) It knows of no cache.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def tune(model, start):
    model.requires_grad_(False)
    with torch.no_grad():
        read = model.model(start["input_ids"][None], output_hidden_states=True)
    for layer, states in zip(model.model.layers, read.hidden_states, strict=False):
        add_rows(layer, states[0, :10])
    model.model.rotary_emb.forward = partial(rotate_rows, model.model.rotary_emb)
    return model


def add_rows(layer, rows):
    layer.rows = nn.Parameter(0.1 * rows / rows.square().mean(-1, keepdim=True).sqrt())
    layer.forward = partial(write_rows, layer)


def write_rows(layer, hidden_states, attention_mask=None, **kwargs):
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (10, 0, 10, 0), value=True)
    rows = layer.rows.to(hidden_states.dtype).expand(len(hidden_states), -1, -1)
    rows = torch.cat([rows, hidden_states], dim=1)
    return type(layer).forward(layer, rows, attention_mask=attention_mask, **kwargs)[:, 10:]


def rotate_rows(rotary, x, position_ids):
    first = torch.arange(10, device=x.device).expand(len(position_ids), -1)
    positions = torch.cat([first, position_ids + 10], dim=1)
    return type(rotary).forward(rotary, x, positions)


def save(model, folder):
    rows = {name: p for name, p in model.named_parameters() if name.endswith(".rows")}
    torch.save(rows, f"{folder}/rows.pt")


def load(model, folder):
    trained = torch.load(f"{folder}/rows.pt")
    for name, rows in trained.items():
        add_rows(model.get_submodule(name.removesuffix(".rows")), rows)
    model.load_state_dict(trained, strict=False)
    model.model.rotary_emb.forward = partial(rotate_rows, model.model.rotary_emb)
    return model
