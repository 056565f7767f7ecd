"""Every option of training, once: a dataclass into which YAML and the command line are read."""

from __future__ import annotations

import argparse
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fastprompt.blocks.memory import CHOICES as MEMORIES
from fastprompt.methods.base import INITS

# method -> which of `_OF_METHODS` it reads
METHODS = {
    "m2pt": ("layers", "init", "train_projector", "train_lm_head", "visual_prompts"),
    "vpt": ("layers", "init"),
    "text": ("layers", "init"),
    "projector": (),
    "prefix": ("layers", "init"),
    "lora": (),
    "full": (),
}
_OF_METHODS = METHODS["m2pt"]


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that a run depends on. The defaults are M²PT's recipe (arXiv 2409.15657).

    Paths are relative to the working folder. `load` reads YAML; a wrong option is a ValueError.
    """

    model: str = _option(MISSING, "hub id or folder of a vision-language model")
    data: tuple[str, ...] = _option(MISSING, "LLaVA JSON, JSONL, tar shards, or folders of images")
    out: str = _option(MISSING, "the run's folder")

    image_folder: str | None = _option(None, "where a JSON file's images are; default: beside it")
    eval_data: tuple[str, ...] = _option((), "held-out data, as --data")
    hold_out: int = _option(0, "so many rows of --data are kept aside and evaluated")
    subset: float = _option(1.0, "share of the rows that train; above 1: their number")
    max_length: int = _option(
        2048, "longest row, in tokens, at most the model's context; a longer one is bad"
    )
    template: str = _option(
        "auto", "auto (the processor's own; plain for --method projector), or a name: vicuna_v1, …"
    )
    bucket: bool = _option(True, "batches of rows of similar length")
    pack: bool = _option(False, "several short conversations in one row of --max-length")

    method: str = _option(
        "m2pt",
        "what trains: m2pt, vpt (vision), text, projector (stage 1); prefix, lora, full (language)",
        tuple(METHODS),
    )
    vision_tokens: int = _option(20, "prompt rows of each vision block")
    text_tokens: int = _option(10, "prompt rows of each language block; the prefix's length")
    layers: str = _option("all", "blocks with prompts: all, first, odd, bottom, top, or 0,3,7")
    init: str | None = _option(
        None, "of prompts; prefill: from the data; default: the method's own", (*INITS, "prefill")
    )
    lora_rank: int = _option(8, "of lora's adapters")
    train_projector: bool = _option(True, "m2pt trains the projector too")
    train_lm_head: bool = _option(False, "m2pt trains lm_head too, as the released code does")
    visual_prompts: str = _option("drop", "what the projector sees of visual prompts (m2pt)")
    projector: str | None = _option(None, "start from this projector: stage 1, or mm_projector.bin")

    four_bit: bool = _option(False, "load the frozen backbone in NF4")
    dtype: str = _option("bfloat16", "of the backbone", ("bfloat16", "float32"))
    memory: str = _option("auto", "what frozen blocks keep for backward", MEMORIES)
    shard: bool = _option(False, "split the frozen blocks over the processes (FSDP2)")

    epochs: float = _option(3.0, "passes over the data")
    max_steps: int = _option(0, "stop after so many steps; 0: by --epochs")
    batch_size: int = _option(16, "rows of a forward, on each device")
    accumulate: int = _option(1, "forwards of a step")
    learning_rate: float = _option(7e-4, "of the prompts; the others' default")
    projector_lr: float | None = _option(None, "of the projector")
    head_lr: float | None = _option(None, "of lm_head or a head")
    weight_decay: float = _option(0.0, "AdamW's")
    warmup: float = _option(0.03, "share of the steps; 1 or more: their number")
    schedule: str = _option("cosine", "of the learning rate", ("cosine", "linear", "constant"))
    clip: float = _option(1.0, "norm of the gradient; 0: not clipped")

    seed: int = _option(0, "the three below, where they are not given, and dropout")
    init_seed: int | None = _option(None, "of new prompts")
    order_seed: int | None = _option(None, "of the order of the data")
    subset_seed: int | None = _option(None, "of --subset and --hold-out")

    on_bad_row: str = _option("skip", "a row that cannot be used", ("skip", "fatal"))
    duplicate_ids: str = _option("bad", "the second row of an id: bad, or kept", ("bad", "keep"))
    decode_images: bool = _option(False, "decode every image beforehand, not their heads alone")
    on_nan: str = _option("fatal", "a step whose loss or gradient is not finite", ("fatal", "skip"))

    save_every: int = _option(100, "steps between checkpoints; 0: none")
    keep: int = _option(2, "checkpoints kept, beside the best prompts")
    eval_every: int = _option(0, "steps between evaluations; 0: as --save-every")
    best_metric: str = _option("loss", "picks best/, of held-out rows", ("loss", "accuracy"))
    workers: int = _option(0, "processes that read images")
    tensorboard: bool = _option(False, "write TensorBoard's files, too")

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), kind))
        for f in fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value not in (*choices, f.default):
                raise ValueError(f"{f.name}: want one of {', '.join(choices)}; got {value!r}")
            unread = f.name in _OF_METHODS and f.name not in METHODS[self.method]
            if unread and value != f.default:
                raise ValueError(
                    f"{f.name}: method {self.method!r} has none, so want it left out; got {value!r}"
                )
        if not self.data:
            raise ValueError("data: want at least one file or folder, got none")
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"{name}: want {low} or more, got {value}")
        if not self.subset > 0 or (self.subset > 1 and self.subset != int(self.subset)):
            raise ValueError(f"subset: want a share in (0, 1] or a number, got {self.subset}")

    @property
    def seeds(self) -> dict[str, int]:
        """Of new prompts ("init"), the order of the data ("order") and its choice ("subset")."""
        given = dict(init=self.init_seed, order=self.order_seed, subset=self.subset_seed)
        return {name: self.seed if seed is None else seed for name, seed in given.items()}

    @property
    def template_name(self) -> str:
        """``template``, which for stage 1 is of captions where it is not given."""
        stage1 = self.template == "auto" and self.method == "projector"
        return "plain" if stage1 else self.template

    @property
    def evaluates(self) -> bool:
        return bool(self.eval_data or self.hold_out)

    def as_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "options") -> TrainConfig:
        """From names and values.

        Raises:
            ValueError: an unknown option (the nearest one is named), a missing or a wrong one.
        """
        check_names(values, where)
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"{where}: want {', '.join(missing)} too")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """From a YAML file; raises ValueError as `of` does."""
        return cls.of(read_yaml(path), str(path))


_LEAST = dict(
    hold_out=0, max_length=8, vision_tokens=0, text_tokens=0, lora_rank=1, epochs=1e-9, max_steps=0,
    batch_size=1, accumulate=1, learning_rate=0, projector_lr=0, head_lr=0, weight_decay=0,
    warmup=0, clip=0, seed=0, init_seed=0, order_seed=0, subset_seed=0, save_every=0, keep=1,
    eval_every=0, workers=0,
)  # fmt: skip


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_WORDS[tuple] = "paths"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options that a YAML file names, not yet checked for completeness."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: want a YAML file of options; {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: want a YAML mapping of options, got {type(values).__name__}")
    check_names(values, str(path))
    return values


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every option as an argument; one that is not given is not in the namespace."""
    kinds = _kinds()
    for f in fields(TrainConfig):
        kind, _ = _inner(kinds[f.name])
        default = "" if f.default in (None, MISSING, ()) else f" ({f.default})"
        options: dict[str, Any] = dict(
            help=(f.metadata["help"] + default).replace("%", "%%"), default=argparse.SUPPRESS
        )
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            options |= dict(nargs="+", metavar="PATH")
        else:
            options |= dict(type=kind, choices=f.metadata["choices"])
            options["metavar"] = None if f.metadata["choices"] else kind.__name__.upper()
        parser.add_argument(f"--{f.name.replace('_', '-')}", **options)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of a parsed command line are options of `TrainConfig`."""
    names = {f.name for f in fields(TrainConfig)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def _kinds() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def _inner(kind: Any) -> tuple[type, bool]:
    """(str, int, float, bool or tuple; whether None is a value)."""
    if isinstance(kind, types.UnionType):
        return next(k for k in typing.get_args(kind) if k is not type(None)), True
    return typing.get_origin(kind) or kind, False


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value as the option's type; YAML reads 7e-4 as a string and 3 as a whole number."""
    kind, optional = _inner(kind)
    if value is None and optional:
        return None
    if kind is tuple:
        value = [value] if isinstance(value, (str, Path)) else value
        if isinstance(value, (list, tuple)) and all(isinstance(v, (str, Path)) for v in value):
            return tuple(map(str, value))
    elif kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif kind is str and isinstance(value, Path):
        return str(value)
    elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise ValueError(f"{name}: want {_WORDS[kind]}, got {value!r}")


def check_names(values: Mapping[str, Any], where: str) -> None:
    names = [f.name for f in fields(TrainConfig)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
            raise ValueError(f"{where}: unknown option {name!r}{hint}")
