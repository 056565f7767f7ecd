"""What the rest of fastprompt needs to know of a model: where its blocks and their parts are."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastprompt import placement
from fastprompt.blocks.parts import Parts
from fastprompt.families.described import BlockLayout, Undescribed, describe

VISION, TEXT = "vision", "text"
THROUGH = ("norm", "k_proj", "v_proj", "k_norm")  # what a prompt passes through


@dataclass(eq=False)
class Rotary:
    """The frequencies by which a block's keys are rotated.

    Attributes:
        module: what the model calls once for all of its blocks.
        prefix: of its attributes' names, where kinds of layers have frequencies of their own.
    """

    module: nn.Module
    prefix: str = ""

    @property
    def inv_freq(self) -> Tensor:
        return getattr(self.module, f"{self.prefix}inv_freq")

    @property
    def attention_scaling(self) -> float:
        return getattr(self.module, f"{self.prefix}attention_scaling")


@dataclass(eq=False)
class Block:
    """One transformer block: what a prompt passes through to become keys and values.

    Attributes:
        attention: the module that transformers hands to the attention function.
        norm: before the projections; None: a post-norm block has none there.
        like: a norm of the block's width, for that width, its dtype and its device.
        k_proj, v_proj: the same module where it gives queries, keys and values side by side. None
            outside transformers, where the attention's own forward is asked (`fastprompt.sdpa`).
        k_norm: over the channels of each head, or, ``k_norm_whole``, of all heads together.
        rotary: prompts are rotated as positions -P .. -1; None: not rotated.
        packed: whether its tokens are a row of several images (`Tower`).
        without: other attentions of the layer that share its masks (cross-attention): no prompt.
        parts: for `blocks`; None: ``undescribed`` says why there are none.
    """

    name: str
    layer: nn.Module
    attention: nn.Module
    norm: nn.Module | None
    like: nn.Module
    k_proj: nn.Module | None
    v_proj: nn.Module | None
    k_norm: nn.Module | None
    k_norm_whole: bool
    rotary: Rotary | None
    head_dim: int
    packed: bool = False
    without: tuple[nn.Module, ...] = ()
    parts: Parts | None = None
    undescribed: str = ""
    _places: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        names = {id(module): name for name, module in self.layer.named_modules()}
        found = {part: names.get(id(getattr(self, part))) for part in THROUGH}
        self._places = {part: name for part, name in found.items() if name is not None}

    def by_now(self, part: str) -> nn.Module | None:
        """What stands in the place of ``norm``, ``k_proj``, ``v_proj`` or ``k_norm`` by now: PEFT
        puts its adapters around them."""
        place = self._places.get(part)
        return getattr(self, part) if place is None else self.layer.get_submodule(place)

    @property
    def width(self) -> int:
        return self.like.weight.shape[0]

    @property
    def dropout(self) -> float:
        """The probability with which its attention drops weights in training."""
        for name in ("attention_dropout", "attn_dropout", "attn_drop", "dropout"):
            p = getattr(self.attention, name, 0.0)
            p = getattr(p, "p", p)  # a module's
            if p:
                return p
        return 0.0

    @property
    def fused(self) -> bool:
        return self.k_proj is self.v_proj

    @property
    def kv_width(self) -> int:
        """Channels of all heads' keys together."""
        if not self.fused:
            return self.k_proj.out_features
        heads = getattr(self.attention, "num_key_value_heads", None) or self.attention.num_heads
        return heads * self.head_dim

    @property
    def kv_heads(self) -> tuple[int, int]:
        """How many heads its keys have, and channels of each."""
        return self.kv_width // self.head_dim, self.head_dim


@dataclass(eq=False)
class Tower:
    """A stack of blocks: ``blocks`` are those whose output is read, ``unread`` the ones past.

    Attributes:
        rotary: the module that rotates its text; prompts then stand before the first token.
        packed: whether images follow each other in one row [1, N], bounded by ``cu_seqlens``.
        bias: the attention that makes all blocks' bias of relative positions (T5's).
        outside: whether it is no tower of transformers (`families.outside`).
        counts: "columns" or "tokens" (no padding), whose place its learned positions are, where
            they can be told to begin elsewhere.
    """

    kind: str  # VISION or TEXT
    family: str
    name: str
    model: nn.Module
    embeddings: nn.Module | None
    blocks: list[Block]
    unread: list[Block] = field(default_factory=list)
    hands_on: bool = True  # its forward's keywords, to its blocks
    rotary: nn.Module | None = None
    packed: bool = False
    bias: nn.Module | None = None
    outside: bool = False
    counts: str | None = None


