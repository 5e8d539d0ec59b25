"""The training loop.

    for each step:  quantize every weight once; add the gradients of the micro-batches; clip; step; average

The model knows nothing of quantization, and nothing here does but the call of `quest.prepare` before the loop and
`quest.frozen_weights` around the micro-batches. Weights and optimizer are float32; on CUDA the products run in
bfloat16 under autocast. A run is a function of its configuration: stopped anywhere and resumed, it takes the steps
that it would have taken; to the bit on a CPU, on CUDA to the rounding of sums whose order is not fixed there.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import quest
from quest import info
from quest.models.files import write_text
from quest.models.llama import Llama
from quest.precision import autocast, product_dtype
from quest.train import checkpoint as checkpoints
from quest.train import config as configs
from quest.train.config import ConfigError, TrainConfig
from quest.train.data import build_data, prepare_tokenizer
from quest.train.diagnostics import Diagnostics
from quest.train.distributed import World, join_world
from quest.train.metrics import MetricsLog, ProgressReport, flops_per_token, peak_flops, peak_memory_gib, read_records
from quest.train.optim import WeightAverage, build_optimizer, clip_gradient, load_optimizer_state, optimizer_state
from quest.train.plot import plot_losses
from quest.train.schedule import learning_rate_factor


class TrainingError(RuntimeError):
    """Training that cannot go on: says at which step, why, and what to do."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: after `step` steps, with its last losses in nats. `finished`: it took all its steps;
    `signal`: the number of the one that stopped it, None where none did."""

    run_dir: Path
    step: int
    finished: bool
    signal: int | None
    loss: float
    validation_loss: float | None


def train(config: TrainConfig) -> TrainResult:
    """Trains a model as configured and leaves everything in `config.run_dir`.

    Once it trains, SIGINT, SIGTERM and `config.max_minutes` save a checkpoint and end the run after the current step; a
    second SIGINT ends it at once.

    Raises:
        ConfigError, DataError: what was asked for cannot be done; nothing was changed.
        CheckpointError: a checkpoint could not be read or written.
        TrainingError: the loss or the gradient is no longer finite, or the run's files could not be written.
    """
    with join_world(config.device) as world, deterministic_algorithms(config.deterministic):
        stop = StopRequest(config.max_minutes)
        trainer = Trainer(config, world, stop)
        with stop:  # only now: before the first step there is nothing to save, and tokenizing may take hours
            return trainer.run()


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Within the block torch takes, if wanted, the algorithms that sum in a fixed order; it warns where it has none."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it before its first product
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


class StopRequest:
    """Whether to stop: SIGINT or SIGTERM came within its block (a second SIGINT is KeyboardInterrupt again), or the
    time since it was made is up."""

    def __init__(self, max_minutes: float | None) -> None:
        self.signal: int | None = None
        self.deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes

    @property
    def made(self) -> bool:
        return self.signal is not None or time.monotonic() > self.deadline

    def __enter__(self) -> StopRequest:
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


def losses_of(model: nn.Module, tokens_BS: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of every next token, in nats, and the same plus `z_loss` · mean(log² Σ exp(logits)).

    Args:
        tokens_BS: int64 [B, sequence + 1]: inputs and, one further, targets.
    """
    logits = model(tokens_BS[:, :-1]).flatten(0, 1).float()
    cross_entropy = F.cross_entropy(logits, tokens_BS[:, 1:].flatten())
    if z_loss == 0:
        return cross_entropy, cross_entropy
    return cross_entropy, cross_entropy + z_loss * logits.logsumexp(-1).square().mean()


