"""The README's example is the file that runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    example = ROOT / "examples" / "ten_lines.py"
    assert example.read_text() in (ROOT / "README.md").read_text()
    runpy.run_path(str(example))
    printed = capsys.readouterr().out.replace(",", "").split()
    assert float(printed[1]) < 0.5, "trained: a random start has a loss above 1"
    assert float(printed[3]) < 0.5, "packed"