@dataclass(eq=False)
class Anatomy:
    """A whole model, taken apart by its family.

    Attributes:
        host: the module whose forward runs both towers of a vision-language model.
        parts: "projector", "lm_head", "head" -> name.
        first_position: of a text's first token, where the host makes the masks and so has to be
            told of positions; None: the language model is.
        shows: whether its projector can be shown visual prompts beside patches.
        beside: name -> why it gets no prompt, of modules with attention that are in no tower.
    """

    family: str
    towers: list[Tower]
    host: nn.Module | None = None
    parts: dict[str, str] = field(default_factory=dict)
    first_position: int | None = None
    shows: bool = False
    beside: dict[str, str] = field(default_factory=dict)

    def tower(self, kind: str) -> Tower | None:
        return next((tower for tower in self.towers if tower.kind == kind), None)


@dataclass(frozen=True)
class Layout:
    """Where one version of an architecture keeps its parts; dotted names.

    Attributes:
        layers: from the model; a ``*`` stands for every stack of that place.
        attention, norm, like: from the layer. ``norm`` None: a post-norm block; ``like`` then
            names any norm of its width.
        norm_if: the layer's attribute that says whether ``norm`` stands before attention.
        k_proj, v_proj: from the attention; the same name twice: one projection to q, k and v.
        rotary: from the model; prompts are rotated as the text before its first token. None:
            prompts are not rotated (learned positions, and rotation by places in an image).
        rotates: the attention's attribute that says whether this layer is rotated at all.
        without: from the layer, where it is; see `Block`.
        bias: whether the first block's attention makes `Tower.bias`.
        counts: see `Tower`.
    """

    layers: str
    attention: str
    norm: str | None
    embeddings: str
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    rotary: str | None = None
    blocks: tuple[BlockLayout, ...] = ()  # of one block; the first that fits
    hands_on: bool = True  # the model's keywords, to its blocks
    like: str | None = None
    norm_if: str | None = None
    rotates: str | None = None
    packed: bool = False
    without: str | None = None
    bias: bool = False
    counts: str | None = None


