"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is a directory `step-00001000` of torch.distributed.checkpoint files, which hold the tensors under flat
names ("model/…", "optimizer/…", "average/…", "evaluation/…", "diagnostics/…", "random/…"), beside `state.json` with
all that is no tensor: the step, the configuration, the position in the data, and length and CRC-32 of every other file.
It is written under a temporary name, forced to disk and renamed, so that a directory with a checkpoint's name is always
whole; what was damaged later is found by the checksums before a single value is used.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

import quest
from quest.models.llama import Llama, LlamaConfig
from quest.models.tokenizer import Tokenizer
from quest.train.config import CheckpointConfig, TrainConfig, from_dict

FORMAT_VERSION = 1
_STATE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: names it, and says what to do."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: where they are; made when missing.
        config: how many stay, and whether they are written in the background.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory = directory
        self.config = config
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".step-*"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)  # another process of the run may be at it too

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Writes the checkpoint of `step`; in the background, from a copy, if so configured.

        Raises:
            CheckpointError: when it could not be written. Earlier checkpoints are untouched. In the background: at
                the next `save` or `wait`.
        """
        self.wait()
        if self.config.asynchronous:
            copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            self.pending = self.writer.submit(self._write, step, copies, state)
        else:
            self._write(step, tensors, state)

    def wait(self) -> None:
        """Returns when nothing is being written any more. Raises CheckpointError when the last write failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the store once everything is written. Raises CheckpointError when the last write failed."""
        self.wait()
        self.writer.shutdown()

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        path = self.directory / f"step-{step:08d}"
        temporary = self.directory / f".{path.name}"
        try:
            with _single_process():
                save_tensors(tensors, storage_writer=FileSystemWriter(temporary, sync_files=True), no_dist=True)
            files = {file.name: _describe(file) for file in sorted(temporary.iterdir())}
            with (temporary / _STATE).open("w", encoding="utf-8") as stream:
                json.dump({"format_version": FORMAT_VERSION, "step": step, **state, "files": files}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            _sync_directory(temporary)
            temporary.rename(path)
            _sync_directory(self.directory)
        except (OSError, RuntimeError, CheckpointException) as error:
            free = _free_space(self.directory)  # while what was written still takes its share
            shutil.rmtree(temporary, ignore_errors=True)
            last = find_latest(self.directory)
            raise CheckpointError(
                f"checkpoint {path} could not be written ({_cause(error)}; {free}); "
                f"{f'the last good one is {last}' if last else 'there is none before it'}. "
                f"Free disk space or choose another run_dir, then go on with --resume auto"
            ) from error
        self._prune()

    def _prune(self) -> None:
        for path in list_checkpoints(self.directory)[: -self.config.keep_last]:
            if self.config.keep_every and int(path.name.removeprefix("step-")) % self.config.keep_every == 0:
                continue
            hidden = path.with_name(f".{path.name}")  # a name that counts as no checkpoint while it is taken apart
            path.rename(hidden)
            shutil.rmtree(hidden)


def list_checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints in `directory`, oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.is_dir())


def find_latest(directory: Path) -> Path | None:
    """The checkpoint of the highest step, if there is one."""
    checkpoints = list_checkpoints(directory)
    return checkpoints[-1] if checkpoints else None


def read_state(path: Path) -> dict[str, Any]:
    """What `state.json` holds, after every file of the checkpoint was found as it was written.

    Raises:
        CheckpointError: when `path` is no checkpoint, of an unknown version, or damaged; names the file.
    """
    try:
        state: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
        version, files = state["format_version"], state["files"]
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint (a directory step-… with {_STATE}), got {error.strerror or error}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise _damaged(path, _STATE, "not readable") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected checkpoint format {FORMAT_VERSION}, got {version}; use the quest of then"
        )
    for name, written in files.items():
        try:
            found = _describe(path / name)
        except OSError:
            raise _damaged(path, name, "missing") from None
        if found["bytes"] != written["bytes"]:
            raise _damaged(path, name, f"{found['bytes']} bytes long where {written['bytes']} were written")
        if found != written:
            raise _damaged(path, name, "of another content than was written (CRC-32 differs)")
    return state


def read_tensors(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names start with one of `prefixes`, on the CPU."""
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in metadata.items()
        if isinstance(item, TensorStorageMetadata) and name.startswith(prefixes)
    }
    with _single_process():
        load_tensors(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return tensors


def model_description(model: LlamaConfig, config: TrainConfig) -> dict[str, Any]:
    """What two runs must share to share weights: the model's shape and its quantizers, as plain values."""
    quant = config.quant.build()
    return {"model": vars(model).copy(), "quant": None if quant is None else quant.to_dict()}


def check_same_model(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises CheckpointError naming the first field in which a checkpoint's model differs from the run's."""
    for section in ("model", "quant"):
        a, b = saved[section], own[section]
        if a == b:
            continue
        if a is None or b is None:
            field, was, now = section, a and a["weight"], b and b["weight"]
        else:
            key = next(key for key in {**a, **b} if a.get(key) != b.get(key))
            field, was, now = f"{section}.{key}", a.get(key), b.get(key)
        raise CheckpointError(
            f"cannot resume from {path}: its {field} is {was}, this run's is {now}; "
            f"configure the same model, or start anew in another run_dir"
        )


def load_model(path: str | Path) -> tuple[nn.Module, Tokenizer | None, TrainConfig]:
    """The trained model of a run, for inference: averaged weights where the run keeps an average.

    Args:
        path: a run directory (its latest checkpoint counts) or one checkpoint.

    Returns:
        The model on the CPU, prepared as it was trained and in evaluation mode; the run's tokenizer if it is there;
        the run's configuration.

    Raises:
        CheckpointError: when there is no checkpoint or it is damaged.
    """
    path = Path(path)
    checkpoint = path if (path / _STATE).exists() else find_latest(path / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{path}: expected a run directory or a checkpoint, found none; train first")
    state = read_state(checkpoint)
    config = from_dict(state["config"])
    with torch.device("meta"):
        model = Llama(LlamaConfig(**state["model"]))
    quant = config.quant.build()
    if quant is not None:
        quest.prepare(model, quant)
    tensors = read_tensors(checkpoint, ("model/", "evaluation/"))
    weights = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    averaged = {name.removeprefix("evaluation/"): value for name, value in tensors.items() if name.startswith("eval")}
    model.load_state_dict(weights | averaged, assign=True)
    run = checkpoint.parent.parent
    tokenizer = Tokenizer.load(run) if (run / "tokenizer.json").exists() else None
    return model.eval(), tokenizer, config


@contextmanager
def _single_process() -> Iterator[None]:
    """Silences the notice that a checkpoint of one process is one: the state is replicated, rank 0 writes it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load).*")
        yield


def _describe(file: Path) -> dict[str, int]:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": file.stat().st_size, "crc32": checksum}


def _damaged(path: Path, name: str, what: str) -> CheckpointError:
    others = [other for other in list_checkpoints(path.parent) if other != path]
    remedy = f"delete {path} to go on from {others[-1].name}" if others else "restore it from a copy or start anew"
    return CheckpointError(f"checkpoint {path} is damaged: {name} is {what}; {remedy}")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    """One line of what went wrong, from within torch.distributed.checkpoint's report of all processes."""
    if isinstance(error, CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    if "inline_container" in str(error):  # of torch's ZIP writer, which tells the position where it got stuck alone
        return "torch could not write the file, as happens on a full disk"
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _free_space(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path).free / 1e6:,.1f} MB are free there"
    except OSError as error:  # the directory itself may be gone
        return f"{path}: {error.strerror}"
