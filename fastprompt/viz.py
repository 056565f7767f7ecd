"""Looking at prompts: how much attention they get."""

import torch
from torch import Tensor, nn

from fastprompt import recorder
from fastprompt.attention import with_sinks
from fastprompt.ops import reference
from fastprompt.patching import patch_of


@torch.no_grad()
def attention_to_prompts(model: nn.Module, **inputs) -> dict[str, Tensor]:
    """The share of each token's attention that goes to the block's prompt (M2PT's Figure 3).

    Args:
        model: a patched model.
        inputs: keyword arguments of its forward, which is run once.

    Returns:
        Block name -> [B, Hq, N] float32 in 0 .. 1, in the order in which the blocks ran. A share
        of P / (P + tokens seen) would be no more than their number.

    Raises:
        ValueError: the model is not patched.
    """
    patch_of(model)
    shares: dict[str, Tensor] = {}

    def listen(name: str, given: tuple[Tensor, ...], options: dict) -> None:
        wide, options = tuple(t.float() for t in given), dict(options)
        sinks = options.pop("sinks", None)
        if sinks is not None:
            wide, options["prompt_bias"] = with_sinks(wide, sinks)
        ends, _ = (options.pop(f"cu_seqlens_{x}", None) for x in "qk")
        if ends is not None:  # each place sees its own image
            image = torch.bucketize(
                torch.arange(given[0].shape[2], device=ends.device), ends, right=True
            )
            options["attn_mask"] = (image[:, None] == image)[None, None]
        _, weights = reference.prompt_attention_with_weights(*wide, **options)
        shares[name] = weights[..., : given[3].shape[-2]].sum(-1)

    with recorder.listening(listen):
        model(**inputs)
    return shares
