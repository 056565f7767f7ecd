"""The least time a device needs, from bytes and FLOPs; for devices that we measured only."""

import torch

RATES = {  # part of the device's name: copy in bytes/s, 16-bit matrix product in FLOP/s, measured
    "H100": (3.03e12, 775e12),
}


def floor_ms(bytes_moved: int, flops: int, dtype: torch.dtype, device: str) -> float | None:
    """Milliseconds, or None on a device or in a dtype that we have no rates of."""
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    card = next((part for part in RATES if part in torch.cuda.get_device_name()), None)
    return None if card is None else predicted_ms(bytes_moved, flops, card)


def predicted_ms(bytes_moved: int, flops: int, card: str) -> float:
    copy, product = RATES[card]
    return 1e3 * max(bytes_moved / copy, flops / product)
