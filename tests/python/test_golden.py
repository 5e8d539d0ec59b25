"""The vectors of the paper's public code, forward and gradient, for the reference and for the operations.

Codes and mask bits may differ where an element lies within one float32 rounding of a threshold: at most 1e-3 of them.
So that one such element counts once, x_hat and dx are compared in rotated space, where both are elementwise.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from quest import Quantizer, fake_quantize, reference

# Not composed quantizers (learned steps, pruning alone), and cases where the paper's code slips: an inverted mask, a
# clamp without its division, a lopsided ternary grid.
NOT_BINDING = re.compile(
    r"LSQ.*|PACTQuantizer.*|FourEightMaskedQuantizer.*|TrustQuantizer\|bits=4,centered=False|STEQuantizer\|bits=1\.585"
)
INTEGER_BITS = (1, 2, 3, 4, 8)

INT_CASES = [
    f"{prefix}Quantizer|bits={bits}"
    for prefix in (
        "STE",
        "Clip",
        "Trust",
        "HalfHadamardClip",
        "HadamardClip",
        "HalfHadamardTrust",
        "HadamardTrust",
    )
    for bits in INTEGER_BITS
]
TWO_WIDTHS = [
    f"{prefix}Quantizer|bits={bits}"
    for prefix in (
        "GaussianSTE",
        "GaussianClip",
        "GaussianTrust",
        "HadamardGaussianClip",
        "HalfHadamardGaussianClip",
        "HalfHadamardGaussianTrust",
        "HadamardGaussianTrust",
        "FourEightSTE",
        "FourEightClip",
        "FourEightTrust",
        "HalfHadamardFourEightTrust",
        "HadamardFourEightTrust",
    )
    for bits in (2, 4)
]
FP4_CASES = [
    f"{prefix}Quantizer|"
    for prefix in (
        "FP4STE",
        "FP4Clip",
        "FP4Trust",
        "HalfHadamardFP4Clip",
        "HadamardFP4Clip",
        "HalfHadamardFP4Trust",
        "HadamardFP4Trust",
    )
]
OTHER_CASES = ["HalfHadamardClipQuantizer|bits=1,clip_scale=1.3", "STEQuantizer|bits=4,centered=False"]
CASES = INT_CASES + TWO_WIDTHS + FP4_CASES + OTHER_CASES


def composed(case: str) -> Quantizer:
    """The composed quantizer of a class name and its arguments in the paper's code."""
    name, _, text = case.partition("|")
    arguments = dict(pair.split("=") for pair in text.split(",") if pair)
    match = re.fullmatch(r"(HalfHadamard|Hadamard)?(Gaussian|FourEight|FP4)?(STE|Clip|Trust)Quantizer", name)
    assert match, name
    rotation, form, estimator = match.groups()
    grid = {"Gaussian": "gauss", "FP4": "fp4"}.get(form, "int")
    return Quantizer(
        grid="int_zero" if arguments.get("centered") == "False" else grid,
        bits=int(arguments.get("bits", 4)),
        rotation="hadamard" if rotation else "none",
        sparsity="4:8" if form == "FourEight" else "none",
        estimator=estimator.lower(),
        # That code's clip scale is 1 unless said, at one bit too.
        bound=float(arguments.get("clip_scale", 1)) if estimator == "Clip" else None,
        output="original" if rotation == "Hadamard" else "rotated",
    )


def assert_same(got: Tensor, expected: np.ndarray, rotate: bool) -> None:
    """Equal but for a share of 1e-3. Tolerance: float32 rounding of sums of 128 terms, and 1e-8 that the paper's code
    adds to the scale of every grid (here: of the int grid alone), which counts in the row whose rms is 1e-3."""
    difference = got.detach().double().cpu() - torch.from_numpy(expected).double()
    if rotate:
        difference = reference.hadamard(difference)
    row_size = torch.from_numpy(expected).double().abs().amax(-1, keepdim=True)
    assert (difference.abs() > 1e-7 + 2e-6 * row_size).double().mean() <= 1e-3


def check(case: str, golden: dict[str, np.ndarray], x: Tensor, x_hat: Tensor) -> None:
    q = composed(case)
    x_hat.backward(torch.from_numpy(golden["g"]).to(x_hat))
    assert x.grad is not None
    assert_same(x_hat, golden[case + "|y"], rotate=q.rotation == "hadamard" and q.output == "original")
    assert_same(x.grad, golden[case + "|dx"], rotate=q.rotation == "hadamard")


def test_every_vector_is_used_or_named(golden: dict[str, np.ndarray]) -> None:
    names = {key.rpartition("|")[0] for key in golden if key not in ("x", "g")}
    assert {name for name in names if not NOT_BINDING.fullmatch(name)} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_reference(case: str, golden: dict[str, np.ndarray]) -> None:
    x = torch.from_numpy(golden["x"]).double().requires_grad_()
    check(case, golden, x, reference.fake_quantize(x, composed(case)))


@pytest.mark.parametrize("case", CASES)
def test_operations(case: str, golden: dict[str, np.ndarray], device: torch.device) -> None:
    x = torch.from_numpy(golden["x"]).to(device).requires_grad_()
    check(case, golden, x, fake_quantize(x, composed(case)))


def test_pruning(golden: dict[str, np.ndarray]) -> None:
    """4:8 pruning without a grid behind it, which is no composed quantizer: the pattern, forward and backward."""
    keep = reference.kept(torch.from_numpy(golden["x"]).double()).numpy()
    np.testing.assert_array_equal(golden["x"] * keep, golden["FourEightMaskedQuantizer||y"])
    np.testing.assert_array_equal(golden["g"] * keep, golden["FourEightMaskedQuantizer||dx"])
