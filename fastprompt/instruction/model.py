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
from fastprompt.instruction.class_prompts import ClassPrompts
from fastprompt.instruction.encoders import Encoder
from fastprompt.instruction.features import TEMPLATE
from fastprompt.instruction.head import Head
from fastprompt.instruction.kept import kept_classes, kept_rows
from fastprompt.instruction.options import PREDICT, check_labels, check_options, check_query, one_of
from fastprompt.instruction.standard import Standard


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
        cls: [B, D], not standardised, and prompts: [B, k, D], the backbone's outputs (a class's
            rows averaged).
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
        projection: a trainable linear map to the backbone's width; None: where widths differ. It
            starts as an orthogonal one, so that classes lie as they did in the encoder's space.
        token_scale: norm of a class row as it enters, over the mean norm of the backbone's own
            image tokens there. Unit features as they are are drowned: in DINOv2-S at 56 pixels the
            outputs of 16 emoji's names were alike to a cosine of 0.96, at scale 1 to 0.6.
        standardise: head and cosine read CLS brought to mean 0 and deviation 1 in every feature, by
            running statistics of the training images (`standard.Standard`). The CLS of DINOv2-S
            has a mean of norm 25 and deviations of 0.3: the head is badly conditioned, and all
            images lie within one narrow cone, of which the cosine sees little else.
        alignment: weight of the aligning loss (the paper's lambda).
        temperature: of the cosine logits.
        token_order: one of `backbones.ORDERS`.
        train_k: classes kept for each image in training: its own, train_k - 1 others, and the
            mean of the rest; None: all. On 100 classes 16, by score or at random, tested as well as
            all at a third of the time (README: 0.60, 0.60, all 0.59; one seed); up to 16 classes it
            is all.
        train_others: "score" keeps those the encoder finds likeliest, "random" any.
        top_k: classes kept for each image in evaluation, by the encoder's scores; None: all, and
            of a task with no more classes than that all, too. Test as you train: a model trained
            with 16 is not used to more.
        predict: which logits `forward` returns as ``logits``: "head", "cosine" (which serves
            classes never trained as well), or "both" (the sum of their log-probabilities, over
            the kept classes).
        train_backbone: train all of the backbone too.

    Backbone and encoder are the caller's own modules: frozen in place, the encoder in evaluation
    mode whatever the model is in; `release` gives them back. A state dict (and so a
    checkpoint of Trainer's) holds both; what `save` writes does not. Several tasks in turn under
    DDP want its ``find_unused_parameters=True``.

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
        token_scale: float = 1.0,
        standardise: bool = False,
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
        check_options(
            kind=kind, features=features, predict=predict, train_others=train_others,
            train_k=train_k, top_k=top_k, temperature=temperature, token_scale=token_scale,
            templates=templates, alignment=alignment,
        )  # fmt: skip
        trains = encoder.text_parameters() if features == "encoder" else []
        if not all(p.is_floating_point() for p in trains):
            raise ValueError("features='encoder': want a dense text tower, got a 4-bit one")
        if train_backbone and not all(p.is_floating_point() for p in backbone.parameters()):
            raise ValueError("train_backbone: want a dense backbone, got a 4-bit one")

        own = [*encoder.modules(), *backbone.modules()]
        self.__dict__["_was"] = (
            [(p, p.requires_grad) for module in (encoder, backbone) for p in module.parameters()],
            [(module, module.training) for module in own],
            linear4bit.adopt(encoder),
        )
        try:
            self.backbone = TokenBackbone(backbone, token_order)
            width = self.backbone.width
            wants = encoder.width != width if projection is None else projection
            if not wants and encoder.width != width:
                raise ValueError(f"projection: want one from {encoder.width} to {width}, got False")
            # without prompts there is nothing to project
            wants = wants and kind != "none"
            self.projection = _projection(encoder.width, width) if wants else nn.Identity()
            shrinks = min(1.0, width / encoder.width) ** 0.5  # what the projection leaves of a norm
            norm = 1.0 if kind == "none" else self.backbone.token_norm() / shrinks
        except BaseException:
            self.release()
            raise
        self.encoder = encoder.requires_grad_(False)  # first: it may hold the backbone
        self.backbone.requires_grad_(train_backbone)
        for p in trains:
            p.requires_grad_(True)
        self.register_buffer("gain", torch.tensor(token_scale * norm))  # from unit rows to tokens
        self.standard = Standard(width) if standardise else None
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

        Parameters are new, so an optimiser made before does not know them; rows that had trained
        begin again as the encoder's features.

        Raises:
            ValueError: no or doubled names, missing exemplars, features that are not finite.
        """
        if not isinstance(task, str) or not task or "." in task or hasattr(nn.ModuleDict, task):
            raise ValueError(
                f"task: want a name without a dot, and none of nn.ModuleDict's own; got {task!r}"
            )
        options = dict(kind=self.kind, features=self.features, templates=self.templates)
        with torch.inference_mode(False):  # what is made there could never train
            prompts = ClassPrompts(self.encoder, names, images, **options)
        same = task in self.tasks and self.tasks[task].names == prompts.names
        device = next(self.backbone.parameters()).device
        self.tasks[task] = prompts.to(device)
        self._kept_rows.pop(task, None)
        if head is None and same and (task in self.heads or not self.training):
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
        one_of("predict", by, PREDICT)
        head = dict(self.heads).get(task)
        if by != "cosine" and head is None:
            raise ValueError(f"predict: want 'cosine' for {task!r}, which has no head; got {by!r}")
        if by != "head" and self.kind == "none":
            raise ValueError(f"predict: want 'head' without prompts, got {by!r}")
        check_labels(labels, len(pixel_values), len(prompts))

        tokens, indices = self._tokens(task, labels, query, pixel_values, encoder_pixel_values)
        cls, outputs = self.backbone(pixel_values, None if tokens is None else tokens.flatten(1, 2))
        cls, by_head, cosine = cls.float(), None, None
        trains = self.training and labels is not None
        read = cls if self.standard is None else self.standard(cls, trains)
        if head is not None:
            by_head = head(read, trains=trains, read=by != "cosine")
        if tokens is not None:
            k = len(prompts) if indices is None else indices.shape[1]
            outputs = outputs.unflatten(1, tokens.shape[1:3])[:, :k].float().mean(2)
            cosine = ops.cosine_logits(read, outputs, 1 / self.temperature)
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
            check_query(query, len(pixels), self.encoder.width)
        if self.training and labels is not None:
            indices = kept_classes(query, prompts.keys, labels, k, self.train_others)
            return kept_rows(rows, indices), indices
        tokens, indices, _ = ops.select_prompts(query, prompts.keys, rows, k, total=total)
        return tokens, indices

    def _rows(self, prompts: ClassPrompts, task: str) -> tuple[Tensor, Tensor | None]:
        """[C, L, D] in the backbone's width, and their sum where they stand still."""
        if self.training or torch.is_grad_enabled():
            return self._project(prompts), None
        parts = [*prompts.parameters(), *prompts.buffers(), *self.projection.parameters()]
        parts.append(self.gain)
        if prompts.live:
            parts += self.encoder.text_parameters()
        if any(p.is_inference() for p in parts):  # they count no versions
            return self._project(prompts), None
        # so that the work of an evaluation does not grow with the classes beyond the selection
        device = prompts.keys.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (autocast, *((id(p), p.data_ptr(), p._version) for p in parts))
        kept_key, kept = self._kept_rows.get(task, (None, None))
        if kept_key != key:
            with torch.inference_mode(False), torch.no_grad():
                rows = self._project(prompts).contiguous()
                kept = rows, ops.sum_of(rows)
            self._kept_rows[task] = key, kept
        return kept

    def _project(self, prompts: ClassPrompts) -> Tensor:
        return self.projection(prompts(self.encoder)) * self.gain

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        return self.encoder.encode_images(pixels).float()

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

    def release(self) -> None:
        """Give backbone and encoder back as they came; this model is not to be used any more.

        Their gradient flags, training modes and (in 4 bits, on the CPU) bitsandbytes' own products
        are again what they were; what trained of them keeps its values.
        """
        flags, modes, adopted = self._was
        linear4bit.release(adopted)
        if "backbone" in self._modules:
            linear4bit.release(self.backbone.adopted)
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode

    def gradient_checkpointing_enable(self, **options: object) -> None:
        """The backbone's own, which Trainer's ``gradient_checkpointing=True`` calls."""
        self.backbone.gradient_checkpointing_enable(**options)

    def _task(self, task: str) -> ClassPrompts:
        if not isinstance(task, str) or task not in self.tasks:
            has = ", ".join(map(repr, self.tasks)) or "none: set_classes first"
            raise ValueError(f"task: want one of {has}; got {task!r}")
        return self.tasks[task]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept_rows": {}}


def _projection(encoder: int, backbone: int) -> nn.Linear:
    layer = nn.Linear(encoder, backbone)
    nn.init.orthogonal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _logits(by: str, by_head, cosine, indices, classes: int) -> Tensor:
    if by == "head":
        return by_head
    if indices is not None:
        everywhere = cosine.new_full((len(cosine), classes), -torch.inf)
        cosine = everywhere.scatter(1, indices, cosine)
    return cosine if by == "cosine" else by_head.log_softmax(-1) + cosine.log_softmax(-1)
