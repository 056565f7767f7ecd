"""Which backends the ops of frozen blocks have here, and on which dtypes."""

import itertools

import pytest
import torch

from fastprompt import native

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["plain", "triton"] + ["native"] * (not CUDA and native.available())  # it is the CPU's
# Triton's interpreter is wrong on bfloat16, csrc has no float16
NONE = [] if CUDA else [("triton", torch.bfloat16), ("native", torch.float16)]


def both(backends: list[str]) -> tuple[pytest.MarkDecorator, pytest.MarkDecorator]:
    """Marks of a test that runs on every pair of a backend and a dtype, or on every backend."""
    pairs = [pair for pair in itertools.product(backends, DTYPES) if pair not in NONE]
    names = [f"{backend}-{str(dtype)[6:]}" for backend, dtype in pairs]
    return (
        pytest.mark.parametrize(("backend", "dtype"), pairs, ids=names),
        pytest.mark.parametrize("backend", backends),
    )


every_pair, every_backend = both(BACKENDS)
every_pair_but_native, every_backend_but_native = both(["plain", "triton"])
