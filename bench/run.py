"""One harness for every benchmark: `python bench/run.py [CASE ...] [--device cpu|cuda] [--out DIR]`.

A case is one operation at several shapes, run by several backends in the same process. For each shape the harness
first checks quest's result against the float64 definition, then times every backend: buffers are rotated past the
last-level cache, rounds of all backends are interleaved so that a drift of the machine's speed meets all of them, and
the median and the spread (interquartile range over median) are kept. Rows go to DIR/CASE.csv, stamped with processor,
driver, versions and commit.

The limit comes from the same run: `copy` (bytes read + written per second of a plain copy) bounds the bytes. On a CPU
no arithmetic ceiling is claimed.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

import quest
from quest import _C, reference

COLUMNS = (
    *("case", "backend", "shape", "dtype", "M", "N", "K", "time_us", "spread_pct", "tops", "gbps"),
    *("limit_us", "share_of_limit", "x_bf16", "x_fp32"),
    *("gpu", "driver", "cpu", "isa", "threads", "torch", "cuda", "commit"),
)
ROUNDS = 15
BUFFER_BYTES = {"cpu": 256 << 20, "cuda": 256 << 20}  # rotated through: well past any last-level cache


@dataclass
class Problem:
    """One shape of a case: its backends (name -> function of a buffer index), its work, and the check of the result."""

    shape: str
    dtype: str
    m: int
    n: int
    k: int
    backends: Mapping[str, Callable[[int], object]]
    buffers: int
    operations: float
    bytes: float
    check: Callable[[], None]
    results: dict[str, tuple[float, float]] = field(default_factory=dict)


def rotating(bytes_each: float, device: str) -> int:
    """How many copies of a problem's operands exceed the last-level cache."""
    return max(2, min(16, int(BUFFER_BYTES[device] // max(bytes_each, 1)) + 1))


def expect_equal(name: str, actual: torch.Tensor, expected: torch.Tensor, share: float = 0.0) -> None:
    wrong = (actual != expected).double().mean().item()
    if wrong > share:
        raise SystemExit(f"bench: {name}: {wrong:.2%} of the elements differ from the definition; nothing is timed")


def expect_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:
        raise SystemExit(f"bench: {name}: relative error {error:.2e} exceeds {tolerance:.0e}; nothing is timed")


def hadamard_problems(device: str) -> Iterator[Problem]:
    rows_by_device = {"cpu": 2048, "cuda": 16384}
    for dim in (128, 512, 2048, 4096, 8192, 32768):
        rows = rows_by_device[device] * 4096 // max(dim, 1024)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        count = rotating(2 * rows * dim * dtype.itemsize, device)
        xs = [torch.randn(rows, dim, device=device, dtype=dtype) for _ in range(count)]

        def check(xs: list[torch.Tensor] = xs, dim: int = dim) -> None:
            ops = torch.ops.quest
            expect_close("hadamard", ops.hadamard(xs[0][:8], dim), reference.hadamard(xs[0][:8].double(), dim), 1e-2)

        yield Problem(
            f"{rows}x{dim}", str(dtype)[6:], rows, 0, dim,
            {
                "quest": lambda i, xs=xs, dim=dim: torch.ops.quest.hadamard(xs[i], dim),
                "copy": lambda i, xs=xs: xs[i].clone(),
            },
            count, 0.0, 2 * rows * dim * dtype.itemsize, check,
        )  # fmt: skip


def eager_quantize(x: torch.Tensor, matrix: torch.Tensor, alpha: float) -> tuple[torch.Tensor, ...]:
    """The same in eager torch: rotation as a product with the 128 x 128 matrix, as the paper's training code does."""
    n = 16
    rotated = (x.view(*x.shape[:-1], -1, 128) @ matrix).view_as(x)
    sigma = rotated.float().square().mean(-1, keepdim=True).sqrt()
    scale = (alpha * sigma + 1e-8) / (n - 1)
    codes = (torch.clamp(rotated, -scale * (n - 1), scale * (n - 1)) / (2 * scale) + 0.5).round() + (n // 2 - 1)
    mask = rotated.abs() <= n * scale
    return codes.to(torch.uint8), scale, mask


def quantize_problems(device: str) -> Iterator[Problem]:
    shapes = [(4096, 4096)] if device == "cpu" else [(16384, k) for k in (2048, 4096, 5632, 11008)] + [(16, 4096)]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    matrix = reference.hadamard(torch.eye(128, dtype=torch.float64), 128).to(device, dtype)
    alpha = _C.int_alpha(4)
    for rows, k in shapes:
        work = rows * k * (dtype.itemsize + 1 / 2 + 1 / 8)
        count = rotating(work, device)
        xs = [torch.randn(rows, k, device=device, dtype=dtype) for _ in range(count)]

        def check(xs: list[torch.Tensor] = xs) -> None:
            x = xs[0][:64]
            packed, scale, *_ = torch.ops.quest.quantize(x, "int4-hadamard-trust", "packed")
            codes = torch.ops.quest.unpack(packed, "int4", "packed", x.shape[-1])
            expected = reference.quantize(x.double(), quest.Quantizer.parse("int4-hadamard-trust"))
            expect_equal("quantize codes", codes, expected.codes.to(codes.dtype), 1e-3)
            expect_close("quantize scale", scale, expected.scale.reshape(scale.shape), 1e-6)

        compiled = torch.compile(eager_quantize)
        backends: dict[str, Callable[[int], object]] = {
            "quest": lambda i, xs=xs: torch.ops.quest.quantize(xs[i], "int4-hadamard-trust", "packed"),
            "torch_eager": lambda i, xs=xs: eager_quantize(xs[i], matrix, alpha),
            "copy": lambda i, xs=xs: xs[i].clone(),
        }
        if device == "cuda":
            backends["torch_compile"] = lambda i, xs=xs, compiled=compiled: compiled(xs[i], matrix, alpha)
        yield Problem(f"{rows}x{k}", str(dtype)[6:], rows, 0, k, backends, count, 0.0, work, check)


PAPER_LAYERS = [(6144, 2048), (2048, 2048), (11264, 2048), (2048, 5632)]
SEVEN_B_LAYERS = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]


def gemm_problems(
    weight: str, activation: str, sparsity: str = "none", quantize: bool = False
) -> Callable[[str], Iterator[Problem]]:
    """Products of a [M, K] activation and a [N, K] weight; `quantize` includes the activation's (`linear`)."""

    def problems(device: str) -> Iterator[Problem]:
        layers = [(4096, 4096)] if device == "cpu" else PAPER_LAYERS + SEVEN_B_LAYERS
        ms = [1, 16, 512] if device == "cpu" else [1, 8, 16, 64, 512, 1024, 4096, 16384]
        real = torch.float32 if device == "cpu" else torch.bfloat16
        for n, k in layers:
            for m in ms:
                yield gemm_problem(device, real, weight, activation, sparsity, quantize, m, n, k)

    return problems


def gemm_problem(
    device: str,
    real: torch.dtype,
    weight: str,
    activation: str,
    sparsity: str,
    with_quantize: bool,
    m: int,
    n: int,
    k: int,
) -> Problem:
    ops = torch.ops.quest
    plan = _C.plan_operands(weight, activation, sparsity)
    middle = "-4:8" if sparsity == "4:8" else ""
    w_text, a_text = f"{weight}-hadamard{middle}-ste", f"{activation}-hadamard-ste"
    count = rotating((n * k) * real.itemsize, device)
    ws = [torch.randn(n, k, device=device, dtype=real) for _ in range(count)]
    xs = [torch.randn(m, k, device=device, dtype=real) for _ in range(count)]
    qw = [ops.quantize(w, w_text, plan["w"], False) for w in ws]
    qx = [ops.quantize(x, a_text, plan["a"], False) for x in xs]
    gemm = getattr(ops, f"gemm_{plan['family']}")

    def run(i: int) -> torch.Tensor:
        a, w = qx[i], qw[i]
        index = (w[4],) if sparsity == "4:8" else ()
        return gemm(a[0], a[1], a[2], activation, w[0], w[1], w[2], *index, weight, k, None, real)

    def linear(i: int) -> torch.Tensor:
        w = qw[i]
        return ops.linear(xs[i], a_text, w[0], w[1], w[2], w[4] if sparsity == "4:8" else None, w_text, None)

    def check() -> None:
        a, w = qx[0], qw[0]
        a_hat = ops.dequantize(a[0], a[1], None, a_text, plan["a"], k, torch.float32)
        w_hat = ops.dequantize(w[0], w[1], w[4] if sparsity == "4:8" else None, w_text, plan["w"], k, torch.float32)
        rows, columns = a_hat[:64].double(), w_hat[:256].double()
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[
            real
        ]  # half an ulp of the output type, and room for the scales
        expect_close(f"gemm {weight} x {activation}", backends["quest"](0)[:64, :256], rows @ columns.T, tolerance)

    reference_name = "torch_fp32" if real is torch.float32 else "torch_bf16"
    backends: dict[str, Callable[[int], torch.Tensor]] = {
        "quest": linear if with_quantize else run,
        reference_name: lambda i: F.linear(xs[i], ws[i]),
    }
    if device == "cpu":
        wb, xb = [w.bfloat16() for w in ws], [x.bfloat16() for x in xs]
        backends["torch_bf16"] = lambda i: F.linear(xb[i], wb[i])
    bits = {"w": int(weight[-1]), "a": int(activation[-1])}
    work = n * k * bits["w"] / 8 + m * k * bits["a"] / 8 + m * n * real.itemsize
    return Problem(f"{m}x{n}x{k}", str(real)[6:], m, n, k, backends, count, 2.0 * m * n * k, work, check)


CASES: dict[str, Callable[[str], Iterator[Problem]]] = {
    "hadamard": hadamard_problems,
    "quantize": quantize_problems,
    "gemm_w4a4": gemm_problems("int4", "int4"),
    "gemm_w4a8": gemm_problems("int4", "int8"),
    "gemm_w8a8": gemm_problems("int8", "int8"),
    "gemm_fp4": gemm_problems("fp4", "fp4"),
    "gemm_w4a4_sparse": gemm_problems("int4", "int4", sparsity="4:8"),
    "gemm_w1a1": gemm_problems("int1", "int1"),
    "gemm_w2a2": gemm_problems("int2", "int2"),
    "linear_w4a4": gemm_problems("int4", "int4", quantize=True),
    "linear_w1a1": gemm_problems("int1", "int1", quantize=True),
}


def measure(problem: Problem, device: str) -> None:
    """Median microseconds and spread of every backend; rounds are interleaved."""
    samples: dict[str, list[float]] = {name: [] for name in problem.backends}
    for call in problem.backends.values():
        for i in range(3):
            call(i % problem.buffers)
    for round_index in range(ROUNDS):
        for name, call in problem.backends.items():
            i = round_index % problem.buffers
            if device == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                start.record()
                call(i)
                end.record()
                torch.cuda.synchronize()
                samples[name].append(start.elapsed_time(end) * 1e3)
            else:
                begin = time.perf_counter()
                call(i)
                samples[name].append((time.perf_counter() - begin) * 1e6)
    for name, times in samples.items():
        quartiles = statistics.quantiles(times, n=4)
        problem.results[name] = (
            statistics.median(times),
            100 * (quartiles[2] - quartiles[0]) / statistics.median(times),
        )


def copy_bandwidth(device: str) -> float:
    """Bytes read + written per second of a plain copy of 512 MiB."""
    x = torch.empty(512 << 20, dtype=torch.uint8, device=device).fill_(1)
    y = torch.empty_like(x)
    problem = Problem("copy", "uint8", 0, 0, 0, {"copy": lambda i: y.copy_(x)}, 1, 0.0, 2.0 * x.numel(), lambda: None)
    measure(problem, device)
    return problem.bytes / (problem.results["copy"][0] * 1e-6)


def command_output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def stamp(device: str) -> dict[str, object]:
    dirty = "-dirty" if command_output("git", "status", "--porcelain", "--untracked-files=no") else ""
    cpu_lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
        "driver": command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device == "cuda"
        else "",
        "cpu": cpu_lines[0].split(":", 1)[1].strip() if cpu_lines else platform.processor(),
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "commit": command_output("git", "rev-parse", "--short=12", "HEAD") + dirty,
    }


def rows_of(case: str, problem: Problem, bandwidth: float, common: dict[str, object]) -> Iterator[dict[str, object]]:
    limit_us = problem.bytes / bandwidth * 1e6
    for backend, (time_us, spread) in problem.results.items():
        row: dict[str, object] = {"case": case, "backend": backend, "shape": problem.shape, "dtype": problem.dtype}
        row |= {"M": problem.m, "N": problem.n, "K": problem.k}
        row |= {"time_us": f"{time_us:.2f}", "spread_pct": f"{spread:.1f}"}
        row |= {"tops": f"{problem.operations / time_us * 1e-6:.3f}", "gbps": f"{problem.bytes / time_us * 1e-3:.1f}"}
        row |= {"limit_us": f"{limit_us:.2f}", "share_of_limit": f"{limit_us / time_us:.3f}"}
        for column, peer in (("x_bf16", "torch_bf16"), ("x_fp32", "torch_fp32")):
            row[column] = f"{problem.results[peer][0] / time_us:.3f}" if peer in problem.results else ""
        yield {**row, **common}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where CASE.csv is written (default: bench/results/DEVICE)")
    arguments = parser.parse_args()
    unknown = [case for case in arguments.case if case not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; choose from {', '.join(CASES)}")
    out = arguments.out or Path(__file__).parent / "results" / arguments.device
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    bandwidth, common = copy_bandwidth(arguments.device), stamp(arguments.device)
    machine = f"{common['gpu'] or common['cpu']}, isa {common['isa']}, {common['threads']} threads"
    print(f"{machine}, copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    for case in arguments.case or CASES:
        rows = []
        for problem in CASES[case](arguments.device):
            problem.check()
            measure(problem, arguments.device)
            rows += list(rows_of(case, problem, bandwidth, common))
            summary = "  ".join(
                f"{name} {us:.0f} us (±{spread:.0f}%)" for name, (us, spread) in problem.results.items()
            )
            print(f"{case:18} {problem.shape:18} {summary}", flush=True)
        path = out / f"{case}.csv"
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
