"""The definition itself: the constants it rests on, and examples small enough to check by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quest import Quantizer, reference

MEAN_SQUARED_ERROR = {1: 0.36338, 2: 0.11885, 3: 0.03744, 4: 0.011543, 8: 8.782e-5}


def normal_error(levels: Tensor) -> float:
    """E (x - nearest level)^2 for x of N(0,1), in closed form: over a cell (a, b) with level l it is the integral of
    (x - l)^2 phi = [Phi - x phi + 2 l phi + l^2 Phi] from a to b."""
    edges = torch.cat([torch.tensor([-40.0]), (levels[1:] + levels[:-1]) / 2, torch.tensor([40.0])]).double()
    phi = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    upper, lower = slice(1, None), slice(None, -1)

    def antiderivative(side: slice) -> Tensor:
        x, density = edges[side], phi[side]
        return (1 + levels.square()) * torch.special.ndtr(x) - x * density + 2 * levels * density

    return float((antiderivative(upper) - antiderivative(lower)).sum())


def int_error(bits: int, alpha: float) -> float:
    return normal_error(torch.linspace(-alpha, alpha, 2**bits, dtype=torch.float64))


@pytest.mark.parametrize("bits", range(1, 9))
def test_alpha_minimises_the_error(bits: int) -> None:
    """No other clipping point is better by more than this share of the error."""
    alpha = reference.ALPHA[bits]
    excess = {7: 2e-4, 8: 2e-3}.get(bits, 1e-5)
    best = min(int_error(bits, alpha * float(factor)) for factor in torch.linspace(0.9, 1.1, 2001))
    assert best <= int_error(bits, alpha) <= best * (1 + excess)
    if bits in MEAN_SQUARED_ERROR:
        assert int_error(bits, alpha) == pytest.approx(MEAN_SQUARED_ERROR[bits], rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gauss_levels_beat_the_int_grid(bits: int) -> None:
    levels = reference.gauss_levels(bits)
    assert normal_error(levels) < int_error(bits, reference.ALPHA[bits])
    torch.testing.assert_close(levels, -levels.flip(0))


@pytest.mark.parametrize("grid", ["fp4", "ternary"])
def test_scales_minimise_the_error(grid: str) -> None:
    q = Quantizer(grid=grid, bits=4 if grid == "fp4" else 2)
    levels = reference.levels(q).unique() * reference.row_scale(q, torch.ones((), dtype=torch.float64))
    # The constants have their published digits, and the error is flat at its minimum.
    assert normal_error(levels * 0.999) > normal_error(levels) < normal_error(levels * 1.001)


@pytest.mark.parametrize("n", [1, 2, 16, 128])
def test_hadamard_is_orthogonal_and_symmetric(n: int) -> None:
    h = reference.hadamard_matrix(n)
    torch.testing.assert_close(h @ h.T, torch.eye(n, dtype=torch.float64))
    assert torch.equal(h, h.T)


def test_hadamard_blocks() -> None:
    assert [reference.default_block(k) for k in (128, 384, 96, 6, 7, 1000)] == [128, 128, 32, 2, 1, 8]
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    expected = torch.tensor([3.0, -1.0, 7.0, -1.0, 11.0, -1.0], dtype=torch.float64) / math.sqrt(2)
    torch.testing.assert_close(reference.hadamard(x), expected)


def test_int_grid_by_hand() -> None:
    """sigma = 1: the 2-bit grid has the levels -3s, -s, s, 3s with 3s = alpha; zero takes the level below it."""
    x = torch.tensor([[1.0, -1.0, math.sqrt(2), 0.0]])
    quantized = reference.quantize(x, Quantizer(bits=2, rotation="none"))
    assert quantized.codes.tolist() == [[3, 0, 3, 1]]
    assert quantized.values.tolist() == [[3, -3, 3, -1]]
    torch.testing.assert_close(quantized.scale, torch.tensor([reference.ALPHA[2] / 3], dtype=torch.float64))
    assert quantized.mask.all()


def test_trust_masks_what_lies_more_than_half_a_step_outside() -> None:
    x = torch.zeros(1, 64)
    x[0, 0] = 8.0  # sigma = 1
    limit = reference.ALPHA[4] * 16 / 15
    x[0, 1:3] = torch.tensor([limit * 0.9, 0.0])
    quantized = reference.quantize(x, Quantizer(rotation="none"))
    assert quantized.mask.tolist() == [[False] + [True] * 63]


def test_zero_row() -> None:
    """Passes its gradient, and stays (nearly) zero on every grid."""
    for text in ("int1-none-trust", "int4-hadamard-trust", "int_zero4-none-trust", "fp4-none-clip", "gauss2-none-clip"):
        quantized = reference.quantize(torch.zeros(1, 16), Quantizer.parse(text))
        assert quantized.mask.all()
        assert quantized.x_hat.abs().max() <= 1e-8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_nan_and_passes_nothing(bad: float) -> None:
    x = torch.randn(3, 16)
    x[1, 5] = bad
    x.requires_grad_()
    q = Quantizer.parse("int4-hadamard-trust")
    quantized = reference.quantize(x, q)
    assert quantized.scale.isnan().tolist() == [False, True, False]
    assert not quantized.codes[1].any()
    assert not quantized.mask[1].any()
    x_hat = reference.fake_quantize(x, q)
    assert x_hat[1].isnan().all()
    assert x_hat[[0, 2]].isfinite().all()
    x_hat.sum().backward()
    assert x.grad is not None
    assert not x.grad[1].any()


def test_four_eight_keeps_the_larger_pairs_and_the_earlier_of_equals() -> None:
    x = torch.tensor([[3.0, 0.0, 1.0, 1.0, 0.0, 3.0, 3.0, 0.0]])
    assert reference.kept(x).tolist() == [[True, True, False, False, True, True, False, False]]


def test_gradient_is_masked_in_rotated_space() -> None:
    """dx = (g M) H^T, element by element against the mask, for both outputs."""
    x, g = torch.randn(2, 4, 128)
    for text in ("int2-hadamard-trust", "int2-hadamard-trust-original", "fp4-none-clip0.5"):
        q = Quantizer.parse(text)
        leaf = x.double().requires_grad_()
        reference.fake_quantize(leaf, q).backward(g.double())
        mask = reference.quantize(x, q).mask
        assert 0 < mask.double().mean() < 1
        g_h = reference.hadamard(g) if q.output == "original" else g.double()
        expected = reference.hadamard(g_h * mask) if q.rotation == "hadamard" else g_h * mask
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, expected)


def test_storage_by_hand() -> None:
    codes = torch.tensor([[1, 2, 3]])
    assert reference.pack_nibbles(codes).tolist() == [[0x21, 0x03] + [0] * 14]
    assert reference.pack_planes(codes, 2).tolist() == [[[0b101] + [0] * 15], [[0b110] + [0] * 15]]
    keep = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    assert reference.pack_index(keep).tolist() == [[(0 | 3 << 2) | (1 | 2 << 2) << 4] + [0] * 15]


@pytest.mark.parametrize("k", [1, 7, 8, 33, 256])
def test_storage_inverts(k: int) -> None:
    codes = torch.randint(0, 16, (3, k))
    assert torch.equal(reference.unpack_nibbles(reference.pack_nibbles(codes), k), codes)
    assert torch.equal(reference.unpack_planes(reference.pack_planes(codes, 4), k), codes)
    assert torch.equal(reference.unpack_bits(reference.pack_bits(codes & 1), k), codes & 1)
