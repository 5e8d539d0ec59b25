"""QuestLinear, the trainable low-bit linear layer, and PackedLinear, the same layer with its weight stored as codes.

    forward   y  = x_hat w_hat^T + bias    an exact integer product times the row scales, where both grids have integers
    backward  dx = ((dy w_hat) M_x) H^T    and  dw = ((dy^T x_hat) M_w) H^T, both products in the compute dtype

Between the two, codes, scales and mask bits are kept, never the real value of a quantized operand (paper, section 3).
When both operands are rotated the product is taken in rotated space, for (x H)(w H)^T = x w^T; when only one is, that
one is rotated back first. The compute dtype is autocast's where autocast is on, else the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest import ops
from quest._C import plan_operands
from quest.ops import Codes, Layout
from quest.quantizer import LinearQuantizers, Quantizer, QuantizerLike, as_quantizer


@dataclass(frozen=True)
class LinearPlan:
    """How one layer is computed: its quantizers, each with the space of its x_hat, their layouts, and the product."""

    a: Quantizer | None
    w: Quantizer | None
    a_layout: Layout
    w_layout: Layout
    family: str  # of the training product: int8, int4, planes, sparse; or dequantized: F.linear on x_hat and w_hat
    packed_op: bool  # whether torch.ops.quest.linear has a kernel for it


@cache
def plan_linear(a: Quantizer | None, w: Quantizer | None) -> LinearPlan:
    """The plan of a layer with these quantizers; None is a real operand."""
    same_space = a is not None and w is not None and a.rotation == w.rotation
    a = None if a is None else replace(a, output="rotated" if same_space else "original")
    w = None if w is None else replace(w, output="rotated" if same_space else "original")
    if w is None:
        return LinearPlan(a, w, "codes", "codes", "dequantized", packed_op=False)
    operands = plan_operands(w.grid_name, a.grid_name if a else None, w.sparsity)
    family, w_layout = operands["family"], cast(Layout, operands["w"])
    if a is None:
        return LinearPlan(a, w, "codes", w_layout, "dequantized", packed_op=family == "weight_only")
    if family == "dequantized" or not same_space or a.sparse:
        return LinearPlan(a, w, "codes", w_layout, "dequantized", packed_op=False)
    return LinearPlan(a, w, cast(Layout, operands["a"]), w_layout, family, packed_op=True)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # "meta" has no autocast, and asking for it is an error
        return torch.get_autocast_dtype(device)
    return x.dtype


def _x_hat(operand: Codes | Tensor, quantizer: Quantizer | None, layout: Layout, k: int, dtype: torch.dtype) -> Tensor:
    """[rows, k] in dtype: what the codes stand for, or the real operand itself where there is no quantizer."""
    if quantizer is None or isinstance(operand, Tensor):
        return cast(Tensor, operand).to(dtype)
    index = operand.pair_index if quantizer.sparse else None
    return ops.dequantize(operand.codes, operand.scale, index, quantizer, layout, k, dtype)


def _product(
    plan: LinearPlan, a: Codes | Tensor, w: Codes | Tensor, bias: Tensor | None, k: int, dtype: torch.dtype
) -> Tensor:
    """y [M, N] in dtype, of operands that are codes where the plan quantizes them, else real."""
    if plan.family == "dequantized":
        a_hat, w_hat = _x_hat(a, plan.a, plan.a_layout, k, dtype), _x_hat(w, plan.w, plan.w_layout, k, dtype)
        return F.linear(a_hat, w_hat, None if bias is None else bias.to(dtype))
    a, w = cast(Codes, a), cast(Codes, w)
    a_grid, w_grid = cast(Quantizer, plan.a).grid_name, cast(Quantizer, plan.w).grid_name
    bias = None if bias is None else bias.float()
    left = (a.codes, a.scale, a.code_sum, a_grid)
    if plan.family == "sparse":
        both = (*left, w.codes, w.scale, w.code_sum, w.pair_index, w_grid)
        return ops.gemm_sparse(*both, k, bias, dtype, plan.a_layout)
    family = cast(ops.Family, plan.family)
    right = (w.codes, w.scale, w.code_sum, w_grid)
    return ops.gemm(family, *left, *right, k, bias, dtype, plan.a_layout)


class _QuestLinear(torch.autograd.Function):
    """y [M, N] of x [M, K]. weight is the real parameter, which gets the gradient; w_codes its codes, if it has any."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: LinearPlan,
        dtype: torch.dtype,
        x_mask: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *w_codes: Tensor,
    ) -> Tensor:
        a = ops.quantize(x, plan.a, plan.a_layout, mask=x_mask) if plan.a else x
        w = Codes(*w_codes) if plan.w else weight
        ctx.plan, ctx.dtype = plan, dtype
        ctx.input_dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.k, ctx.saved_for_a = x.shape[-1], len(a) if plan.a else 1
        ctx.save_for_backward(*(a if plan.a else [a]), *(w if plan.w else [w]))
        return _product(plan, a, w, bias, x.shape[-1], dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plan, dtype, k = ctx.plan, ctx.dtype, ctx.k
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second access
        saved_a, saved_w = saved[: ctx.saved_for_a], saved[ctx.saved_for_a :]
        a = Codes(*saved_a) if plan.a else saved_a[0]
        w = Codes(*saved_w) if plan.w else saved_w[0]
        x_dtype, weight_dtype, bias_dtype = ctx.input_dtypes
        dx = dw = db = None
        if ctx.needs_input_grad[3]:
            dx = dy @ _x_hat(w, plan.w, plan.w_layout, k, dtype)
            dx = (ops.quantize_backward(dx, a.mask, plan.a) if plan.a else dx).to(x_dtype)
        if ctx.needs_input_grad[4]:
            dw = dy.T @ _x_hat(a, plan.a, plan.a_layout, k, dtype)
            dw = (ops.quantize_backward(dw, w.mask, plan.w) if plan.w else dw).to(weight_dtype)
        if ctx.needs_input_grad[5]:
            db = dy.sum(0, dtype=torch.float32).to(bias_dtype)
        return None, None, None, dx, dw, db, *[None] * (len(saved_w) if plan.w else 0)


def _check_features(in_features: int, *quantizers: Quantizer | None) -> None:
    for quantizer in quantizers:
        if quantizer is not None and quantizer.sparse and in_features % 8 != 0:
            raise ValueError(
                f"QuestLinear: in_features: expected a multiple of 8 for {quantizer}, got {in_features}; "
                "leave this layer dense by an override"
            )


def _check_input(layer: str, input: Tensor, in_features: int) -> None:
    if input.shape[-1] != in_features:
        raise ValueError(
            f"{layer}: input: expected a last dimension of {in_features} features, got shape {tuple(input.shape)}"
        )


class _InferenceOnly(torch.autograd.Function):
    """y, which depends on x without a gradient: backward is an error, where silence would train on a wrong one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "PackedLinear: expected no backward pass: packed layers are for inference; train the QuestLinear model and "
            "convert it afterwards"
        )


def _describe(weight: Quantizer | None, activation: Quantizer | None) -> str:
    return f"weight={weight or 'none'}, activation={activation or 'none'}"


class QuestLinear(nn.Linear):
    """nn.Linear whose weight and input are quantized in the forward pass, with the estimators' gradients.

    x [*, in_features] -> [*, out_features], in autocast's dtype where that is on, else in the dtype of x (float32,
    bfloat16 or float16, as the parameters). Parameters and state_dict are those of nn.Linear: the real master weight.
    weight_quantizer, activation_quantizer: quest.Quantizer, its string, or None for a real operand (not both). Their
    `output` does not matter here: the layer picks the space of the product.
    Raises ValueError for a 4:8 quantizer with in_features not a multiple of 8.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_quantizer: QuantizerLike = "int4",
        activation_quantizer: QuantizerLike = "int4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight_quantizer = as_quantizer(weight_quantizer)
        self.activation_quantizer = as_quantizer(activation_quantizer)
        if self.weight_quantizer is None and self.activation_quantizer is None:
            raise ValueError("QuestLinear: expected a weight or an activation quantizer, got neither; use nn.Linear")
        _check_features(in_features, self.weight_quantizer, self.activation_quantizer)
        self.plan = plan_linear(self.activation_quantizer, self.weight_quantizer)
        self.frozen_codes: Codes | None = None  # set within quest.frozen_weights

    @staticmethod
    def from_linear(linear: nn.Linear, quantizers: LinearQuantizers) -> QuestLinear:
        """A layer that shares the parameters of `linear`."""
        layer = QuestLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            weight_quantizer=quantizers.weight,
            activation_quantizer=quantizers.activation,
            device="meta",
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def weight_codes(self) -> Codes:
        """The weight as its quantizer gives it, in the layout of the plan. Raises ValueError where it has none."""
        if self.plan.w is None:
            raise ValueError("QuestLinear: expected a weight quantizer, got none: this layer quantizes its input alone")
        mask = self.weight.requires_grad and torch.is_grad_enabled()
        return ops.quantize(self.weight.detach(), self.plan.w, self.plan.w_layout, mask=mask)

    def forward(self, input: Tensor) -> Tensor:
        _check_input("QuestLinear", input, self.in_features)
        x = input.reshape(-1, self.in_features)
        w_codes: Codes | tuple[()] = ()
        if self.plan.w is not None:
            w_codes = self.frozen_codes if self.frozen_codes is not None else self.weight_codes()
        x_mask = x.requires_grad and torch.is_grad_enabled()
        dtype = _compute_dtype(x)
        y = _QuestLinear.apply(self.plan, dtype, x_mask, x, self.weight, self.bias, *w_codes)  # type: ignore[no-untyped-call]
        return cast(Tensor, y).reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_describe(self.weight_quantizer, self.activation_quantizer)}"


