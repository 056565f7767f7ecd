"""Bytes and FLOPs of one program of each kernel of `prompt_attention`, counted, not measured.

    python -m benchmarks.programs [--json FILE]

The tiles are those that the table gives for an H100 (sm_90) in 16 bits, and the shares of the
prompts' gradients those that its 132 processors take. A program is a whole block; under causality,
the average one. Registers, spills and shared memory are the compiler's to say: compile_targets.
"""

import argparse
from math import ceil
from typing import NamedTuple
from unittest.mock import patch

import torch

from benchmarks import report, shapes
from fastprompt.ops import prompt_attention_tiles as tiles
from fastprompt.ops import prompt_attention_triton as launcher
from fastprompt.ops.options import Options

SM, PROCESSORS, ITEM = 90, 132, 2  # card; bytes of a number


class Program(NamedTuple):
    kernel: str
    tile: tiles.Tile
    programs: int  # in the grid
    moved: int  # bytes read and written by one
    flops: int


def programs(s: shapes.Attention) -> list[Program]:
    """Of forward and of backward with all gradients; s without a cache."""
    q = torch.empty(s.B, s.H, s.N, s.d, dtype=torch.bfloat16, device="meta")
    prompt_k = torch.empty(s.Hkv, s.P, s.d, dtype=torch.bfloat16, device="meta")
    o = Options(s.causal, s.d**-0.5)
    with (
        patch.object(tiles, "capability", lambda device: SM),
        patch.object(launcher, "processors", lambda device: PROCESSORS),
    ):
        tile = {name: tiles.best_tile(name, q) for name in ("fwd", "dq", "dkv", "prompts")}
        splits, _, per_split, *_ = launcher._shares(o, q, prompt_k, 1, tile["prompts"], True)
    groups, seen = s.H // s.Hkv, (s.N + 1) / 2 if s.causal else s.N

    def of(kernel, count, rows, numbers, flops):
        """rows of d numbers, single float32 numbers, and FLOPs a channel."""
        moved = round(rows * s.d * ITEM + numbers * 4)
        return Program(kernel, tile[kernel], round(count), moved, round(flops * s.d))

    Q, K = tile["fwd"].queries, seen + s.P
    found = [of("fwd", ceil(s.N / Q) * s.B * s.H, 2 * Q + 2 * K, Q, 4 * Q * K)]
    Q = tile["dq"].queries
    found.append(of("dq", ceil(s.N / Q) * s.B * s.H, 4 * Q + 2 * K, 2 * Q, 6 * Q * K))
    K, Q = tile["dkv"].keys, seen * groups
    found.append(of("dkv", ceil(s.N / K) * s.B * s.Hkv, 4 * K + 2 * Q, 2 * Q, 8 * K * Q))
    # few prompts take a narrower block than tokens do
    block = max(16, min(tile["prompts"].keys, 1 << (s.P - 1).bit_length()))
    tile["prompts"] = tile["prompts"]._replace(keys=block)
    Q, written = per_split * tile["prompts"].queries, 2 * block * s.d
    count = ceil(s.P / block) * s.Hkv * splits
    numbers = 2 * Q + (written if splits > 1 else written * ITEM / 4)
    found.append(of("prompts", count, 2 * block + 2 * Q, numbers, 8 * block * Q))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.programs", description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    rows = []
    print("| shape | kernel | tile | programs | MB moved | MFLOP |\n|---|---|---|---|---|---|")
    for model, s in shapes.attention("cuda", quick=False).items():
        for p in programs(s):
            rows.append(
                dict(model=model, shape=str(s), **p._asdict() | dict(tile=p.tile._asdict()))
            )
            if s.P in (10, 20, 50) and " P" not in model:
                tile = f"{p.tile.queries}×{p.tile.keys}, {p.tile.warps} warps"
                print(
                    f"| {model} | {p.kernel} | {tile} | {p.programs:,} | {p.moved / 1e6:.2f} "
                    f"| {p.flops / 1e6:.0f} |"
                )
    if given.json:
        command = f"python -m benchmarks.programs --json {given.json}"
        env = report.environment("cpu", None, command) | dict(device="predicted for an H100")
        report.write_json(given.json, env, rows)


if __name__ == "__main__":
    main()
