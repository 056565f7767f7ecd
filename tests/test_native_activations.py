"""csrc's activations over all numbers, on every instruction set that this machine runs."""

import math

import pytest
import torch

from fastprompt import native
from fastprompt.native_elementwise import activate, activate_backward
from fastprompt.ops.gelu import KINDS

every_variant = pytest.mark.parametrize("variant", native.variants())


def true(kind, x):
    """An activation and its slope in float64, to the last digit far out, too."""
    x = x.double()
    normal = torch.special.erfc(x * -(0.5**0.5)) / 2
    inner, slope = {
        "silu": (x, 1),
        "quick": (1.702 * x, 1.702),
        "tanh": ((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3), None),
        "none": (x, None),
    }[kind]
    if kind == "tanh":
        slope = (8 / math.pi) ** 0.5 * (1 + 3 * 0.044715 * x**2)
    if kind == "none":
        bell = (-0.5 * x * x).exp() / (2 * math.pi) ** 0.5
        return x * normal, normal + x * bell
    share = inner.sigmoid()
    pulled = share * (-inner).sigmoid()
    return x * share, share + torch.where(pulled > 0, x * slope * pulled, 0)


@pytest.mark.parametrize("kind", ["silu", "none", "tanh", "quick"])
@every_variant
def test_every_bfloat16_number(variant, kind):
    """Rounded as the true value is, or to its neighbour; the slope near what it is made of."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(torch.bfloat16)
    wide = x.float()
    y, dx = torch.empty_like(wide), torch.empty_like(wide)
    name = kind if kind == "silu" else KINDS[kind]
    activate(wide, None, name, y, variant)
    activate_backward(torch.ones_like(wide), wide, None, name, dx, None, variant)
    assert torch.equal(y.isnan(), wide.isnan()) and dx[wide.isnan()].isnan().all()
    fine = wide.isfinite()
    value, slope = true(kind, wide[fine])
    # a share ends at the least normal float; exponents carry the error of their argument
    least = 2e-37 * wide[fine].abs()
    assert ((y[fine] - value).abs() <= 2e-5 * value.abs() + least).all()
    near = wide[fine].abs() < 4
    assert ((y[fine] - value).abs()[near] <= 2e-6 * value.abs()[near] + least[near]).all()
    assert ((dx[fine] - slope).abs() <= 5e-7).all()
    half = torch.full_like(x, torch.nan)
    activate(x, None, name, half, variant)
    error = (half.double()[fine] - value).abs()
    assert (error <= 2**-8 * 1.01 * value.abs() + least + 1e-40).all()


@every_variant
def test_the_normal_distribution(variant):
    """Against erf, on the whole of its range: to float32's last digits, as a share of 1."""
    x = torch.linspace(-13.5, 13.5, 200_001)
    y = torch.empty_like(x)
    activate(x, None, "gelu", y, variant)
    want = (1 + torch.erf(x.double() / 2**0.5)) / 2
    far = x.abs() > 1e-3
    assert ((y[far] / x[far]) - want[far]).abs().max() < 2.5e-7
