"""What transformers' Trainer and its optimiser are to do of a `TrainConfig`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from fastprompt.patching import patch_of
from fastprompt.train.config import TrainConfig


def arguments(config: TrainConfig) -> TrainingArguments:
    """What Trainer is to do of a `TrainConfig`; the rest is done here."""
    schedules = dict(cosine="cosine", linear="linear", constant="constant_with_warmup")
    evaluated = config.eval_every or config.save_every
    made = TrainingArguments(
        output_dir=config.out,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        warmup_steps=config.warmup,
        lr_scheduler_type=schedules[config.schedule],
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is none is written as none
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 1,
        eval_strategy="steps" if config.evaluates and evaluated else "no",
        eval_steps=evaluated or None,
        seed=config.seed,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # each step reaches all that trains
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=["tensorboard"] if config.tensorboard else [],
    )
    made._n_gpu = min(made.n_gpu, 1)  # or one process would put nn.DataParallel on several cards
    return made


def groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The optimiser's groups, each with its learning rate and weight decay."""
    found = patch_of(model).param_groups()
    own = dict(projector=config.projector_lr, head=config.head_lr)
    for group in found:
        rate = own.get(group["name"])
        group["lr"] = config.learning_rate if rate is None else rate
        group["weight_decay"] = config.weight_decay
    return found
