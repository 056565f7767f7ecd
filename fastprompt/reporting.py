"""`Patch.report()`, as text and as a table."""

from __future__ import annotations

import html
from collections import Counter
from typing import TYPE_CHECKING

import torch

from fastprompt import adapters, linear4bit, native, native_cuda, placement
from fastprompt.blocks.fp8 import why_not
from fastprompt.ops import nf4_linear_cuda
from fastprompt.ops.prompt_attention import chosen_backend
from fastprompt.share import count, is_4bit, numel, share_of

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from fastprompt.patching import Patch


class Report(str):
    """Text; what rich prints is a table of it."""

    def __rich__(self) -> Table | Text:
        from rich.table import Table
        from rich.text import Text

        title, *sections = self.split("\n\n")
        if not sections:
            return Text(self)
        table = Table(title=Text(title), show_header=False, title_justify="left")
        for section in sections:
            head, *rows = section.split("\n")
            table.add_section()
            for i, row in enumerate([head, *rows]):
                # two spaces end a cell
                first, _, rest = row.strip().partition("  ")
                cells = (first, "", rest) if i == 0 else ("", first, rest)
                table.add_row(*(Text(cell.strip()) for cell in cells))
        return table

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self)}</pre>"


def report(patch: Patch) -> Report:
    """One screen: the towers, what trains, what is frozen and how, what was skipped."""
    model, lengths = patch.model, patch.method.lengths()
    if patch.undone:
        return Report(f"fastprompt: undone ({patch.method} on {type(model).__name__})")
    lines = [f"fastprompt: {patch.method} on {type(model).__name__}", "", "towers"]
    for tower in patch.anatomy.towers:
        rows, depth = lengths.get(tower.kind, 0), len(tower.blocks) + len(tower.unread)
        found = (patch.replaced.get(block.name) for block in (*tower.blocks, *tower.unread))
        kinds = Counter(what for what in found if what)
        what = ", ".join(f"{kind.removesuffix(' as side keys')} × {n}" for kind, n in kinds.items())
        what = f"{what} of {depth} blocks" if rows else "no prompts"
        lines.append(f"  {tower.kind:<8}{tower.family:<9} {what}  ({tower.name or 'the model'})")
        dropout = tower.blocks[0].dropout if tower.blocks else 0.0
        if rows and dropout:
            lines.append(
                f"  attention dropout {dropout}: in training, keys are concatenated for SDPA"
            )

    lines += _sets(patch)
    trained = {name: p.numel() for name, p in patch.trainable.items()}
    prompts = sum(count(prompt) for prompt in patch.prompts.values())
    total = count(model)
    lines += ["", f"trains  {sum(trained.values()):,} of {total:,} parameters ({share_of(patch)})"]
    lines.append(f"  prompts  {prompts:,}")
    for name, what in patch.replaced.items():
        size = sum(n for key, n in trained.items() if key.startswith(f"{name}."))
        if "trains" in what:
            lines.append(f"  {name}  {size:,}  ({what})")

    others = model.named_parameters() if adapters.configs(model) else ()
    others = sum(p.numel() for n, p in others if p.requires_grad and n not in trained)
    if others:
        lines.append(f"  adapters  {others:,}  (PEFT's {adapters.kinds(model)}, which saves them)")

    # PEFT's wrapper shows its base layer's weight as its own
    four_bit = [*{id(m.weight): m for m in model.modules() if is_4bit(m)}.values()]
    lines += ["", f"frozen  {total - sum(trained.values()) - others:,} parameters"]
    if four_bit:
        lines[-1] += f", {sum(map(numel, four_bit)):,} of them in 4-bit ({len(four_bit)} layers)"
        experts = sum(p.numel() for p in model.parameters() if p.ndim == 3 and not p.requires_grad)
        if experts:  # matrices stacked into one parameter, which bitsandbytes' loader passes over
            lines.append(f"  experts  {experts:,} parameters, dense: the loader leaves them")
        how = f"decoded by csrc ({native.isa()})" if native.available() else "decoded by torch"
        lines.append(
            f"  on the CPU  {how}" + ("" if native.available() else f": {native.why_missing()}")
        )
        lines += _on_gpus({m.weight.device for m in four_bit})
    lines += ["", *_blocks(patch)]
    if hasattr(model, "lm_head"):
        lines.append(_loss(patch))
    lines += ["", f"attention backend  {_backend(patch)}"]
    if patch.skipped:
        lines += ["", "skipped", *(f"  {name}: {why}" for name, why in patch.skipped.items())]
    return Report("\n".join(lines))


