"""transformers' Trainer for a patched model: exact to resume, and never half a checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from fastprompt.patching import patch_of
from fastprompt.train.batches import ABOUT, Collator, Examples, Order
from fastprompt.train.checking import Problems, TrainingError
from fastprompt.train.config import TrainConfig
from fastprompt.train.distributed import sees, zero_of_a_blank_image
from fastprompt.train.guarding import LEFT_OUT, GuardSteps
from fastprompt.train.options import arguments, groups
from fastprompt.train.sharding import shard
from fastprompt.train.templates import IGNORE


class PromptTrainer(Trainer):
    """Trains what a patch names, as a `TrainConfig` says.

    Args:
        model: patched (`fastprompt.patch`), dense or 4-bit.
        config: everything but the data.
        train, held_out: the rows; those held out are not packed.
        pad_id: the token that fills rows up.
        problems: rows that turn out bad while training are added here.

    Attributes:
        tokens: seen by this process, padding left out.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train: Examples,
        held_out: Examples | None = None,
        *,
        pad_id: int = 0,
        problems: Problems | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.config = config
        self.problems = (
            Problems(fatal=config.on_bad_row == "fatal") if problems is None else problems
        )
        self.tokens, self.about = 0, {}
        self.step_rows: list[str] = []  # of the step that is being computed
        self.spoiled = ""  # what of it is not finite
        self.left_out = ""  # why the step that has ended changed nothing
        self.norm: Tensor | float = 0.0  # of its gradient, before clipping
        self._staging: Path | None = None
        self._patch = patch_of(model)
        super().__init__(
            model=model,
            args=arguments(config),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=Collator(pad_id),
            compute_metrics=_metrics,
            callbacks=[GuardSteps(self), *(callbacks or [])],
        )

    def steps(self) -> int:
        """How many steps `train` takes from the beginning."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    @property
    def skipped(self) -> list[str]:
        """Steps whose loss or gradient was not finite; checkpoints keep them."""
        return [entry[LEFT_OUT] for entry in self.state.log_history if LEFT_OUT in entry]

    # ---- batches ----

    def _get_train_sampler(self, train_dataset: Examples | None = None) -> Order:
        data = self.train_dataset if train_dataset is None else train_dataset
        config = self.config
        return Order(data.lengths, config.batch_size, config.seeds["order"], config.bucket)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """At least 1: where all rows of a step turn out bad its loss is 0, not 0/0."""
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count.clamp(min=1) if isinstance(count, Tensor) else count

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.about = inputs.pop(ABOUT)
        for problem in self.about["problems"]:
            self.problems.add(problem)
        return {**super()._prepare_inputs(inputs), "use_cache": False}

    # ---- steps ----

    def _run_epoch(self, *args, **kwargs) -> None:
        """Nothing, where a resumed run has taken all its steps: Trainer would take one more."""
        # a checkpoint brings the cadence that it was written with: the options' goes before it
        self.state.compute_steps(self.args, self.state.max_steps)
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = cls(groups(self.model, self.config), **options)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict, *args, **kwargs) -> Any:
        """Of texts alone with a blank image, if parts that see images train: see `distributed`."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        # under `shard` the model's own forward adds one
        if "pixel_values" not in inputs and sees(self._patch) and not self.config.shard:
            data = self.train_dataset
            loss = loss + zero_of_a_blank_image(self._patch, data.process, data.dtype)
        return loss

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None):
        """Under ``shard`` by us: accelerate puts no DDP around FSDP2."""
        model = super()._wrap_model(model, training, dataloader)
        if not (self.config.shard and training and model is self.model):
            return model
        return shard(self._patch, self.train_dataset.process, self.train_dataset.dtype)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.tokens += self.about["tokens"]
        self.step_rows += self.about["rows"]
        if not torch.isfinite(loss):
            self.spoiled = f"the loss is {loss.item()}"
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args, **kwargs) -> None:
        """Trainer clears a step's loss by taking it from itself, which leaves none of what is none:
        every later loss would be none, too."""
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if not torch.isfinite(tr_loss):
            tr_loss.zero_()

    def log(self, logs: dict[str, Any], *args, **kwargs) -> None:
        if "loss" in logs and self.left_out:
            logs, self.left_out = {**logs, LEFT_OUT: self.left_out}, ""
        super().log(logs, *args, **kwargs)

    def _get_grad_norm(self, *args, **kwargs) -> Tensor | float:
        self.norm = super()._get_grad_norm(*args, **kwargs)
        return self.norm

    # ---- evaluation ----

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Draws no number that training would: how often it is done changes no loss."""
        cards = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=cards):
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """No loss (a mean of means would be wrong); [B, 3] of each row: see `_scores`."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
        scores = _scores(logits, labels)
        return None, scores, scores.new_zeros(len(scores))

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written beside, flushed to disk, then renamed: a checkpoint is whole or not there."""
        step, out = self.state.global_step, Path(self.args.output_dir)
        self._staging = out / f".checkpoint-{step}.partial"
        name = f"checkpoint-{step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(self._staging / name, out / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_of_writing(error):
                raise
            left = sorted(p.name for p in out.glob("checkpoint-*"))
            raise TrainingError(
                f"step {step}: its checkpoint could not be written: {error}\n"
                f"whole ones in {out}: {', '.join(left) or 'none'}"
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if self.args.should_save:
            rotate_checkpoints(str(out), save_total_limit=self.config.keep)


def _is_of_writing(error: Exception) -> bool:
    """torch.save makes a full disk a RuntimeError of its zip writer."""
    return not isinstance(error, RuntimeError) or "inline_container.cc" in str(error)


def publish(staged: Path, final: Path) -> None:
    """Flush a folder's files to the disk, then rename it into place."""
    for path in [*staged.rglob("*"), staged]:
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)  # of the same step, if it is saved twice
    os.replace(staged, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _scores(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, 3] float64: of each row the loss summed, its tokens, whether each would be the first
    choice (then a greedy answer is exact)."""
    due = labels[:, 1:] != IGNORE
    found, wanted = logits[:, :-1][due].float(), labels[:, 1:][due]
    owner = due.nonzero()[:, 0]
    scores = torch.zeros(len(labels), 3, dtype=torch.float64, device=logits.device)
    losses = F.cross_entropy(found, wanted, reduction="none").double()
    wrong = (found.argmax(-1) != wanted).double()
    per_row = torch.stack([losses, torch.ones_like(losses), wrong], dim=1)
    scores.index_add_(0, owner, per_row)
    scores[:, 2] = (scores[:, 1] > 0) & (scores[:, 2] == 0)
    return scores


def _metrics(prediction: Any) -> dict[str, float]:
    """ "loss": mean over held-out answer tokens; "accuracy": share of rows answered exactly."""
    loss, tokens, right = torch.as_tensor(prediction.predictions).T
    rows = (tokens > 0).sum().clamp(min=1)
    return {"loss": (loss.sum() / tokens.sum()).item(), "accuracy": (right.sum() / rows).item()}
