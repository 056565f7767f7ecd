"""Prompts in an attention outside transformers: what stands in its forward's place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastprompt import attention, placement, sdpa
from fastprompt.attention import SideKeys


@dataclass(eq=False)
class Called:
    """Stands in for ``attention.forward``: the same, with the block's prompt among keys and values.

    A plain object in the instance's ``__dict__``: it follows the model through deepcopy and pickle.
    """

    module: nn.Module

    @classmethod
    def put_on(cls, module: nn.Module, side: SideKeys) -> Called:
        vars(module)[attention.ATTRIBUTE] = side
        made = cls(module)
        placement.put_in(module, made)
        return made

    def undo(self) -> None:
        vars(self.module).pop(attention.ATTRIBUTE, None)
        placement.take_out(self.module, self)

    def __call__(self, *args, **kwargs) -> Tensor:
        return sdpa.run(self.module, self._attend, *args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As ``F.scaled_dot_product_attention``: [B, H, N, d] each."""
        if attn_mask is not None and is_causal:
            raise ValueError(
                f"{type(self.module).__name__}: want attn_mask or is_causal, got both, as SDPA"
            )
        if attn_mask is not None:  # of any shape that broadcasts to [B, H, N, M]
            lead = [1] * (4 - attn_mask.ndim) + list(attn_mask.shape[:-2])
            attn_mask = attn_mask.expand(*lead, query.shape[2], key.shape[2])
        out, _ = attention.attention_forward(
            self.module, query, key, value, attn_mask,
            dropout=dropout_p, scaling=scale, is_causal=is_causal,
        )  # fmt: skip
        return out.transpose(1, 2)
