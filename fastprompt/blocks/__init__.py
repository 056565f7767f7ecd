"""Frozen transformer blocks: one autograd node each, with a backward written for frozen weights.

`parts` says what a block is made of (a family fills it in), `compute` is its forward and backward
on tensors, `node` the autograd function that keeps what a `memory` policy says, and `frozen` what
stands in a layer's place. No architecture is named here.
"""

from fastprompt.blocks.parts import Norm, Parts, Vector

__all__ = ["Norm", "Parts", "Vector"]
