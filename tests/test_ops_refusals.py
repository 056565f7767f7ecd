"""Arguments of another kind than an op takes are refused by name."""

import pytest
import torch

from fastprompt import ops

X, W = torch.randn(2, 3), torch.randn(4, 3)
LABELS = torch.tensor([0, 1])
NAN = float("nan")


def cross_entropy(labels=LABELS, weight=W, **options):
    return ops.linear_cross_entropy(X, weight, labels, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.quantize_rows(X, 2.0), r"factor: want a tensor \[3\], got float"),
        (lambda: ops.rms_norm(X, X[0], "a"), "eps: want a finite number of at least 0, got 'a'"),
        (lambda: ops.layer_norm(X, X[0], None, "a"), "eps: want a finite number"),
        (lambda: ops.rms_norm(X, X[0], -1e-6), "eps: want a finite number"),
        (lambda: cross_entropy([0, 1]), "labels: want a tensor, got list"),
        (lambda: cross_entropy(weight=[1.0]), "weight: want a tensor, got list"),
        (lambda: cross_entropy(bias=[1.0]), "bias: want a tensor, got list"),
        (lambda: cross_entropy(scale=NAN), "scale: want a finite number, got nan"),
        (lambda: cross_entropy(softcap="a"), "softcap: want a finite number, got 'a'"),
        (lambda: cross_entropy(label_smoothing="a"), "label_smoothing: want a finite number"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
