"""Devices, seeds and the published test vectors, shared by every test of the Python package."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def shared_data(name: str) -> Path:
    """A file of the shared data folder, which lies beside the repository or where QUEST_TEST_DATA says; skips without."""
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
    """The vectors of the paper's public code: inputs x and g [6, 256] and, per case, NAME|kwargs|y and NAME|kwargs|dx."""
    with np.load(shared_data("golden_quantizers.npz")) as data:
        return dict(data)
