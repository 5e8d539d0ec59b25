"""Which of how many processes this is, and the few things that they do together.

`torchrun --nproc-per-node 8 -m quest train …` starts one process for each GPU. Every one holds the whole model and
reads its own share of the data; gradients are averaged by DistributedDataParallel. A plain start is a world of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from quest.train.config import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, computing on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process reports and saves."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """The world that torchrun's environment describes, or one of this process alone.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is a GPU.

    Raises:
        ConfigError: when CUDA is asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a CUDA GPU for device cuda, found none; choose cpu or auto")
    here = torch.device("cpu")
    if device == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, here)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), here)
    finally:
        dist.destroy_process_group()
