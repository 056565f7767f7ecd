"""Instruction-ViT: class prompts from an image-text encoder as the tokens of a vision backbone."""

from fastprompt.instruction.cache import FeatureCache
from fastprompt.instruction.encoders import Encoder, OpenClipEncoder, TransformersClipEncoder
from fastprompt.instruction.model import InstructionViT

__all__ = [
    "Encoder",
    "FeatureCache",
    "InstructionViT",
    "OpenClipEncoder",
    "TransformersClipEncoder",
]
