"""Who takes part. What a user of each writes is a file for each model: ``tiny/``, ``demo/``.

Such a file has three functions, whose bodies are what a user writes: ``tune(model, start)`` gives
the model that trains; ``save(model, folder)``; ``load(model, folder)`` gives a tuned model from a
fresh one. ``start`` is what prompts may begin as: see `tasks.Task`. `lines` counts them.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Contender:
    """One row of a table.

    Attributes:
        name: on the command line, and of its files.
        title: in the tables.
        method: what it does with each model, where that differs.
        needs: the package it is of, if it is not fastprompt or torch alone.
        apart: whether that lives in a folder of its own, beside another transformers.
    """

    name: str
    title: str
    method: tuple[str, str] = ("", "")
    needs: str = ""
    apart: bool = False

    def title_on(self, model: str) -> str:
        return self.title + self.method[model == "demo"]

    def file(self, model: str) -> Path:
        return Path(__file__).parent / model / f"{self.name}.py"

    def module(self, model: str) -> ModuleType:
        """What its user writes for "tiny" or "demo"."""
        return importlib.import_module(f"{__name__}.{model}.{self.name}")


CONTENDERS = {
    c.name: c
    for c in (
        Contender("peft_prefix", "PEFT, prefix tuning", needs="peft"),
        Contender("peft_prompt", "PEFT, prompt tuning", needs="peft"),
        Contender("peft_lora", "PEFT, LoRA", needs="peft"),
        Contender("adapters_prefix", "adapters, prefix tuning", needs="adapters", apart=True),
        Contender(
            "adapters_eager",
            "adapters, prefix tuning, eager attention",
            ("", ", in the language model"),
            needs="adapters",
            apart=True,
        ),
        Contender("concatenation", "literal concatenation by hand", ("", ", M²PT")),
        Contender("fastprompt_prefix", "fastprompt, prefix tuning"),
        Contender("fastprompt_deep", "fastprompt", (", deep prompts", ", M²PT")),
    )
}
