"""Prompts and projectors that other code trained, into a model of ours, and back."""

from fastprompt.importers.m2pt import load_m2pt, save_m2pt
from fastprompt.importers.projector import load_projector

__all__ = ["load_m2pt", "load_projector", "save_m2pt"]
