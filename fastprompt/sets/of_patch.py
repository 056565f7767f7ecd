"""What a `Patch` does with many prompt sets on its backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from fastprompt.sets.rows import Rows
from fastprompt.sets.sets import PromptSet, Sets


class WithSets:
    """The base of `Patch`: prompt sets by name, one of them in use."""

    _sets: Sets | None = None  # made when one is asked for

    @property
    def sets(self) -> dict[str, PromptSet]:
        """Name -> prompt set. What `patch` made is "default"."""
        return dict(self._of_sets().named)

    @property
    def several(self) -> bool:
        """Whether there is more than one set."""
        return self._sets is not None and len(self._sets.named) > 1

    @property
    def in_use(self) -> str:
        """The name of the set that forwards have, and that trains."""
        return self._of_sets().active

    @property
    def mixing(self) -> Rows | None:
        """Inside of `using`: which rows have which prompts."""
        return None if self._sets is None else self._sets.mixing

    def add(
        self,
        name: str,
        prompts: PromptSet | None = None,
        *,
        init_from: str | Path | PromptSet | Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> PromptSet:
        """Add a prompt set; the one in use stays in use.

        Args:
            name: letters, digits and ``._-``.
            prompts: a set made of this patch's (`fastprompt.set_algebra`). None: new prompts.
            init_from: what new prompts begin from: see `fastprompt.init_from`.
            options: of the patch's method, where the new prompts' differ: ``text_tokens=20``.

        Returns:
            The set.

        Raises:
            ValueError: a name that is there already, a set that does not fit, options that train or
                show other parts, or a patch that can have one set alone: with a pool, with prompts
                as tokens, or with visual prompts that the projector sees.
        """
        from fastprompt.sets.beginning import init_from as begin

        self._check_outside("add")
        sets = self._of_sets()
        sets.check_new(name)
        if prompts is None:
            try:
                prompts = sets.new(dataclasses.replace(self.method, **options))
            except TypeError as error:
                raise ValueError(f"{type(self.method).__name__}: {error}") from error
        elif options or init_from is not None:
            raise ValueError("add: want prompts, or options or a start of new ones; got both")
        else:
            sets.check(prompts)
        sets.add(name, prompts)
        if init_from is not None:
            try:
                begin(self, init_from, name=name)
            except BaseException:
                sets.drop(name)
                raise
        return prompts

    def use(self, name: str) -> None:
        """Have forwards see this set, and let it train: `trainable`, `save`, `report` are of it.

        The set in use until now is frozen. Make the optimizer, and wrap the model (DDP), after.

        Raises:
            ValueError: no set of this name.
        """
        self._of_sets().use(name)

    def using(
        self, names: str | Sequence[str | None] | None, *, images: Sequence[int] | None = None
    ) -> AbstractContextManager[None]:
        """``with patch.using([...]):`` forwards inside have these sets; `generate` too.

        Args:
            names: one name for each row of the batch; or one for all rows. None is no prompts.
                ``generate`` may repeat rows (beams).
            images: of a vision-language model, how many rows of its vision tower's batch (images,
                or tiles of them) each row of text has. None: they are counted by image tokens,
                where images become equally many of those, or are packed (Qwen-VL).

        Of the sets only the one in use gets gradients; a projector or head that trains and that
        the sets share gets them from all rows. Where a set came with a projector of its own, that
        is in place meanwhile, frozen.

        Raises:
            ValueError: no such set, too many sets for `resident`, two sets with projectors of
                their own; and in the forward a batch of other rows, or images whose row is not
                known.
        """
        return self._of_sets().using(names, images)

    def drop(self, name: str) -> None:
        """Forget a set that is not in use."""
        self._of_sets().drop(name)

    def load(self, name: str, folder: str | Path) -> None:
        """Add a set from a checkpoint of the same method and base model; lengths may differ.

        A projector or head in it that is not the patch's belongs to this set alone, and is in the
        model while the set is in use.

        Raises:
            ValueError: a name that is there already, or what `fastprompt.load` refuses.
        """
        from fastprompt.sets.files import load_set

        self._check_outside("load")
        load_set(self, name, folder)

    def save(self, name: str, folder: str | Path) -> Path:
        """Write a set, in use or not, as `fastprompt.save` writes the one in use."""
        from fastprompt.sets.files import save_set

        self._check_outside("save")
        return save_set(self, name, folder)

    def resident(self, max_sets: int | None) -> None:
        """Keep at most so many sets, the last used, in the model's memory beside the one in use.

        The others wait in the host's memory, and come when `using` names them. None: all stay.
        """
        self._of_sets().resident(max_sets)

    def _check_outside(self, what: str) -> None:
        """Raise a ValueError inside of `using`, where the model has other sets than its own."""
        if self.mixing is not None:
            raise ValueError(f"{what}: want to be outside of `with patch.using`, got inside")

    def _not_of_base(self) -> tuple[str, ...]:
        """Names of frozen parameters that are `given`, or came with the set in use."""
        own = () if self._sets is None else self._sets[self._sets.active].parts or ()
        return tuple(n for n in dict.fromkeys((*self.given, *own)) if n not in self._names)

    def _of_sets(self) -> Sets:
        if self._sets is None:
            self._sets = Sets(self)
        return self._sets
