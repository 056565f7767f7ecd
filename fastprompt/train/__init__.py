"""``fastprompt train``, and the same from Python: data, chat templates, batches, Trainer, runs."""

from fastprompt.train.checking import Problems, TrainingError
from fastprompt.train.config import TrainConfig
from fastprompt.train.preparing import make_trainer, prepare_data, prepare_model
from fastprompt.train.run import Result, rerun, train
from fastprompt.train.trainer import PromptTrainer

__all__ = [
    "Problems",
    "PromptTrainer",
    "Result",
    "TrainConfig",
    "TrainingError",
    "make_trainer",
    "prepare_data",
    "prepare_model",
    "rerun",
    "train",
]
