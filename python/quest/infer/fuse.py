"""A packed model's norms and SwiGLU products, computed while the linear layer behind them quantizes its input.

The kernel reads what the layer before wrote and writes codes: the norm's or product's own result is neither written nor
read. The model is the same up to the last bit of a square root and of an exponential.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

from torch import nn

from quest.linear import PackedLinear
from quest.models.llama import Block, Llama


def fuse_prologues(model: Llama) -> Llama:
    """Moves both norms of every block, and its SwiGLU product, into the packed layers that consume them, in place;
    returns the model.

    For inference, after loading: the norms' weights are then parameters of those layers, and a state_dict has them
    there, so `save_packed` refuses the model. A layer that is not packed, or whose input stays real, keeps the module
    before it. A model that is fused already stays as it is.
    """
    for block in cast(Iterable[Block], model.blocks):
        _fuse("rms_norm", block, "attention_norm", block.attention.qkv)
        _fuse("rms_norm", block, "mlp_norm", block.mlp.gate_up)
        _fuse("silu_mul", block.mlp, "product", block.mlp.down)
    return model


def _fuse(kind: Literal["rms_norm", "silu_mul"], parent: nn.Module, name: str, consumer: nn.Module) -> None:
    if not isinstance(consumer, PackedLinear) or consumer.activation_quantizer is None or consumer.prologue is not None:
        return
    consumer.fuse(kind, getattr(parent, name))
    setattr(parent, name, nn.Identity())
