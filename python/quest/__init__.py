"""QuEST: train language models with weights and activations of 1 to 8 bits, and run them on low-bit kernels (arXiv
2502.05003).

    cfg = quest.QuantConfig(weight="int4", activation="int4")
    quest.prepare(model, cfg)      # nn.Linear -> quest.QuestLinear; train as ever
    quest.convert(model)           # quest.QuestLinear -> quest.PackedLinear, on the low-bit kernels
    quest.fake_quantize(x, "int4-hadamard-trust")

The operations are quest.ops (torch.ops.quest.*), their definitions quest.reference. quest.models, quest.train and
quest.infer are imported when first used.
"""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from quest import ops
from quest._C import build_info as _build_info
from quest.functional import fake_quantize
from quest.linear import PackedLinear, QuestLinear
from quest.quantizer import QuantConfig, Quantizer
from quest.surgery import convert, frozen_weights, prepare

__version__: str = _build_info()["version"]

__all__ = [
    "PackedLinear",
    "QuantConfig",
    "Quantizer",
    "QuestLinear",
    "convert",
    "fake_quantize",
    "frozen_weights",
    "ops",
    "prepare",
]


def __getattr__(name: str) -> _ModuleType:
    if name in ("infer", "models", "reference", "train"):
        return _import_module(f"quest.{name}")
    raise AttributeError(f"module 'quest' has no attribute {name!r}")
