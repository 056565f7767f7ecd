"""Many prompt sets on one backbone: each a `Prompt` for every prompted block, one of them in use.

The set in use is what `Patch.use` named last: its prompts are the blocks' children, it trains, and
`save`, `load` and the report are of it. The others are plain objects beside the model, in its
memory or the host's. `Patch.using` lets a forward have other sets, or each row its own: that trains
nothing but the set in use, moves no module, and may be left before backward.

A set is its prompts. The projector or head that trains beside them is the patch's, shared by all
sets, but for sets that were loaded with another one: theirs is copied in while they are in use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastprompt import attention
from fastprompt.attention import SideKeys
from fastprompt.families import Block, Tower
from fastprompt.methods import Method
from fastprompt.methods.base import new_prompts
from fastprompt.placement import device_of
from fastprompt.prompts import CHILD, BlockPrompt
from fastprompt.sets.rows import Rows
from fastprompt.shards import is_shard

if TYPE_CHECKING:
    from fastprompt.patching import Patch

FIRST = "default"


@dataclass(eq=False)
class PromptSet:
    """Prompts of one method for the blocks of one patched model.

    Attributes:
        method: whose prompts they are; it has their lengths.
        prompts: block name -> prompt.
        parts: name -> value, of a trained projector or head that belongs to this set alone.
        taken: whether a patch has it; that one's blocks and this set have the same prompts.
    """

    method: Method
    prompts: dict[str, BlockPrompt]
    parts: dict[str, Tensor] | None = None
    taken: bool = field(default=False, repr=False)

    def __getstate__(self) -> dict:
        return {**vars(self), "taken": False}  # a copy has prompts of its own

    def tensors(self) -> dict[str, Tensor]:
        """The prompts' parameters, named as in the model."""
        return {
            f"{block}.{CHILD}.{name}": p
            for block, prompt in self.prompts.items()
            for name, p in prompt.named_parameters()
        }


