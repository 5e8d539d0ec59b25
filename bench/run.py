"""One harness for every benchmark: `python bench/run.py [CASE ...] [--device cpu|cuda] [--out DIR] [--quick]`.

A case is one operation at several shapes, run by several backends in the same process. For each shape the harness
first checks every backend's result, quest's against the float64 definition, and times nothing that is wrong. Operands
are random and are rotated past the last-level cache, so that weights and activations are cold. The median and the
spread (interquartile range over median) of the rounds are kept. Rows go to DIR/CASE.csv, stamped with processor,
driver, versions and commit.

On a GPU the calls of one backend over all its buffers are one CUDA graph, and a replay of it is one sample: Python and
launch gaps are in no number. A large product takes all the power that a GPU may draw, and the clock follows what the
last tenths of a second drew: behind other work an H200 takes 0.4 s to settle, and until then a product of int4 is up
to 20 % slower and one of bfloat16 as much faster than by itself. So a backend first works for SETTLE_US, and its
samples have the clock that it would run at by itself, as the ceilings have. Problems of few rows, which draw less, come
first in a case, and settle for QUIET_SETTLE_US (with --quick all do). Every call writes to memory of its own. On Hopper
quest's products start while the call before them ends (programmatic dependent launch), as they do in use; the peers'
kernels do not.

The limit of a row comes from the same run: limit_us = max(operations / ceiling, bytes / copy bandwidth), with the bytes
of quest's operands as they are stored and of its result, and the operations of the unit that should do them: the
1-bit products of all pairs of planes, the dense count of a sparse product. The ceilings are those of bench_peaks.cu
(--peaks: the program, or the CSV it printed); without it the limit counts bytes alone, as it does on a CPU. A peer's
share_of_limit is of the same limit; its gbps counts its own bytes.

Peers: torch_bf16, torch_fp32 (F.linear); torch_fp8 (_scaled_mm, e4m3, tensorwise scales, fast accumulation); torch_int8
(_int_mm: int32 sums without scales); torch_compile (the formula through torch.compile); torch_eager; paper_steps
(rotation by a 128 x 128 product, then the scales, then the codes: each step writes its result); quest_steps (torch's
norm or product, which writes its result, then quest's quantize); copy (as many bytes as quest reads and writes);
quest_int8 (in the bit-plane cases: the same integers through quest's int8 product).
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import quest
from quest import _C, reference

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PEAKS = ROOT / "build" / "dev" / "bench_peaks"
COLUMNS = {
    "cuda": (
        *("case", "backend", "shape", "dtype", "M", "N", "K", "time_us", "spread_pct", "tops", "gbps"),
        *("limit_us", "share_of_limit", "x_bf16", "gpu", "driver", "torch", "cuda", "commit"),
    ),
    "cpu": (
        *("case", "backend", "shape", "dtype", "M", "N", "K", "time_us", "spread_pct", "tops", "gbps"),
        *("limit_us", "share_of_limit", "x_bf16", "x_fp32"),
        *("gpu", "driver", "cpu", "isa", "threads", "torch", "cuda", "commit"),
    ),
}
# The rates of bench_peaks that bound a kind of product, the best unit first; a GPU has those it has.
CEILINGS = {
    "s8": ("wgmma_s8", "mma_s8"),
    "s8_4bit": ("wgmma_s8_4bit", "wgmma_s8", "mma_s8"),
    "b1": ("wgmma_b1", "mma_b1"),
    "sparse_s8": ("wgmma_sparse_s8",),
    "bf16": ("wgmma_bf16", "mma_bf16"),
}
ROUNDS, QUICK_ROUNDS = 15, 5
CPU_CACHE_BYTES = 64 << 20  # no portable way to ask; larger than most last-level caches per core complex
CACHES_BETWEEN_USES = 4  # a buffer comes back after this many caches' worth of other bytes
MAX_BUFFERS = 2048  # bounds the graph of calls that move next to nothing
SAMPLE_US = 500.0  # a sample at least this long: the first launch of a graph, some microseconds, disappears in it
SETTLE_US, QUIET_SETTLE_US = 500e3, 100e3  # a backend's own work before it is measured
QUIET_ROWS = 64  # problems of at most so many rows draw less power than a GPU may
POOL_BYTES = 16 << 30  # cached memory of past problems is given back beyond this


# ---- what is measured ----


@dataclass(frozen=True)
class Backend:
    """One way to do a problem's work: `call` of one set of operands, which the harness copies to rotate them."""

    operands: tuple[Tensor, ...]
    call: Callable[..., Any]
    check: Callable[[Any], None]  # raises CheckError


@dataclass(frozen=True)
class Problem:
    """One shape of a case. The backend `quest` is the one whose bytes make the limit."""

    backends: Mapping[str, Backend]
    operations: float  # of the formula, for tops
    unit: str = ""  # key of CEILINGS; "": bound by bytes alone
    unit_operations: float = 0.0  # what the unit does for them


@dataclass(frozen=True)
class Shape:
    """A problem before its operands exist, so that choosing among shapes costs nothing."""

    name: str
    dtype: str
    m: int
    n: int
    k: int
    build: Callable[[], Problem]


@dataclass(frozen=True)
class Timing:
    microseconds: float
    spread_percent: float
    bytes: int  # operands read, result written


