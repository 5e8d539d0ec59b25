"""The benchmark harness: limits, rows, checks, the peers' formulas, a quick run and its figures."""

from __future__ import annotations

import csv
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

from quest import Quantizer, ops, reference

PEAKS = """peak,value,unit,milliseconds,gpu
copy,3000.0,GB/s,300,NVIDIA H100 80GB HBM3
wgmma_s8,1900.0,TOPS,300,NVIDIA H100 80GB HBM3
wgmma_b1,15000.0,TOPS,300,NVIDIA H100 80GB HBM3
"""


def load(name: str) -> ModuleType:
    """bench/ is no package: its scripts are loaded by path."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", REPOSITORY / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


run, plots = load("run"), load("plots")


def problem(unit: str, operations: float) -> Any:
    return run.Problem({}, operations, unit, operations)


def test_limit_is_the_larger_of_bytes_and_operations() -> None:
    peaks, gpu = run.parse_peaks(PEAKS)
    assert gpu == "NVIDIA H100 80GB HBM3"
    assert run.limit_us(problem("s8", 1.9e9), 3_000, peaks) == pytest.approx(1.0)
    assert run.limit_us(problem("s8", 1.9e9), 6_000_000, peaks) == pytest.approx(2.0)
    assert run.limit_us(problem("b1", 15e9), 0, peaks) == pytest.approx(1.0)
    assert run.limit_us(problem("s8_4bit", 1.9e9), 0, peaks) == pytest.approx(1.0)  # the full-range rate stands in
    assert run.limit_us(problem("sparse_s8", 1e15), 3_000_000, peaks) == pytest.approx(1.0)  # no rate: bytes alone


@pytest.mark.parametrize("text", ["", "wgmma_s8,1900\n", PEAKS + "[rc 0]\n"], ids=["empty", "no-header", "noise"])
def test_peaks_that_are_no_peaks_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected bench_peaks's CSV"):
        run.parse_peaks(text)


@pytest.mark.parametrize(
    ("weight", "activation", "sparsity", "unit"),
    [
        ("int4", "int4", "none", ("s8_4bit", 1)),
        ("fp4", "fp4", "none", ("s8_4bit", 1)),
        ("int4", "int8", "none", ("s8", 1)),
        ("int4", "int4", "4:8", ("sparse_s8", 1)),
        ("int1", "int1", "none", ("b1", 1)),
        ("int1", "int2", "none", ("b1", 2)),
        ("int2", "int2", "none", ("b1", 4)),
        ("int2", None, "none", ("bf16", 1)),
    ],
)
def test_unit_of_a_product(weight: str, activation: str | None, sparsity: str, unit: tuple[str, int]) -> None:
    assert run.Product(weight, activation, sparsity).unit() == unit


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_gpu_slug(name: str, slug: str) -> None:
    assert run.gpu_slug(name) == slug


def test_buffers_leave_four_caches_between_uses() -> None:
    assert run.buffer_count(1 << 20, 50 << 20) == 200
    assert run.buffer_count((1 << 20) + 1, 50 << 20) == 200
    assert run.buffer_count(1 << 40, 50 << 20) == 2
    assert run.buffer_count(0, 50 << 20) == run.MAX_BUFFERS
    sets = run.copies((torch.arange(3), torch.ones(2)), 3)
    assert len({tensor.data_ptr() for operands in sets for tensor in operands}) == 6
    assert all(torch.equal(operands[0], torch.arange(3)) for operands in sets)


def test_sample_has_both_ends() -> None:
    assert run.sample(1, 64, "cpu").tolist() == [0]
    assert run.sample(5, 64, "cpu").tolist() == [0, 1, 2, 3, 4]
    chosen = run.sample(16384, 64, "cpu").tolist()
    assert (chosen[0], chosen[-1], len(set(chosen))) == (0, 16383, 64)


def test_rows() -> None:
    shape = run.Shape("64x32x16", "bfloat16", 64, 32, 16, lambda: None)
    timings = {"quest": run.Timing(10.0, 1.5, 1_000_000), "torch_bf16": run.Timing(25.0, 0.5, 2_000_000)}
    rows = list(run.rows_of("gemm_w4a4", shape, 2e9, 5.0, timings, {"gpu": "G", "commit": "c"}))
    assert [row["backend"] for row in rows] == ["quest", "torch_bf16"]
    assert rows[0]["tops"] == "200.000"
    assert rows[0]["gbps"] == "100.0"
    assert (rows[0]["share_of_limit"], rows[1]["share_of_limit"]) == ("0.500", "0.200")
    assert (rows[0]["x_bf16"], rows[1]["x_bf16"], rows[0]["x_fp32"]) == ("2.500", "1.000", "")
    assert set(run.COLUMNS["cuda"]) - set(rows[0]) == {"driver", "torch", "cuda"}  # those the stamp adds
    assert run.summarize([1.0, 2.0, 3.0], 7) == run.Timing(2.0, 100.0, 7)


def test_wrong_results_are_refused() -> None:
    expected = torch.full((4, 8), 2.0, dtype=torch.float64)
    for wrong in (2.1, float("nan"), float("inf")):
        y = expected.float()
        y[3, 7] = wrong
        with pytest.raises(run.CheckError, match=r"element \[3, 7\]"):
            run.expect_close_each("y", y, expected, 2**-8, 1e-6)
        with pytest.raises(run.CheckError, match="relative error"):
            run.expect_close("y", y, expected, 1e-3)
    with pytest.raises(run.CheckError, match=r"3\.12%"):
        run.expect_equal("y", y, expected.float(), 0.03)


def test_what_a_peer_cannot_run_is_said() -> None:
    small, odd = (run.Shape("", "", m, n, 64, lambda: None) for m, n in ((16, 64), (64, 40)))
    assert "M > 16" in run.left_out("torch_int8", small)
    assert "divisible by 16" in run.left_out("torch_fp8", odd)
    assert run.left_out("torch_fp8", small) is None

    def fails(*operands: Any) -> Any:
        raise RuntimeError("not on this device\nstack")

    notes: set[str] = set()
    backends = {"quest": run.copy_backend(64, "cpu"), "peer": run.Backend((), fails, run.unchecked)}
    kept, moved = run.verified(SimpleNamespace(backends=backends), odd, notes)
    assert (list(kept), moved) == (["quest"], {"quest": 64})
    assert notes == {"peer is left out where it does not run: not on this device"}


@pytest.mark.parametrize("dim", [64, 128, 512, 2048])
def test_hadamard_product_is_the_rotation(dim: int) -> None:
    x = torch.randn(3, dim, dtype=torch.float64)
    assert torch.allclose(run.hadamard_product(x, *run.hadamard_factors(dim)), reference.hadamard(x, dim), atol=1e-12)


@pytest.mark.parametrize(("bits", "layout"), [(4, "packed"), (4, "values"), (4, "codes"), (2, "planes"), (1, "planes")])
def test_the_peers_quantize_as_the_definition_does(bits: int, layout: Any) -> None:
    """In float32, where the formulas round as the kernel does except next to a tie."""
    quantizer = Quantizer.parse(f"int{bits}-hadamard-{'trust' if bits > 1 else 'clip'}")
    x = torch.randn(8, 256)
    left, right = (factor.float() for factor in run.hadamard_factors(128))
    got = run.quantize_formula(x, left, right, bits, layout, True)
    expected = ops.quantize(x, quantizer, layout)
    assert got[0].dtype == expected.codes.dtype
    assert (got[0] != expected.codes).double().mean() <= 1e-3
    assert torch.allclose(got[1].flatten(), expected.scale)
    if bits > 1:
        assert (got[2] != expected.mask).double().mean() <= 1e-2
    rows = torch.tensor([1, 7])
    codes = run.codes_of(expected.codes, bits, layout, 256, rows)
    assert torch.equal(codes, ops.quantize(x, quantizer, "codes").codes[rows].long())
    ordered = ops.quantize(x, quantizer, "even_odd").codes
    assert torch.equal(codes, run.codes_of(ordered, bits, "even_odd", 256, rows))


def test_rows_of_a_quantized_matrix() -> None:
    w = torch.randn(6, 128)
    at = torch.tensor([0, 5])
    for text, layout in (
        ("int4-hadamard-ste", "packed"),
        ("int2-hadamard-ste", "planes"),
        ("fp4-hadamard-ste", "values"),
    ):
        expected = reference.quantize(w, Quantizer.parse(text))
        got = run.Quantized.of(w, text, layout).rows(at)
        assert torch.allclose(got, expected.x_hat[at], rtol=1e-6, atol=0)


def test_quick_run_and_figures(device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    products = ["gemm_w2a2", "gemm_w4a4_sparse", "gemm_w4a16", "linear_w4a4"]
    others = (
        ["hadamard", "quantize", "quantize_prologue"] if device.type == "cpu" else []
    )  # on a GPU their peers take a minute to compile
    arguments = [*products, *others, "--quick", "--out", str(tmp_path), "--commit", "abc"]
    assert run.main([*arguments, "--device", device.type]) == 0
    assert "of the limit" in capsys.readouterr().out
    for case in products + others:
        with (tmp_path / f"{case}.csv").open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        assert tuple(reader.fieldnames or ()) == run.COLUMNS[device.type]
        assert "quest" in {row["backend"] for row in rows}
        assert all(float(row["time_us"]) > 0 and row["case"] == case and row["commit"] == "abc" for row in rows)
    assert not list(tmp_path.glob("*.tmp"))
    written = {path.name for path in plots.plot(tmp_path)}
    expected = {f"speedup_{case}.png" for case in products} | {"share_of_limit.png"}
    assert written == expected | ({"share_of_limit_rows.png"} if others else set())
    assert all((tmp_path / name).stat().st_size > 10_000 for name in written)


def test_wrong_problem_is_skipped_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(result: Any) -> None:
        raise run.CheckError("all of it")

    def shapes(device: str, quick: bool) -> Any:
        for name, check in (("good", run.unchecked), ("bad", wrong)):
            backend = run.Backend((torch.ones(4),), torch.clone, check)
            yield run.Shape(name, "float32", 1, 0, 4, lambda backend=backend: run.Problem({"quest": backend}, 0.0))

    monkeypatch.setitem(run.CASES, "made_up", shapes)
    assert run.main(["made_up", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    assert "NOT TIMED: all of it" in capsys.readouterr().out
    assert (tmp_path / "made_up.csv").read_text().count("\n") == 2


@pytest.mark.parametrize("directory", sorted(path.name for path in (REPOSITORY / "bench" / "results").glob("*")))
def test_kept_results_have_the_columns_and_plot(directory: str, tmp_path: Path) -> None:
    for path in (REPOSITORY / "bench" / "results" / directory).glob("*.csv"):
        shutil.copy(path, tmp_path)
    cases = plots.read_cases(tmp_path)
    columns = run.COLUMNS["cpu" if directory.startswith("cpu") else "cuda"]
    assert all(tuple(row) == columns for rows in cases.values() for row in rows)
    products = {name: rows for name, rows in cases.items() if plots.is_product(rows)}
    assert not products or plots.share_figure(products, plots.machine_of(cases)).axes


def test_plots_name_what_they_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plots.main([str(tmp_path)]) == 1
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    assert plots.main([str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert "has no CSV of bench/run.py" in errors
    assert "x.csv is no result of bench/run.py: its columns are a, b" in errors
