"""Instruction-ViT on real images: ``python -m fastprompt.demo instruction-vit``."""
