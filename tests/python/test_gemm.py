"""Products of codes against int64: the sum is exact, so with powers of two as scales y is its float32 rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quest import _C, Quantizer, ops, reference

SHAPES = [
    (1, 1, 1),
    (1, 130, 257),
    (2, 7, 33),
    (3, 65, 128),
    (5, 16, 1000),
    (17, 33, 96),
    (64, 48, 512),
    (257, 31, 130),
]


def random_codes(grid: str, rows: int, k: int) -> Tensor:
    count = 3 if grid == "ternary" else 2 ** Quantizer.parse(grid).bits
    return torch.randint(0, count, (rows, k))


def values_of(grid: str, codes: Tensor) -> Tensor:
    return reference.levels(Quantizer.parse(grid))[codes].long()


def in_layout(grid: str, codes: Tensor, layout: str) -> Tensor:
    q = Quantizer.parse(grid)
    if layout == "values":
        return (codes - 128 if q.bits == 8 else values_of(grid, codes)).to(torch.int8)
    if layout == "codes":
        return codes.to(torch.uint8)
    if layout == "even_odd":
        return reference.even_odd(codes)
    return reference.pack_nibbles(codes) if layout == "packed" else reference.pack_planes(codes, q.bits)


def scales(rows: int) -> Tensor:
    return 2.0 ** torch.randint(-6, 3, (rows,))


def check(
    family: ops.Family,
    a_grid: str,
    a_layout: str,
    w_grid: str,
    w_layout: str,
    a: Tensor,
    w: Tensor,
    device: torch.device,
) -> None:
    """gemm of these codes, in these layouts, is exact."""
    a_scale, w_scale = scales(len(a)), scales(len(w))
    exact = reference.integer_product(values_of(a_grid, a), values_of(w_grid, w))
    expected = exact.float() * a_scale[:, None] * w_scale
    left = [t.to(device) for t in (in_layout(a_grid, a, a_layout), a_scale, a.sum(-1).int())]
    right = [t.to(device) for t in (in_layout(w_grid, w, w_layout), w_scale, w.sum(-1).int())]
    y = ops.gemm(family, *left, a_grid, *right, w_grid, a.shape[-1], None, torch.float32, a_layout)
    assert torch.equal(y.cpu(), expected)


INT8_GRIDS = ["int1", "int2", "int4", "int7", "int8", "int_zero4", "int_zero8", "fp4", "ternary"]


@pytest.mark.parametrize("layouts", ["values values", "codes codes", "values codes", "codes values"])
@pytest.mark.parametrize("a_grid", INT8_GRIDS)
@pytest.mark.parametrize("w_grid", INT8_GRIDS)
def test_int8_grids(a_grid: str, w_grid: str, layouts: str, device: torch.device) -> None:
    a_layout, w_layout = layouts.split()
    a, w = random_codes(a_grid, 5, 203), random_codes(w_grid, 9, 203)
    check("int8", a_grid, a_layout, w_grid, w_layout, a, w, device)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("grid", ["int4", "int8"])
def test_int8_shapes(grid: str, m: int, n: int, k: int, device: torch.device) -> None:
    check("int8", grid, "values", grid, "codes", random_codes(grid, m, k), random_codes(grid, n, k), device)


INT4_GRIDS = ["int1", "int3", "int4", "int_zero4", "fp4", "ternary"]


@pytest.mark.parametrize(
    ("a_grid", "a_layout"),
    [
        ("int8", "values"),
        ("int8", "even_odd"),
        *((grid, layout) for grid in INT4_GRIDS for layout in ("values", "packed", "codes", "even_odd")),
    ],
)
@pytest.mark.parametrize("w_grid", INT4_GRIDS)
def test_int4_grids(a_grid: str, w_grid: str, a_layout: str, device: torch.device) -> None:
    a, w = random_codes(a_grid, 5, 203), random_codes(w_grid, 9, 203)
    check("int4", a_grid, a_layout, w_grid, "packed", a, w, device)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("a_layout", ["values", "packed", "codes", "even_odd"])
def test_int4_shapes(a_layout: str, m: int, n: int, k: int, device: torch.device) -> None:
    check("int4", "int4", a_layout, "int4", "packed", random_codes("int4", m, k), random_codes("int4", n, k), device)


@pytest.mark.parametrize("a_bits", range(1, 5))
@pytest.mark.parametrize("w_bits", range(1, 5))
def test_planes_grids(a_bits: int, w_bits: int, device: torch.device) -> None:
    a_grid, w_grid = f"int{a_bits}", f"int{w_bits}"
    a, w = random_codes(a_grid, 5, 203), random_codes(w_grid, 9, 203)
    check("planes", a_grid, "planes", w_grid, "planes", a, w, device)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [1, 3])
def test_planes_shapes(bits: int, m: int, n: int, k: int, device: torch.device) -> None:
    grid = f"int{bits}"
    check("planes", grid, "planes", grid, "planes", random_codes(grid, m, k), random_codes(grid, n, k), device)


@pytest.mark.parametrize(
    ("family", "a_grid", "a_layout", "w_grid", "w_layout"),
    [
        ("int8", "int8", "codes", "int8", "codes"),
        ("int8", "int8", "values", "int8", "values"),
        ("int8", "int7", "values", "int7", "values"),
        ("int4", "int8", "values", "int4", "packed"),
        ("int4", "int4", "packed", "int4", "packed"),
        ("planes", "int4", "planes", "int4", "planes"),
        ("planes", "int1", "planes", "int1", "planes"),
    ],
)
@pytest.mark.parametrize("signs", ["++", "+-", "--"])
def test_extreme_codes_at_large_depth(
    family: ops.Family, a_grid: str, a_layout: str, w_grid: str, w_layout: str, signs: str, device: torch.device
) -> None:
    """Every product at its largest, K = 32768: at 8 x 8 bits within 1 % of the end of int32. Neither the sum nor any
    step of the identities that lead to it may overflow."""

    def extreme(grid: str, sign: str, rows: int) -> Tensor:
        return torch.full((rows, 32768), 2 ** Quantizer.parse(grid).bits - 1 if sign == "+" else 0)

    a, w = extreme(a_grid, signs[0], 2), extreme(w_grid, signs[1], 3)
    check(family, a_grid, a_layout, w_grid, w_layout, a, w, device)


def test_depth_that_int32_cannot_hold(device: torch.device) -> None:
    for grid, depth in (("int8", 33025), ("int7", 133144)):
        assert _C.max_gemm_depth(grid, grid) == depth
        codes = torch.zeros(1, depth + 1, dtype=torch.uint8, device=device)
        one, zero = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
        with pytest.raises(ValueError, match=f"gemm_int8: .*{depth + 1}.*"):
            ops.gemm("int8", codes, one, zero, grid, codes, one, zero, grid, depth + 1, None, torch.float32)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 8), (3, 33, 96), (17, 5, 136), (64, 48, 512), (257, 31, 264)])
@pytest.mark.parametrize(
    ("a_grid", "a_layout", "w_grid"),
    [
        ("int4", "values", "int4"),
        ("int4", "packed", "int4"),
        ("int4", "even_odd", "int4"),
        ("int8", "even_odd", "int3"),
        ("fp4", "even_odd", "ternary"),
        ("int8", "values", "int2"),
        ("fp4", "values", "fp4"),
        ("int_zero4", "packed", "int1"),
        ("ternary", "values", "ternary"),
    ],
)
def test_sparse(a_grid: str, a_layout: str, w_grid: str, m: int, n: int, k: int, device: torch.device) -> None:
    a, w = random_codes(a_grid, m, k), random_codes(w_grid, n, k)
    keep = reference.kept(torch.randn(n, k))
    kept_codes = reference.compress(w, keep)
    a_scale, w_scale = scales(m), scales(n)
    exact = reference.integer_product(values_of(a_grid, a), values_of(w_grid, w) * keep)
    left = [t.to(device) for t in (in_layout(a_grid, a, a_layout), a_scale, a.sum(-1).int())]
    right = [reference.pack_nibbles(kept_codes), w_scale, kept_codes.sum(-1).int(), reference.pack_index(keep)]
    y = ops.gemm_sparse(*left, a_grid, *(t.to(device) for t in right), w_grid, k, None, torch.float32, a_layout)
    assert torch.equal(y.cpu(), exact.float() * a_scale[:, None] * w_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_epilogue(dtype: torch.dtype, device: torch.device) -> None:
    """Any scales, a bias, every output dtype: three float32 roundings, then one to dtype."""
    a, w = random_codes("int4", 5, 64), random_codes("int4", 7, 64)
    a_scale, w_scale, bias = torch.rand(5), torch.rand(7), torch.randn(7)
    exact = reference.integer_product(values_of("int4", a), values_of("int4", w))
    product = exact.double() * a_scale[:, None] * w_scale
    expected = product + bias
    left = [t.to(device) for t in (in_layout("int4", a, "values"), a_scale, a.sum(-1).int())]
    right = [t.to(device) for t in (in_layout("int4", w, "packed"), w_scale, w.sum(-1).int())]
    y = ops.gemm("int4", *left, "int4", *right, "int4", 64, bias.to(device), dtype)
    assert y.dtype == dtype
    tolerance = 2.0**-22 * (product.abs() + expected.abs()) + torch.finfo(dtype).eps * expected.abs()
    assert ((y.double().cpu() - expected).abs() <= tolerance).all()


def test_nan_scale_reaches_its_row_alone(device: torch.device) -> None:
    a, w = random_codes("int4", 3, 64), random_codes("int4", 4, 64)
    a_scale = torch.tensor([1.0, torch.nan, 1.0])
    left = [t.to(device) for t in (in_layout("int4", a, "values"), a_scale, a.sum(-1).int())]
    right = [t.to(device) for t in (in_layout("int4", w, "packed"), torch.ones(4), w.sum(-1).int())]
    y = ops.gemm("int4", *left, "int4", *right, "int4", 64, None, torch.float32)
    assert y.isnan().any(-1).tolist() == y.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("grid", "layout"),
    [("int1", "planes"), ("int3", "planes"), ("int4", "packed"), ("fp4", "packed"), ("gauss4", "packed"),
     ("int8", "codes"), ("gauss8", "codes"), ("ternary", "packed"), ("int_zero3", "planes")],
)  # fmt: skip
@pytest.mark.parametrize(("m", "n", "k"), [(1, 130, 257), (17, 33, 96), (3, 5, 1000), (70, 24, 264)])
def test_weight_only(grid: str, layout: str, dtype: torch.dtype, m: int, n: int, k: int, device: torch.device) -> None:
    q = Quantizer.parse(grid)
    x, codes, w_scale, bias = torch.randn(m, k).to(dtype), random_codes(grid, n, k), torch.rand(n), torch.randn(n)
    w_hat = reference.levels(q)[codes] * w_scale[:, None]
    expected = x.double() @ w_hat.T + bias
    packed = in_layout(grid, codes, layout)
    y = ops.gemm_weight_only(*(t.to(device) for t in (x, packed, w_scale)), grid, layout, bias.to(device))
    assert y.dtype == dtype
    # The weight may be rounded to dtype on its way (tensor cores); then K float32 additions, and one rounding of y.
    magnitude = x.double().abs() @ w_hat.abs().T + bias.abs()
    eps = torch.finfo(dtype).eps
    tolerance = eps * expected.abs() + (k**0.5 * 2.0**-22 + (eps if dtype != torch.float32 else 0.0)) * magnitude
    assert ((y.double().cpu() - expected).abs() <= tolerance).all()