class CheckError(Exception):
    """A result is wrong: its problem is not timed."""


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors_of(part)]


def bytes_of(*results: Any) -> int:
    return sum(tensor.nbytes for result in results for tensor in tensors_of(result))


# ---- checks ----


def expect_equal(name: str, actual: Tensor, expected: Tensor, share: float = 0.0) -> None:
    """At most `share` of the elements differ."""
    wrong = (actual != expected).double().mean().item()
    if wrong > share:
        raise CheckError(f"{name}: {wrong:.2%} of the elements differ from the definition")


def expect_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative error in the Frobenius norm."""
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:
        raise CheckError(f"{name}: relative error {error:.2e} exceeds {tolerance:.0e}")


def expect_close_each(name: str, actual: Tensor, expected: Tensor, relative: float, absolute: float) -> None:
    """Every element within relative · |expected| + absolute · rms(expected)."""
    bound = relative * expected.abs() + absolute * expected.square().mean().sqrt()
    excess = (actual.double() - expected).abs() - bound
    if not excess.max().item() <= 0:  # a NaN is no number that is small enough
        at = [int(i) for i in torch.unravel_index(excess.nan_to_num(math.inf).argmax(), excess.shape)]
        raise CheckError(
            f"{name}: element {at} of the sample is {actual[tuple(at)].item():.6g}, "
            f"expected {expected[tuple(at)].item():.6g}"
        )


def sample(count: int, wanted: int, device: str) -> Tensor:
    """Up to `wanted` indices spread over range(count), both ends among them."""
    return torch.linspace(0, count - 1, min(count, wanted), device=device).round().long()


def unchecked(result: Any) -> None:
    """For the copies, which compute nothing."""


def copy_backend(moved: int, device: str) -> Backend:
    """A copy that reads and writes `moved` bytes in all."""
    source = torch.randint(0, 256, (max(moved // 2, 1),), dtype=torch.uint8, device=device)
    return Backend((source,), torch.clone, unchecked)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape. What was compiled for earlier ones is dropped: past a few shapes of one function
    torch would silently run it uncompiled."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


# ---- cases: hadamard ----


def hadamard_product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x H along the last dimension as two products, by H(a b) = H(a) (x) H(b): left is H(a), right H(b)."""
    blocks = x.view(*x.shape[:-1], left.shape[0], right.shape[0]) @ right
    product: Tensor = blocks if left.shape[0] == 1 else left @ blocks
    return product.view(x.shape)


