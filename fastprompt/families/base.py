"""What the rest of fastprompt needs to know of a model: where its blocks and their parts are."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from torch import nn

from fastprompt.blocks.parts import Parts
from fastprompt.families.described import BlockLayout, Undescribed, describe

VISION, TEXT = "vision", "text"


@dataclass(eq=False)
class Block:
    """One pre-norm transformer block: what a prompt passes through to become keys and values."""

    name: str
    layer: nn.Module
    attention: nn.Module  # the module that transformers hands to the attention function
    norm: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    k_norm: nn.Module | None
    rotary: nn.Module | None  # prompts are rotated as positions -P .. -1; None: not rotated
    head_dim: int
    parts: Parts | None = None  # for `blocks`; None: ``undescribed`` says why there are none
    undescribed: str = ""

    @property
    def width(self) -> int:
        return self.norm.weight.shape[0]


@dataclass(eq=False)
class Tower:
    """A stack of blocks: ``blocks`` are those whose output is read, ``unread`` the ones past."""

    kind: str  # VISION or TEXT
    family: str
    name: str
    model: nn.Module
    embeddings: nn.Module
    blocks: list[Block]
    unread: list[Block] = field(default_factory=list)
    hands_on: bool = True  # its forward's keywords, to its blocks

    @property
    def rotary(self) -> nn.Module | None:
        return self.blocks[0].rotary if self.blocks else None


@dataclass(eq=False)
class Anatomy:
    """A whole model, taken apart by its family."""

    family: str
    towers: list[Tower]
    host: nn.Module | None = (
        None  # the module whose forward runs both towers of a vision-language model
    )
    parts: dict[str, str] = field(default_factory=dict)  # "projector", "lm_head", "head" -> name

    def tower(self, kind: str) -> Tower | None:
        return next((tower for tower in self.towers if tower.kind == kind), None)


@dataclass(frozen=True)
class Layout:
    """Where one version of an architecture keeps its parts; dotted names."""

    layers: str
    attention: str
    norm: str
    embeddings: str
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    rotary: str | None = None
    blocks: tuple[BlockLayout, ...] = ()  # of one block; the first that fits
    hands_on: bool = True  # the model's keywords, to its blocks


@dataclass(frozen=True)
class TowerFamily:
    """Serves a stack of blocks: ``classes`` are the transformers classes that hold it."""

    name: str
    kind: str
    classes: tuple[str, ...]
    layouts: tuple[Layout, ...]  # the first whose ``layers`` and ``attention`` exist

    def serves(self, module: nn.Module) -> bool:
        return is_transformers(module, self.classes)

    def tower(self, name: str, model: nn.Module) -> Tower:
        layout = next((each for each in self.layouts if _fits(model, each)), None)
        if layout is None:
            raise ValueError(
                f"{name or type(model).__name__}: want the parts of {self.name} as transformers "
                f"5.17 and newer lay them out ({self.layouts[0]}); this one has others"
            )
        rotary = attrgetter(layout.rotary)(model) if layout.rotary else None
        blocks = [
            self._block(f"{join(name, layout.layers)}.{i}", layer, layout, rotary)
            for i, layer in enumerate(attrgetter(layout.layers)(model))
        ]
        embeddings = attrgetter(layout.embeddings)(model)
        return Tower(
            self.kind, self.name, name, model, embeddings, blocks, hands_on=layout.hands_on
        )

    def _block(
        self, name: str, layer: nn.Module, layout: Layout, rotary: nn.Module | None
    ) -> Block:
        attention = attrgetter(layout.attention)(layer)
        k_proj = attrgetter(layout.k_proj)(attention)
        head_dim = getattr(attention, "head_dim", None) or attention.attention_head_size
        norm = attrgetter(layout.norm)(layer)
        v_proj = attrgetter(layout.v_proj)(attention)
        rotates = rotary is not None
        parts, why = None, ""
        try:
            parts = describe(
                layer, attention, norm, k_proj, v_proj, head_dim, rotates, layout.blocks
            )
        except Undescribed as reason:
            why = str(reason)
        return Block(
            name=name,
            layer=layer,
            attention=attention,
            norm=norm,
            k_proj=k_proj,
            v_proj=v_proj,
            k_norm=getattr(attention, "k_norm", None),
            rotary=rotary,
            head_dim=head_dim,
            parts=parts,
            undescribed=why,
        )


def _fits(model: nn.Module, layout: Layout) -> bool:
    try:
        layers = attrgetter(layout.layers)(model)
        return len(layers) == 0 or attrgetter(f"{layout.attention}.{layout.k_proj}")(layers[0])
    except AttributeError:
        return False


def is_transformers(module: nn.Module, classes: tuple[str, ...]) -> bool:
    """Whether the module is one of transformers' classes of these names, or a subclass of one."""
    # by name: importing every model file of transformers to ask isinstance would take seconds
    return any(
        c.__name__ in classes and c.__module__.startswith("transformers.")
        for c in type(module).__mro__
    )


def join(*names: str) -> str:
    return ".".join(name for name in names if name)


def find(
    model: nn.Module, families: tuple[TowerFamily, ...]
) -> Iterator[tuple[str, nn.Module, TowerFamily]]:
    """Every served stack in ``model``, outermost first; what is inside one is not looked at."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or outer == "" for outer in inside):
            continue
        family = next((f for f in families if f.serves(module)), None)
        if family is not None:
            inside.append(name)
            yield name, module, family
