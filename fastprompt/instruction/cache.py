"""Image features, kept on disk."""

import hashlib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastprompt.files import replace
from fastprompt.instruction.encoders import Encoder
from fastprompt.instruction.features import BATCH, check_finite


class FeatureCache:
    """Image features on disk, keyed by the file's content and the encoder's weights.

    Args:
        folder: made if it is not there. Each call that adds features writes one safetensors file,
            whole or not at all, so that an interrupted run loses its last batch alone.
        encoder: whose features they are.
        preprocess: (path) -> [3, H, W], decodes and normalises one file.
        key: names the preprocessing, since a function cannot be told from another: change it
            when the pixels change.
    """

    def __init__(
        self, folder: str | Path, encoder: Encoder, preprocess: Callable[[Path], Tensor], key: str
    ):
        self.encoder, self.preprocess = encoder, preprocess
        name = hashlib.sha256(f"{encoder.fingerprint} {key}".encode()).hexdigest()[:16]
        self.folder = Path(folder) / name
        self._known: dict[str, Tensor] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self._known |= load_file(file)

    @torch.no_grad()
    def features(
        self, files: Iterable[str | Path], *, bad: str = "raise"
    ) -> tuple[Tensor, list[int]]:
        """[n, width] float32 features, and the places in ``files`` that they are of.

        Args:
            bad: "raise" a ValueError that names a file which cannot be decoded, or "skip" it with
                a warning; what was encoded before it is kept either way.
        """
        if bad not in ("raise", "skip"):
            raise ValueError(f"bad: want 'raise' or 'skip', got {bad!r}")
        files = [Path(f) for f in files]
        hashes, waiting, new = [], {}, {}  # waiting: content -> (file, pixels)
        try:
            for file in files:
                content = self._hash(file, bad)
                hashes.append(content)
                if content is None or any(content in x for x in (self._known, waiting, new)):
                    continue
                pixels = self._decode(file, bad)
                if pixels is not None:
                    waiting[content] = file, pixels
                if len(waiting) == BATCH:
                    new |= self._encode(waiting)
                    waiting = {}
            new |= self._encode(waiting)
        finally:
            self._keep(new)
        places = [i for i, content in enumerate(hashes) if content in self._known]
        rows = [self._known[hashes[i]] for i in places]
        return torch.stack(rows) if rows else torch.empty(0, self.encoder.width), places

    def _hash(self, file: Path, bad: str) -> str | None:
        try:
            return hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            return self._bad(file, error, bad)

    def _decode(self, file: Path, bad: str) -> Tensor | None:
        try:
            return self.preprocess(file)
        except Exception as error:  # decoders raise of every kind
            return self._bad(file, error, bad)

    def _bad(self, file: Path, error: Exception, bad: str) -> None:
        if bad == "raise":
            raise ValueError(f"{file}: want an image that can be decoded; {error}") from error
        warnings.warn(f"{file} was skipped: {error}", stacklevel=4)

    def _encode(self, waiting: dict[str, tuple[Path, Tensor]]) -> dict[str, Tensor]:
        if not waiting:
            return {}
        (first, like), files = next(iter(waiting.values())), [str(f) for f, _ in waiting.values()]
        for file, pixels in waiting.values():
            if pixels.shape != like.shape:
                sizes = f"{list(pixels.shape)}, and {list(like.shape)} of {first}"
                raise ValueError(f"{file}: want preprocess to give images of one size, got {sizes}")
        self.encoder.eval()  # noise would stay on the disk
        pixels = torch.stack([pixels for _, pixels in waiting.values()]).to(self.encoder.device)
        rows = self.encoder.encode_images(pixels).float().cpu()
        check_finite(rows, "image features", files)
        return dict(zip(waiting, rows, strict=True))

    def _keep(self, new: dict[str, Tensor]) -> None:
        if not new:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256("".join(sorted(new)).encode()).hexdigest()[:16]
        own = {key: row.clone() for key, row in new.items()}
        replace(self.folder / f"{name}.safetensors", lambda part: save_file(own, part))
        self._known |= new