class Sets:
    """All sets of one patch.

    Attributes:
        named: name -> set.
        active: the name of the one in use.
        inside: whether a `using` is under way.
        most: how many sets beside it may lie in the model's memory; None: all.
    """

    def __init__(self, patch: Patch):
        _check(patch)
        self.patch = patch
        prompts = {name.removesuffix(f".{CHILD}"): p for name, p in patch.prompts.items()}
        self.named = {FIRST: PromptSet(patch.method, prompts, taken=True)}
        self.active = FIRST
        self.most: int | None = None
        self._recent: list[str] = []  # in the model's memory beside the active; the newest last
        self._shared: dict[str, Tensor] = {}  # the patch's parts, while a set's own are in
        self.mixing: Rows | None = None  # inside of `using`: who sees what
        # a later set may have prompts where this one has none
        patch._undo += [("prompt", block.layer) for _, block, _ in self._blocks()]

    def __getitem__(self, name: str) -> PromptSet:
        if name not in self.named:
            raise ValueError(f"want one of the sets {', '.join(self.named)}; got {name!r}")
        return self.named[name]

    def _blocks(self) -> Iterator[tuple[Tower, Block, SideKeys]]:
        """Those that can have a prompt."""
        for tower in self.patch.anatomy.towers:
            for block in (*tower.blocks, *tower.unread):
                side = vars(block.attention).get(attention.ATTRIBUTE)
                if side is not None:
                    yield tower, block, side

    # ---- in, out ----

    def new(self, method: Method) -> PromptSet:
        """New prompts of a method that is the patch's but for lengths, layers and the like."""
        ours = self.patch.method
        if type(method) is not type(ours):
            raise ValueError(f"want prompts of {type(ours).__name__}, got {method}")
        if (method.trains(), method.shown()) != (ours.trains(), ours.shown()):
            raise ValueError(f"want a set that trains and shows what {ours} does, got {method}")
        for tower in self.patch.anatomy.towers:  # its tokens are counted alike for all sets
            want, got = (each.position_of_first(tower) for each in (ours, method))
            if want != got:
                raise ValueError(f"want positions from {want}, as the patch's; got {method}")
        method.check(self.patch.anatomy)
        towers = [t for t in self.patch.anatomy.towers if method.lengths().get(t.kind)]
        made = new_prompts(method, towers)[0]
        unserved = [*made.keys() - {block.name for _, block, _ in self._blocks()}]
        if unserved:
            raise ValueError(
                f"want no prompt in {unserved[0]}, as the patch has none; got {method}"
            )
        return PromptSet(method, made)

    def check(self, prompts: Any) -> None:
        """Raise a ValueError unless it is a set for this patch's blocks, and none of its own."""
        if not isinstance(prompts, PromptSet):
            raise ValueError(f"want a prompt set, got a {type(prompts).__name__}")
        same = [name for name, each in self.named.items() if each is prompts]
        if same:
            raise ValueError(f"want another set, or a copy (average(it)); got {same[0]!r} itself")
        with torch.random.fork_rng():  # made for their shapes alone
            made = self.new(prompts.method)
        want = {n: list(p.shape) for n, p in made.tensors().items()}
        got = {n: list(p.shape) for n, p in prompts.tensors().items()}
        for name in want.keys() | got.keys():
            if want.get(name) != got.get(name):
                raise ValueError(f"{name}: want {want.get(name)}, got {got.get(name)}")
        if prompts.taken:
            raise ValueError("want another set, or a copy (average(it)); got one of another patch")

    def add(self, name: str, prompts: PromptSet) -> None:
        self.check_new(name)
        for prompt in prompts.prompts.values():
            _rest(prompt)
        for tower, *_ in self._blocks():
            if tower.bias is not None:  # of places before the text, for the longest set
                bias = vars(tower.bias)["compute_bias"]
                bias.rows = max(bias.rows, prompts.method.lengths().get(tower.kind, 0))
        self.named[name] = prompts
        prompts.taken = True
        self._recent.append(name)
        self._page_out()

    def check_new(self, name: Any) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"name: want letters, digits and . _ -, got {name!r}")
        if name in self.named:
            raise ValueError(f"name: {name!r} is there already: patch.drop it first")

    def rename(self, old: str, new: str) -> None:
        self.named = {new if name == old else name: each for name, each in self.named.items()}
        self.active = new if self.active == old else self.active

    def drop(self, name: str) -> None:
        self[name]
        self.patch._check_outside("drop")
        if name == self.active:
            raise ValueError(f"drop: {name!r} is in use: patch.use another one first")
        self.named.pop(name).taken = False
        self._recent = [n for n in self._recent if n != name]

    def release(self) -> None:
        """Let other patches have the sets: this one is no more."""
        for each in self.named.values():
            each.taken = False

    # ---- in use ----

    def use(self, name: str) -> None:
        new, old = self[name], self[self.active]
        self.patch._check_outside("use")
        if new is old:
            return
        self._to_model(new)
        self._hand_over(old, new)
        for prompt in old.prompts.values():
            _rest(prompt)
        parts = [n for n in self.patch._names if CHILD not in n.split(".")]
        replaced = self.patch.replaced
        for tower, block, side in self._blocks():
            side.prompt = prompt = new.prompts.get(block.name)
            block.layer._modules.pop(CHILD, None)
            replaced.pop(block.name, None)
            if prompt is not None:
                block.layer.add_module(CHILD, prompt.train(block.layer.training))
                layer = new.method.blocks(tower).index(block)
                replaced[block.name] = new.method.describe(tower.kind, layer)
        for p in new.tensors().values():
            p.requires_grad_(True)
        self.patch.method = new.method
        self.patch._names = [*parts, *new.tensors()]
        self._recent = [n for n in self._recent if n != name] + [self.active]
        self.active = name
        self._page_out()

    @contextmanager
    def using(
        self, names: str | Sequence[str | None] | None, images: Sequence[int] | None = None
    ) -> Iterator[None]:
        self.patch._check_outside("using")
        if any(tower.outside for tower in self.patch.anatomy.towers):
            raise ValueError(
                f"using: want a model of transformers, got {self.patch.anatomy.family}: use one set"
            )
        alone = names is None or isinstance(names, str)
        rows = [names] if alone else list(names)
        if not rows:
            raise ValueError("using: want a name for each row of the batch, got none")
        chosen = list(dict.fromkeys(rows))
        named = [self[name] for name in chosen if name is not None]
        if len(named) > 1 and any(each.parts is not None for each in named):
            own = next(n for n in chosen if n is not None and self[n].parts is not None)
            raise ValueError(
                f"using: {own!r} came with {', '.join(self[own].parts)} of its own, which rows of "
                "one batch cannot have apart: want it alone, or sets that share the patch's"
            )
        if images is not None and len(images) != len(rows):
            raise ValueError(f"images: want {len(rows)} numbers, one a row; got {list(images)}")
        self._page_in([name for name in chosen if name not in (None, self.active)])
        prompts = [{} if name is None else self[name].prompts for name in chosen]
        which = None if alone else [chosen.index(name) for name in rows]
        with ExitStack() as stack:
            self.mixing = Rows(self.patch.model, self.patch.anatomy, prompts, which, images)
            stack.callback(setattr, self, "mixing", None)
            if named:
                active = self[self.active]
                if active is not named[0]:  # what is the active set's learns from no other's rows
                    for name in {*(active.parts or ()), *(named[0].parts or ())}:
                        p = self._parameter(name)
                        stack.callback(p.requires_grad_, p.requires_grad)
                        p.requires_grad_(False)
                self._hand_over(active, named[0])
                stack.callback(self._hand_over, named[0], active)
            self.mixing.put_on(stack)
            yield

    # ---- parts beside prompts ----

    def parts(self) -> dict[str, nn.Parameter]:
        """What the sets share: a projector or head that trains, and one that was loaded."""
        trained = {n: p for n, p in self.patch.trainable.items() if CHILD not in n.split(".")}
        return trained | {name: self._parameter(name) for name in self.patch.given}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """What the sets share is in the model, and what belongs to the one in use beside it."""
        active = self[self.active]
        if active.parts is not None:
            active.parts = self._exchange(self._shared)
        try:
            yield
        finally:
            if active.parts is not None:
                self._shared = self._exchange(active.parts)

    def _hand_over(self, old: PromptSet, new: PromptSet) -> None:
        """Put the parts that ``new`` goes with in the place of those that ``old`` goes with."""
        if old is new:
            return
        if old.parts is not None:
            old.parts = self._exchange(self._shared)
        if new.parts is not None:
            self._shared = self._exchange(new.parts)

    @torch.no_grad()
    def _exchange(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write values into the model; returns what was there."""
        there = {name: self._parameter(name) for name in values}
        kept = {name: p.detach().to("cpu", copy=True) for name, p in there.items()}
        for name, p in there.items():
            p.copy_(values[name])
        return kept

    def _parameter(self, name: str) -> nn.Parameter:
        return self.patch.model.get_parameter(name)

    def differing(self, parts: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The parts that a set comes with; None: they are the patch's own, `shared`."""
        ours = {name: self._parameter(name).detach().cpu() for name in parts}
        same = all(torch.equal(x.to(ours[n].dtype), ours[n]) for n, x in parts.items())
        return None if same else parts

    # ---- where the others are ----

    def resident(self, max_sets: int | None) -> None:
        if max_sets is not None and (not isinstance(max_sets, int) or max_sets < 0):
            raise ValueError(f"resident: want a number of sets, or None for all; got {max_sets!r}")
        self.patch._check_outside("resident")
        self.most = max_sets
        self._page_out()

    def _to_model(self, prompts: PromptSet) -> None:
        for _, block, _ in self._blocks():
            prompt, device = prompts.prompts.get(block.name), device_of(block.like)
            if prompt is not None and any(p.device != device for p in prompt.parameters()):
                prompt.to(device)

    def _page_in(self, names: list[str]) -> None:
        if self.most is not None and len(names) > self.most:
            raise ValueError(
                f"using: want at most {self.most} sets beside {self.active!r} in one batch, as "
                f"patch.resident says; got {len(names)}"
            )
        for name in names:
            self._to_model(self.named[name])
        self._recent = [n for n in self._recent if n not in names] + names
        self._page_out()

    def _page_out(self) -> None:
        while self.most is not None and len(self._recent) > self.most:
            for prompt in self.named[self._recent.pop(0)].prompts.values():
                prompt.to("cpu").refresh()


def _rest(prompt: BlockPrompt) -> None:
    """It is not in use: nothing drops from it, and it gets no gradient."""
    prompt.eval().requires_grad_(False)


def _check(patch: Patch) -> None:
    """Raises ValueError if there cannot be several sets."""
    if patch.undone or patch.baked:
        what = "was undone" if patch.undone else "is baked"
        raise ValueError(f"prompt sets: want a patch as it was made, got one that {what}")
    if patch.pool is not None or not patch.prompts:
        raise ValueError(f"prompt sets: want prompts that all images share, got {patch.method}")
    method = patch.method
    if method.folded() != method or any(map(method.as_tokens, patch.anatomy.towers)):
        raise ValueError(
            f"prompt sets: want prompts that are rows, keys or values of their blocks, got {method}"
        )
    if method.shown() != "drop":
        raise ValueError(
            "prompt sets: want visual_prompts='drop', or an image's length would be a set's; got "
            f"{method.shown()!r}"
        )
    if any(is_shard(p) for prompt in patch.prompts.values() for p in prompt.parameters()):
        raise ValueError("prompt sets: want whole parameters, got FSDP's shards")
