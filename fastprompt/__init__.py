"""Prompt tuning of frozen, 4-bit vision and vision-language transformers, as fused side keys."""

from fastprompt import importers, methods, ops, viz
from fastprompt.assembly import assemble, assemble_processor
from fastprompt.attention import register
from fastprompt.baking import bake
from fastprompt.checkpoint import load, read_card, save
from fastprompt.doctor import report
from fastprompt.families import supported
from fastprompt.hub import from_hub, push_to_hub
from fastprompt.loading import four_bit
from fastprompt.patching import Patch, patch, patch_of
from fastprompt.prefill import prefill
from fastprompt.prefix_cache import prefix_cache
from fastprompt.quantizing import quantize_
from fastprompt.sets import algebra as set_algebra
from fastprompt.sets.beginning import init_from, kmeans
from fastprompt.sets.files import load_sets, save_sets
from fastprompt.sets.transfer import transfer
from fastprompt.share import Share, trainable_share
from fastprompt.support import Support, supports

__version__ = "0.1.0"
__all__ = [
    "Patch",
    "Share",
    "Support",
    "assemble",
    "assemble_processor",
    "bake",
    "four_bit",
    "from_hub",
    "importers",
    "init_from",
    "kmeans",
    "load",
    "load_sets",
    "methods",
    "ops",
    "patch",
    "patch_of",
    "prefill",
    "prefix_cache",
    "push_to_hub",
    "quantize_",
    "read_card",
    "report",
    "save",
    "save_sets",
    "set_algebra",
    "supported",
    "supports",
    "trainable_share",
    "transfer",
    "viz",
]

register()
