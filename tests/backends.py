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
