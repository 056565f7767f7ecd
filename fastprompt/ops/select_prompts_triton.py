"""`select_prompts` in Triton: launches and allocations. Device code: `select_prompts_kernels`.

Two launches. The first ranks: its programs share out queries and keys, and each leaves the k best
of its share; some more of its programs sum the prompts meanwhile, where the rest is wanted and no
``total`` is given. The second merges the shares and writes tokens, indices and scores. A third, of
torch, adds up the partial sums where there are many (more than 4096 keys). No atomics: two runs
agree bit for bit. Beside its results a call holds 8·k bytes a query and share, and 8 a column and
chunk of prompts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops.prompt_attention_tiles import capability, processors
from fastprompt.ops.select_prompts_kernels import gather_kernel, rank_kernel


class Tile(NamedTuple):
    """What one program of the first kernel works on at a time, and with what."""

    queries: int
    keys: int
    channels: int
    warps: int
    stages: int


# (queries up to, keys up to, tile), of which the first that fits is taken. Not measured: few keys
# take small tiles, that many programs share them; many keys are read for as many queries as leave
# room for two programs a processor, of which one ranks while the other multiplies. All compile for
# the smallest card of their kind without spills in a loop (tests/compile_select_targets.py).
_ANY = 1 << 31
_HALF = [
    (64, 4096, Tile(16, 64, 64, 4, 4)),
    (512, 4096, Tile(32, 64, 64, 4, 4)),
    (_ANY, 4096, Tile(64, 64, 64, 4, 4)),
    (16, _ANY, Tile(16, 128, 64, 4, 4)),
    (_ANY, _ANY, Tile(64, 128, 64, 4, 3)),
]
_FLOAT32 = [  # no tensor cores, so operands and sums alike lie in registers
    (64, _ANY, Tile(16, 64, 16, 4, 2)),
    (_ANY, _ANY, Tile(64, 64, 16, 8, 2)),
]
_INTERPRETER = [(_ANY, _ANY, Tile(32, 64, 64, 4, 1))]  # several blocks of each kind still occur

_MOST_RANKS = 4096  # of one query, which a program of the second kernel holds in registers
_MOST_CHUNKS = 8  # partial sums that every program of the second kernel adds up by itself
_CHUNK = 512  # prompts, or more, to a partial sum
_SUM_E = 64  # channels of a partial sum
_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def forward(
    query: Tensor,
    keys: Tensor,
    prompts: Tensor,
    k: int,
    rest: bool,
    key_scale: Tensor | None,
    total: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [B, k + rest, ...], indices [B, k], scores [B, k]); see `ops.select_prompts`."""
    B, C = len(query), len(keys)
    tokens = prompts.new_empty(B, k + rest, *prompts.shape[1:])
    indices = query.new_empty(B, k, dtype=torch.int64)
    scores = query.new_empty(B, k, dtype=torch.float32)
    L, E, stride_c, stride_r = rows = _rows(prompts)
    sums, chunks = None, 0
    with torch.cuda.device_of(query):
        if rest and total is not None:
            sums, chunks = total.contiguous(), 1
        elif rest:
            chunks = _chunks(C, L * triton.cdiv(E, _SUM_E), query.device)
            sums = query.new_empty(chunks, L * E, dtype=torch.float64)
        ranks = _rank(query, keys, prompts, k, key_scale, sums if total is None else None, rows)
        if chunks > _MOST_CHUNKS:
            sums, chunks = sums.sum(0), 1

        slots, splits = triton.next_power_of_2(k), ranks.shape[1]
        block = max(16, min(4096 // slots, 1024, triton.next_power_of_2(E)))
        blocks = L * triton.cdiv(E, block)
        parts = max(1, min(2 * processors(query.device) // B, blocks))
        gather_kernel[(B * parts,)](
            ranks, prompts, sums,
            tokens, indices, scores,
            C, k, splits, parts, L, chunks, E, stride_c, stride_r,
            SLOTS=slots, BLOCK_N=triton.next_power_of_2(splits * k), BLOCK_E=block, num_warps=4,
        )  # fmt: skip
    return tokens, indices, scores


def _rank(query, keys, prompts, k, key_scale, sums, rows) -> Tensor:
    """[B, splits, k] int64; fills ``sums`` [chunks, L * E] on the way, if given."""
    (B, D), C = query.shape, len(keys)
    L, E, stride_c, stride_r = rows
    dtype = _product_dtype(query, keys)
    # loads of single elements take many registers
    odd = any(n % 16 for n in (D, query.stride(0), keys.stride(0)))
    tile = _tile(B, C, k, dtype, odd, query.device)
    blocks, tiles = triton.cdiv(B, tile.queries), triton.cdiv(C, tile.keys)
    # about two programs a processor
    splits = min(2 * processors(query.device) // blocks, _MOST_RANKS // k, tiles)
    each = triton.cdiv(tiles, max(1, splits))
    splits = triton.cdiv(tiles, each)  # so that none is left without a key
    ranks = query.new_empty(B, splits, k, dtype=torch.int64)
    chunks = 0 if sums is None else len(sums)
    rank_kernel[(blocks * splits + chunks * L * triton.cdiv(E, _SUM_E),)](
        query, keys, key_scale, prompts,
        ranks, sums,
        B, C, k, each * tile.keys, splits, L, chunks, D, E,
        query.stride(0), keys.stride(0), 0 if key_scale is None else key_scale.stride(0),
        stride_c, stride_r,
        DOT=_TRITON[dtype], SLOTS=triton.next_power_of_2(k),
        BLOCK_B=tile.queries, BLOCK_C=tile.keys, BLOCK_D=tile.channels,
        SUM_C=128 // prompts.element_size(), SUM_E=_SUM_E,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return ranks


def _tile(B: int, C: int, k: int, dtype: torch.dtype, odd: bool, device: torch.device) -> Tile:
    table = _FLOAT32 if dtype == torch.float32 else _HALF
    if capability(device) == 0:
        table = _INTERPRETER
    tile = next(tile for queries, keys, tile in table if queries >= B and keys >= C)
    if odd:
        return tile._replace(keys=64, warps=8)
    return tile if k <= 32 else tile._replace(warps=8)


def _product_dtype(query: Tensor, keys: Tensor) -> torch.dtype:
    """What both are cast to, without loss: every int8 is a number of every float type."""
    same = keys.dtype in (query.dtype, torch.int8)
    return query.dtype if same else torch.float32


def _rows(prompts: Tensor) -> tuple[int, int, int, int]:
    """(L, E, strides of class and row) of [C, L, E]; one long row where those of a class adjoin."""
    if prompts.ndim == 2:
        return 1, prompts.shape[1], prompts.stride(0), 0
    (_, L, E), (of_class, of_row, _) = prompts.shape, prompts.stride()
    return (1, L * E, of_class, 0) if L == 1 or of_row == E else (L, E, of_class, of_row)


def _chunks(C: int, columns: int, device: torch.device) -> int:
    """Partial sums of a column: as many as give every processor a program, each not too short."""
    return max(1, min(triton.cdiv(C, _CHUNK), processors(device) // max(1, columns)))
