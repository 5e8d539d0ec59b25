"""torch.ops.quest.* as typed functions, with the fakes and gradients that torch.compile and autograd need.

The kernels live in the C++ libraries that importing quest._C loads; this file adds to each operation what it means
(docstring), which shapes it gives (fake), and its gradient where it has one (hadamard: itself). All operations are
functional and run on CPU and CUDA. Shapes: K is the last dimension of a matrix of codes, * all leading ones.

Layouts of codes, by rows of K integers; packed rows are padded with zero bytes to 16:
    codes    uint8 [*, K]                      one code a byte
    values   int8  [*, K]                      the integer value v (at 8 bits: code - 128)
    packed   uint8 [*, packed_row_bytes(K)]    two 4-bit codes a byte, the even column in the low half
    planes   uint8 [bits, *, plane_row_bytes(K)]  plane j holds bit j of every code, eight columns a byte, lowest first
    even_odd uint8 [*, K to a multiple of 64]  one code a byte; of every 64 columns the even ones, then the odd ones:
                                               the order in which packed weights take activations, 4:8 sparse ones too
A prologue is what quantize does to x first, as torch does it and with its roundings to the dtype of x:
    rms_norm  F.rms_norm(x, (K,), norm_weight, norm_epsilon)
    silu_mul  F.silu(gate) * up, where x is [*, 2K]: gate, then up

A 4:8 sparse quantizer stores its K/2 kept codes (values: all K, the pruned ones 0) and their index.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, library

from quest.quantizer import Quantizer, grid_bits

try:
    import quest._C  # noqa: F401  loads the libraries that register torch.ops.quest.*
except ImportError as error:
    raise ImportError(
        f"quest: the compiled extension quest._C cannot be imported ({error}). Build and install the package with "
        "`pip install .` (or `make`) in its source tree, for the torch that is installed now."
    ) from error

Layout = Literal["codes", "values", "packed", "planes", "even_odd"]
Prologue = Literal["none", "rms_norm", "silu_mul"]
Family = Literal["int8", "int4", "planes"]


def packed_row_bytes(k: int) -> int:
    """Bytes of a row of k packed 4-bit codes."""
    return ((k + 1) // 2 + 15) // 16 * 16


def plane_row_bytes(k: int) -> int:
    """Bytes of a row of k bits: of one plane, or of a mask."""
    return ((k + 7) // 8 + 15) // 16 * 16


def index_row_bytes(k: int) -> int:
    """Bytes of the 4:8 index of a row of k values."""
    return ((k + 15) // 16 + 15) // 16 * 16


class Codes(NamedTuple):
    """What quantize gives for x [*, K]."""

    codes: Tensor  # by layout
    scale: Tensor  # float32 [*]
    code_sum: Tensor  # int32 [*], sum of the stored codes
    mask: Tensor  # uint8 [*, plane_row_bytes(K)], bit set: the gradient passes; [0] when not asked for
    pair_index: Tensor  # uint8 [*, index_row_bytes(K)] of a 4:8 sparse quantizer, else [0]


def hadamard(x: Tensor, block: int | None = None) -> Tensor:
    """x blockdiag(H/sqrt(B)), Sylvester order, along the last dimension: its own inverse, its own gradient.

    x: [*, K] float32, bfloat16 or float16; computed in float32, returned in its dtype.
    block: a power of two up to 32768 that divides K; None: 128, or the largest that divides K when 128
    does not.
    Raises for another block, dtype or an x without dimensions.
    """
    return _op("hadamard")(x, block)


def quantize(
    x: Tensor,
    quantizer: Quantizer,
    layout: Layout = "codes",
    mask: bool = True,
    prologue: Prologue = "none",
    norm_weight: Tensor | None = None,
    norm_epsilon: float = 0.0,
) -> Codes:
    """Rotation, row scale, codes, code sums and the estimator's mask in one pass over x (paper, section 3).

    x: [*, K] float32, bfloat16 or float16; [*, 2K] for prologue silu_mul. Not differentiable: see quest.fake_quantize.
    prologue: done to x in the same pass; rms_norm takes norm_weight [K] in the dtype of x, and norm_epsilon.
    A row with a NaN or an infinity gets scale NaN, codes 0, code_sum 0 and mask 0.
    Raises for "values" of gauss, "packed" of more than 4 bits, "planes" and "even_odd" of 4:8, 4:8 where 8 does
    not divide K, silu_mul of an odd last dimension, a norm_weight without rms_norm or none with it.
    """
    return Codes(*_op("quantize")(x, str(quantizer), layout, mask, prologue, norm_weight, norm_epsilon))


def dequantize(
    codes: Tensor, scale: Tensor, index: Tensor | None, quantizer: Quantizer, layout: Layout, k: int, dtype: torch.dtype
) -> Tensor:
    """x_hat [*, k] in dtype: scale times level, rotated back where quantizer.output is "original".

    codes, scale, index: as quantize wrote them in this layout; index None unless the quantizer is 4:8 sparse. A code
    beyond the grid gives an unspecified value; `pack` checks.
    """
    return _op("dequantize")(codes, scale, index, str(quantizer), layout, k, dtype)


def quantize_backward(grad: Tensor, mask: Tensor, quantizer: Quantizer) -> Tensor:
    """dx = (g M) H^T (paper, section 3), with g the gradient at x_hat (output "original": rotated first).

    grad: [*, K] float32, bfloat16 or float16; mask: as quantize wrote it. Returns [*, K] in the dtype of grad.
    """
    return _op("quantize_backward")(grad, mask, str(quantizer))


def pack(codes: Tensor, grid: str, layout: Literal["packed", "planes"]) -> Tensor:
    """uint8 codes [*, K] in layout packed (up to 4 bits) or planes. Raises for a code that the grid does not have."""
    return _op("pack")(codes, grid, layout)


def unpack(packed: Tensor, grid: str, layout: Literal["packed", "planes"], k: int) -> Tensor:
    """Inverse of pack: uint8 codes [*, k]."""
    return _op("unpack")(packed, grid, layout, k)


def gemm(
    family: Family,
    a: Tensor,
    a_scale: Tensor,
    a_sum: Tensor,
    a_grid: str,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    w_grid: str,
    k: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    a_layout: Layout | None = None,
) -> Tensor:
    """gemm_int8, gemm_int4 or gemm_planes: y[m, n] = a_scale[m] w_scale[n] sum_k v_a[m, k] v_w[n, k] + bias[n].

    The sum is exact, in int32. a, w: codes of M and N rows as quantize wrote them; a code beyond the grid gives an
    unspecified value; `pack` checks.
    family int8: each values (int8) or codes (uint8); int4: w packed, a even_odd, packed, values (int8) or codes;
    planes: both planes, int grids of 1 to 4 bits. a_layout tells which uint8 codes those of family int4 are: None,
    packed.
    a_scale, w_scale: float32 [M], [N]; a_sum, w_sum: int32 [M], [N]; bias: float32 [N] or None.
    dtype: float32, bfloat16 or float16, of y [M, N]. Raises where K is so large that the sum may not fit int32.
    """
    return _op("gemm_" + family)(a, a_scale, a_sum, a_grid, w, w_scale, w_sum, w_grid, k, bias, dtype, a_layout or "")


def gemm_sparse(
    a: Tensor,
    a_scale: Tensor,
    a_sum: Tensor,
    a_grid: str,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    w_index: Tensor,
    w_grid: str,
    k: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    a_layout: Layout | None = None,
) -> Tensor:
    """gemm with a 4:8 sparse weight: w packed, K/2 kept codes a row, and their index; a dense.

    a: even_odd, packed or values (int8). a_layout tells uint8 codes in even_odd from packed ones, which None takes.
    """
    left, right = (a, a_scale, a_sum, a_grid), (w, w_scale, w_sum, w_index, w_grid)
    return _op("gemm_sparse")(*left, *right, k, bias, dtype, a_layout or "")


def gemm_weight_only(
    x: Tensor, w: Tensor, w_scale: Tensor, w_grid: str, w_layout: Layout, bias: Tensor | None
) -> Tensor:
    """y [M, N] = x w_hat^T + bias for real x [M, K], which is rotated already if w is; in the dtype of x.

    Accumulated in float32. w: codes of any grid in layout codes, packed or planes; bias float32 [N] or None.
    On Hopper and for a 16-bit dtype most products of few rows (up to 64 all that this suits, up to 256 those where it
    is faster), but for gauss, take x as fixed-point numbers of 16 bits (by weights of 8 bits: 15). A bfloat16 of at
    least 2^-6 (2^-5) of the largest magnitude in its 512 or 1024 columns is exact, a float16 of at least 2^-3 (2^-2),
    and what is smaller is off by about 2^-15 (2^-14) of the largest; a row with a NaN or an infinity gives NaN. More
    rows meet weights of all grids but gauss and fp4 that are widened to the dtype on their way to the tensor cores.
    Else, and on other GPUs, more than 64 rows (32 where a thread block has less than 227 KB of shared memory) are
    multiplied by torch, at its precision, with a weight [N, K] that is dequantized to the dtype; a bias is then a
    second rounding.
    """
    return _op("gemm_weight_only")(x, w, w_scale, w_grid, w_layout, bias)


def linear(
    x: Tensor,
    a_quantizer: Quantizer | None,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    w_index: Tensor | None,
    w_quantizer: Quantizer,
    bias: Tensor | None,
    prologue: Prologue = "none",
    norm_weight: Tensor | None = None,
    norm_epsilon: float = 0.0,
) -> Tensor:
    """Quantize x [*, K] and multiply by a stored weight of N rows: y [*, N] in the dtype of x. For inference.

    a_quantizer None: x stays real. w: in the layout of plan_operands for the two grids. bias float32 [N] or None.
    prologue, norm_weight, norm_epsilon: as quantize takes them (silu_mul: x is [*, 2K]).
    Raises for products that have no kernel (gauss with quantized activations, rotations that differ, 4:8 activations),
    and for a prologue where x stays real: it is a part of quantizing.
    """
    activation = "none" if a_quantizer is None else str(a_quantizer)
    first = (prologue, norm_weight, norm_epsilon)
    return _op("linear")(x, activation, w, w_scale, w_sum, w_index, str(w_quantizer), bias, *first)


def _op(name: str) -> Callable[..., Tensor]:
    return cast(Callable[..., Tensor], getattr(torch.ops.quest, name))


# ---- fake implementations: shapes and dtypes of the results ----


Function = TypeVar("Function", bound=Callable[..., object])


def _fake(*names: str) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        for name in names:
            library.register_fake(f"quest::{name}", _on_one_device(name, function))
        return function

    return register


def _on_one_device(name: str, fake: Callable[..., object]) -> Callable[..., object]:
    """The fake, and the kernels' check of devices: one operand on "meta" makes a call the fake's, whose result would be
    memory that nothing has written if it were on the device of another."""
    parameters = tuple(inspect.signature(fake).parameters)

    @functools.wraps(fake)
    def checked(*args: object, **kwargs: object) -> object:
        operands = {**dict(zip(parameters, args, strict=False)), **kwargs}
        (first, tensor), *others = [(key, value) for key, value in operands.items() if isinstance(value, Tensor)]
        for key, other in others:
            if other.device != tensor.device:
                raise ValueError(
                    f"{name}: expected {key} on the same device as {first}, got {other.device} and {tensor.device}; "
                    "move one, or load what is on meta"
                )
        return fake(*args, **kwargs)

    return checked


def _codes_shape(quantizer: Quantizer, layout: str, lead: tuple[int, ...], k: int) -> tuple[int, ...]:
    stored = k // 2 if quantizer.sparse and layout != "values" else k
    if layout == "planes":
        return (quantizer.bits, *lead, plane_row_bytes(stored))
    if layout == "even_odd":
        return (*lead, (stored + 63) // 64 * 64)
    return (*lead, packed_row_bytes(stored) if layout == "packed" else stored)


@_fake("hadamard")
def _(x: Tensor, block: int | None = None) -> Tensor:
    return x.new_empty(x.shape)


@_fake("quantize")
def _(
    x: Tensor,
    quantizer: str,
    layout: str = "codes",
    mask: bool = True,
    prologue: str = "none",
    norm_weight: Tensor | None = None,
    norm_epsilon: float = 0.0,
) -> tuple[Tensor, ...]:
    q = Quantizer.parse(quantizer)
    lead, k = tuple(x.shape[:-1]), x.shape[-1] // (2 if prologue == "silu_mul" else 1)
    return (
        x.new_empty(_codes_shape(q, layout, lead, k), dtype=torch.int8 if layout == "values" else torch.uint8),
        x.new_empty(lead, dtype=torch.float32),
        x.new_empty(lead, dtype=torch.int32),
        x.new_empty((*lead, plane_row_bytes(k)) if mask else (0,), dtype=torch.uint8),
        x.new_empty((*lead, index_row_bytes(k)) if q.sparse else (0,), dtype=torch.uint8),
    )


@_fake("dequantize")
def _(
    codes: Tensor, scale: Tensor, index: Tensor | None, quantizer: str, layout: str, k: int, dtype: torch.dtype
) -> Tensor:
    return scale.new_empty((*scale.shape, k), dtype=dtype)


@_fake("quantize_backward")
def _(grad: Tensor, mask: Tensor, quantizer: str) -> Tensor:
    return grad.new_empty(grad.shape)


@_fake("pack")
def _(codes: Tensor, grid: str, layout: str) -> Tensor:
    lead, k = codes.shape[:-1], codes.shape[-1]
    return codes.new_empty(
        (grid_bits(grid), *lead, plane_row_bytes(k)) if layout == "planes" else (*lead, packed_row_bytes(k))
    )


@_fake("unpack")
def _(packed: Tensor, grid: str, layout: str, k: int) -> Tensor:
    return packed.new_empty((*packed.shape[1 if layout == "planes" else 0 : -1], k))


@_fake("gemm_int8", "gemm_int4", "gemm_planes")
def _(
    a: Tensor,
    a_scale: Tensor,
    a_sum: Tensor,
    a_grid: str,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    w_grid: str,
    k: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    a_layout: str = "",
) -> Tensor:
    return a_scale.new_empty((a_scale.shape[0], w_scale.shape[0]), dtype=dtype)


@_fake("gemm_sparse")
def _(
    a: Tensor,
    a_scale: Tensor,
    a_sum: Tensor,
    a_grid: str,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    w_index: Tensor,
    w_grid: str,
    k: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    a_layout: str = "",
) -> Tensor:
    return a_scale.new_empty((a_scale.shape[0], w_scale.shape[0]), dtype=dtype)


@_fake("gemm_weight_only")
def _(x: Tensor, w: Tensor, w_scale: Tensor, w_grid: str, w_layout: str, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], w_scale.shape[0]))


@_fake("linear")
def _(
    x: Tensor,
    a_quantizer: str,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    w_index: Tensor | None,
    w_quantizer: str,
    bias: Tensor | None,
    prologue: str = "none",
    norm_weight: Tensor | None = None,
    norm_epsilon: float = 0.0,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_scale.shape[0]))


# ---- gradients ----


def _hadamard_setup(ctx: Any, inputs: tuple[Tensor, int | None], output: Tensor) -> None:
    ctx.block = inputs[1]


def _hadamard_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _op("hadamard")(grad, ctx.block), None


library.register_autograd("quest::hadamard", _hadamard_backward, setup_context=_hadamard_setup)


# The other operations have none: their results never require a gradient, whatever their arguments do (the estimators
# give gradients, one layer above). Falling through autograd says so, and costs a call nothing.
_library = library.Library("quest", "IMPL")  # type: ignore[no-untyped-call]
for _name in (
    "quantize",
    "dequantize",
    "quantize_backward",
    "gemm_int8",
    "gemm_int4",
    "gemm_planes",
    "gemm_sparse",
    "gemm_weight_only",
    "linear",
):
    _library.impl(_name, library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