def hadamard_factors(dim: int) -> tuple[Tensor, Tensor]:
    """The two matrices of hadamard_product in float64; the right one is the 128 x 128 of the method where it fits."""
    right = min(dim, 128)
    return reference.hadamard_matrix(dim // right), reference.hadamard_matrix(right)


def hadamard_shapes(device: str, quick: bool) -> Iterator[Shape]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for dim in (128, 4096) if quick else (128, 512, 2048, 4096, 8192, 32768):
        elements = (1 << 26) if device == "cuda" else (1 << (18 if quick else 23))
        rows = elements // (dim if device == "cuda" else max(dim, 1024))

        def build(dim: int = dim, rows: int = rows) -> Problem:
            x = torch.randn(rows, dim, device=device, dtype=dtype)
            left, right = (factor.to(device) for factor in hadamard_factors(dim))
            at = sample(rows, 16, device)
            expected = hadamard_product(x[at].double(), left, right)

            def check(result: Tensor) -> None:
                expect_close("hadamard", result[at], expected, 1e-2)  # bfloat16 between two products

            backends = {
                "quest": Backend((x,), lambda x: torch.ops.quest.hadamard(x, dim), check),
                "copy": copy_backend(2 * x.nbytes, device),
            }
            if device == "cuda":
                matrices = left.to(dtype), right.to(dtype)
                product = compiled(hadamard_product)
                backends["torch_compile"] = Backend((x,), lambda x: product(x, *matrices), check)
            return Problem(backends, 0.0)

        yield Shape(f"{rows}x{dim}", str(dtype)[6:], rows, 0, dim, build)


# ---- cases: quantize ----


def pack_bits(bits: Tensor) -> Tensor:
    """0/1 [*, K] -> uint8 [*, K / 8], lowest first."""
    eight: Tensor = bits.to(torch.uint8).unflatten(-1, (-1, 8))
    packed = eight[..., 0]
    for i in range(1, 8):
        packed = packed | eight[..., i] << i
    return packed


def rms_scale(x: Tensor, bits: int) -> Tensor:
    """Half a step of the int grid, [*, 1]: the paper's second step."""
    sigma = x.float().square().mean(-1, keepdim=True).sqrt()
    return (reference.ALPHA[bits] * sigma + reference.SCALE_EPSILON) / ((1 << bits) - 1)


def quantize_rotated(x: Tensor, scale: Tensor, bits: int, layout: str, mask: bool) -> tuple[Tensor, ...]:
    """Codes of rotated x in a layout, and the bits of the trust mask: the paper's third step. 8 divides K."""
    n = 1 << bits
    clamped = torch.clamp(x.float(), -scale * (n - 1), scale * (n - 1))
    codes = (torch.round(clamped / (2 * scale) + 0.5) + (n // 2 - 1)).to(torch.uint8)
    if layout == "packed":
        pairs = codes.unflatten(-1, (-1, 2))
        stored = pairs[..., 0] | pairs[..., 1] << 4
    elif layout == "planes":
        stored = torch.stack([pack_bits(codes >> j & 1) for j in range(bits)])
    elif layout == "codes":
        stored = codes
    else:
        stored = (2 * codes.to(torch.int8) - (n - 1)).to(torch.int8)
    return (stored, scale, pack_bits(x.float().abs() <= n * scale)) if mask else (stored, scale)


def quantize_formula(x: Tensor, left: Tensor, right: Tensor, bits: int, layout: str, mask: bool) -> tuple[Tensor, ...]:
    """The whole quantization in torch: rotation, scale, codes."""
    rotated = hadamard_product(x.unflatten(-1, (-1, right.shape[0])), left, right).flatten(-2)
    return quantize_rotated(rotated, rms_scale(rotated, bits), bits, layout, mask)


def codes_of(stored: Tensor, bits: int, layout: str, k: int, rows: Tensor) -> Tensor:
    """Codes of some rows of a quantized matrix, int64."""
    if layout == "values":
        return (stored[rows].long() + (1 << bits) - 1) // 2
    if layout == "codes":
        return stored[rows].long()
    if layout == "even_odd":
        return stored[rows].long().unflatten(-1, (-1, 2, 32)).transpose(-1, -2).flatten(-3)[:, :k]
    chosen = stored[:, rows].contiguous() if layout == "planes" else stored[rows]
    codes: Tensor = torch.ops.quest.unpack(chosen, f"int{bits}", layout, k)
    return codes.long()


def codes_check(
    bits: int,
    layout: str,
    k: int,
    at: Tensor,
    expected: reference.Quantized,
    mask: bool,
    share: float,
    tolerance: float,
) -> Callable[[tuple[Tensor, ...]], None]:
    """Of the rows `at` of what quantize gives, or of (codes, scale, mask): at most `share` of the codes differ."""

    def checked(result: tuple[Tensor, ...]) -> None:
        expect_equal("quantize: codes", codes_of(result[0], bits, layout, k, at), expected.codes, share)
        expect_close("quantize: scale", result[1].flatten()[at], expected.scale, tolerance)
        if mask:
            passed = reference.unpack_bits(result[3 if len(result) > 3 else 2][at], k).bool()
            expect_equal("quantize: mask", passed, expected.mask, share)

    return checked


def quantize_shapes(device: str, quick: bool) -> Iterator[Shape]:
    """packed with the mask: what training stores. values and planes without: what an inference product takes."""
    wide = [(16, 4096)] + [(16384, k) for k in (2048, 4096, 5632, 11008)]
    sizes = [(64 if quick else 4096, 4096)] if device == "cpu" else [(16, 4096), (16384, 4096)] if quick else wide
    layouts = ("packed", "values") if device == "cuda" else ("packed",)
    kinds = [(4, layout, size) for size in sizes for layout in layouts]
    if device == "cuda":
        kinds += [(bits, "planes", (16384, 4096)) for bits in (1, 2)]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for bits, layout, (rows, k) in kinds:

        def build(bits: int = bits, layout: str = layout, rows: int = rows, k: int = k) -> Problem:
            return quantize_problem(device, dtype, bits, layout, rows, k)

        yield Shape(f"{rows}x{k}", f"{str(dtype)[6:]}:int{bits}:{layout}", rows, 0, k, build)


def quantize_problem(device: str, dtype: torch.dtype, bits: int, layout: str, rows: int, k: int) -> Problem:
    estimator = "trust" if bits > 1 else "clip"
    quantizer, mask = f"int{bits}-hadamard-{estimator}", layout == "packed"
    x = torch.randn(rows, k, device=device, dtype=dtype)
    at = sample(rows, 64, device)
    expected = reference.quantize(x[at], quest.Quantizer.parse(quantizer))
    left, right = (factor.to(device, dtype) for factor in hadamard_factors(128))

    def check(share: float, tolerance: float) -> Callable[[tuple[Tensor, ...]], None]:
        return codes_check(bits, layout, k, at, expected, mask, share, tolerance)

    def whole(x: Tensor) -> Any:
        return torch.ops.quest.quantize(x, quantizer, layout, mask)

    def formula(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: function(x, left, right, bits, layout, mask)

    # The kernel rounds float32 near a tie otherwise than float64 does. The peers round x_h to `dtype` first: in
    # bfloat16, 2^-9 of |x_h| against steps of a third of sigma, about one code in a hundred.
    exact, rounded = check(1e-3, 1e-6), check(1e-3 if dtype == torch.float32 else 5e-2, 1e-2)
    backends = {"quest": Backend((x,), whole, exact), "copy": copy_backend(bytes_of(x, whole(x)), device)}
    if device == "cpu":
        backends["torch_eager"] = Backend((x,), formula(quantize_formula), rounded)
        return Problem(backends, 0.0)
    backends["torch_compile"] = Backend((x,), formula(compiled(quantize_formula)), rounded)
    if layout != "planes":
        scale_step = compiled(rms_scale)
        code_step = compiled(quantize_rotated)

        def steps(x: Tensor) -> Any:
            rotated = (x.view(-1, 128) @ right).view(x.shape)
            return code_step(rotated, scale_step(rotated, bits), bits, layout, mask)

        backends["paper_steps"] = Backend((x,), steps, rounded)
    return Problem(backends, 0.0)


# ---- cases: quantize with a prologue ----


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, NORM_EPSILON)


def silu_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


NORM_EPSILON = 1e-5
PROLOGUES: dict[str, Callable[..., Tensor]] = {"rms_norm": rms_norm, "silu_mul": silu_mul}


def prologue_shapes(device: str, quick: bool) -> Iterator[Shape]:
    """int4 codes without a mask: what the product of an inference takes. K is the quantized width."""
    sizes = [(16, 4096)] + [(16384, k) for k in (2048, 4096, 11008)]
    if device == "cpu":
        sizes = [(64 if quick else 1024, 4096)]
    elif quick:
        sizes = [(16, 4096), (16384, 4096)]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for rows, k in sizes:
        for kind in PROLOGUES:

            def build(kind: str = kind, rows: int = rows, k: int = k) -> Problem:
                return prologue_problem(device, dtype, kind, rows, k)

            yield Shape(f"{rows}x{k}", f"{str(dtype)[6:]}:int4:{kind}", rows, 0, k, build)


def prologue_problem(device: str, dtype: torch.dtype, kind: str, rows: int, k: int) -> Problem:
    quantizer, layout = "int4-hadamard-trust", "codes"
    first = PROLOGUES[kind]
    x = torch.randn(rows, 2 * k if kind == "silu_mul" else k, device=device, dtype=dtype)
    weight = (torch.randn(k, device=device, dtype=dtype),) if kind == "rms_norm" else ()
    norm = (*weight, NORM_EPSILON) if weight else ()
    at = sample(rows, 64, device)
    expected = reference.quantize(first(x[at], *weight), quest.Quantizer.parse(quantizer))
    left, right = (factor.to(device, dtype) for factor in hadamard_factors(128))

    def check(share: float, tolerance: float) -> Callable[[tuple[Tensor, ...]], None]:
        return codes_check(4, layout, k, at, expected, False, share, tolerance)

    def fused(x: Tensor) -> Any:
        return torch.ops.quest.quantize(x, quantizer, layout, False, kind, *norm)

    def steps(x: Tensor) -> Any:
        return torch.ops.quest.quantize(first(x, *weight), quantizer, layout, False)

    def formula(x: Tensor) -> Any:
        return quantize_formula(first(x, *weight), left, right, 4, layout, False)

    # As in quantize_problem; a square root or exponential in the last bit moves a few values of bfloat16 more.
    exact, rounded = check(1e-3, 1e-4), check(1e-3 if dtype == torch.float32 else 5e-2, 1e-2)
    backends = {
        "quest": Backend((x,), fused, exact),
        "quest_steps": Backend((x,), steps, exact),
        "copy": copy_backend(bytes_of(x, fused(x)), device),
    }
    if device == "cpu":
        backends["torch_eager"] = Backend((x,), formula, rounded)
    else:
        backends["torch_compile"] = Backend((x,), compiled(formula), rounded)
    return Problem(backends, 0.0)


# ---- cases: products ----


@dataclass(frozen=True)
class Product:
    """Products of a [M, K] activation and a [N, K] weight; `quantize` includes the activation's (`linear`)."""

    weight: str
    activation: str | None  # None: it stays real (weight only)
    sparsity: str = "none"
    quantize: bool = False

    def unit(self) -> tuple[str, int]:
        """Key of CEILINGS, and that unit's products for one product of the formula."""
        if self.activation is None:
            return "bf16", 1
        if self.sparsity == "4:8":
            return "sparse_s8", 1
        bits = quest.quantizer.grid_bits(self.weight), quest.quantizer.grid_bits(self.activation)
        if _C.plan_operands(self.weight, self.activation, self.sparsity)["family"] == "planes":
            return "b1", bits[0] * bits[1]
        return "s8_4bit" if max(bits) <= 4 else "s8", 1

    def shapes(self, device: str, quick: bool) -> Iterator[Shape]:
        real = torch.float32 if device == "cpu" else torch.bfloat16
        layers, ms = PAPER_LAYERS + SEVEN_B_LAYERS, [1, 8, 16, 64, 512, 1024, 4096, 16384]
        if device == "cpu":
            layers, ms = ([(512, 512)], [1, 16]) if quick else ([(4096, 4096)], [1, 16, 512])
        elif quick:
            layers, ms = [(2048, 2048), (4096, 4096)], [1, 64, 4096]
        for m in ms:  # outermost: few rows before many (QUIET_ROWS)
            for n, k in layers:

                def build(m: int = m, n: int = n, k: int = k) -> Problem:
                    return product_problem(self, device, real, m, n, k)

                yield Shape(f"{m}x{n}x{k}", str(real)[6:], m, n, k, build)


PAPER_LAYERS = [(6144, 2048), (2048, 2048), (11264, 2048), (2048, 5632)]
SEVEN_B_LAYERS = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]


@dataclass(frozen=True)
class Quantized:
    """A matrix as torch.ops.quest.quantize wrote it in one layout."""

    quantizer: str
    grid: str
    layout: str
    k: int
    codes: Tensor
    scale: Tensor
    code_sum: Tensor
    index: Tensor | None

    @staticmethod
    def of(x: Tensor, quantizer: str, layout: str) -> Quantized:
        codes, scale, code_sum, _, index = torch.ops.quest.quantize(x, quantizer, layout, False)
        sparse = index if "4:8" in quantizer and layout != "values" else None
        return Quantized(quantizer, quantizer.split("-")[0], layout, x.shape[-1], codes, scale, code_sum, sparse)

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale, self.code_sum

    def rows(self, at: Tensor) -> Tensor:
        """x_hat of some rows in float64: exact in float32, where dequantize forms it."""
        codes = self.codes[:, at] if self.layout == "planes" else self.codes[at]
        index = None if self.index is None else self.index[at]
        unit = torch.ones_like(self.scale[at])  # so that the scale multiplies in float64
        values: Tensor = torch.ops.quest.dequantize(
            codes.contiguous(), unit, index, self.quantizer, self.layout, self.k, torch.float32
        )
        return values.double() * self.scale[at, None].double()


def integer_call(family: str, a: Quantized, w: Quantized, real: torch.dtype) -> tuple[tuple[Tensor, ...], Any]:
    """Operands and call of gemm_FAMILY."""
    gemm = getattr(torch.ops.quest, f"gemm_{family}")
    index = () if w.index is None else (w.index,)

    def call(ac: Tensor, ascale: Tensor, asum: Tensor, *weight: Tensor) -> Any:
        return gemm(ac, ascale, asum, a.grid, *weight, w.grid, a.k, None, real, a.layout)

    return (*a.operands, *w.operands, *index), call


def fp8_backend(x: Tensor, w: Tensor, check: Callable[[Any], None]) -> Backend:
    one = torch.ones((), device=x.device)

    def call(x8: Tensor, w8: Tensor) -> Any:
        return torch._scaled_mm(
            x8, w8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )  # fast accumulation: the faster peer, and what its users run

    return Backend((x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)), call, check)


def gpu_model(device: str) -> tuple[int, int]:
    """Compute capability and multiprocessors, as plan_operands takes them."""
    if device == "cpu":
        return 0, 0
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return 10 * gpu.major + gpu.minor, gpu.multi_processor_count


def product_problem(product: Product, device: str, real: torch.dtype, m: int, n: int, k: int) -> Problem:
    plan = _C.plan_operands(product.weight, product.activation, product.sparsity, (m, n, k), *gpu_model(device))
    sparse = "-4:8" if product.sparsity == "4:8" else ""
    w_text, a_text = f"{product.weight}-hadamard{sparse}-ste", f"{product.activation}-hadamard-ste"
    x = torch.randn(m, k, device=device, dtype=real)
    w = torch.randn(n, k, device=device, dtype=real)
    at_m, at_n = sample(m, 64, device), sample(n, 256, device)
    weight = Quantized.of(w, w_text, plan["w"])
    half_ulp = {torch.float32: 2**-24, torch.bfloat16: 2**-9}[real]

    def check(name: str, expected: Tensor, relative: float, absolute: float) -> Callable[[Tensor], None]:
        return lambda y: expect_close_each(name, y[at_m][:, at_n], expected, relative, absolute)

    def near(name: str, expected: Tensor, tolerance: float) -> Callable[[Tensor], None]:
        return lambda y: expect_close(name, y[at_m][:, at_n], expected, tolerance)

    backends: dict[str, Backend] = {}
    plain = x[at_m].double() @ w[at_n].double().T
    if product.activation is None:
        expected = x[at_m].double() @ weight.rows(at_n).T
        grid, layout = product.weight, plan["w"]
        backends["quest"] = Backend(
            (x, weight.codes, weight.scale),
            lambda x, codes, scale: torch.ops.quest.gemm_weight_only(x, codes, scale, grid, layout, None),
            near(f"weight-only {grid}", expected, 1e-5 if real == torch.float32 else 6e-3),
        )
    else:
        # The integer sum is exact; both scales are multiplied in float32 (3 roundings) and the result is rounded.
        relative = 2 * half_ulp + 2**-21
        activation = Quantized.of(x, a_text, plan["a"])
        expected = activation.rows(at_m) @ weight.rows(at_n).T
        name = f"{product.weight} x {product.activation}"
        checked = check(name, expected, relative, 1e-6)
        if product.quantize:
            index = () if weight.index is None else (weight.index,)

            def linear(x: Tensor, codes: Tensor, scale: Tensor, code_sum: Tensor, *index: Tensor) -> Any:
                pattern = index[0] if index else None
                return torch.ops.quest.linear(x, a_text, codes, scale, code_sum, pattern, w_text, None)

            backends["quest"] = Backend((x, *weight.operands, *index), linear, checked)
        else:
            backends["quest"] = Backend(*integer_call(plan["family"], activation, weight, real), checked)
            if plan["family"] == "planes":
                wide_a, wide_w = Quantized.of(x, a_text, "values"), Quantized.of(w, w_text, "values")
                backends["quest_int8"] = Backend(*integer_call("int8", wide_a, wide_w, real), checked)
    if device == "cpu":
        backends["torch_fp32"] = Backend((x, w), F.linear, near("torch_fp32", plain, 1e-5))
    backends["torch_bf16"] = Backend((x.bfloat16(), w.bfloat16()), F.linear, near("torch_bf16", plain, 2e-2))
    if device == "cuda" and product.activation is not None:
        # e4m3 rounds each operand by up to 2^-4, 2.6% root mean square: 3.7% of a product of two, and no less of a sum.
        backends["torch_fp8"] = fp8_backend(x, w, near("torch_fp8", plain, 6e-2))
        if not product.quantize:
            int_a, int_w = Quantized.of(x, a_text, "values").codes, Quantized.of(w, w_text, "values").codes
            sums = int_a[at_m].double() @ int_w[at_n].double().T
            backends["torch_int8"] = Backend(
                (int_a, int_w),
                lambda a, w: torch._int_mm(a, w.t()),
                check("torch_int8", sums, 0.0, 0.0),
            )
    unit, products = product.unit()
    operations = 2.0 * m * n * k
    return Problem(backends, operations, unit, operations * products)


def left_out(backend: str, shape: Shape) -> str | None:
    """Why a peer cannot run a shape; None: it can."""
    if backend == "torch_int8" and shape.m <= 16:
        return "torch._int_mm needs M > 16"
    if backend == "torch_fp8" and (shape.n % 16 or shape.k % 16):
        return "torch._scaled_mm needs N and K divisible by 16"
    return None


CASES: dict[str, Callable[[str, bool], Iterator[Shape]]] = {
    "hadamard": hadamard_shapes,
    "quantize": quantize_shapes,
    "quantize_prologue": prologue_shapes,
    "gemm_w4a4": Product("int4", "int4").shapes,
    "gemm_w4a8": Product("int4", "int8").shapes,
    "gemm_w8a8": Product("int8", "int8").shapes,
    "gemm_fp4": Product("fp4", "fp4").shapes,
    "gemm_w4a4_sparse": Product("int4", "int4", sparsity="4:8").shapes,
    "gemm_w1a1": Product("int1", "int1").shapes,
    "gemm_w2a2": Product("int2", "int2").shapes,
    "gemm_w1a2": Product("int1", "int2").shapes,
    "gemm_w1a16": Product("int1", None).shapes,
    "gemm_w2a16": Product("int2", None).shapes,
    "gemm_w4a16": Product("int4", None).shapes,
    "linear_w4a4": Product("int4", "int4", quantize=True).shapes,
    "linear_w1a1": Product("int1", "int1", quantize=True).shapes,
    "linear_w2a2": Product("int2", "int2", quantize=True).shapes,
}


# ---- timing ----


def buffer_count(bytes_per_call: int, cache_bytes: int, most: int = MAX_BUFFERS) -> int:
    """How many sets of operands make a set cold by the time it comes back."""
    return max(2, min(most, math.ceil(CACHES_BETWEEN_USES * cache_bytes / max(bytes_per_call, 1))))


def copies(operands: tuple[Tensor, ...], count: int) -> list[tuple[Tensor, ...]]:
    """The operands and count - 1 copies of them."""
    return [operands, *(tuple(tensor.clone() for tensor in operands) for _ in range(count - 1))]


def summarize(samples: list[float], moved: int) -> Timing:
    quartiles = statistics.quantiles(samples, n=4)
    median = statistics.median(samples)
    return Timing(median, 100 * (quartiles[2] - quartiles[0]) / median, moved)


def measure_cpu(backends: Mapping[str, Backend], moved: Mapping[str, int], rounds: int) -> dict[str, Timing]:
    """Rounds of all backends are interleaved: a drift of the machine's speed meets all of them."""
    sets = {
        name: copies(b.operands, buffer_count(moved[name], CPU_CACHE_BYTES, rounds)) for name, b in backends.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in backends}
    for name, backend in backends.items():
        for i in range(2):
            backend.call(*sets[name][i])
    for round_index in range(rounds):
        for name, backend in backends.items():
            operands = sets[name][round_index % len(sets[name])]
            begin = time.perf_counter()
            backend.call(*operands)
            samples[name].append((time.perf_counter() - begin) * 1e6)
    return {name: summarize(samples[name], moved[name]) for name in backends}


class Capture:
    """`calls` calls of a backend over its buffers as one CUDA graph; their results stay, each in its own memory."""

    def __init__(self, backend: Backend, sets: list[tuple[Tensor, ...]], calls: int) -> None:
        self.calls, self.sets = calls, sets  # the graph knows addresses alone: their memory must stay taken
        self.graph = torch.cuda.CUDAGraph()
        stream = capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Not `with torch.cuda.graph(...)`: it collects garbage and empties the memory pool, a tenth of a second each.
        with torch.cuda.stream(stream):
            backend.call(*sets[0])  # libraries allocate a stream's workspace on its first call: outside the graph
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.results = [backend.call(*sets[i % len(sets)]) for i in range(calls)]
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self.per_call_us(self.replay())  # the first replay also uploads the graph
        self.sample_us = self.per_call_us(self.replay()) * calls

    def replay(self) -> tuple[Any, Any]:
        """Queues all calls; returns the events before and after them."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        end.record()
        return start, end

    def per_call_us(self, events: tuple[Any, Any]) -> float:
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1])) * 1e3 / self.calls


@cache
def capture_stream() -> Any:
    return torch.cuda.Stream()


def capture(backend: Backend, bytes_per_call: int) -> Capture:
    """As many turns through the buffers as make a sample of SAMPLE_US."""
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sets = copies(backend.operands, buffer_count(bytes_per_call, cache_bytes))
    once = Capture(backend, sets, len(sets))
    turns = math.ceil(SAMPLE_US / once.sample_us)
    return once if turns == 1 else Capture(backend, sets, turns * len(sets))


def measure_cuda(
    backends: Mapping[str, Backend], moved: Mapping[str, int], rounds: int, settle_us: float
) -> dict[str, Timing]:
    captures: dict[str, Capture] = {}
    for name, backend in backends.items():
        try:
            captures[name] = capture(backend, moved[name])
        except RuntimeError as error:
            if name.startswith("quest"):
                raise
            print(f"note: {name} cannot be captured in a graph and is left out here: {str(error).splitlines()[0]}")
    # All of it is queued before anything is waited for: the GPU goes from graph to graph without a pause.
    events_of: dict[str, list[tuple[Any, Any]]] = {}
    for name, captured in captures.items():
        for _ in range(math.ceil(settle_us / captured.sample_us)):
            captured.graph.replay()
        events_of[name] = [captured.replay() for _ in range(rounds)]
    return {
        name: summarize([captured.per_call_us(events) for events in events_of[name]], moved[name])
        for name, captured in captures.items()
    }


def measure(
    device: str, backends: Mapping[str, Backend], moved: Mapping[str, int], quick: bool, quiet: bool = False
) -> dict[str, Timing]:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    if device == "cpu":
        return measure_cpu(backends, moved, rounds)
    return measure_cuda(backends, moved, rounds, QUIET_SETTLE_US if quick or quiet else SETTLE_US)


def verified(problem: Problem, shape: Shape, notes: set[str]) -> tuple[dict[str, Backend], dict[str, int]]:
    """The backends that run this shape, checked, and the bytes each moves. A peer that cannot run is noted; a wrong
    result raises CheckError."""
    backends, moved = {}, {}
    for name, backend in problem.backends.items():
        reason = left_out(name, shape)
        if reason is None:
            try:
                result = backend.call(*backend.operands)
            except (RuntimeError, NotImplementedError) as error:
                if name.startswith("quest"):
                    raise
                reason = str(error).splitlines()[0]
        if reason is not None:
            notes.add(f"{name} is left out where it does not run: {reason}")
            continue
        backend.check(result)
        backends[name], moved[name] = backend, bytes_of(backend.operands, result)
    return backends, moved


# ---- limits ----


def parse_peaks(text: str) -> tuple[dict[str, float], str]:
    """bench_peaks's CSV -> rates per second (operations or bytes) by name, and the GPU they are of."""
    rows = list(csv.DictReader(text.splitlines()))
    unit = {"TOPS": 1e12, "GB/s": 1e9}
    bad = [row for row in rows if row.get("unit") not in unit or not row.get("gpu")]
    if bad or not rows:
        raise ValueError(f"expected bench_peaks's CSV (peak,value,unit,milliseconds,gpu), got {bad or text[:80]!r}")
    return {row["peak"]: float(row["value"]) * unit[row["unit"]] for row in rows}, rows[0]["gpu"]


def read_peaks(path: Path) -> str:
    if path.suffix == ".csv":
        return path.read_text()
    return subprocess.run([path.resolve()], stdout=subprocess.PIPE, text=True, check=True).stdout


def limit_us(problem: Problem, moved: int, peaks: Mapping[str, float]) -> float:
    """The least time for the bytes and the operations of a problem."""
    ceiling = next((peaks[name] for name in CEILINGS.get(problem.unit, ()) if name in peaks), math.inf)
    return 1e6 * max(moved / peaks["copy"], problem.unit_operations / ceiling)


def copy_bandwidth(device: str, quick: bool) -> float:
    """Bytes read + written per second of a plain copy of 512 MiB (quick: 64 MiB)."""
    source = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, device=device).repeat(64 if quick else 512)
    backend = {"copy": Backend((source, torch.empty_like(source)), lambda x, y: y.copy_(x), unchecked)}
    moved = 2 * source.numel()
    return moved / (measure(device, backend, {"copy": moved}, quick)["copy"].microseconds * 1e-6)


