"""What a run reports: records in metrics.jsonl, TensorBoard and Weights & Biases, and progress on the terminal.

`metrics.jsonl` has one JSON object a line, each with a `step`, written through at once: what a killed run has
reported is there. On resuming, records of steps that will be done again are taken out, so that the file reads like
that of a run which never stopped.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quest.models.files import write_text
from quest.models.llama import LlamaConfig
from quest.train.config import ConfigError, LogConfig

# Dense bf16 FLOP/s of the makers' data sheets, by a part of the device's name; the first that is found counts, so the
# cards with a lower power limit come before the SXM modules of their name.
_PEAK_FLOPS = {
    "H200 NVL": 836e12,
    "H100 NVL": 836e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "RTX 4090": 165e12,
}

_RECORDS = "metrics.jsonl"


def flops_per_token(model: LlamaConfig, sequence_length: int) -> float:
    """Floating-point operations of one token's forward and backward pass.

    Six per weight that multiplies (embedding rows are looked up, the head counts), and 12·layers·width·length for the
    two attention products, halved because half of each is masked (PaLM, arXiv 2204.02311, appendix B).
    """
    weights = model.non_embedding_parameters + model.vocab_size * model.d_model
    return 6 * weights + 6 * model.n_layers * model.d_model * sequence_length


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU, None where it is not known."""
    if device.type != "cuda":
        return None
    return named_peak_flops(torch.cuda.get_device_name(device))


def named_peak_flops(name: str) -> float | None:
    """Peak dense bf16 FLOP/s of the GPU that calls itself `name`, None where it is not known."""
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


class MetricsLog:
    """Writes records to every sink that the configuration asks for.

    Args:
        run_dir: the run's directory.
        config: which sinks.
        resume_step: steps already done; records after it are dropped. 0: a new run.
        settings: the resolved configuration, shown by Weights & Biases.

    Raises:
        ConfigError: when a sink is asked for whose package is not installed.
    """

    def __init__(self, run_dir: Path, config: LogConfig, resume_step: int, settings: Mapping[str, Any]) -> None:
        path = run_dir / _RECORDS
        kept = [record for record in read_records(run_dir) if record["step"] <= resume_step] if resume_step else []
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self.stream = path.open("a", encoding="utf-8", buffering=1)
        self.board: Any = None
        self.wandb: Any = None
        if config.tensorboard == "on" or (config.tensorboard == "auto" and importlib.util.find_spec("tensorboard")):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError:
                raise ConfigError(
                    'log.tensorboard: "on" needs the package tensorboard, which is not installed; '
                    'pip install tensorboard, or choose "auto"'
                ) from None
            purge = resume_step + 1 if resume_step else None
            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        if config.wandb_project is not None:
            try:
                import wandb
            except ModuleNotFoundError:
                raise ConfigError(
                    "log.wandb_project: needs the package wandb, which is not installed; "
                    "pip install wandb, or leave the project out"
                ) from None
            self.wandb = wandb.init(
                project=config.wandb_project,
                dir=run_dir,
                resume="auto" if resume_step else None,
                config=dict(settings),
            )

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds a record: numbers, or tables of numbers (which become "table/row/column" outside of the file)."""
        self.stream.write(json.dumps({"step": step, **record}) + "\n")
        flat = dict(_flatten(record))
        if self.board is not None:
            for name, value in flat.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(flat, step=step)

    def close(self) -> None:
        self.stream.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; a last line that a killed run left half-written is passed over."""
    path = run_dir / _RECORDS
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        elif value is not None:
            yield prefix + name, value


class ProgressReport:
    """Progress of a run: a bar with loss, rate and time left on a terminal, plain lines elsewhere.

    Args:
        total_steps: of the run.
        first_step: where this start begins.
        quiet: say nothing, as all processes but one do.
    """

    def __init__(self, total_steps: int, first_step: int, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)
        self.total_steps = total_steps
        self.first_step = first_step
        self.after_first = math.nan  # the time then
        self.bar: Progress | None = None
        self.status = ""

    @contextmanager
    def shown(self) -> Iterator[ProgressReport]:
        if not self.console.is_terminal:
            yield self
            return
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as self.bar:
            self.task = self.bar.add_task("", total=self.total_steps, completed=self.first_step, status=self.status)
            yield self

    def step(self, step: int, record: Mapping[str, Any] | None) -> None:
        """After `step` steps; `record` is that of the step when it has one."""
        # The first step of a start may compile the model for a minute: what is left is judged by those after it.
        done = step - self.first_step - 1
        if done == 0:
            self.after_first = time.perf_counter()
        status = self._status(record) if record is not None else None
        if self.bar is not None:
            self.status = status or self.status
            self.bar.update(self.task, completed=step, status=self.status)
        elif status is not None:
            if done > 0:
                left = (time.perf_counter() - self.after_first) / done * (self.total_steps - step)
                status += f"  {_duration(left)} left"
            self.say(f"step {step}/{self.total_steps}  {status}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _status(self, record: Mapping[str, Any]) -> str:
        parts = [
            f"loss {record['loss']:.4f}",
            f"lr {record['learning_rate']:.2e}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
        ]
        if record.get("mfu") is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use since the start: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    unit = 1 if os.uname().sysname == "Darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
