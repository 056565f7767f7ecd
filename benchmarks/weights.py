"""NF4 weights as bitsandbytes makes them, for benchmarks of what reads them."""

from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import Tensor

from benchmarks.registry import NotMeasured


def bitsandbytes() -> ModuleType:
    """`bitsandbytes.functional`.

    Raises:
        NotMeasured: it is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise NotMeasured("bitsandbytes, which makes the weights, is not installed")
    import bitsandbytes.functional  # not at the top: GPU machines do without it

    return bitsandbytes.functional


def nf4(dense: Tensor, nested: bool = True) -> tuple[Tensor, Any]:
    """``dense`` [out, in] in blocks of 64: (packed, its QuantState). Raises as `bitsandbytes`."""
    return bitsandbytes().quantize_4bit(dense, quant_type="nf4", compress_statistics=nested)