# ---- rows ----


def gpu_slug(name: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'h100': the words up to the first with a digit, without the maker's."""
    words = [word for word in re.split(r"[\s-]+", name.lower()) if word not in ("nvidia", "geforce", "tesla", "quadro")]
    last = next((i for i, word in enumerate(words) if any(c.isdigit() for c in word)), len(words) - 1)
    return "".join(words[: last + 1]) or "cuda"


def command_output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def stamp(device: str, commit: str | None) -> dict[str, object]:
    dirty = "-dirty" if command_output("git", "status", "--porcelain", "--untracked-files=no") else ""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
        "driver": command_output(*query) if device == "cuda" else "",
        "cpu": models[0] if models else platform.processor(),
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "commit": commit or command_output("git", "rev-parse", "--short=12", "HEAD") + dirty,
    }


def rows_of(
    case: str,
    shape: Shape,
    operations: float,
    limit: float,
    timings: Mapping[str, Timing],
    common: Mapping[str, object],
) -> Iterator[dict[str, object]]:
    """One row for each backend, with the columns of both kinds of device."""
    for backend, timing in timings.items():
        us = timing.microseconds
        row: dict[str, object] = {"case": case, "backend": backend, "shape": shape.name, "dtype": shape.dtype}
        row |= {"M": shape.m, "N": shape.n, "K": shape.k}
        row |= {"time_us": f"{us:.2f}", "spread_pct": f"{timing.spread_percent:.1f}"}
        row |= {"tops": f"{operations / us * 1e-6:.3f}", "gbps": f"{timing.bytes / us * 1e-3:.1f}"}
        row |= {"limit_us": f"{limit:.2f}", "share_of_limit": f"{limit / us:.3f}"}
        for column, peer in (("x_bf16", "torch_bf16"), ("x_fp32", "torch_fp32")):
            row[column] = f"{timings[peer].microseconds / us:.3f}" if peer in timings else ""
        yield {**row, **common}


