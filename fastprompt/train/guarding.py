"""Steps whose loss or gradient is not finite: they change nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from fastprompt.train.checking import TrainingError
from fastprompt.train.distributed import asked_of_any

if TYPE_CHECKING:
    from fastprompt.train.trainer import PromptTrainer

LEFT_OUT = "left_out"  # of a log entry: the step, and why it changed nothing


class GuardSteps(TrainerCallback):
    """A loss or a gradient that is not finite changes no parameter: it ends the run, or its step
    is left out (the schedule goes on)."""

    def __init__(self, trainer: PromptTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        trainer, reason = self.trainer, self.trainer.spoiled
        if not reason and not math.isfinite(trainer.norm):
            reason = "the gradient is not finite"
        rows, trainer.step_rows, trainer.spoiled = trainer.step_rows, [], ""
        if not asked_of_any(bool(reason), args.device):  # all processes step, or none
            return
        reason = reason or "another process met what is not finite"
        message = f"step {state.global_step + 1}: {reason}; its rows: {', '.join(rows)}"
        if trainer.config.on_nan == "fatal":
            raise TrainingError(f"{message}\n--on-nan skip leaves such steps out")
        trainer.left_out = message
        for p in model.parameters():
            p.grad = None  # AdamW passes over what has none
