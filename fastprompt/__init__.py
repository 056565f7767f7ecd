"""Prompt tuning of frozen, 4-bit vision and vision-language transformers, as fused side keys."""

from fastprompt import methods, ops
from fastprompt.attention import register
from fastprompt.checkpoint import load, read_card, save
from fastprompt.doctor import report
from fastprompt.families import supported
from fastprompt.patching import Patch, patch, patch_of
from fastprompt.support import Support, supports

__version__ = "0.1.0"
__all__ = [
    "Patch",
    "Support",
    "load",
    "methods",
    "ops",
    "patch",
    "patch_of",
    "read_card",
    "report",
    "save",
    "supported",
    "supports",
]

register()
