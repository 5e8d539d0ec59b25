"""The dtype that a model's products run in, the same in training and in inference.

Weights stay float32. On CUDA autocast rounds the operands of every product to bfloat16, whose tensor cores are an
order of magnitude faster than those of float32; a CPU computes in the dtype of the weights, which it does about as
fast. A model evaluated where it was trained thus takes the very products that it was trained with.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["auto", "bfloat16", "float32"]


def product_dtype(weight: Tensor, precision: Precision = "auto") -> torch.dtype:
    """The dtype of the products of a model.

    Args:
        weight: one of the model's real parameters, such as its embedding.
        precision: `auto` is bfloat16 for float32 weights on CUDA, else the weights' own dtype.
    """
    if precision == "auto":
        return torch.bfloat16 if weight.is_cuda and weight.dtype == torch.float32 else weight.dtype
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]


def autocast(weight: Tensor, precision: Precision = "auto") -> AbstractContextManager[Any]:
    """A block whose products run in `product_dtype`; where that is the weights' own, whatever is around it stands."""
    dtype = product_dtype(weight, precision)
    return nullcontext() if dtype == weight.dtype else torch.autocast(weight.device.type, dtype)