_Prologue = tuple[ops.Prologue, Tensor | None, float]  # as the operations take it: kind, norm_weight, norm_epsilon
_NO_PROLOGUE: _Prologue = ("none", None, 0.0)


class PackedLinear(nn.Module):
    """The inference form of QuestLinear: the weight stored as codes, the product taken by one torch.ops.quest.linear.

    x [*, in_features] -> [*, out_features], in autocast's dtype where that is on, else in that of x. Without gradients.
    Buffers: weight_codes in the layout of the plan, weight_scale float32 [out], weight_code_sum int32 [out],
    weight_index (4:8 sparse weights only), bias float32 [out] or None; they keep these dtypes through .to(dtype). A
    new layer's buffers hold nothing: load_state_dict fills them (on "meta": with assign=True), or use `from_linear`.
    Products that have no integer or weight-only kernel (gauss, rotations that differ) are taken by F.linear on
    dequantized operands.
    prologue: a module that `fuse` made the layer apply to its input first, or None.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_code_sum: Tensor
    weight_index: Tensor | None
    bias: Tensor | None
    prologue: nn.Module | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_quantizer: Quantizer | str,
        activation_quantizer: QuantizerLike,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        quantizer = as_quantizer(weight_quantizer)
        if quantizer is None:
            raise ValueError(
                "PackedLinear: weight_quantizer: expected a quantizer, got none; keep the layer as nn.Linear"
            )
        self.weight_quantizer = quantizer
        self.activation_quantizer = as_quantizer(activation_quantizer)
        _check_features(in_features, self.weight_quantizer, self.activation_quantizer)
        self.plan = plan_linear(self.activation_quantizer, self.weight_quantizer)
        self.prologue = None
        self.prologue_kind: ops.Prologue = "none"
        # On "meta" quantize gives the shapes and dtypes of its results and computes nothing.
        shape = torch.empty(out_features, in_features, device="meta")
        codes = ops.quantize(shape, self.weight_quantizer, self.plan.w_layout, mask=False)
        index = codes.pair_index if self.weight_quantizer.sparse else None
        bias_shape = torch.empty(out_features, device="meta") if bias else None
        device = torch.get_default_device() if device is None else device
        self._set_buffers(
            *(
                None if t is None else torch.empty_like(t, device=device)
                for t in (codes.codes, codes.scale, codes.code_sum, index, bias_shape)
            )
        )

    def _set_buffers(
        self,
        codes: Tensor | None,
        scale: Tensor | None,
        code_sum: Tensor | None,
        index: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_code_sum", code_sum)
        self.register_buffer("weight_index", index)
        self.register_buffer("bias", bias)

    @staticmethod
    def from_linear(layer: QuestLinear) -> PackedLinear:
        """The packed form of a trained layer, on its device. Raises ValueError where its weight is not quantized."""
        if layer.weight_quantizer is None:
            raise ValueError(
                "PackedLinear: the layer quantizes its input alone: there is no weight to pack; keep it as it is"
            )
        packed = PackedLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            weight_quantizer=layer.weight_quantizer,
            activation_quantizer=layer.activation_quantizer,
            device="meta",
        )
        with torch.no_grad():
            codes = layer.weight_codes()
            bias = None if layer.bias is None else layer.bias.detach().float()
        packed._set_buffers(
            codes.codes, codes.scale, codes.code_sum, codes.pair_index if codes.pair_index.numel() else None, bias
        )
        return packed.train(layer.training)

    def fuse(self, kind: Literal["rms_norm", "silu_mul"], module: nn.Module) -> None:
        """From now on the layer applies `module` to its input first, within the kernel that quantizes it: what the
        module gives is not written to memory. Where there is no such kernel (a real input, another dtype than that of
        the norm's weight), the layer calls the module.

        kind: what it computes: rms_norm (an nn.RMSNorm over in_features), or silu_mul (no parameters; the layer's input
        then has 2 in_features). The module's parameters are now those of this layer, also in a state_dict.
        Raises ValueError for a layer that has a prologue, another kind, or a module that does not compute it.
        """
        if self.prologue is not None:
            raise ValueError(f"PackedLinear.fuse: expected a layer without a prologue, got one with {self.prologue}")
        if kind == "rms_norm":
            if not isinstance(module, nn.RMSNorm) or module.normalized_shape != (self.in_features,):
                raise ValueError(
                    f"PackedLinear.fuse: module: expected an nn.RMSNorm over {self.in_features} features for rms_norm, "
                    f"got {module}"
                )
        elif kind != "silu_mul":
            raise ValueError(f"PackedLinear.fuse: kind: expected rms_norm or silu_mul, got {kind!r}")
        self.prologue_kind, self.prologue = kind, module

    def _fused_prologue(self, input: Tensor) -> _Prologue | None:
        """The prologue as the operations take it; None where the module has to be called."""
        if self.prologue is None:
            return _NO_PROLOGUE
        if self.plan.a is None:
            return None
        if self.prologue_kind == "silu_mul":
            return "silu_mul", None, 0.0
        norm = cast(nn.RMSNorm, self.prologue)
        if norm.weight is None or norm.eps is None or norm.weight.dtype != input.dtype:
            return None
        return "rms_norm", norm.weight, norm.eps

    def forward(self, input: Tensor) -> Tensor:
        _check_input("PackedLinear", input, self.in_features * (2 if self.prologue_kind == "silu_mul" else 1))
        y = self._forward(input.detach())
        if torch.is_grad_enabled() and input.requires_grad:
            return cast(Tensor, _InferenceOnly.apply(input, y))  # type: ignore[no-untyped-call]
        return y

    def _forward(self, input: Tensor) -> Tensor:
        plan = self.plan
        fused = self._fused_prologue(input)
        if fused is None:
            with torch.no_grad():
                input = cast(nn.Module, self.prologue)(input)
        prologue = fused or _NO_PROLOGUE
        dtype = _compute_dtype(input)
        if plan.a is None:
            input = input.to(dtype)  # as F.linear does under autocast
        # The operation gives y in the dtype of its input. Where autocast asks for another, the input is quantized as it
        # is and the product written in that dtype: what QuestLinear does, to the bit.
        if plan.packed_op and plan.w and input.dtype == dtype:
            return ops.linear(
                input,
                plan.a,
                self.weight_codes,
                self.weight_scale,
                self.weight_code_sum,
                self.weight_index,
                plan.w,
                self.bias,
                *prologue,
            )
        x = input.reshape(-1, input.shape[-1])
        nothing = x.new_empty(0, dtype=torch.uint8)
        index = nothing if self.weight_index is None else self.weight_index
        a = ops.quantize(x, plan.a, plan.a_layout, False, *prologue) if plan.a else x
        w = Codes(self.weight_codes, self.weight_scale, self.weight_code_sum, nothing, index)
        y = _product(plan, a, w, self.bias, self.in_features, dtype)
        return y.reshape(*input.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moves between devices, but keeps dtypes: model.to(bfloat16) must not round the scales."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse and self.prologue is not None:  # a part of the model, of the model's dtype
            self.prologue._apply(fn)  # type: ignore[no-untyped-call]
        return cast(PackedLinear, super()._apply(move, recurse=False))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{_describe(self.weight_quantizer, self.activation_quantizer)}, layout={self.plan.w_layout}"
        )
