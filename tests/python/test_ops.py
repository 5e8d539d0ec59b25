"""What all operations share: opcheck (schema, fake, autograd), error texts, and a clear word without the extension."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library

from quest import Quantizer, ops

INT4 = Quantizer.parse("int4-hadamard-trust")
SPARSE = Quantizer.parse("int4-hadamard-4:8-trust")
FLOAT, BFLOAT = torch.float32, torch.bfloat16


def operand(rows: int, q: Quantizer, layout: ops.Layout, device: torch.device, k: int = 96) -> ops.Codes:
    return ops.quantize(torch.randn(rows, k, device=device), q, layout)


def dense(layout: ops.Layout, w_layout: ops.Layout, device: torch.device, **other: Any) -> tuple[Any, ...]:
    """Arguments of a dense product of int4 codes, [3, 96] x [5, 96]."""
    a, w = operand(3, INT4, layout, device), operand(5, INT4, w_layout, device)
    bias = torch.randn(5, device=device)
    named = {
        "a": a.codes, "a_scale": a.scale, "a_sum": a.code_sum, "a_grid": "int4",
        "w": w.codes, "w_scale": w.scale, "w_sum": w.code_sum, "w_grid": "int4", "k": 96, "bias": bias, "dtype": BFLOAT,
    }  # fmt: skip
    return tuple({**named, **other}.values())


def sparse(device: torch.device, a_layout: ops.Layout = "values") -> tuple[Any, ...]:
    a, w = operand(3, INT4, a_layout, device), operand(5, SPARSE, "packed", device)
    left = (a.codes, a.scale, a.code_sum, "int4")
    return (*left, w.codes, w.scale, w.code_sum, w.pair_index, "int4", 96, None, FLOAT, a_layout)


def packed_weight(device: torch.device) -> tuple[Any, ...]:
    w = operand(5, INT4, "packed", device)
    return w.codes, w.scale, w.code_sum, None, str(INT4)


def samples(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.randn(2, 3, 96, device=device)
    half = x.to(BFLOAT)
    codes, kept = ops.quantize(x, INT4), ops.quantize(x, SPARSE, "packed")
    planes = ops.quantize(x, INT4, "planes")
    return [
        ("hadamard", (x.clone().requires_grad_(), None)),
        ("hadamard", (half, 4)),
        ("quantize", (x, str(INT4))),
        ("quantize", (x, str(INT4), "packed")),
        ("quantize", (half, "int8-none-clip", "values", False)),
        ("quantize", (x, "int3-hadamard-ste", "planes", True)),
        ("quantize", (x, str(INT4), "even_odd", True)),
        ("quantize", (x, str(SPARSE), "packed", True)),
        ("quantize", (x, str(SPARSE), "values", True)),
        ("quantize", (half, str(INT4), "packed", True, "rms_norm", half[0, 0].clone(), 1e-5)),
        ("quantize", (x, str(INT4), "planes", False, "silu_mul")),
        ("dequantize", (codes.codes, codes.scale, None, str(INT4), "codes", 96, FLOAT)),
        ("dequantize", (kept.codes, kept.scale, kept.pair_index, str(SPARSE), "packed", 96, BFLOAT)),
        ("dequantize", (planes.codes, planes.scale, None, str(INT4), "planes", 96, FLOAT)),
        ("quantize_backward", (half, codes.mask, str(INT4))),
        ("pack", (codes.codes, "int4", "packed")),
        ("pack", (codes.codes, "int4", "planes")),
        ("unpack", (ops.pack(codes.codes, "int4", "packed"), "int4", "packed", 96)),
        ("unpack", (planes.codes, "int4", "planes", 96)),
        ("gemm_int8", dense("values", "values", device)),
        ("gemm_int8", dense("codes", "codes", device, bias=None, dtype=FLOAT)),
        ("gemm_int4", dense("values", "packed", device)),
        ("gemm_planes", dense("planes", "planes", device)),
        ("gemm_sparse", sparse(device)),
        ("gemm_sparse", sparse(device, "even_odd")),
        ("gemm_weight_only", (x[0], *packed_weight(device)[:2], "int4", "packed", None)),
        ("linear", (x, str(INT4), *packed_weight(device), torch.randn(5, device=device))),
        ("linear", (half, "none", *packed_weight(device), None)),
        ("linear", (x, str(INT4), *packed_weight(device), None, "rms_norm", x[0, 0].clone(), 1e-5)),
        ("linear", (half.repeat(1, 1, 2), str(INT4), *packed_weight(device), None, "silu_mul")),
    ]


NAMES = [name for name, _ in samples(torch.device("meta"))]


def test_every_op_has_a_sample() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("quest::")}
    assert registered == {f"quest::{name}" for name in NAMES}


@pytest.mark.parametrize("sample", range(len(NAMES)), ids=[f"{name}-{i}" for i, name in enumerate(NAMES)])
def test_opcheck(sample: int, device: torch.device) -> None:
    name, arguments = samples(device)[sample]
    library.opcheck(getattr(torch.ops.quest, name).default, arguments)


def test_estimators_alone_give_gradients(device: torch.device) -> None:
    """Of the operations hadamard alone has a gradient: backward through codes is an error, not a silent zero."""
    for name, arguments in samples(device):
        leaves = [
            a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
        ]
        results = getattr(torch.ops.quest, name)(*leaves)
        results = [results] if isinstance(results, Tensor) else results
        assert [result.requires_grad for result in results] == [name == "hadamard"] * len(results)


X = (4, 96)
BAD_CALLS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "hadamard block no power of two": (
        lambda x: ops.hadamard(x, 7),
        "hadamard: expected block to be a power of two from 1 to 32768, got 7",
    ),
    "hadamard block that does not divide": (
        lambda x: ops.hadamard(x, 64),
        "hadamard: .* got block 64 and last dimension 96; use a divisor, at most 32",
    ),
    "hadamard dtype": (
        lambda x: ops.hadamard(x.double()),
        "hadamard: expected x of dtype float32, bfloat16 or float16, got Double",
    ),
    "hadamard scalar": (
        lambda x: ops.hadamard(x[0, 0]),
        r"hadamard: expected x with at least 1 dimension\(s\), got shape \[\]",
    ),
    "quantize grid": (lambda x: torch.ops.quest.quantize(x, "int9-hadamard-trust"), "expected bits from 1 to 8, got 9"),
    "quantize rotation": (
        lambda x: torch.ops.quest.quantize(x, "int4-hadamrd-trust"),
        'rotation: .* got "hadamrd"; did you mean "hadamard"',
    ),
    "quantize layout": (
        lambda x: torch.ops.quest.quantize(x, str(INT4), "code"),
        'layout: .* got "code"; did you mean "codes"',
    ),
    "quantize dtype": (lambda x: ops.quantize(x.long(), INT4), "quantize: expected x of dtype .* got Long"),
    "quantize gauss values": (
        lambda x: ops.quantize(x, Quantizer("gauss"), "values"),
        "quantize: expected a grid with integer values for layout values, got gauss4; use layout codes",
    ),
    "quantize packed int5": (
        lambda x: ops.quantize(x, Quantizer(bits=5), "packed"),
        "quantize: expected at most 4 bits for layout packed, got grid int5; use layout codes or planes",
    ),
    "quantize sparse planes": (lambda x: ops.quantize(x, SPARSE, "planes"), "sparse quantizer, got planes; use packed"),
    "quantize sparse values": (
        lambda x: ops.quantize(x, Quantizer.parse("int8-none-4:8-ste"), "values"),
        "quantize: expected less than 8 bits for layout values of a 4:8 sparse quantizer, got int8; use layout codes",
    ),
    "quantize sparse k": (
        lambda x: ops.quantize(x[:, :90], SPARSE),
        "quantize: expected 8 to divide the last dimension of a 4:8 sparse quantizer, got 90",
    ),
    "quantize prologue": (
        lambda x: torch.ops.quest.quantize(x, str(INT4), prologue="rmsnorm"),
        'prologue: .* got "rmsnorm"; did you mean "rms_norm"',
    ),
    "quantize odd silu_mul": (
        lambda x: ops.quantize(x[:, :95], INT4, prologue="silu_mul"),
        r"quantize: expected x with an even last dimension, .* prologue silu_mul, got shape \[4, 95\]; concatenate",
    ),
    "quantize silu_mul k": (
        lambda x: ops.quantize(x[:, :8], SPARSE, prologue="silu_mul"),
        "quantize: expected 8 to divide the last dimension of a 4:8 sparse quantizer, got 4",
    ),
    "quantize without norm_weight": (
        lambda x: ops.quantize(x, INT4, prologue="rms_norm"),
        "quantize: expected a norm_weight for prologue rms_norm, got none; pass the weight of the norm",
    ),
    "quantize norm_weight alone": (
        lambda x: ops.quantize(x, INT4, norm_weight=x[0]),
        "quantize: expected no norm_weight for prologue none, got one; leave it out, or use rms_norm",
    ),
    "quantize norm_weight shape": (
        lambda x: ops.quantize(x, INT4, prologue="rms_norm", norm_weight=x[0, :95]),
        r"quantize: expected norm_weight of shape \[96\], got \[95\]",
    ),
    "quantize norm_weight dtype": (
        lambda x: ops.quantize(x, INT4, prologue="rms_norm", norm_weight=x[0].bfloat16()),
        "quantize: expected norm_weight of dtype Float, got BFloat16; convert it",
    ),
    "dequantize shape": (
        lambda x: ops.dequantize(*ops.quantize(x[:, :90], INT4)[:2], None, INT4, "codes", 96, FLOAT),
        r"dequantize: expected codes .* of shape \[4, 96\], got \[4, 90\]",
    ),
    "dequantize scale dtype": (
        lambda x: ops.dequantize(ops.quantize(x, INT4).codes, x[:, 0].double(), None, INT4, "codes", 96, FLOAT),
        "dequantize: expected scale of dtype Float, got Double",
    ),
    "dequantize out dtype": (
        lambda x: ops.dequantize(*ops.quantize(x, INT4)[:2], None, INT4, "codes", 96, torch.int32),
        "dequantize: expected dtype of dtype float32, bfloat16 or float16, got Int",
    ),
    "dequantize without index": (
        lambda x: ops.dequantize(*ops.quantize(x, SPARSE)[:2], None, SPARSE, "codes", 96, FLOAT),
        "dequantize: expected an index for quantizer .*, got none; pass the index",
    ),
    "backward mask shape": (
        lambda x: ops.quantize_backward(x, ops.quantize(x[:2], INT4).mask, INT4),
        r"quantize_backward: expected mask of shape \[4, 16\], got \[2, 16\]",
    ),
    "pack range": (
        lambda x: ops.pack(torch.full_like(x, 9, dtype=torch.uint8), "int3", "planes"),
        "pack: expected codes from 0 to 7 for grid int3, got 9 at row 0, column 0",
    ),
    "pack bits": (
        lambda x: ops.pack(ops.quantize(x, INT4).codes, "int5", "packed"),
        "pack: expected at most 4 bits for layout packed, got grid int5; use layout planes",
    ),
    "pack layout": (
        lambda x: torch.ops.quest.pack(ops.quantize(x, INT4).codes, "int4", "codes"),
        'pack: expected layout "packed" or "planes", got "codes"',
    ),
    "unpack shape": (
        lambda x: ops.unpack(ops.quantize(x, INT4).codes, "int4", "packed", 96),
        r"unpack: expected packed \(k = 96\) of shape \[4, 48\], got \[4, 96\]",
    ),
    "gemm k": (
        lambda x: torch.ops.quest.gemm_int8(*dense("values", "values", x.device, k=95)),
        r"gemm_int8: expected a \(int4, values, k = 95\) of shape \[3, 95\], got \[3, 96\]",
    ),
    "gemm scale shape": (
        lambda x: torch.ops.quest.gemm_int4(*dense("values", "packed", x.device, a_scale=x[:2, 0].contiguous())),
        r"gemm_int4: expected a_scale of shape \[3\], got \[2\]",
    ),
    "gemm sum dtype": (
        lambda x: torch.ops.quest.gemm_int8(*dense("values", "values", x.device, w_sum=x[0, :5].long())),
        "gemm_int8: expected w_sum of dtype Int, got Long",
    ),
    "gemm bias": (
        lambda x: torch.ops.quest.gemm_planes(*dense("planes", "planes", x.device, bias=x[0, :3].contiguous())),
        r"gemm_planes: expected bias of shape \[5\], got \[3\]",
    ),
    "gemm dtype": (
        lambda x: torch.ops.quest.gemm_int8(*dense("values", "values", x.device, dtype=torch.float64)),
        "gemm_int8: expected dtype of dtype float32, bfloat16 or float16, got Double",
    ),
    "gemm gauss": (
        lambda x: torch.ops.quest.gemm_int8(*dense("codes", "codes", x.device, a_grid="gauss4")),
        "gemm_int8: expected a on a grid with integer values, got gauss4",
    ),
    "gemm planes grid": (
        lambda x: torch.ops.quest.gemm_planes(*dense("planes", "planes", x.device, a_grid="fp4")),
        "gemm_planes: expected int grids of 1 to 4 bits, got fp4",
    ),
    "weight-only values": (
        lambda x: ops.gemm_weight_only(x, *ops.quantize(x, INT4, "values")[:2], "int4", "values", None),
        "gemm_weight_only: expected a weight in layout codes, packed or planes, got values",
    ),
    "weight-only order": (
        lambda x: ops.gemm_weight_only(x, *ops.quantize(x, INT4, "even_odd")[:2], "int4", "even_odd", None),
        "gemm_weight_only: expected a weight in layout codes, packed or planes, got even_odd",
    ),
    "linear rotations": (
        lambda x: torch.ops.quest.linear(x, "int4-none-trust", *packed_weight(x.device), None),
        "linear: the rotations of .* differ",
    ),
    "linear gauss": (
        lambda x: torch.ops.quest.linear(x, "gauss4-hadamard-trust", *packed_weight(x.device), None),
        "linear: .* is no product of integers; dequantize both",
    ),
    "linear sparse activations": (
        lambda x: torch.ops.quest.linear(x, str(SPARSE), *packed_weight(x.device), None),
        "linear: expected a dense activation quantizer",
    ),
    "linear prologue of real activations": (
        lambda x: torch.ops.quest.linear(x, "none", *packed_weight(x.device), None, "silu_mul"),
        "linear: expected prologue none and no norm_weight where a_quantizer is none, .* got silu_mul; apply it to x",
    ),
    "linear norm_weight of real activations": (
        lambda x: torch.ops.quest.linear(x, "none", *packed_weight(x.device), None, norm_weight=x[0]),
        "linear: expected prologue none and no norm_weight where a_quantizer is none, .* got none and one; apply",
    ),
    "linear norm_weight": (
        lambda x: torch.ops.quest.linear(x, str(INT4), *packed_weight(x.device), None, "rms_norm"),
        "linear: expected a norm_weight for prologue rms_norm, got none",
    ),
    "linear silu_mul k": (
        lambda x: torch.ops.quest.linear(x, str(INT4), *packed_weight(x.device), None, "silu_mul"),
        r"linear: expected w \(int4, packed, k = 48\) of shape \[5, 32\], got \[5, 48\]",
    ),
    "linear k": (
        lambda x: torch.ops.quest.linear(x[:, :64], str(INT4), *packed_weight(x.device), None),
        r"linear: expected w \(int4, packed, k = 64\) of shape \[5, 32\], got \[5, 48\]",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_errors_name_operation_argument_expected_and_got(case: str, device: torch.device) -> None:
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call(torch.randn(X, device=device))


def test_operands_on_two_devices(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("needs two devices")
    elsewhere = operand(5, INT4, "values", torch.device("cpu")).codes
    with pytest.raises(ValueError, match=r"gemm_int8: expected w on the same device as a; move one"):
        torch.ops.quest.gemm_int8(*dense("values", "values", device, w=elsewhere))
    with pytest.raises(ValueError, match=r"quantize: expected norm_weight on the same device as x; move one"):
        ops.quantize(torch.randn(X, device=device), INT4, prologue="rms_norm", norm_weight=torch.ones(96))


@pytest.mark.parametrize("sample", range(len(NAMES)), ids=[f"{name}-{i}" for i, name in enumerate(NAMES)])
def test_one_operand_on_meta(sample: int) -> None:
    """The fake computes nothing, so what it gives must not pass for a result."""
    name, arguments = samples(torch.device("cpu"))[sample]
    tensors = [i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)]
    for i in tensors if len(tensors) > 1 else []:
        mixed = (*arguments[:i], arguments[i].to("meta"), *arguments[i + 1 :])
        with pytest.raises(ValueError, match=f"{name}: expected .* on the same device as .*, got .*meta"):
            getattr(torch.ops.quest, name)(*mixed)


def test_import_without_the_extension_says_what_to_do() -> None:
    program = "import sys; sys.modules['quest._C'] = None; import quest"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "the compiled extension quest._C cannot be imported" in result.stderr
    assert "pip install ." in result.stderr
