"""A quick look at how fast this machine quantizes and multiplies: what `quest bench` prints. The measurements that the
project keeps are made by bench/ in its source tree.

Every row is the median of repeated runs, with the peer in torch timed in the same process: eager quantization for
`quantize`, F.linear in the machine's usual dtype for the layers (float32 on a CPU, bfloat16 on a GPU).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from quest import ops
from quest.linear import QuestLinear
from quest.quantizer import Quantizer
from quest.reference import ALPHA, default_block, hadamard_matrix
from quest.surgery import convert

_SECONDS = 0.5  # of each measurement, after its warm-up; at least three runs
# Weight and activation quantizer of the layers that are timed.
_LAYERS = (
    ("int1", "int1"),
    ("int2", "int2"),
    ("int4", "int4"),
    ("int8", "int8"),
    ("int4-hadamard-4:8-trust", "int4"),
    ("int4", "none"),
)


def bench_layer(m: int, n: int, k: int, device: str) -> Iterator[str]:
    """Lines of a table for a layer of k inputs and n outputs on m rows.

    Raises:
        ValueError: when a size is below 1.
    """
    if min(m, n, k) < 1:
        raise ValueError(f"bench: expected m, n, k of at least 1, got {m}, {n}, {k}")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.randn(m, k, device=device, dtype=dtype)
    title = f"m = {m}, n = {n}, k = {k} on {device}"
    yield f"{title:44}{'µs':>10}{'speedup':>10}"

    quantizer = Quantizer.parse("int4")
    matrix = hadamard_matrix(default_block(k)).to(x)
    peer = _median_seconds(lambda: eager_quantize(x, matrix), device)
    yield _row("quantize int4, eager torch", peer, peer)
    own = _median_seconds(lambda: ops.quantize(x, quantizer, "values"), device)
    yield _row("quantize int4", own, peer)

    weight = torch.randn(n, k, device=device, dtype=dtype)
    peer = _median_seconds(lambda: F.linear(x, weight), device)
    yield _row(f"F.linear {str(dtype).removeprefix('torch.')}", peer, peer)
    for w, a in _LAYERS:
        if k % 8 and "4:8" in w:
            continue
        layer = convert(QuestLinear(k, n, False, weight_quantizer=w, activation_quantizer=a, device=device))
        with torch.inference_mode():
            yield _row(f"linear, weight {w}, input {a}", _median_seconds(lambda: layer(x), device), peer)  # noqa: B023


def _row(name: str, seconds: float, peer: float) -> str:
    return f"{name:44}{seconds * 1e6:10.0f}{peer / seconds:10.2f}"


def _median_seconds(run: Callable[[], object], device: str) -> float:
    def once() -> float:
        started = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()
    times = [once()]
    while len(times) < 3 or sum(times) < _SECONDS:
        times.append(once())
    return statistics.median(times)


def eager_quantize(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int4 quantization with its rotation as one writes it in torch (paper, section 3): the peer of `quantize`.

    Args:
        x: [*, K] of a real dtype.
        matrix: [B, B], the Hadamard matrix of a block that divides K, in the dtype of x.

    Returns:
        Codes uint8 [*, K], scale float32 [*, 1], and where the gradient passes, bool [*, K].
    """
    rotated = (x.reshape(*x.shape[:-1], -1, matrix.shape[0]) @ matrix).flatten(-2).float()
    scale = (ALPHA[4] * rotated.square().mean(-1, keepdim=True).sqrt() + 1e-8) / 15
    codes = (rotated.clamp(-15 * scale, 15 * scale) / (2 * scale) + 0.5).round() + 7
    return codes.to(torch.uint8), scale, rotated.abs() <= 16 * scale
