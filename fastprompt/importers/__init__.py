"""Prompts and projectors that other code trained, into a model of ours, and back."""

from fastprompt.importers.m2pt import load_m2pt, save_m2pt
from fastprompt.importers.peft import load_peft, save_peft
from fastprompt.importers.projector import load_projector
from fastprompt.importers.vpt import load_vpt

__all__ = ["load_m2pt", "load_peft", "load_projector", "load_vpt", "save_m2pt", "save_peft"]
