"""Prompt tuning of frozen, 4-bit vision and vision-language transformers, as fused side keys."""

from fastprompt import importers, methods, ops
from fastprompt.assembly import assemble, assemble_processor
from fastprompt.attention import register
from fastprompt.checkpoint import load, read_card, save
from fastprompt.doctor import report
from fastprompt.families import supported
from fastprompt.patching import Patch, patch, patch_of
from fastprompt.prefill import prefill
from fastprompt.prefix_cache import prefix_cache
from fastprompt.reporting import Share, trainable_share
from fastprompt.support import Support, supports

__version__ = "0.1.0"
__all__ = [
    "Patch",
    "Share",
    "Support",
    "assemble",
    "assemble_processor",
    "importers",
    "load",
    "methods",
    "ops",
    "patch",
    "patch_of",
    "prefill",
    "prefix_cache",
    "read_card",
    "report",
    "save",
    "supported",
    "supports",
    "trainable_share",
]

register()
