"""torch.ops.quest.pack and unpack against the definition of canonical storage, byte by byte."""

from __future__ import annotations

import pytest
import torch

from quest import Quantizer, ops, reference

GRIDS = ["int1", "int2", "int3", "int4", "int5", "int8", "int_zero4", "fp4", "gauss3", "ternary"]


@pytest.mark.parametrize("k", [1, 2, 15, 33, 128, 257])
@pytest.mark.parametrize("grid", GRIDS)
def test_pack_and_unpack(grid: str, k: int, device: torch.device) -> None:
    q = Quantizer.parse(grid)
    codes = torch.randint(0, 3 if grid == "ternary" else 2**q.bits, (2, 5, k)).to(torch.uint8)
    layouts = {"planes": reference.pack_planes(codes, q.bits)}
    if q.bits <= 4:
        layouts["packed"] = reference.pack_nibbles(codes)
    for layout, expected in layouts.items():
        packed = ops.pack(codes.to(device), grid, layout)
        assert torch.equal(packed.cpu(), expected)
        assert torch.equal(ops.unpack(packed, grid, layout, k).cpu(), codes)


def test_any_strides(device: torch.device) -> None:
    codes = torch.randint(0, 16, (40, 6), dtype=torch.uint8, device=device)
    assert torch.equal(ops.pack(codes.T, "int4", "packed"), ops.pack(codes.T.contiguous(), "int4", "packed"))


def test_no_rows(device: torch.device) -> None:
    codes = torch.empty(0, 40, dtype=torch.uint8, device=device)
    packed = ops.pack(codes, "int3", "planes")
    assert packed.shape == (3, 0, 16)
    assert ops.unpack(packed, "int3", "planes", 40).shape == (0, 40)
