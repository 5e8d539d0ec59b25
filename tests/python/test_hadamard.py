"""torch.ops.quest.hadamard against the matrix, for every block and dtype."""

from __future__ import annotations

import math

import pytest
import torch

from quest import ops, reference

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((5, 128), None),
        ((3, 384), None),
        ((2, 3, 96), None),
        ((7, 7), None),
        ((1000,), None),
        ((3, 256), 2),
        ((3, 256), 256),
        ((1, 1), 1),
        ((0, 64), None),
        ((33, 2048), 1024),
    ],
)
def test_values(shape: tuple[int, ...], block: int | None, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    y = ops.hadamard(x, block)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    expected = reference.hadamard(x, block)
    # log2(block) <= 10 float32 additions on numbers of at most the block's l2 norm, then one rounding to dtype.
    tolerance = 12 * EPSILON[torch.float32] * x.double().norm() + EPSILON[dtype] * expected.abs()
    assert ((y.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("log_block", range(16))
def test_signs_of_every_block(log_block: int, device: torch.device) -> None:
    """Row i of the identity becomes row i of H: H[i, j] = (-1)^popcount(i & j) / sqrt(n)."""
    n = 2**log_block
    rows = torch.tensor([0, n - 1, n // 3, n // 2])
    x = torch.zeros(4, n)
    x[range(4), rows] = 1
    j = torch.arange(n)
    common = rows[:, None] & j
    parity = sum(common >> bit & 1 for bit in range(15)) % 2
    expected = (1 - 2 * parity) / math.sqrt(n)
    y = ops.hadamard(x.to(device), n).cpu()
    torch.testing.assert_close(y, expected.float(), rtol=1e-6, atol=0)


def test_is_its_own_inverse_and_keeps_norms(device: torch.device) -> None:
    x = torch.randn(6, 4096, device=device)
    for block in (None, 4096):
        y = ops.hadamard(x, block)
        torch.testing.assert_close(ops.hadamard(y, block), x)
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_gradient_is_the_rotation(device: torch.device) -> None:
    x = torch.randn(3, 64, device=device, requires_grad=True)
    g = torch.randn(3, 64, device=device)
    (dx,) = torch.autograd.grad(ops.hadamard(x, 16), x, g)
    assert torch.equal(dx, ops.hadamard(g, 16))


def test_any_strides(device: torch.device) -> None:
    x = torch.randn(64, 6, device=device)
    assert torch.equal(ops.hadamard(x.T), ops.hadamard(x.T.contiguous()))
    padded = torch.randn(5, 65, device=device)
    assert torch.equal(ops.hadamard(padded[:, 1:]), ops.hadamard(padded[:, 1:].contiguous()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_block(bad: float, device: torch.device) -> None:
    x = torch.randn(2, 256, device=device)
    x[0, 3] = bad
    y = ops.hadamard(x)
    assert not y[0, :128].isfinite().any()
    assert y[0, 128:].isfinite().all()
    assert y[1].isfinite().all()
