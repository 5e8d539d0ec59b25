"""Batches of token sequences from a token cache.

The stream of n tokens is cut into windows of sequence_length + 1 tokens, the last of one being the first of the next:
inputs and targets of a language model. Training visits them in a new order every epoch, for ever. The order is a keyed
permutation that is computed, not stored: sample number i of the whole run is window permute(i mod windows) under the
key of epoch i div windows, whatever the number of processes. So the whole state of a run's data is one integer, the
next sample; every process computes its own share; a run that stops resumes at the exact sample, also on another number
of processes; and 10^9 windows take no memory.

The permutation is a Feistel network (Luby and Rackoff, 1988) on the smallest even number of bits that holds all
windows; results beyond the last window are permuted again until they fall inside (cycle walking, Black and Rogaway,
2002), fewer than 4 times on average.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quest.train.data.cache import TokenCache
from quest.train.data.config import DataError

_U64 = npt.NDArray[np.uint64]
_PREFETCH = 4  # batches ready ahead of the consumer; more only smooths a disk slower than the model
_FEISTEL_ROUNDS = 8  # four do in theory; a handful of windows needs eight before all orders are about as frequent


def permute(positions: _U64, epochs: _U64, length: int, seed: int) -> _U64:
    """Where each position in 0 … length-1 goes in the shuffle of its epoch: a permutation of them for every (seed,
    epoch).

    `positions` and `epochs` are uint64 of one shape [n]; so is the result.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    keys = _mix(_mix(np.full_like(epochs, seed % (1 << 64))) ^ epochs)
    result = positions.copy()
    todo = np.arange(len(result))
    while todo.size:
        result[todo] = _feistel(result[todo], keys[todo], np.uint64(half))
        todo = todo[result[todo] >= length]
    return result


def _feistel(values: _U64, keys: _U64, half: np.uint64) -> _U64:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for turn in range(_FEISTEL_ROUNDS):
        left, right = right, left ^ (_mix(_mix(keys + np.uint64(turn)) ^ right) & mask)
    return left << half | right


def _mix(x: _U64) -> _U64:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): each input bit changes each output bit with
    probability 1/2."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _window_count(cache: TokenCache, sequence_length: int, at_least: int) -> int:
    windows = max(0, len(cache.tokens) - 1) // sequence_length
    if windows < at_least:
        raise DataError(
            f"{cache.path}: {len(cache.tokens)} tokens, but {at_least} sequence(s) of {sequence_length} need "
            f"{at_least * sequence_length + 1}; use more data or a shorter sequence"
        )
    return windows


def _gather(cache: TokenCache, windows: npt.NDArray[np.integer[Any]], sequence_length: int) -> torch.Tensor:
    """Windows as int64 [len(windows), sequence_length + 1]."""
    starts = windows.astype(np.int64) * sequence_length
    rows = [cache.tokens[start : start + sequence_length + 1] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


class TrainBatches:
    """Endless iterator of int64 tensors [batch_size, sequence_length + 1]; with `pin_memory` in pinned memory, which
    a GPU copies from without the CPU waiting.

    Each process gives its `rank` and takes its own rows of every global batch of world_size · batch_size samples.
    Batches are prepared by a thread, ahead of the consumer; `state_dict` counts those consumed alone.
    """

    def __init__(
        self,
        cache: TokenCache,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        pin_memory: bool = False,
    ) -> None:
        self.windows = _window_count(cache, sequence_length, at_least=1)
        self._cache = cache
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._shuffle = shuffle
        self._sample = 0  # next sample of the run, over all processes
        self._pin = pin_memory
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="quest-data")
        self._ahead: deque[Future[torch.Tensor]] = deque()

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._sample / self.windows

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> torch.Tensor:
        global_batch = self._batch_size * self._world_size
        while len(self._ahead) <= _PREFETCH:
            self._ahead.append(self._pool.submit(self._batch, self._sample + len(self._ahead) * global_batch))
        batch = self._ahead[0].result()  # an error stays in its place: the batch behind it must not come in its stead
        self._ahead.popleft()
        self._sample += global_batch
        return batch

    def _batch(self, sample: int) -> torch.Tensor:
        """This process's rows of the global batch that begins at `sample`."""
        first = sample + self._rank * self._batch_size
        samples = np.arange(first, first + self._batch_size, dtype=np.uint64)
        windows = samples % np.uint64(self.windows)
        if self._shuffle:
            windows = permute(windows, samples // np.uint64(self.windows), self.windows, self._seed)
        batch = _gather(self._cache, windows, self._sequence_length)
        return batch.pin_memory() if self._pin else batch

    def state_dict(self) -> dict[str, Any]:
        """The next sample, and what gives sample numbers their meaning. The same on every process."""
        return {"sample": self._sample, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the sample of `state`, also on another number of processes or with another batch size.

        Raises DataError when the state belongs to other tokens, sequences or another order.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise DataError(
                    f"resuming data: {name} was {state.get(name)!r} and is {mine!r} now; resume with the data and "
                    f"settings that the checkpoint was made with, or start a new run"
                )
        self._cancel()
        self._sample = int(state["sample"])

    def _identity(self) -> dict[str, Any]:
        return {
            "tokens": len(self._cache.tokens),
            "checksum": self._cache.checksum,
            "sequence_length": self._sequence_length,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def _cancel(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """Ends the thread; the iterator cannot be used afterwards."""
        self._cancel()
        self._pool.shutdown()


class ValidationBatches:
    """The validation windows in order, as int64 tensors [≤ batch_size, sequence_length + 1]; can be iterated again and
    again.

    Every process gets the same number of windows, so that none waits for another in a collective: on world_size
    processes the last windows mod world_size are left out, on one process none is. The last batch may be smaller.
    """

    def __init__(
        self, cache: TokenCache, sequence_length: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        windows = _window_count(cache, sequence_length, at_least=world_size)
        self._windows = np.arange(rank, windows - windows % world_size, world_size)
        self._cache = cache
        self._sequence_length = sequence_length
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._windows) // self._batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for first in range(0, len(self._windows), self._batch_size):
            yield _gather(self._cache, self._windows[first : first + self._batch_size], self._sequence_length)