class Trainer:
    """One run in one process: built from its configuration, resumed if asked, then `run`."""

    def __init__(self, config: TrainConfig, world: World, stop: StopRequest) -> None:
        self.config, self.world, self.stop = config, world, stop
        self.micro_batches, micro_batch_size = config.micro_batches(world.size)
        resume_from = self._resume_path()

        self.tokenizer = prepare_tokenizer(config.data)
        shape = config.model.build(self.tokenizer.vocab_size, config.sequence_length)
        self.description = checkpoints.model_description(shape, config)
        saved = None
        if resume_from is not None:
            saved = checkpoints.read_state(resume_from)
            checkpoints.check_same_model(resume_from, saved, self.description)
        self.data = build_data(
            config.data,
            self.tokenizer,
            sequence_length=config.sequence_length,
            batch_size=micro_batch_size,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            pin_memory=world.device.type == "cuda",
        )

        torch.manual_seed(config.seed)
        self.model = Llama(shape)
        quant = config.quant.build()
        if quant is not None:
            quest.prepare(self.model, quant)
        self.model.to(world.device)
        self.optimizer = build_optimizer(self.model, config.optim, config.learning_rate)
        self.average = WeightAverage(config.average, config.total_steps, self.model, self.optimizer)
        self.diagnostics = Diagnostics(self.model)
        self.parallel: nn.Module = DistributedDataParallel(self.model) if world.size > 1 else self.model
        self.losses = torch.compile(losses_of) if config.compile else losses_of

        self.store = checkpoints.CheckpointStore(config.run_dir / "checkpoints", config.checkpoint)
        self.step = 0
        if resume_from is not None and saved is not None:
            self._restore(resume_from, saved)
        self.saved_step = self.step
        self.flops_per_token = flops_per_token(shape, config.sequence_length)
        dtype = product_dtype(self.model.embed.weight, config.precision)
        self.peak_flops = peak_flops(world.device) if dtype == torch.bfloat16 else None

    def run(self) -> TrainResult:
        config, total = self.config, self.config.total_steps
        tokens_per_step = config.batch_size * config.sequence_length
        report = ProgressReport(total, self.step, quiet=not self.world.leads)
        loss, validation_loss = float("nan"), None
        log = self._open_log()
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.world.device)  # an earlier run in this process is not of this one
        try:
            with report.shown():
                self._introduce(report)
                first = self.step + 1
                seconds, at = 0.0, self.step
                while self.step < total:
                    started = time.perf_counter()
                    record = self._train_step()
                    seconds += time.perf_counter() - started
                    loss, stopped = record["loss"], record.pop("stopped")
                    self.step += 1
                    last = stopped or self.step == total
                    reported = self.step % config.log.every == 0 or last
                    if reported:
                        rate = (self.step - at) * tokens_per_step / seconds
                        seconds, at = 0.0, self.step
                        record |= {"tokens": self.step * tokens_per_step, **self._costs(rate)}
                        self._write(log, record)
                    elif self.step == first:
                        seconds, at = 0.0, self.step  # it may have compiled the model, which is no measure of its rate
                    report.step(self.step, record if reported else None)
                    if config.diagnose.every and self.step % config.diagnose.every == 0:
                        self._write(log, {"diagnostics": self._diagnose()})
                    if config.evaluation.every and (self.step % config.evaluation.every == 0 or self.step == total):
                        validation_loss = self.evaluate()
                        self._write(log, {"validation_loss": validation_loss})
                        report.say(f"step {self.step}: validation loss {validation_loss:.4f}")
                    if self.step % config.checkpoint.every == 0 or last:
                        self._save()
                    if stopped:
                        reason = "the time limit" if self.stop.signal is None else "a signal"
                        report.say(f"stopped by {reason} at step {self.step}; go on with --resume auto")
                        break
            self.store.close()
        finally:
            self.data.close()
            if log is not None:
                self._close(log, report)
        return TrainResult(config.run_dir, self.step, self.step >= total, self.stop.signal, loss, validation_loss)

    def _train_step(self) -> dict[str, Any]:
        """One optimizer step. Returns its loss, learning rate and gradient norm, and whether any process is to stop."""
        optim = self.config.optim
        factor = learning_rate_factor(self.config.schedule, self.step, self.config.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        total = torch.zeros((), device=self.world.device)
        with quest.frozen_weights(self.model):
            for index in range(self.micro_batches):
                tokens = next(self.data.train).to(self.world.device, non_blocking=True)
                with self._gradients_synchronised(index == self.micro_batches - 1):
                    with self._autocast():
                        loss, objective = self.losses(self.parallel, tokens, optim.z_loss)
                    torch.autograd.backward(objective / self.micro_batches)
                total += loss.detach() / self.micro_batches
        norm = clip_gradient(self.model, optim.clip_norm)
        # One transfer for all that the processes must agree on: the mean loss, and whether to stop.
        stop_wanted = torch.full_like(total, float(self.stop.made))
        sums = self.world.sum(torch.stack([total, stop_wanted])) / self.world.size
        mean_loss, stopped, gradient_norm = torch.cat([sums, norm.detach().reshape(1)]).tolist()
        self._require_finite(mean_loss, gradient_norm)
        self.optimizer.step()
        self.average.update(self.step + 1)
        rate = self.config.learning_rate * factor
        return {"loss": mean_loss, "learning_rate": rate, "gradient_norm": gradient_norm, "stopped": stopped > 0}

    def _require_finite(self, loss: float, gradient_norm: float) -> None:
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if not math.isfinite(value):
                self.store.wait()
                latest = checkpoints.find_latest(self.store.directory)
                raise TrainingError(
                    f"the {name} is {value} at step {self.step + 1}; no weight was changed by that step. "
                    f"The checkpoint before is {latest or 'none yet'}; go on from it with a lower optim.learning_rate "
                    f"or a smaller optim.clip_norm"
                )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss per token on the validation text, in nats, with the averaged weights where there are such."""
        # Every process has its share of the validation text, sequence by sequence in turn.
        remaining = math.ceil(self.config.evaluation.sequences / self.world.size) or sys.maxsize
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        self.model.eval()
        with self.average.applied(), quest.frozen_weights(self.model):
            for batch in self.data.validation():
                tokens = batch[:remaining].to(self.world.device, non_blocking=True)
                with self._autocast():
                    loss, _ = losses_of(self.model, tokens, 0.0)
                sums += torch.stack([loss * len(tokens), torch.full_like(loss, len(tokens))])
                remaining -= len(tokens)
                if remaining == 0:
                    break
        total, count = self.world.sum(sums).tolist()
        return float(total / count)

    def _diagnose(self) -> dict[str, dict[str, float | None]]:
        """The table of `Diagnostics`, for the first sequences of the validation text."""
        tokens = next(iter(self.data.validation())).to(self.world.device)
        with self._autocast():
            return self.diagnostics.measure(lambda: losses_of(self.model, tokens, 0.0)[0])

    # Saving and resuming.

    def _resume_path(self) -> Path | None:
        """The checkpoint to go on from; a run never goes on beside later checkpoints, or those of another run."""
        latest = checkpoints.find_latest(self.config.run_dir / "checkpoints")
        if self.config.resume == "auto":
            return latest
        chosen = None if self.config.resume == "none" else Path(self.config.resume)
        if latest is not None and (chosen is None or chosen.resolve() != latest.resolve()):
            raise ConfigError(
                f"run_dir: expected a directory without checkpoints, {self.config.run_dir} has {latest.name}; "
                f"go on from there with --resume auto, or choose another run_dir"
            )
        return chosen

    def _save(self) -> None:
        """Writes a checkpoint of this step, unless the one it resumed from is just that."""
        if self.step == self.saved_step:
            return
        self.saved_step = self.step
        if self.world.leads:
            moments, groups = optimizer_state(self.model, self.optimizer)
            tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
            tensors |= {f"optimizer/{name}": value for name, value in moments.items()}
            tensors |= {f"average/{name}": value for name, value in self.average.average.items()}
            with self.average.applied() as differs:
                if differs:
                    tensors |= {f"evaluation/{name}": p.detach().clone() for name, p in self.model.named_parameters()}
            tensors |= {f"diagnostics/{name}": mask for name, mask in self.diagnostics.masks.items()}
            tensors["random/cpu"] = torch.get_rng_state()
            if self.world.device.type == "cuda":
                tensors["random/cuda"] = torch.cuda.get_rng_state(self.world.device)
            state = {
                **self.description,
                "config": configs.to_dict(self.config),
                "tokenizer": self.tokenizer.fingerprint,
                "optimizer": {"name": self.config.optim.name, "groups": groups},
                "average": {"name": self.config.average.name, "count": self.average.count},
                "data": self.data.train.state_dict(),  # the same in every process
            }
            self.store.save(self.step, tensors, state)
        self.world.barrier()

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        """Takes over everything that `_save` wrote; what cannot be taken over as it is, is an error."""
        own = {
            "the tokenizer": (state["tokenizer"], self.tokenizer.fingerprint, "data.tokenizer"),
            "the optimizer": (state["optimizer"]["name"], self.config.optim.name, "optim.name"),
            "the average": (state["average"]["name"], self.config.average.name, "average.name"),
        }
        for what, (was, now, where) in own.items():
            if was != now:
                raise checkpoints.CheckpointError(
                    f"cannot resume from {path}: {what} was {was} and is now {now} ({where}); keep what it was, "
                    f"or start anew in another run_dir"
                )
        tensors = checkpoints.read_tensors(path)

        def part(section: str) -> dict[str, Tensor]:
            prefix = section + "/"
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(part("model"))
        load_optimizer_state(self.model, self.optimizer, part("optimizer"), state["optimizer"]["groups"])
        average = part("average")  # in the order of the parameters, with which `update` pairs it
        self.average.average = {
            name: average[name].to(self.world.device) for name in self.average.parameters if name in average
        }
        self.average.count = state["average"]["count"]
        self.diagnostics.masks = {name: mask.to(self.world.device) for name, mask in part("diagnostics").items()}
        self.data.train.load_state_dict(state["data"])
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"], self.world.device)
        self.step = state["step"]

    # Reporting: by the leading process alone.

    def _open_log(self) -> MetricsLog | None:
        """The run's files, opened; None in processes that do not report."""
        if not self.world.leads:
            return None
        environment = {
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "processes": self.world.size,
            "device": str(self.world.device),
            **info.describe(),
        }
        text = json.dumps(environment, indent=2, ensure_ascii=False) + "\n"
        with self._writing():
            self.config.run_dir.mkdir(parents=True, exist_ok=True)
            configs.dump(self.config, self.config.run_dir / "config.toml")
            self.tokenizer.save(self.config.run_dir)
            write_text(self.config.run_dir / "environment.json", text)
            return MetricsLog(self.config.run_dir, self.config.log, self.step, configs.to_dict(self.config))

    def _write(self, log: MetricsLog | None, record: dict[str, Any]) -> None:
        if log is not None:
            with self._writing():
                log.write(self.step, record)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Within the block an error of the disk ends the run, and says where and what to do."""
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"the run directory {self.config.run_dir} could not be written at step {self.step} ({error}). "
                f"Free disk space or choose another run_dir, then go on with --resume auto"
            ) from error

    def _close(self, log: MetricsLog, report: ProgressReport) -> None:
        """Closes the run's files and draws its losses so far, if any; failing at that must not hide why it ended."""
        run_dir = self.config.run_dir
        try:
            log.close()
            if any("loss" in record for record in read_records(run_dir)):
                plot_losses([run_dir], run_dir / "loss.png")
        except OSError as error:
            report.say(f"{run_dir}: its records could not be closed, or loss.png not be written: {error}")

    def _introduce(self, report: ProgressReport) -> None:
        quant = self.config.quant.build()
        quantized = "not quantized"
        if quant is not None:
            quantized = f"{quant.weight or 'real'} weights, {quant.activation or 'real'} activations"
        shape = self.model.config
        report.say(
            f"{shape.non_embedding_parameters / 1e6:.1f} million non-embedding parameters, "
            f"{quantized}, "
            f"on {self.world.size} × {self.world.device.type}; "
            f"{'resumed after' if self.step else 'starting at'} step {self.step} of {self.config.total_steps}; "
            f"writing to {self.config.run_dir}"
        )

    def _costs(self, tokens_per_second: float) -> dict[str, float]:
        costs = {"tokens_per_second": tokens_per_second, "memory_gib": peak_memory_gib(self.world.device)}
        if self.peak_flops is not None:
            costs["mfu"] = tokens_per_second * self.flops_per_token / (self.peak_flops * self.world.size)
        return costs

    # How the passes are computed.

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.model.embed.weight, self.config.precision)

    def _gradients_synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Between processes gradients are averaged once a step, in the backward pass of the last micro-batch."""
        if isinstance(self.parallel, DistributedDataParallel) and not last:
            no_sync: AbstractContextManager[Any] = self.parallel.no_sync()
            return no_sync
        return nullcontext()
