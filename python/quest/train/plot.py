"""Loss curves of one or several runs on one axis, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quest.train.metrics import read_records


def plot_losses(run_dirs: Sequence[Path], output: Path) -> None:
    """Draws training loss (each record pale, smoothed on top) and validation loss (points) against tokens.

    Args:
        run_dirs: directories with a metrics.jsonl; each is one colour, named after its directory.
        output: the PNG to write.

    Raises:
        ValueError: naming a directory that has no records.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="tokens", ylabel="loss (nats per token)")
    for index, run_dir in enumerate(run_dirs):
        records = read_records(run_dir)
        losses = [(record["tokens"], record["loss"]) for record in records if "loss" in record]
        if not losses:
            raise ValueError(f"plot: {run_dir} has no training records in metrics.jsonl; give run directories")
        tokens_per_step = losses[-1][0] / max(record["step"] for record in records if "loss" in record)
        validation = [
            (record["step"] * tokens_per_step, record["validation_loss"])
            for record in records
            if "validation_loss" in record
        ]
        colour = f"C{index}"
        axes.plot(*zip(*losses, strict=True), color=colour, alpha=0.25, linewidth=0.8)
        tokens = [count for count, _ in losses]
        axes.plot(tokens, _smooth([loss for _, loss in losses]), color=colour, label=f"{run_dir.name}, training")
        if validation:
            axes.plot(
                *zip(*validation, strict=True), "o", color=colour, markersize=4, label=f"{run_dir.name}, validation"
            )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start.

    It reaches back a fiftieth of the curve, which bends no short one, and at most 20 records, enough to see through
    the noise of batches.
    """
    keep = min(max(0.0, 1 - 50 / len(values)), 0.95)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
