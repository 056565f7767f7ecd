"""Prompt pools: how each sample gets prompts of its own. What is chosen, the methods say."""

from fastprompt.pools.parts import Components, PoolKeys
from fastprompt.pools.pool import Pool

__all__ = ["Components", "Pool", "PoolKeys"]
