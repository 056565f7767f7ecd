"""What `blocks` needs to know of a block, from where its architecture keeps it."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from torch import nn

from fastprompt.blocks.parts import LAYER, RMS, RMS_PLUS_ONE, Norm, Parts, Vector

_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "gelu_quick",
}


@dataclass(frozen=True)
class BlockLayout:
    """Where one version of an architecture keeps a block's parts.

    Dotted names from the layer; ``q_proj``, ``scaling``, ``dropout`` and ``window`` from the
    module that transformers hands to its attention functions.

    Attributes:
        layer: the class whose forward this describes.
        hands_on: whether that module hands its caller's keywords on.
        others: containers of what is named here.
    """

    layer: str
    o_proj: str
    norm2: str
    gate: str
    down: str
    activation: str
    up: str | None = None
    q_proj: str = "q_proj"
    scale1: str | None = None
    scale2: str | None = None
    scaling: str = "scaling"
    dropout: str = "attention_dropout"
    window: str | None = None
    hands_on: bool = True
    others: tuple[str, ...] = ()


class Undescribed(Exception):
    """A block that no layout describes; its message is the reason."""


def describe(
    layer: nn.Module,
    attention: nn.Module,
    norm: nn.Module | None,
    k_proj: nn.Module,
    v_proj: nn.Module,
    head_dim: int,
    rotary: bool,
    layouts: tuple[BlockLayout, ...],
) -> Parts:
    """The parts of one block, by the first layout that fits.

    Raises:
        Undescribed: none fits, or a norm or activation is of a kind that blocks do not know.
    """
    layout = next((each for each in layouts if _fits(layer, attention, each)), None)
    if layout is None:
        raise Undescribed(f"a {type(layer).__name__} with parts that frozen blocks do not know")

    def at(name: str | None) -> nn.Module | None:
        return attrgetter(name)(layer) if name else None

    return Parts(
        attention=attention,
        norm1=_norm(norm),
        q_proj=attrgetter(layout.q_proj)(attention),
        k_proj=k_proj,
        v_proj=v_proj,
        o_proj=at(layout.o_proj),
        norm2=_norm(at(layout.norm2)),
        gate=at(layout.gate),
        up=at(layout.up),
        down=at(layout.down),
        activation=_activation(at(layout.activation)),
        head_dim=head_dim,
        scale=attrgetter(layout.scaling)(attention),
        q_norm=_norm(getattr(attention, "q_norm", None)),
        k_norm=_norm(getattr(attention, "k_norm", None)),
        scale1=_vector(layer, layout.scale1),
        scale2=_vector(layer, layout.scale2),
        rotary=rotary,
        dropout_name=layout.dropout,
        window_name=layout.window,
        hands_on=layout.hands_on,
        others=(attention, at(layout.activation), *map(at, layout.others)),
    )


def _fits(layer: nn.Module, attention: nn.Module, layout: BlockLayout) -> bool:
    if type(layer).__name__ != layout.layer:
        return False
    try:
        for root, names in ((layer, _names(layout)), (attention, _of_attention(layout))):
            for name in names:
                attrgetter(name)(root)
    except AttributeError:
        return False
    return True


def _names(layout: BlockLayout) -> Iterator[str]:
    named = (layout.o_proj, layout.norm2, layout.gate, layout.up, layout.down, layout.activation)
    yield from (n for n in (*named, layout.scale1, layout.scale2, *layout.others) if n)


def _of_attention(layout: BlockLayout) -> Iterator[str]:
    yield from (n for n in (layout.q_proj, layout.scaling, layout.dropout, layout.window) if n)


def _norm(module: nn.Module | None) -> Norm | None:
    if module is None:
        return None
    if isinstance(module, nn.LayerNorm) and module.weight is not None:
        return Norm(module, LAYER, module.eps)
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return Norm(module, RMS, module.variance_epsilon)
    if type(module).__name__ == "GemmaRMSNorm":
        return Norm(module, RMS_PLUS_ONE, module.eps)
    raise Undescribed(f"a {type(module).__name__}, which frozen blocks do not know")


def _activation(module: nn.Module) -> str:
    name = _ACTIVATIONS.get(type(module).__name__)
    if name is None:
        raise Undescribed(f"activation {type(module).__name__}, which frozen blocks do not know")
    return name


def _vector(layer: nn.Module, name: str | None) -> Vector | None:
    if name is None:
        return None
    module, _, parameter = name.rpartition(".")
    return Vector(attrgetter(module)(layer), parameter)
