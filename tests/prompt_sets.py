"""Models with three prompt sets, and their batches, for tests."""

import tiny
import torch
import zoo
from test_families import four_bit, wide  # noqa: F401  (a fixture)

import fastprompt
from fastprompt.methods import DeepPrompts

TINY = [name for name in tiny.FAMILIES if name not in ("llava vit qwen2", "llava dinov2 qwen3")]
# transformers cuts these images into tiles, or packs them into rows of one batch entry
TILED = ("llava_next", "llava_onevision")
ALL = [
    *TINY,
    *(n for n, row in zoo.ROWS.items() if n != "mistral3" and row.library == "transformers"),
]
GENERATES = ["llama", "llava", "gpt2", "t5", "gpt_oss", "gemma3", "qwen2_5_vl", "internvl"]


def kinds(name):
    if name in zoo.ROWS:
        return zoo.ROWS[name].vision, zoo.ROWS[name].text
    both = name.startswith("llava")
    text = name in tiny.LANGUAGE or name.endswith("_text")
    return both or not text, both or text


def build(name, dtype=torch.float64):
    return (zoo if name in zoo.ROWS else tiny).build(name, dtype)


def inputs(name, dtype=torch.float64):
    return (zoo if name in zoo.ROWS else tiny).inputs(name, dtype)


def patched(name, model=None):
    """A model with three random sets of unlike lengths: "default", "long" and "short"."""
    model = build(name) if model is None else model
    vision, text = kinds(name)
    method = DeepPrompts(vision=3 * vision, text=3 * text, train_head=False)
    patch = fastprompt.patch(model, method)
    patch.add("long", vision=5 * vision, text=6 * text)
    patch.add("short", vision=2 * vision, text=1 * text)
    randomize(patch)
    return patch


@torch.no_grad()
def randomize(patch, seed=7):
    torch.manual_seed(seed)
    for each in patch.sets.values():
        for p in each.tensors().values():
            p.normal_()


def row(given, i):
    """The inputs of one row of the batch, where each row has one image."""
    own = {}
    for key, x in given.items():
        if key == "pixel_values" and "image_grid_thw" in given:
            x = x.split(given["image_grid_thw"].prod(-1).tolist())[i]
        else:
            x = x[i : i + 1]
        own[key] = x
    return own


def mixed_and_alone(patch, name, given, names):
    model = patch.model
    images = [3, 3] if name in TILED else None
    with torch.no_grad():
        with patch.using(names, images=images):
            mixed = tiny.output(name, model, given)
        alone = []
        for i, own in enumerate(names):
            with patch.using(own):
                alone.append(tiny.output(name, model, row(given, i)))
    return mixed, torch.cat(alone)
