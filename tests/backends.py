"""Which backends the ops of frozen blocks have here, and on which dtypes."""

import itertools

import pytest
import torch

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter is wrong on bfloat16
PAIRS = [
    pair
    for pair in itertools.product(["plain", "triton"], DTYPES)
    if CUDA or pair != ("triton", torch.bfloat16)
]
every_pair = pytest.mark.parametrize(
    ("backend", "dtype"), PAIRS, ids=[f"{backend}-{str(dtype)[6:]}" for backend, dtype in PAIRS]
)
every_backend = pytest.mark.parametrize("backend", ["plain", "triton"])


def saved_bytes(run) -> int:
    """What autograd keeps of `run()`, each storage once."""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = run()  # alive until here: a storage that is freed could be met again
    del result
    return sum(kept.values())
