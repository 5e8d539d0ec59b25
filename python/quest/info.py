"""What a bug report needs, and what it takes to understand a run later, as one dictionary."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from quest import _C

_PACKAGES = ("numpy", "safetensors", "tokenizers", "tyro", "transformers", "lm_eval", "schedulefree", "datasets")
# A weight grid, an activation grid (None: weight-only), a sparsity: one of each kind of product.
_PRODUCTS = (
    ("int1", "int1", "none"),
    ("int2", "int2", "none"),
    ("int4", "int4", "none"),
    ("int8", "int8", "none"),
    ("fp4", "fp4", "none"),
    ("int4", "int4", "4:8"),
    ("int4", None, "none"),
)


def describe() -> dict[str, Any]:
    """Versions, build, machine, the libraries that were loaded, and which product the common formats get, and why."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    plans = {}
    for weight, activation, sparsity in _PRODUCTS:
        plan = _C.plan_operands(weight, activation, sparsity)
        name = f"{weight}{'' if sparsity == 'none' else '-' + sparsity} × {activation or 'real'}"
        plans[name] = f"{plan['family']}: {plan['reason']}"
    return {
        "quest": _C.build_info() | {"libraries": _C.libraries},
        "python": platform.python_version(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()},
        "packages": packages,
        "system": platform.platform(),
        "cpu": {"count": os.cpu_count(), "isa": _C.cpu_isa()},
        "gpus": _C.devices(),
        "products": plans,
        "environment": {name: value for name, value in os.environ.items() if name.startswith("QUEST_")},
    }
