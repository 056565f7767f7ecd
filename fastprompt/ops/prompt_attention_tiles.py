"""Which tile each kernel of `prompt_attention` takes: a table, or, switched on, a measurement.

A user's first call never waits for a search. ``FASTPROMPT_AUTOTUNE=1`` (or `autotune(True)`) makes
each new (kernel, dtype, head dim, number of queries, card) time every candidate once, for forward,
dq and dk/dv; decoding and the prompts' kernel, whose work is shared out by tile, keep the table's.

Where a row came from stands beside it: (H) measured on an H100, bf16, forward or backward alone
(DESIGN, section 7: what was tried there and what it gave); (C) the largest that compiles for the
smallest card of its kind without spills in a loop (tests/compile_targets.py), not measured.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """What one program of a kernel works on, and with what."""

    queries: int
    keys: int
    warps: int
    stages: int


# kernel: [(head dim up to, queries up to, tile), ...], of which the first that fits is taken
_ANY = 1 << 31
_HOPPER = {  # sm_90 and sm_100: 227 KB of shared memory, wgmma from 64 queries on
    "fwd": [
        (128, 16, Tile(16, 64, 4, 3)),  # (C) decoding: the fewest rows that a product takes
        (64, 256, Tile(128, 32, 4, 3)),  # (H) N 197: 0.123 ms, with 64 queries about the same
        (64, _ANY, Tile(128, 64, 8, 3)),  # (H) N 577
        (128, 1536, Tile(64, 32, 4, 3)),  # (H) N 1024
        (128, _ANY, Tile(64, 64, 4, 2)),  # (H) N 2048
        (256, _ANY, Tile(128, 32, 8, 2)),  # (C)
    ],
    "dq": [
        (64, 256, Tile(128, 64, 8, 3)),  # (H) N 197
        (64, _ANY, Tile(64, 64, 4, 3)),  # (H) N 577
        (128, _ANY, Tile(64, 64, 4, 2)),  # (H) N 1024 and 2048
        (256, _ANY, Tile(32, 32, 4, 2)),  # (C)
    ],
    "dkv": [
        (64, _ANY, Tile(32, 128, 4, 3)),  # (H) N 197 and 577
        (128, _ANY, Tile(64, 64, 4, 2)),  # (H) N 1024 and 2048
        (256, _ANY, Tile(32, 32, 8, 2)),  # (C)
    ],
    "prompts": [  # (C), all
        (64, _ANY, Tile(64, 64, 4, 3)),
        (128, _ANY, Tile(64, 32, 4, 2)),
        (256, _ANY, Tile(32, 32, 8, 2)),
    ],
}
# (C) every other card: the least is sm_86's and sm_89's 99 KB; backward's tiles fit that too
_AMPERE = _HOPPER | {
    "fwd": [
        (128, 16, Tile(16, 64, 4, 3)),
        (64, 256, Tile(128, 32, 4, 3)),
        (64, _ANY, Tile(64, 64, 4, 3)),
        (128, 1536, Tile(64, 32, 4, 3)),
        (128, _ANY, Tile(64, 64, 4, 2)),
        (256, _ANY, Tile(64, 32, 8, 2)),
    ],
}
_FLOAT32 = {  # (C) no tensor cores, so operands and sums alike lie in registers; fits every card
    "fwd": [
        (128, 16, Tile(16, 16, 4, 1)),
        (64, _ANY, Tile(64, 32, 8, 1)),
        (128, _ANY, Tile(32, 32, 8, 1)),
        (256, _ANY, Tile(16, 16, 4, 1)),
    ],
    "dq": [
        (64, _ANY, Tile(32, 16, 4, 1)),
        (256, _ANY, Tile(16, 16, 8, 1)),
    ],
    "dkv": [
        (128, _ANY, Tile(16, 32, 4, 1)),
        (256, _ANY, Tile(16, 16, 4, 1)),
    ],
    "prompts": [
        (128, _ANY, Tile(16, 32, 4, 1)),
        (256, _ANY, Tile(16, 16, 4, 1)),
    ],
}
# the interpreter pays per operation, not per element; several blocks of each kind still occur
_INTERPRETER = {name: [(256, _ANY, Tile(64, 32, 4, 1))] for name in ("fwd", "dq", "dkv", "prompts")}

_CANDIDATES = [
    Tile(queries, keys, warps, stages)
    for queries, keys in ((32, 32), (32, 128), (64, 32), (64, 64), (128, 32), (128, 64), (64, 128))
    for warps in (4, 8)
    for stages in (2, 3)
]
_tuned: dict[tuple, Tile] = {}
_autotune = os.environ.get("FASTPROMPT_AUTOTUNE", "0") not in ("", "0")


def autotune(on: bool = True) -> None:
    """Switch measuring of tiles on or off, for shapes not met before."""
    global _autotune
    _autotune = on


def best_tile(kernel: str, q: Tensor, launch: Callable[[Tile], None] | None = None) -> Tile:
    """The tile for a kernel on ``q`` [B, H, N, d]; with ``launch``, it is run with that tile."""
    tile = _from_table(kernel, q)
    if launch is None:
        return tile
    if _autotune and capability(q.device) and not torch.cuda.is_current_stream_capturing():
        key = (kernel, q.dtype, q.shape[-1], q.shape[2], capability(q.device))
        if key not in _tuned:
            _tuned[key] = _fastest([tile, *_CANDIDATES], launch)
        tile = _tuned[key]
    launch(tile)
    return tile


def _from_table(kernel: str, q: Tensor) -> Tile:
    sm, (N, d) = capability(q.device), q.shape[2:]
    if sm == 0:
        table = _INTERPRETER
    elif q.dtype == torch.float32:
        table = _FLOAT32
    else:
        table = _HOPPER if sm // 10 in (9, 10) else _AMPERE
    return next(tile for dims, rows, tile in table[kernel] if d <= dims and rows >= N)


def _fastest(tiles: list[Tile], launch: Callable[[Tile], None]) -> Tile:
    """The one with the least median time; the first stands for those that do not fit the card."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def time(tile: Tile) -> float:
        try:
            return do_bench(functools.partial(launch, tile), return_mode="median")
        except (OutOfResources, CompilationError):
            return float("inf")

    return min(tiles, key=time)


@functools.cache
def capability(device: torch.device) -> int:
    """90 for sm_90; 0 where Triton's interpreter runs."""
    if device.type == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a few for the interpreter, so that work is shared out too."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
