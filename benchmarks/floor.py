"""The least time a device needs, from bytes and FLOPs; for devices that we measured only."""

import torch

RATES = {  # part of the device's name: copy in bytes/s, 16-bit matrix product in FLOP/s, measured
    "H100": (3.03e12, 775e12),
}


def floor_ms(
    bytes_moved: int, flops: int, dtype: torch.dtype, device: str, in_turn: bool = False
) -> float | None:
    """Milliseconds, or None on a device or in a dtype that we have no rates of."""
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    card = next((part for part in RATES if part in torch.cuda.get_device_name()), None)
    return None if card is None else predicted_ms(bytes_moved, flops, card, in_turn)


def predicted_ms(bytes_moved: int, flops: int, card: str, in_turn: bool = False) -> float:
    copy, product = RATES[card]
    times = bytes_moved / copy, flops / product
    return 1e3 * (sum(times) if in_turn else max(times))
