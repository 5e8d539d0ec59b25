"""The optimizer with the paper's parameter groups, its state by parameter name, and averages of the weights.

Weight decay is for the weights of linear layers alone: embeddings, norms and biases have none. The learning rate is
set from outside before each step (see `schedule`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quest.train.config import AverageConfig, ConfigError, OptimConfig

# What a configuration decides: on resuming, the new configuration's values stand. Everything else in a parameter
# group (the counters of schedule-free AdamW) is state.
_HYPERPARAMETERS = ("lr", "betas", "eps", "momentum", "weight_decay")


def build_optimizer(model: nn.Module, config: OptimConfig, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW (fused), SGD with momentum, or schedule-free AdamW, over the trainable parameters of `model`.

    Raises:
        ConfigError: when schedule-free AdamW is asked for and the package is not installed.
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=config.betas, eps=config.eps, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum)
    try:
        from schedulefree import AdamWScheduleFree
    except ModuleNotFoundError:
        raise ConfigError(
            'optim.name: "schedule_free" needs the package schedulefree, which is not installed; '
            "pip install schedulefree, or choose adamw"
        ) from None
    optimizer: torch.optim.Optimizer = AdamWScheduleFree(groups, lr=learning_rate, betas=config.betas, eps=config.eps)
    optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[Any]]:
    """The optimizer's tensors as "parameter name/quantity", and its groups without parameters (plain values)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[id(parameter)]}/{quantity}": value
        for parameter, state in optimizer.state.items()
        for quantity, value in state.items()
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, groups


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[Any]
) -> None:
    """Inverse of `optimizer_state`; hyperparameters stay those of the optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        state.setdefault(order.index(name), {})[quantity] = value
    own = optimizer.state_dict()["param_groups"]
    for group, saved in zip(own, groups, strict=True):
        group.update({key: value for key, value in saved.items() if key not in _HYPERPARAMETERS})
    optimizer.load_state_dict({"state": state, "param_groups": own})


def clip_gradient(model: nn.Module, norm: float) -> Tensor:
    """Scales the gradient down to `norm` when it is longer (0: never); returns its norm before, on its device."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if norm == 0:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return torch.nn.utils.clip_grad_norm_(parameters, norm)


class WeightAverage:
    """The weights that are evaluated and exported, where they are not the ones that are trained.

    `ema` is an exponential moving average, `uniform` the mean of every weight since its start; schedule-free AdamW
    has an average of its own, held by the optimizer. With none of these, the trained weights serve.

    Args:
        config: which average.
        total_steps: of the run, for the start of averaging.
    """

    def __init__(
        self, config: AverageConfig, total_steps: int, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.config = config
        self.first_step = round(config.start * total_steps)
        self.parameters = dict(model.named_parameters())
        self.optimizer = optimizer
        self.schedule_free = hasattr(optimizer, "eval")
        self.average: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step`, when it is one that enters."""
        if self.config.name == "none" or step < self.first_step or (step - self.first_step) % self.config.every:
            return
        self.count += 1
        if self.count == 1:
            self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            return
        share = 1 / self.count
        if self.config.name == "ema":
            # At least this share, so that a young average does not hang on to the first weights (as TensorFlow's).
            share = max(1 - self.config.decay, 9 / (10 + self.count))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), share)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[bool]:
        """Within the block the model has the averaged weights; yields whether they differ from the trained ones.

        The trained weights come back from a copy, to the bit.
        """
        if not self.average and not self.schedule_free:
            yield False
            return
        trained = {name: parameter.clone() for name, parameter in self.parameters.items()}
        if self.schedule_free:
            self.optimizer.eval()  # type: ignore[attr-defined]
        else:
            self._set(self.average)
        try:
            yield True
        finally:
            if self.schedule_free:
                self.optimizer.train()  # type: ignore[attr-defined]
            self._set(trained)

    def _set(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
