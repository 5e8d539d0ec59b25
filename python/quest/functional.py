"""fake_quantize: x -> x_hat in one differentiable step, for any tensor, outside of a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quest import ops
from quest.quantizer import Quantizer


class _FakeQuantize(torch.autograd.Function):
    """Keeps the mask bits alone for backward: K/8 bytes a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer, mask: bool) -> Tensor:
        codes = ops.quantize(x, quantizer, "codes", mask)
        ctx.save_for_backward(codes.mask)
        ctx.quantizer = quantizer
        index = codes.pair_index if quantizer.sparse else None
        return ops.dequantize(codes.codes, codes.scale, index, quantizer, "codes", x.shape[-1], x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return ops.quantize_backward(grad, mask, ctx.quantizer), None, None


def fake_quantize(x: Tensor, quantizer: Quantizer | str) -> Tensor:
    """x_hat, the nearest point of the grid, with the estimator's gradient dx = (g M) H^T (paper, section 3).

    x: [*, K] float32, bfloat16 or float16; each row (all leading dimensions) has its own scale. Returns the same
    shape and dtype: in rotated space, unless the quantizer's output is "original" or its rotation "none".
    A row with a NaN or an infinity gives a row of NaN and passes no gradient.
    """
    q = Quantizer.parse(quantizer) if isinstance(quantizer, str) else quantizer
    mask = torch.is_grad_enabled() and x.requires_grad
    return _FakeQuantize.apply(x, q, mask)  # type: ignore[no-untyped-call,no-any-return]
