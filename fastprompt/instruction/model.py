"""Instruction-ViT (arXiv 2305.00201): class prompts are the tokens that instruct a backbone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from fastprompt import linear4bit, ops
from fastprompt.instruction import saving
from fastprompt.instruction.backbones import ORDERS, TokenBackbone
from fastprompt.instruction.class_prompts import FEATURES, KINDS, ClassPrompts
from fastprompt.instruction.encoders import Encoder
from fastprompt.instruction.features import TEMPLATE
from fastprompt.instruction.head import Head
from fastprompt.instruction.kept import kept_classes, kept_rows

PREDICT = ("head", "cosine", "both")


@dataclass
class Prediction(ModelOutput):
    """What a forward gives; B images, C classes, k of them kept (all C without selection).

    Attributes:
        loss: scalar, if labels were given.
        logits: [B, C], those that ``predict`` names; -inf where a class cannot be predicted.

    and with ``details=True``, as Trainer would else gather all of it over an evaluation:
        head_logits: [B, C]; None for a task without a head.
        cosine_logits: [B, k]; None without prompts.
        indices: [B, k], the classes kept; None if all are.
        cls: [B, D] and prompts: [B, k, D], the backbone's outputs (a class's rows averaged).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    head_logits: Tensor | None = None
    cosine_logits: Tensor | None = None
    indices: Tensor | None = None
    cls: Tensor | None = None
    prompts: Tensor | None = None


