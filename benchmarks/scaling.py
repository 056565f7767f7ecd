"""M²PT on many cards, by arithmetic: what a step sends, and what it needs to be fed. Computed.

    python -m benchmarks.scaling

DDP sends the gradients of what trains, float32, by a ring all-reduce: 2 (n - 1) / n times their
bytes out of each card. FSDP2, as `fastprompt train --shard` has it (`fastprompt.train.sharding`),
leaves what trains to DDP, and gathers each block's 4-bit weights for forward and again for
backward: 2 (n - 1) / n times their bytes out of each card, and into it. Nothing overlaps here, so
the share of a step is the worst. The step's time is the bar of the design for an H100 (7B, 1,024
tokens a row), not a measurement.
"""

import sys
from dataclasses import dataclass, replace

from benchmarks.card_bytes import OURS, Card
from benchmarks.llava import LANGUAGE, Tuning

LINKS = {  # bytes a second out of a card that a ring gets
    "NVLink 4": 350e9,
    "PCIe 4.0 x16": 22e9,
    "one 100 Gb/s port a card": 11e9,
    "one 100 Gb/s port for 8 cards": 11e9 / 8,
}
LAST = 4096 * 4096 + 4096  # numbers in the second layer of a 7B LLaVA's projector
BATCH, STEP = 4, 0.210  # rows a card, seconds: the design's bar, all kept
IMAGE_SECONDS = 6.5e-3  # of one core: decode a 640 x 480 JPEG (1.9 ms), to 336 x 336 (4.6 ms)


@dataclass(frozen=True)
class Traffic:
    """Bytes out of each of ``cards`` cards in a step, and into it."""

    trained: int  # numbers
    split: int  # bytes of the blocks' 4-bit weights
    cards: int

    @property
    def ddp(self) -> float:
        return 2 * (self.cards - 1) / self.cards * 4 * self.trained

    @property
    def fsdp(self) -> float:
        return self.ddp + 2 * (self.cards - 1) / self.cards * self.split


def traffic(model: str, cards: int) -> Traffic:
    card = Card(Tuning(BATCH, LANGUAGE[model]), OURS)
    return Traffic(card.trained, card.split, cards)


def main() -> int:
    print("| cards | way | sent a card and step | " + " | ".join(LINKS) + " |")
    print("|" + "---|" * (3 + len(LINKS)))
    for cards in (8, 64):
        sent = traffic("7B", cards)
        linear = replace(sent, trained=sent.trained - LAST)
        ways = {"DDP": sent.ddp, "DDP, linear projector": linear.ddp, "FSDP2": sent.fsdp}
        for way, n in ways.items():
            shares = (f"{1e3 * n / rate:.1f} ms, {n / rate / STEP:.1%}" for rate in LINKS.values())
            print(f"| {cards} | {way} | {n / 1e6:,.0f} MB | {' | '.join(shares)} |")
    for cards in (8, 64):
        rows = cards * BATCH / STEP
        print(
            f"{cards} cards: {rows:,.0f} rows a second, {rows * IMAGE_SECONDS:.1f} cores for images"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
