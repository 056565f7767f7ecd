"""Encoders that put images and texts into one space, behind one small interface."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """What `InstructionViT` asks of an encoder; subclass it for one of your own.

    Attributes:
        width: of its features.
    """

    width: int

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """[texts, width]; gradients reach the text tower."""
        raise NotImplementedError

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[B, width] of images [B, 3, H, W] as this encoder wants them normalised."""
        raise NotImplementedError

    def text_parameters(self) -> list[nn.Parameter]:
        """What trains with ``features="encoder"``."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Tells this encoder's features from every other's: a hash of its modules and weights."""
        digest = hashlib.sha256(repr(self).encode())
        for name, tensor in self.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))


class OpenClipEncoder(Encoder):
    """A CLIP model of open_clip (``open_clip.create_model``) and its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor]):
        super().__init__()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.width = self.encode_text(["a"]).shape[1]

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device))

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)

    def text_parameters(self) -> list[nn.Parameter]:
        names = ("visual.", "logit_")  # all but the image tower and the temperature
        return [p for n, p in self.model.named_parameters() if not n.startswith(names)]


class TransformersClipEncoder(Encoder):
    """A ``CLIPModel`` of transformers and its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Callable):
        super().__init__()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.width = model.config.projection_dim

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        given = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return _features(self.model.get_text_features(**given.to(self.device)))

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        return _features(self.model.get_image_features(pixel_values=pixel_values))

    def text_parameters(self) -> list[nn.Parameter]:
        return [*self.model.text_model.parameters(), *self.model.text_projection.parameters()]


def _features(out: object) -> Tensor:
    """transformers gives the features, or an output whose pooled state they are, by version."""
    return out if isinstance(out, Tensor) else out.pooler_output