def run_case(
    case: str,
    device: str,
    quick: bool,
    patterns: list[str],
    peaks: Mapping[str, float],
    common: Mapping[str, object],
    out: Path,
) -> int:
    """Measures a case and writes out/CASE.csv; returns how many of its problems gave a wrong result."""
    path = out / f"{case}.csv"
    temporary = path.with_suffix(".tmp")  # holds what was measured should the run be cut short
    wrong, notes = 0, set[str]()
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS[device], extrasaction="ignore")
        writer.writeheader()
        for shape in CASES[case](device, quick):
            if not any(fnmatch.fnmatch(shape.name, pattern) for pattern in patterns):
                continue
            known = set(notes)
            problem = shape.build()
            try:
                backends, moved = verified(problem, shape, notes)
            except CheckError as error:
                wrong += 1
                print(f"{case:16} {shape.name:18} NOT TIMED: {error}", flush=True)
                continue
            timings = measure(device, backends, moved, quick, shape.m <= QUIET_ROWS)
            limit = limit_us(problem, moved["quest"], peaks)
            writer.writerows(rows_of(case, shape, problem.operations, limit, timings, common))
            file.flush()
            summary = "  ".join(
                f"{name} {t.microseconds:.4g}" + (f" ±{t.spread_percent:.0f}%" if t.spread_percent >= 3 else "")
                for name, t in timings.items()
            )
            share = limit / timings["quest"].microseconds
            print(f"{case:16} {shape.name:18} {share:4.0%} of the limit, us: {summary}", flush=True)
            for note in sorted(notes - known):
                print(f"note: {note}", flush=True)
            del problem, backends
            if device == "cuda" and torch.cuda.memory_reserved() > POOL_BYTES:
                torch.cuda.empty_cache()
    os.replace(temporary, path)
    print(f"wrote {path}", flush=True)
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where CASE.csv is written (default: bench/results/GPU, or .../cpu)")
    parser.add_argument("--peaks", type=Path, help="bench_peaks or its CSV (default: build/dev/bench_peaks)")
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds: does everything run?")
    parser.add_argument("--shape", nargs="+", default=["*"], help="only shapes that match one, for example '16384x*'")
    parser.add_argument("--commit", help="for the stamp, where the tree is no git checkout")
    options = parser.parse_args(arguments)
    unknown = [case for case in options.case if case not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; choose from {', '.join(CASES)}")
    torch.manual_seed(0)
    device, common = options.device, stamp(options.device, options.commit)
    out = options.out or ROOT / "bench" / "results" / (gpu_slug(str(common["gpu"])) if device == "cuda" else "cpu")
    out.mkdir(parents=True, exist_ok=True)

    peaks: dict[str, float] = {}
    program = options.peaks or (DEFAULT_PEAKS if DEFAULT_PEAKS.exists() else None)
    if device == "cuda" and program is not None:
        try:
            text = read_peaks(program)
            peaks, gpu = parse_peaks(text)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            parser.error(f"--peaks {program}: {error}")
        if gpu != common["gpu"]:
            parser.error(f"--peaks {program}: measured on {gpu!r}, but this is {common['gpu']!r}; measure again")
        (out / "peaks.csv").write_text(text)
    elif device == "cuda":
        print("note: no bench_peaks (build it with QUEST_BUILD_BENCH=ON, or give --peaks): limits count bytes only")
    if "copy" not in peaks:
        peaks["copy"] = copy_bandwidth(device, options.quick)

    machine = common["gpu"] or f"{common['cpu']}, isa {common['isa']}, {common['threads']} threads"
    print(f"{machine}, torch {common['torch']}, copy {peaks['copy'] / 1e9:.1f} GB/s", flush=True)
    print("  ".join(f"{name} {rate / 1e12:.0f} TOPS" for name, rate in peaks.items() if name != "copy"), flush=True)
    wrong = sum(
        run_case(case, device, options.quick, options.shape, peaks, common, out) for case in options.case or CASES
    )
    if wrong:
        print(f"bench: {wrong} problems gave a wrong result and have no row", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