class InstructionViT(nn.Module):
    """A vision backbone that reads the classes as tokens and is trained to align CLS with them.

        loss = CE(head(CLS)) + alignment · CE(cosine(CLS, prompt outputs) / temperature)

    What the paper leaves open is a parameter here, and its default a choice of ours: alignment,
    temperature, token_order, the mean over a class's rows, templates beyond the first.

    Args:
        backbone: see `TokenBackbone`; frozen, dense or 4-bit.
        encoder: makes class features from texts and images, and the scores that select.
        kind: "text", "image" (mean of exemplar features), "mixed" (both, two rows a class), or
            "none" (no prompts: the head alone, for comparison).
        features: "trainable": rows start as the encoder's features and train; "frozen": the
            projection alone trains; "encoder": gradients reach the text encoder.
        templates: sentences with ``{class}``; several are averaged.
        projection: a trainable linear map to the backbone's width; None: where widths differ.
        alignment: weight of the aligning loss (the paper's lambda).
        temperature: of the cosine logits.
        token_order: one of `backbones.ORDERS`.
        train_k: classes kept for each image in training: its own, train_k - 1 others, and the
            mean of the rest; None: all. 16 by score tested best on 100 classes (README: 0.47, all
            0.40, 16 at random 0.40; one seed) at a third of the time; up to 16 classes it is all.
        train_others: "score" keeps those the encoder finds likeliest, "random" any.
        top_k: classes kept for each image in evaluation, by the encoder's scores; None: all, and
            of a task with no more classes than that all, too. Test as you train: a model trained
            with 16 is not used to more.
        predict: which logits `forward` returns as ``logits``: "head", "cosine" (which serves
            classes never trained as well), or "both" (the sum of their log-probabilities, over
            the kept classes).
        train_backbone: train all of the backbone too.

    Backbone and encoder are the caller's own modules: frozen in place, the encoder in evaluation
    mode whatever the model is in. A state dict (and so a checkpoint of Trainer's) holds both; what
    `save` writes does not.

    Raises:
        ValueError: an option or a backbone that is not served.
    """

    def __init__(
        self,
        backbone: nn.Module,
        encoder: Encoder,
        *,
        kind: str = "text",
        features: str = "trainable",
        templates: Sequence[str] = (TEMPLATE,),
        projection: bool | None = None,
        alignment: float = 1.0,
        temperature: float = 0.1,
        token_order: str = ORDERS[0],
        train_k: int | None = 16,
        train_others: str = "score",
        top_k: int | None = 16,
        predict: str = "head",
        train_backbone: bool = False,
    ):
        super().__init__()
        _one_of("kind", kind, KINDS)
        _one_of("features", features, FEATURES)
        _one_of("predict", predict, PREDICT)
        _one_of("train_others", train_others, ("score", "random"))
        for name, k in (("train_k", train_k), ("top_k", top_k)):
            if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
                raise ValueError(f"{name}: want a whole number of at least 1, or None; got {k!r}")
        if not temperature > 0:
            raise ValueError(f"temperature: want a number above 0, got {temperature!r}")
        if kind == "none" and predict != "head":
            raise ValueError(f"predict: want 'head' without prompts, got {predict!r}")
        if features == "encoder" and kind not in ("text", "mixed"):
            raise ValueError(f"features='encoder': want kind 'text' or 'mixed', got {kind!r}")
        if isinstance(templates, str) or not templates:
            raise ValueError(f"templates: want a list of sentences, got {templates!r}")

        if train_k == 1 and alignment and kind != "none":
            raise ValueError(
                "train_k: want at least 2 (one class has nothing to differ from), got 1"
            )
        trains = encoder.text_parameters() if features == "encoder" else []
        if not all(p.is_floating_point() for p in trains):
            raise ValueError("features='encoder': want a dense text tower, got a 4-bit one")

        linear4bit.adopt(encoder)
        self.encoder = encoder.requires_grad_(False)  # first: it may hold the backbone
        self.backbone = TokenBackbone(backbone, token_order).requires_grad_(train_backbone)
        for p in trains:
            p.requires_grad_(True)
        width = self.backbone.width
        wants = encoder.width != width if projection is None else projection
        if not wants and encoder.width != width:
            raise ValueError(f"projection: want one from {encoder.width} to {width}, got False")
        # without prompts there is nothing to project
        wants = wants and kind != "none"
        self.projection = nn.Linear(encoder.width, width) if wants else nn.Identity()
        self.kind, self.features, self.templates = kind, features, tuple(templates)
        self.alignment, self.temperature = alignment, temperature
        self.train_k, self.train_others = train_k, train_others
        self.top_k, self.predict = top_k, predict
        self.tasks, self.heads = nn.ModuleDict(), nn.ModuleDict()
        self.__dict__["_kept_rows"] = {}  # by task
        self.train(self.training)

    def train(self, mode: bool = True) -> "InstructionViT":
        """The encoder stays in evaluation mode: its features are to be the same every time."""
        super().train(mode)
        self.encoder.eval()
        self._kept_rows.clear()  # a write through ``.data`` leaves no trace
        return self

    # ---- the instruction ----

    def set_classes(
        self,
        names: Sequence[str],
        images: Sequence[Tensor] | None = None,
        *,
        task: str = "default",
        head: bool | None = None,
    ) -> None:
        """Say what is to be told apart. Nothing is trained: a trained model serves new classes.

        Args:
            names: of the classes.
            images: for each class its exemplars [n, 3, H, W] as the encoder wants them, or their
                features [n, width]; wanted by kinds "image" and "mixed".
            task: its name, for a model with several; its older classes are replaced.
            head: give the task a new head, which must train (None: while the model is in training
                mode; a head of the same classes stays). Without one it is predicted by cosine.

        Parameters are new, so an optimiser made before does not know them.

        Raises:
            ValueError: no or doubled names, missing exemplars, features that are not finite.
        """
        if not task or "." in task or hasattr(nn.ModuleDict, task):
            raise ValueError(
                f"task: want a name without a dot, and none of nn.ModuleDict's own; got {task!r}"
            )
        options = dict(kind=self.kind, features=self.features, templates=self.templates)
        with torch.inference_mode(False):  # what is made there could never train
            prompts = ClassPrompts(self.encoder, names, images, **options)
        same = task in self.tasks and self.tasks[task].names == prompts.names
        device = next(self.backbone.parameters()).device
        self.tasks[task] = prompts.to(device)
        if head is None and same:
            return
        if self.training if head is None else head:
            self.heads[task] = Head(self.backbone.width, len(names)).to(device)
        elif task in self.heads:
            del self.heads[task]

    def classes(self, task: str = "default") -> list[str]:
        """The names of a task's classes, in the order of its logits."""
        return self._task(task).names

    def save(self, folder: str | Path) -> Path:
        """Write what trains, and the tasks with the encoder's features, to one safetensors file.

        Returns the file's path; it appears whole or not at all. Backbone and encoder are not in
        it, unless they train.
        """
        return saving.save(self, folder)

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote into a model of the same backbone, encoder, kind and features.

        Tasks of other names stay as they are.

        Raises:
            ValueError: another model, a missing or truncated file; the model is then as it was.
        """
        saving.load(self, folder)

    # ---- forward ----

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        query: Tensor | None = None,
        encoder_pixel_values: Tensor | None = None,
        task: str = "default",
        predict: str | None = None,
        details: bool = False,
    ) -> Prediction:
        """Predict, and with labels the loss.

        Args:
            pixel_values: [B, 3, H, W] as the backbone wants them normalised.
            labels: [B] int64, places in `classes`.
            query: [B, width], the encoder's features of the images, if they are there already.
            encoder_pixel_values: [B, 3, h, w] as the encoder wants them; pixel_values otherwise.
                Encoded only where classes are selected and no query is given.
            task, predict: as in `set_classes` and above.
            details: give all of `Prediction`, not the loss and logits alone.

        Raises:
            ValueError: an unknown task, labels out of range, logits that the task lacks, or a
                query of another shape or (on the CPU, where asking is free) not finite.
        """
        prompts, by = self._task(task), self.predict if predict is None else predict
        _one_of("predict", by, PREDICT)
        head = dict(self.heads).get(task)
        if by != "cosine" and head is None:
            raise ValueError(f"predict: want 'cosine' for {task!r}, which has no head; got {by!r}")
        if by != "head" and self.kind == "none":
            raise ValueError(f"predict: want 'head' without prompts, got {by!r}")
        _check_labels(labels, len(pixel_values), len(prompts))

        tokens, indices = self._tokens(task, labels, query, pixel_values, encoder_pixel_values)
        cls, outputs = self.backbone(pixel_values, None if tokens is None else tokens.flatten(1, 2))
        cls, by_head, cosine = cls.float(), None, None
        if head is not None:
            by_head = head(cls, trains=self.training and labels is not None, read=by != "cosine")
        if tokens is not None:
            k = len(prompts) if indices is None else indices.shape[1]
            outputs = outputs.unflatten(1, tokens.shape[1:3])[:, :k].float().mean(2)
            cosine = ops.cosine_logits(cls, outputs, 1 / self.temperature)
        loss = None if labels is None else self._loss(by_head, cosine, indices, labels)
        logits = _logits(by, by_head, cosine, indices, len(prompts))
        if not details:
            return Prediction(loss, logits)
        return Prediction(loss, logits, by_head, cosine, indices, cls, outputs)

    def _tokens(self, task, labels, query, pixels, encoder_pixels):
        """Tokens [B or 1, classes (and the rest), L, D] and the classes kept [B, k]."""
        if self.kind == "none":
            return None, None
        prompts = self._task(task)
        rows, total = self._rows(prompts, task)
        k = self.train_k if self.training else self.top_k
        if k is None or k >= len(prompts):
            return rows[None], None
        if query is None and not (
            self.training and labels is not None and self.train_others == "random"
        ):
            query = self._encode(pixels if encoder_pixels is None else encoder_pixels)
        if query is not None:
            self._check_query(query, len(pixels))
        if self.training and labels is not None:
            indices = kept_classes(query, prompts.keys, labels, k, self.train_others)
            return kept_rows(rows, indices), indices
        tokens, indices, _ = ops.select_prompts(query, prompts.keys, rows, k, total=total)
        return tokens, indices

    def _rows(self, prompts: ClassPrompts, task: str) -> tuple[Tensor, Tensor | None]:
        """[C, L, D] in the backbone's width, and their sum where they stand still."""
        if self.training or torch.is_grad_enabled():
            return self.projection(prompts(self.encoder)), None
        parts = [*prompts.parameters(), *prompts.buffers(), *self.projection.parameters()]
        if prompts.live:
            parts += self.encoder.text_parameters()
        if any(p.is_inference() for p in parts):  # they count no versions
            return self.projection(prompts(self.encoder)), None
        # so that the work of an evaluation does not grow with the classes beyond the selection
        device = prompts.keys.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (autocast, *((id(p), p.data_ptr(), p._version) for p in parts))
        kept_key, kept = self._kept_rows.get(task, (None, None))
        if kept_key != key:
            with torch.inference_mode(False), torch.no_grad():
                rows = self.projection(prompts(self.encoder)).contiguous()
                kept = rows, ops.sum_of(rows)
            self._kept_rows[task] = key, kept
        return kept

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        return self.encoder.encode_images(pixels).float()

    def _check_query(self, query: Tensor, B: int) -> None:
        if query.shape != (B, self.encoder.width):
            want = [B, self.encoder.width]
            raise ValueError(f"query: want {want}, got {list(query.shape)}")
        if query.device.type == "cpu" and not query.isfinite().all():
            raise ValueError("query: want finite image features, got NaN or infinity")

    def _loss(self, by_head, cosine, indices, labels: Tensor) -> Tensor:
        loss = labels.new_zeros((), dtype=torch.float32)
        if by_head is not None:
            loss = loss + F.cross_entropy(by_head, labels)
        if cosine is None or not self.alignment:
            return loss
        if indices is not None:
            # places among the kept; an image whose class was not kept has nothing to align with
            match = indices == labels[:, None]
            labels = torch.where(match.any(1), match.int().argmax(1), -100)
        aligned = F.cross_entropy(cosine, labels, reduction="sum")
        return loss + self.alignment * aligned / (labels >= 0).sum().clamp(min=1)

    def gradient_checkpointing_enable(self, **options: object) -> None:
        """The backbone's own, which Trainer's ``gradient_checkpointing=True`` calls."""
        self.backbone.model.gradient_checkpointing_enable(**options)

    def _task(self, task: str) -> ClassPrompts:
        if task not in self.tasks:
            has = ", ".join(map(repr, self.tasks)) or "none: set_classes first"
            raise ValueError(f"task: want one of {has}; got {task!r}")
        return self.tasks[task]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept_rows": {}}


def _logits(by: str, by_head, cosine, indices, classes: int) -> Tensor:
    if by == "head":
        return by_head
    if indices is not None:
        everywhere = cosine.new_full((len(cosine), classes), -torch.inf)
        cosine = everywhere.scatter(1, indices, cosine)
    return cosine if by == "cosine" else by_head.log_softmax(-1) + cosine.log_softmax(-1)


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: want one of {', '.join(choices)}; got {value!r}")


def _check_labels(labels: Tensor | None, B: int, C: int) -> None:
    if labels is None:
        return
    if labels.shape != (B,) or labels.dtype != torch.int64:
        raise ValueError(f"labels: want [{B}] int64, got {list(labels.shape)} {labels.dtype}")
    if labels.device.type == "cpu" and B and not 0 <= int(labels.min()) <= int(labels.max()) < C:
        raise ValueError(
            f"labels: want 0 .. {C - 1}, got {int(labels.min())} .. {int(labels.max())}"
        )