def _sets(patch: Patch) -> list[str]:
    """One line for each prompt set, where there are several."""
    if not patch.several:
        return []
    lines = ["", f"prompt sets  {len(patch.sets)}, {patch.in_use} in use"]
    for name, each in patch.sets.items():
        rows = ", ".join(f"{n} {kind}" for kind, n in each.method.lengths().items() if n)
        names = each.parts or ()  # trained ones, or a frozen projector that was loaded
        places = patch.anatomy.parts.items()
        parts = [kind for kind, at in places if any(name.startswith(f"{at}.") for name in names)]
        own = f", {' and '.join(parts)} of its own" if parts else ""
        lines.append(f"  {name}  {rows} rows{own}")
    return lines


def _blocks(patch: Patch) -> list[str]:
    """How many blocks run as one autograd node, what they keep, and why others do not."""
    if patch.memory == "off":
        return ["blocks  transformers' own (memory='off')"]
    if not patch.memories:
        return ["blocks  transformers' own: no tower has prompts"]
    blocks, reasons = patch.blocks, dict(patch.unfused)
    taken = (tower for tower in patch.anatomy.towers if tower.name in patch.memories)
    for name in (block.name for tower in taken for block in tower.blocks):
        if name not in blocks:  # wrapped after the patch, where nothing of ours is found any more
            reasons.setdefault(name, "its forward was replaced")
    reasons |= {name: why for name, block in blocks.items() if (why := block.why_not())}
    count = len(blocks.keys() - reasons.keys())
    lines = [f"blocks  {count} of {len(blocks.keys() | reasons.keys())} as one autograd node"]
    for name, memory in patch.memories.items():
        own = [b for b in blocks.values() if b.memory is memory]
        if any(b.checkpointed for b in own):
            lines.append(f"  memory  low, by gradient checkpointing  ({name or 'the model'})")
        elif own:
            lines.append(f"  memory  {memory.describe()}  ({name or 'the model'})")
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons.items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"  unfused  {names[0]}{more}: {why}")
    return lines + (_products(patch) if patch.compute == "fp8" else [])


def _products(patch: Patch) -> list[str]:
    """How many of the blocks' products run in fp8, and why others do not."""
    names = {module: name for name, module in patch.model.named_modules()}
    by_reason: dict[str | None, list[str]] = {}
    for block in patch.blocks.values():
        # before its first forward as its norm has it, which autocast may yet change
        dtype, unless = block.dtype, ""
        if dtype is None:
            dtype, unless = block.parts.norm1.weight.dtype, " unless autocast is bfloat16"
        other = f"the block computes in {dtype}{unless}, fp8 wants torch.bfloat16"
        late = other if dtype != torch.bfloat16 else block.why_not()
        for group in block.parts.groups:
            found = by_reason.setdefault(late or why_not(group), [])
            found += [names[part] for part in group]
    total, done = sum(map(len, by_reason.values())), by_reason.pop(None, [])
    emulated = " (emulated on the CPU, in float32)" if patch.model.device.type == "cpu" else ""
    # a forward without gradients runs the layers' own
    lines = [f"  products  {len(done)} of {total} in fp8{emulated}, in training"]
    for why, found in by_reason.items():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        lines.append(f"  not in fp8  {found[0]}{more}: {why}")
    return lines


def _loss(patch: Patch) -> str:
    why = patch.loss if isinstance(patch.loss, str) else patch.loss.why_not()
    if why:
        return f"loss  transformers' own, of all logits: {why}"
    return "loss  at label positions alone; in training logits are None"


def _backend(patch: Patch) -> str:
    if patch.backend != "auto":
        return patch.backend
    tower = patch.anatomy.towers[0]
    norm = next(block.like for block in (*tower.blocks, *tower.unread))
    like = torch.empty(0, dtype=norm.weight.dtype, device=placement.device_of(norm))
    chosen = chosen_backend(like)
    rest = (
        "; what that does not take goes to vendor: float16, float16 masks, additive masks beside "
        "soft-capping, a single query with a 4-D mask, biased prompts, packed sequences "
        "(cu_seqlens), fewer heads than threads"
    )
    return f"auto: {chosen} (on {like.device.type})" + rest * (chosen == "native")


def _on_gpus(devices: set[torch.device]) -> list[str]:
    """What multiplies few tokens with 4-bit weights there."""
    lines = []
    for device in sorted((d for d in devices if d.type == "cuda"), key=str):
        why = nf4_linear_cuda.why_not(device)
        off = f"({native_cuda.OFF} turns it off)"
        how = (
            f"{linear4bit.FEW[0]} to {linear4bit.FEW[-1]} tokens are multiplied by csrc/cuda {off}"
        )
        lines.append(f"  on {device}  " + (f"csrc/cuda is not used: {why}" if why else how))
    return lines
