"""Looking at prompts: how much attention they get, and from where; what they look like.

Numbers in `attention` and `prompts`, pictures of them in `figures` (matplotlib).
"""

from fastprompt.viz.attention import Mass, attention_mass, attention_to_prompts, patches_to_prompts
from fastprompt.viz.figures import draw_attention, draw_overlay, draw_similarity
from fastprompt.viz.prompts import effective_rank, similarity

__all__ = [
    "Mass",
    "attention_mass",
    "attention_to_prompts",
    "draw_attention",
    "draw_overlay",
    "draw_similarity",
    "effective_rank",
    "patches_to_prompts",
    "similarity",
]