@dataclass(frozen=True)
class TowerFamily:
    """Serves a stack of blocks.

    Attributes:
        classes: the transformers classes that hold it.
        types: the ``model_type`` of its configs.
        layouts: the first whose ``layers`` and ``attention`` exist.
        refuses: why a config of these types is not served after all; None: it is.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    types: tuple[str, ...]
    layouts: tuple[Layout, ...]
    refuses: Callable[[PreTrainedConfig], str | None] = lambda config: None

    def serves(self, module: nn.Module) -> bool:
        return is_of(module, "transformers", self.classes)

    def tower(self, name: str, model: nn.Module) -> Tower:
        why = self.refuses(model.config)
        if why is not None:
            raise ValueError(f"{name or type(model).__name__}: {self.name} {why}")
        layout = next((each for each in self.layouts if _fits(model, each)), None)
        if layout is None:
            raise ValueError(
                f"{name or type(model).__name__}: want the parts of {self.name} as transformers "
                f"5.17 and newer lay them out ({self.layouts[0]}); this one has others"
            )
        rotary = attrgetter(layout.rotary)(model) if layout.rotary else None
        blocks = [
            _block(join(name, place), layer, layout, rotary)
            for place, layer in _stack(model, layout.layers)
        ]
        embeddings = attrgetter(layout.embeddings)(model)
        return Tower(
            self.kind, self.name, name, model, embeddings, blocks, rotary=rotary,
            hands_on=layout.hands_on, packed=layout.packed,
            bias=blocks[0].attention if layout.bias and blocks else None, counts=layout.counts,
        )  # fmt: skip


def _stack(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """(Dotted name, layer) of "layers", or of "stages.*.blocks": the blocks of every stage."""
    outer, _, inner = path.partition(".*.")
    found = [(f"{outer}.{i}", each) for i, each in enumerate(attrgetter(outer)(model))]
    if not inner:
        return found
    return [
        (join(name, place), layer) for name, each in found for place, layer in _stack(each, inner)
    ]


_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")


def _block(name: str, layer: nn.Module, layout: Layout, rotary: nn.Module | None) -> Block:
    attention = attrgetter(layout.attention)(layer)
    why_not = _unheard(attention)
    if why_not is not None:
        raise ValueError(f"{join(name, layout.attention)}: {why_not}")
    k_proj = attrgetter(layout.k_proj)(attention)
    v_proj = attrgetter(layout.v_proj)(attention)
    head_dim = next(getattr(attention, n) for n in _HEAD_DIM if hasattr(attention, n))
    like = attrgetter(layout.like or layout.norm)(layer)
    before = layout.norm and (layout.norm_if is None or getattr(layer, layout.norm_if))
    norm = attrgetter(layout.norm)(layer) if before else None
    k_norm = getattr(attention, "k_norm", None)
    if isinstance(k_norm, nn.Identity):
        k_norm = None
    rotates = rotary is not None and (layout.rotates is None or getattr(attention, layout.rotates))
    parts, why = None, ""
    try:
        parts = describe(layer, attention, norm, k_proj, v_proj, head_dim, rotates, layout.blocks)
    except Undescribed as reason:
        why = str(reason)
    return Block(
        name=name,
        layer=layer,
        attention=attention,
        norm=norm,
        like=like,
        k_proj=k_proj,
        v_proj=v_proj,
        k_norm=k_norm,
        k_norm_whole=k_norm is not None and k_norm.weight.shape[-1] != head_dim,
        rotary=_rotary(rotary, attention) if rotates else None,
        head_dim=head_dim,
        packed=layout.packed,
        without=_at(layer, layout.without),
        parts=parts,
        undescribed=why,
    )


def _unheard(attention: nn.Module) -> str | None:
    """Why our attention function would not be called, and prompts not be seen."""
    kind = type(attention).__name__
    if placement.stands_in(attention) is not None:
        return f"want {kind}'s own forward, got another in its place: patch first, then wrap it"
    owner = next(c for c in type(attention).__mro__ if "forward" in vars(c))
    called = set(inspect.unwrap(owner.forward).__code__.co_names)
    ours = owner.__module__.startswith("transformers.") or "ALL_ATTENTION_FUNCTIONS" in called
    if ours or {"super", "forward"} <= called:
        return None
    return (
        f"want an attention that asks transformers for its function, or prompts would not be seen; "
        f"got a {kind} with a forward of its own"
    )


def _at(layer: nn.Module, name: str | None) -> tuple[nn.Module, ...]:
    try:
        return () if name is None else (attrgetter(name)(layer),)
    except AttributeError:
        return ()


def _rotary(module: nn.Module, attention: nn.Module) -> Rotary:
    prefix = f"{getattr(attention, 'layer_type', '')}_"
    return Rotary(module, prefix if hasattr(module, f"{prefix}inv_freq") else "")


def _fits(model: nn.Module, layout: Layout) -> bool:
    try:
        layers = _stack(model, layout.layers)
        return not layers or attrgetter(f"{layout.attention}.{layout.k_proj}")(layers[0][1])
    except AttributeError:
        return False


def is_of(module: nn.Module, library: str, classes: tuple[str, ...] | None = None) -> bool:
    """Whether the module is one of a library's classes of these names (any, if None are given), or
    a subclass of one."""
    # by name: importing every model file of transformers to ask isinstance would take seconds
    return any(
        (classes is None or c.__name__ in classes) and c.__module__.startswith(f"{library}.")
        for c in type(module).__mro__
    )


def join(*names: str) -> str:
    return ".".join(name for name in names if name)


class Family(Protocol):
    """What serves a stack of blocks: `TowerFamily`, and outside transformers another."""

    name: str
    kind: str

    def serves(self, module: nn.Module) -> bool: ...

    def tower(self, name: str, model: nn.Module) -> Tower: ...


def find(model: nn.Module, families: tuple[Family, ...]) -> Iterator[tuple[str, nn.Module, Family]]:
    """Every served stack in ``model``, outermost first; what is inside one is not looked at."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or outer == "" for outer in inside):
            continue
        family = next((f for f in families if f.serves(module)), None)
        if family is not None:
            inside.append(name)
            yield name, module, family
