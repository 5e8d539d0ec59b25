"""Devices, seeds and the published test vectors, shared by every test of the Python package."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from quest import Quantizer, reference

REPOSITORY = Path(__file__).resolve().parents[2]


def shared_data(name: str) -> Path:
    """A file of the data folder, which lies beside the repository or where QUEST_TEST_DATA says; skips without it."""
    path = Path(os.environ.get("QUEST_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / name
    if not path.exists():
        pytest.skip(f"{path} is not present (QUEST_TEST_DATA names another folder)")
    return path


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the operations run on. Without a GPU its tests skip; with QUEST_REQUIRE_GPU=1 they fail."""
    if request.param == "cuda" and not torch.cuda.is_available():
        if os.environ.get("QUEST_REQUIRE_GPU") == "1":
            pytest.fail("QUEST_REQUIRE_GPU=1, but torch finds no CUDA device")
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_compiled_graphs() -> None:
    torch.compiler.reset()


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """The vectors of the paper's public code: inputs x and g [6, 256], and NAME|kwargs|y and |dx per case."""
    with np.load(shared_data("golden_quantizers.npz")) as data:
        return dict(data)


def steady_normal(*shape: int, quantizer: Quantizer) -> torch.Tensor:
    """Normal float32 rows none of whose elements lies within float32 rounding of a threshold of the quantizer, so that
    codes, pattern and mask are the same in float64 and float32. Rows that noise of 3e-6 sigma changes are redrawn."""
    x = torch.randn(shape)
    while True:
        expected = reference.quantize(x, quantizer)
        unsteady = torch.zeros(shape[:-1], dtype=torch.bool)
        for _ in range(8):  # each draw finds an element that is at its threshold with probability 1/2
            got = reference.quantize(x.double() + 3e-6 * torch.randn(shape), quantizer)
            for name in ("codes", "kept", "mask"):
                unsteady |= (getattr(got, name) != getattr(expected, name)).any(-1)
        if not unsteady.any():
            return x
        x[unsteady] = torch.randn(shape)[unsteady]


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Within the block, collects what autograd keeps for backward."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

        def collect(tensor: torch.Tensor) -> torch.Tensor:
            self.tensors.append(tensor)
            return tensor

        super().__init__(collect, lambda tensor: tensor)
