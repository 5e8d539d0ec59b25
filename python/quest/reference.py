"""The definition of every operation in float64 torch: what the kernels are tested against, and the shortest way to
read the method.

    x_h = x H;  sigma = rms(row);  code c and scale s by the grid;  x_hat = s v(c);  dx = (g M) H^T with M by the
    estimator

Rows are everything but the last dimension: one row is one token or one output channel of a weight. Source: QuEST,
arXiv 2502.05003, section 3; the constants ALPHA are the paper's.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quest.quantizer import Quantizer

# alpha(b): where the int grid of b bits clips, in units of sigma.
ALPHA = {
    1: 0.7978845587140913,
    2: 1.4935346200015913,
    3: 2.051068354131873,
    4: 2.513930578568423,
    5: 2.9160938834961225,
    6: 3.276597282593217,
    7: 3.6010497188221655,
    8: 3.884938678807525,
}
SCALE_EPSILON = 1e-8  # keeps the int grid's scale of an all-zero row positive
FP4_SCALE = 0.48707976  # RMSE-optimal scale of the E2M1 levels on N(0,1)
TERNARY_STEP = 1.2240  # RMSE-optimal step of {-1, 0, 1} on N(0,1)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ROW_ALIGNMENT = 16  # bytes; packed rows are padded to it


# ---- rotation ----


@cache
def hadamard_matrix(n: int) -> Tensor:
    """The Sylvester Hadamard matrix over sqrt(n), [n, n]: symmetric and its own inverse."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)], dim=0)
    return h / math.sqrt(n)


def default_block(k: int) -> int:
    """128 where it divides k, else the largest power of two that divides k."""
    return 128 if k % 128 == 0 else k & -k


