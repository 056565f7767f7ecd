"""Models outside transformers, whose attention is reached through its own forward.

They ask no registry of attention functions. But each attention of theirs calls
``F.scaled_dot_product_attention`` once, with queries, keys and values ready, and that call is where
prompts come in (`fastprompt.sdpa`). So a family says where attentions are and the norms in front of
them, and nothing of what happens inside.
"""

from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import Tensor, nn

from fastprompt import placement, sdpa
from fastprompt.families.base import Anatomy, Block, Tower, find, is_of, join


@dataclass(frozen=True)
class Place:
    """Where a kind of block keeps its attention and norms; dotted names from the block.

    Attributes:
        norm: in front of the attention; None: a post-norm block, and ``like`` names a norm of its
            width.
    """

    attention: str
    norm: str | None
    like: str


@dataclass(frozen=True)
class OutsideFamily:
    """Serves a stack of blocks.

    Attributes:
        library: the package of the classes.
        classes: that hold the stack, also by subclasses but for those in ``beside``.
        layers: from the model; a dotted name.
        places: of the kinds of blocks that are served, by class.
        refused: kinds of blocks and attentions that are not, by class -> why.
        beside: classes of modules with attention that get no prompts -> why.
    """

    name: str
    kind: str
    library: str
    classes: tuple[str, ...]
    layers: str
    places: dict[str, Place]
    refused: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)

    def serves(self, module: nn.Module) -> bool:
        return (
            is_of(module, self.library, self.classes) and type(module).__name__ not in self.beside
        )

    def tower(self, name: str, model: nn.Module) -> Tower:
        stack = attrgetter(self.layers)(model)
        blocks = [
            self._block(join(name, self.layers, str(i)), layer) for i, layer in enumerate(stack)
        ]
        return Tower(self.kind, self.name, name, model, None, blocks, outside=True)

    def _block(self, name: str, layer: nn.Module) -> Block:
        place = self.places.get(type(layer).__name__)
        if place is None:
            raise ValueError(f"{name}: {self._why_not(layer)}")
        attention, like = attrgetter(place.attention)(layer), attrgetter(place.like)(layer)
        if type(attention).__name__ in self.refused:
            raise ValueError(f"{name}: {self._why_not(attention)}")
        if getattr(like, "weight", None) is None:
            raise ValueError(f"{name}: want norms with weights, got {like}")
        if placement.stands_in(attention) is not None:
            raise ValueError(
                f"{name}: want its attention's own forward, got another in its place: patch first, "
                "then hook or wrap"
            )
        sizes = [n for n in ("head_dim", "num_heads") if hasattr(attention, n)]
        if not sizes:
            raise ValueError(
                f"{name}: {type(attention).__name__} is not served: want head_dim or num_heads"
            )
        width = like.weight.shape[0]
        head_dim = attention.head_dim if "head_dim" in sizes else width // attention.num_heads
        _try(name, attention, like.weight)
        return Block(
            name=name,
            layer=layer,
            attention=attention,
            norm=attrgetter(place.norm)(layer) if place.norm else None,
            like=like,
            k_proj=None,
            v_proj=None,
            k_norm=None,
            k_norm_whole=False,
            rotary=None,
            head_dim=head_dim,
            undescribed=f"a {type(layer).__name__} of {self.library}, which runs as it is",
        )

    def _why_not(self, module: nn.Module) -> str:
        kind = type(module).__name__
        why = self.refused.get(kind, f"want one of {', '.join(self.places)}")
        return f"{kind} is not served: {why}"


def _try(name: str, attention: nn.Module, like: Tensor) -> None:
    """Whether prompts can be put in, which nothing but its forward says: a row goes through it."""
    if any(p.is_meta for p in attention.parameters()):
        return
    device = [like.device] if like.is_cuda else []
    try:  # dropout of its output draws numbers, which prompts are yet to be made from
        with sdpa.asked_for(attention), torch.no_grad(), torch.random.fork_rng(device):
            sdpa.keys_values(attention, like.new_zeros(1, 1, like.shape[0]))
    except Exception as error:  # whatever it is, the first forward would end with it
        raise ValueError(f"{name}: {type(attention).__name__} is not served: {error}") from error


@dataclass(frozen=True)
class Library:
    """A package of models.

    Attributes:
        whole: classes of models with towers in ``visual`` and ``text``.
    """

    name: str
    families: tuple[OutsideFamily, ...]
    whole: tuple[str, ...] = ()

    def refusal(self, model: nn.Module) -> str | None:
        """Why the model is not one that holds what the families serve; None: it is."""
        if is_of(model, self.name, self.whole) or any(f.serves(model) for f in self.families):
            return None
        classes = (*self.whole, *(name for family in self.families for name in family.classes))
        return f"want one of {self.name}'s {', '.join(dict.fromkeys(classes))}"


def library_of(model: nn.Module, libraries: tuple[Library, ...]) -> Library | None:
    """Whose class the model is of, or a subclass of one."""
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    return next((each for each in libraries if each.name in packages), None)


def take_apart(model: nn.Module, library: Library, libraries: tuple[Library, ...]) -> Anatomy:
    """A model of a library; its towers may be of another's.

    Raises:
        ValueError: one that no family serves, or with a kind of block that none serves.
    """
    why = library.refusal(model)
    if why is not None:
        raise ValueError(f"{type(model).__name__}: {why}")
    families = tuple(family for each in libraries for family in each.families)
    towers = [family.tower(name, module) for name, module, family in find(model, families)]
    if not towers:
        names = ", ".join(family.name for family in families)
        raise ValueError(f"{type(model).__name__}: want a model with one of {names} in it")
    beside = {
        name: family.beside[type(module).__name__]
        for name, module in model.named_modules()
        for family in families
        if type(module).__name__ in family.beside and is_of(module, family.library)
    }
    for part in ("visual", "text"):
        module = getattr(model, part, None)
        if module is not None and not any(tower.name.startswith(part) for tower in towers):
            module = getattr(module, "trunk", module)
            beside[part] = f"{type(module).__name__} has no blocks that are served"
    if hasattr(model, "head_dist"):  # timm's DeiT, whose two heads' mean is its answer
        beside["head_dist"] = "frozen: of two heads the first alone may train"
    head = getattr(model, "head", None)
    trains = isinstance(head, nn.Module) and next(head.parameters(), None) is not None
    parts = {"head": "head"} if trains and towers[0].model is model else {}
    return Anatomy(towers[0].family, towers, parts=parts, beside=beside)
