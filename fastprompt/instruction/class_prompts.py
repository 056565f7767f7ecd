"""The classes of one task: their names, the encoder's features of them, and prompt rows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastprompt.instruction.encoders import Encoder
from fastprompt.instruction.features import check_names, image_features, text_features

KINDS = ("text", "image", "mixed", "none")
FEATURES = ("trainable", "frozen", "encoder")


class ClassPrompts(nn.Module):
    """Rows [C, L, width] in the encoder's space: one a class, or two (text, image) when mixed.

    ``keys`` [C, width] are what selection compares an image's feature with: unit rows of the text,
    of the exemplars, or of the mean of both. They stay the encoder's own while rows train.
    """

    def __init__(
        self,
        encoder: Encoder,
        names: Sequence[str],
        images: Sequence[Tensor] | None,
        *,
        kind: str,
        features: str,
        templates: Sequence[str],
    ):
        check_names(names)
        if kind in ("image", "mixed") and images is None:
            raise ValueError(f"images: want exemplars of every class for kind={kind!r}, got None")
        with torch.no_grad():
            rows = []
            if kind in ("text", "mixed"):
                rows.append(text_features(encoder, names, templates))
            if kind in ("image", "mixed"):
                rows.append(image_features(encoder, images, names))
            rows = torch.stack(rows, dim=1) if rows else torch.zeros(len(names), 0, encoder.width)
            keys = normalize(rows.sum(1), dim=-1)
        self._hold(names, templates, kind, features, rows, keys)

    @classmethod
    def of(
        cls, names: Sequence[str], templates: Sequence[str], kind: str, features: str,
        rows: Tensor, keys: Tensor,
    ) -> "ClassPrompts":  # fmt: skip
        """Those of a checkpoint: rows [C, L, width] and keys [C, width], nothing encoded anew."""
        made = cls.__new__(cls)
        made._hold(names, templates, kind, features, rows, keys)
        return made

    def _hold(self, names, templates, kind, features, rows, keys):
        super().__init__()
        self.names, self.templates, self.kind = list(names), list(templates), kind
        self.live = features == "encoder"  # the text rows come out of the encoder at each forward
        self.register_buffer("keys", keys.contiguous())
        if features == "trainable" and rows.numel():
            self.rows = nn.Parameter(rows)
        else:
            self.register_buffer("rows", rows)

    def __len__(self) -> int:
        return len(self.names)

    def forward(self, encoder: Encoder) -> Tensor:
        """[C, L, width], with the text tower's graph where it trains."""
        if not self.live:
            return self.rows
        text = text_features(encoder, self.names, self.templates)[:, None]
        return text if self.kind == "text" else torch.cat([text, self.rows[:, 1:]], dim=1)