def hadamard(x: Tensor, block: int | None = None) -> Tensor:
    """x blockdiag(H/sqrt(B)) along the last dimension, [*, K] -> [*, K]. Differentiable."""
    block = block or default_block(x.shape[-1])
    blocks = x.double().reshape(*x.shape[:-1], x.shape[-1] // block, block)
    return (blocks @ hadamard_matrix(block).to(x.device)).flatten(-2)


# ---- grids ----


@cache
def gauss_levels(bits: int) -> Tensor:
    """Lloyd-Max levels of N(0,1), ascending: 20 sweeps of level = E(x | x in its cell) from linspace(-3, 3, 2^bits)."""
    levels = torch.linspace(-3, 3, 1 << bits, dtype=torch.float64)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(20):
        edges = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        levels = (density[:-1] - density[1:]) / torch.special.ndtr(edges).diff()
    return (levels - levels.flip(0)) / 2  # symmetric to the last bit, so that zero is the tie it should be


def levels(q: Quantizer) -> Tensor:
    """v of every code, [level_count] float64; x_hat = s v. Integers for all grids but gauss."""
    n = 1 << q.bits
    if q.grid == "int":
        return 2 * torch.arange(n, dtype=torch.float64) - (n - 1)
    if q.grid == "int_zero":
        return torch.arange(n, dtype=torch.float64) - (n // 2 - 1)
    if q.grid == "fp4":
        half = 2 * torch.tensor(E2M1, dtype=torch.float64)
        return torch.cat([half, -half])
    if q.grid == "ternary":
        return torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    return gauss_levels(q.bits)


def row_scale(q: Quantizer, sigma: Tensor) -> Tensor:
    """s of rows whose root mean square is sigma."""
    n = 1 << q.bits
    if q.grid == "int":
        return (ALPHA[q.bits] * sigma + SCALE_EPSILON) / (n - 1)
    factor = {"int_zero": 2 * ALPHA[q.bits] / n, "fp4": FP4_SCALE / 2, "ternary": TERNARY_STEP, "gauss": 1.0}
    return factor[q.grid] * sigma


def nearest_codes(q: Quantizer, x: Tensor, scale: Tensor) -> Tensor:
    """The code of x, [*, K] int64, for row scales [*, 1]. Integer grids round ties to even, as the paper's code
    does."""
    n = 1 << q.bits
    z = torch.where(scale > 0, x / scale, 0.0)  # an all-zero row of a grid without epsilon has scale 0
    if q.grid == "int":
        return (torch.round(z.clamp(-(n - 1), n - 1) / 2 + 0.5) + n // 2 - 1).long()
    if q.grid == "int_zero":
        return (torch.round(z.clamp(-(n // 2 - 1), n // 2)) + n // 2 - 1).long()
    if q.grid == "fp4":
        middles = (levels(q)[1:8] + levels(q)[:7]).to(x.device) / 2
        return torch.bucketize(z.abs(), middles) + 8 * (z < 0)
    middles = (levels(q)[1:] + levels(q)[:-1]).to(x.device) / 2
    return torch.bucketize(z, middles)


def kept(x: Tensor) -> Tensor:
    """4:8 sparsity: of every 4 adjacent pairs the 2 of largest L2 norm, [*, K] -> bool [*, K]. Of equal pairs the
    earlier stays."""
    norms = x.reshape(*x.shape[:-1], -1, 4, 2).square().sum(-1)
    order = norms.argsort(dim=-1, descending=True, stable=True)
    pairs = torch.zeros_like(norms, dtype=torch.bool).scatter(-1, order[..., :2], True)
    return pairs.repeat_interleave(2, dim=-1).flatten(-2)


# ---- estimators ----


def clip_limit(q: Quantizer) -> float:
    """Where clip with k = 1 stops, in units of sigma: alpha for the int grids, the top level for the others."""
    if q.grid in ("int", "int_zero"):
        return ALPHA[q.bits]
    return float(row_scale(q, torch.ones((), dtype=torch.float64)) * levels(q).max())


def default_bound(q: Quantizer) -> float:
    """T of trust or k of clip where the quantizer leaves it open."""
    if q.estimator == "clip":
        one_bit = (q.grid, q.bits) == ("int", 1)
        return (1.30 if q.rotation == "hadamard" else 1.25) if one_bit else 1.0
    if q.grid in ("int", "int_zero"):
        return ALPHA[q.bits] / ((1 << q.bits) - 1)
    if q.grid == "ternary":
        return TERNARY_STEP / 2
    top = gauss_levels(4 if q.grid == "fp4" else q.bits)[-2:]
    return float(top.diff() / 2)


def gradient_mask(q: Quantizer, x_h: Tensor, x_hat: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
    """M: which gradients pass, bool [*, K]. x_hat is the pruned one where the quantizer is sparse."""
    bound = default_bound(q) if q.bound is None else q.bound
    epsilon = SCALE_EPSILON if q.grid == "int" else 0.0
    if q.estimator == "ste":
        return torch.ones_like(x_h, dtype=torch.bool)
    if q.estimator == "clip":
        return x_h.abs() <= bound * (clip_limit(q) * sigma + epsilon)
    if q.grid == "int" and q.bound is None and not q.sparse:
        return x_h.abs() <= (1 << q.bits) * scale  # |x_hat - x_h| <= half a step, without the rounding of a difference
    return (x_hat - x_h).abs() <= bound * sigma


# ---- the quantizer ----


class Quantized(NamedTuple):
    """What quantize gives for x [*, K]. A row with a NaN or an infinity: codes 0, scale NaN, mask 0, x_hat NaN."""

    codes: Tensor  # int64 [*, K]; of pruned elements, those of x_h
    values: Tensor  # float64 [*, K]: v, 0 where pruned
    scale: Tensor  # float64 [*]
    kept: Tensor  # bool [*, K]; all true unless sparse
    mask: Tensor  # bool [*, K]
    x_hat: Tensor  # float64 [*, K], in rotated space


def quantize(x: Tensor, q: Quantizer) -> Quantized:
    """Codes, values, scale, mask and x_hat of x [*, K], each row with one scale. No gradient: see fake_quantize."""
    x = x.detach().double()
    x_h = hadamard(x) if q.rotation == "hadamard" else x
    sigma = x.square().mean(-1, keepdim=True).sqrt()
    sigma = torch.where(sigma.isfinite(), sigma, math.nan)
    scale = row_scale(q, sigma)
    bad = sigma.isnan()
    codes = nearest_codes(q, x_h, scale).masked_fill(bad, 0)
    keep = kept(x_h) if q.sparse else torch.ones_like(x_h, dtype=torch.bool)
    values = levels(q).to(x.device)[codes] * keep
    x_hat = scale * values
    mask = gradient_mask(q, x_h, x_hat, sigma, scale) & ~bad
    return Quantized(codes, values, scale.squeeze(-1), keep, mask, x_hat)


def fake_quantize(x: Tensor, q: Quantizer) -> Tensor:
    """x_hat of x [*, K] in float64, with the estimator's gradient dx = (g M) H^T."""
    quantized = quantize(x, q)
    x_h = hadamard(x) if q.rotation == "hadamard" else x.double()
    passing = torch.where(quantized.mask, x_h, 0.0)
    x_hat = passing + (quantized.x_hat - passing).detach()
    return hadamard(x_hat) if q.rotation == "hadamard" and q.output == "original" else x_hat


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Quantizer | None, w: Quantizer | None) -> Tensor:
    """y = x_hat w_hat^T + bias in float64, differentiable: what QuestLinear computes. Each side in the original
    space."""

    def hat(t: Tensor, q: Quantizer | None) -> Tensor:
        if q is None:
            return t.double()
        t_hat = fake_quantize(t, q)
        return hadamard(t_hat) if q.rotation == "hadamard" and q.output == "rotated" else t_hat

    y = hat(x, a) @ hat(weight, w).T
    return y if bias is None else y + bias.double()


def integer_product(a: Tensor, w: Tensor) -> Tensor:
    """sum_k a[m, k] w[n, k] of integers, exact: int64 [M, N]."""
    return a.long() @ w.long().T


# ---- canonical storage: little end first along K, rows padded with zero bytes to 16 ----


def _pad_rows(data: Tensor) -> Tensor:
    return F.pad(data, (0, -data.shape[-1] % ROW_ALIGNMENT))


def pack_bits(bits: Tensor) -> Tensor:
    """0/1 [*, K] -> uint8 [*, ceil(K/8) padded to 16]: eight a byte, lowest first."""
    groups = F.pad(bits.long(), (0, -bits.shape[-1] % 8)).reshape(*bits.shape[:-1], -1, 8)
    return _pad_rows((groups << torch.arange(8, device=bits.device)).sum(-1).to(torch.uint8))


def unpack_bits(data: Tensor, k: int) -> Tensor:
    """Inverse of pack_bits: int64 0/1 [*, k]."""
    return (data.long().unsqueeze(-1) >> torch.arange(8, device=data.device) & 1).flatten(-2)[..., :k]


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes [*, K] -> uint8 [bits, *, ceil(K/8) padded to 16]: plane j holds bit j of every code."""
    return torch.stack([pack_bits(codes.long() >> j & 1) for j in range(bits)])


def unpack_planes(planes: Tensor, k: int) -> Tensor:
    """Inverse of pack_planes: int64 [*, k]."""
    return sum((unpack_bits(plane, k) << j for j, plane in enumerate(planes)), torch.zeros((), dtype=torch.int64))


def pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit codes [*, K] -> uint8 [*, ceil(K/2) padded to 16]: the even column in the low half."""
    pairs = F.pad(codes.long(), (0, codes.shape[-1] % 2)).reshape(*codes.shape[:-1], -1, 2)
    return _pad_rows((pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8))


def unpack_nibbles(data: Tensor, k: int) -> Tensor:
    """Inverse of pack_nibbles: int64 [*, k]."""
    return torch.stack([data.long() & 15, data.long() >> 4], dim=-1).flatten(-2)[..., :k]


def even_odd(codes: Tensor) -> Tensor:
    """Codes [*, K] -> uint8 [*, K to a multiple of 64]: of every 64 columns the even ones, then the odd ones."""
    blocks = torch.unflatten(F.pad(codes, (0, -codes.shape[-1] % 64)), -1, (-1, 32, 2))
    return blocks.transpose(-1, -2).flatten(-3).to(torch.uint8)


def pack_index(keep: Tensor) -> Tensor:
    """4:8 pattern bool [*, K] -> uint8 [*, ceil(K/16) padded to 16]: for every 8 values p0 | p1 << 2, two such
    nibbles a byte."""
    pairs = keep.reshape(*keep.shape[:-1], -1, 4, 2)[..., 0]
    kept_pairs = pairs.nonzero()[:, -1].reshape(*pairs.shape[:-1], 2)
    return pack_nibbles(kept_pairs[..., 0] | kept_pairs[..., 1] << 2)


def compress(codes: Tensor, keep: Tensor) -> Tensor:
    """The kept half of 4:8 codes in order: [*, K] -> [*, K/2]."""
    return codes[keep].reshape(*codes.shape[:-1], -1)
