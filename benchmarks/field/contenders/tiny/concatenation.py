"""Literal concatenation by hand, for one model: 10 rows before every block, cut off behind it.

What the code of VPT and M²PT does, at its shortest. (fastprompt/concatenation.py does it for all
families.) It knows of no cache.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def tune(model, start):
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.rows = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 10, layer.hidden_size)))
        layer.forward = partial(write_rows, layer)
    model.model.rotary_emb.forward = partial(rotate_rows, model.model.rotary_emb)
    return model


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
    model = tune(model, None)
    model.load_state_dict(torch.load(f"{folder}/rows.pt"), strict=False)
    return model
