"""`supports(model)`: can it be patched, and how, without touching it."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from fastprompt import adapters, families
from fastprompt.methods import Method, default_for, default_of
from fastprompt.patching import check_model


@dataclass(frozen=True)
class Support:
    """An answer of `supports`; true if the model can be patched.

    Attributes:
        family: what it would be patched as.
        method: what `fastprompt.patch` takes by default.
        reason: why it cannot be patched; "" if it can.
    """

    family: str = ""
    method: Method | None = None
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return self.reason or f"{self.family}, by default with {self.method}"


def supports(model: nn.Module | PreTrainedConfig) -> Support:
    """Whether `fastprompt.patch` takes a model, or a model of this config; changes nothing.

    A model is looked at as `patch` itself does, but for where its weights are. A config says what
    its architecture allows; that a model is wrapped, adapted or patched already is not seen in it.
    """
    try:
        if isinstance(model, PreTrainedConfig):
            return _of_config(model)
        check_model(model)
        anatomy = families.anatomy(adapters.unwrapped(model))
    except ValueError as error:
        return Support(reason=str(error))
    return Support(anatomy.family, default_for(anatomy))


def _of_config(config: PreTrainedConfig) -> Support:
    why = families.refusal(config)
    if why is not None:
        return Support(reason=why)
    kind = config.model_type
    if kind in {each for host in families.HOSTS for each in host.types}:
        return Support(kind, default_of({families.VISION, families.TEXT}, projector=True))
    serving = [family for family in families.TOWERS if kind in family.types]
    kinds = {family.kind for family in serving} or {families.VISION, families.TEXT}
    name = serving[0].name if serving else kind
    return Support(name, default_of(kinds, projector=False))
