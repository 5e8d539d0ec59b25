"""Optimizers, their parameter groups and state, clipping, and averages of the weights."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import quest
from quest.models.llama import Llama, LlamaConfig
from quest.train.config import AverageConfig, ConfigError, OptimConfig
from quest.train.optim import (
    WeightAverage,
    build_optimizer,
    clip_gradient,
    load_optimizer_state,
    optimizer_state,
)

NAMES = ["adamw", "sgd", "schedule_free"]


def small_model(quantized: bool = False) -> Llama:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=29, n_layers=1, n_heads=2, d_model=16, d_hidden=32, max_seq_len=8))
    return quest.prepare(model, quest.QuantConfig()) if quantized else model


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        fill_gradients(model, step)
        optimizer.step()


@pytest.mark.parametrize("quantized", [False, True])
def test_only_linear_weights_decay(quantized: bool) -> None:
    model = small_model(quantized)
    optimizer = build_optimizer(model, OptimConfig(), 1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert others == {"embed.weight", "norm.weight", "blocks.0.attention_norm.weight", "blocks.0.mlp_norm.weight"}
    assert decayed == set(names.values()) - others
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_to_the_bit(name: str) -> None:
    straight = small_model()
    optimizer = build_optimizer(straight, OptimConfig(name=name), 1e-2)
    steps(straight, optimizer, 0, 3)
    tensors, groups = optimizer_state(straight, optimizer)
    tensors = {key: value.clone() for key, value in tensors.items()}
    resumed = small_model()
    resumed.load_state_dict(straight.state_dict())
    again = build_optimizer(resumed, OptimConfig(name=name), 1e-2)
    load_optimizer_state(resumed, again, tensors, groups)
    steps(straight, optimizer, 3, 6)
    steps(resumed, again, 3, 6)
    for (key, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_state_is_named_by_parameter() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(), 1e-2)
    steps(model, optimizer, 0, 1)
    tensors, _ = optimizer_state(model, optimizer)
    parameters = dict(model.named_parameters())
    assert set(tensors) == {f"{name}/{part}" for name in parameters for part in ("exp_avg", "exp_avg_sq", "step")}
    torch.testing.assert_close(tensors["norm.weight/exp_avg"], 0.1 * parameters["norm.weight"].grad)


def test_hyperparameters_of_the_new_configuration_stand() -> None:
    model = small_model()
    old = build_optimizer(model, OptimConfig(weight_decay=0.1), 1e-2)
    steps(model, old, 0, 1)
    new = build_optimizer(model, OptimConfig(weight_decay=0.3, betas=(0.5, 0.6)), 1e-3)
    load_optimizer_state(model, new, *optimizer_state(model, old))
    assert [group["weight_decay"] for group in new.param_groups] == [0.3, 0.0]
    assert new.param_groups[0]["betas"] == (0.5, 0.6)


def test_sgd_is_momentum_descent() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(name="sgd", momentum=0.5, weight_decay=0.0), 0.1)
    weight = model.norm.weight
    before = weight.detach().clone()
    steps(model, optimizer, 0, 1)
    first = weight.grad.clone()
    steps(model, optimizer, 1, 2)
    torch.testing.assert_close(weight.detach(), before - 0.1 * first - 0.1 * (0.5 * first + weight.grad))


def test_schedule_free_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ConfigError, match="needs the package schedulefree, which is not installed; pip install"):
        build_optimizer(small_model(), OptimConfig(name="schedule_free"), 1e-3)


def test_clipping() -> None:
    model = small_model()
    fill_gradients(model, 0)
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert clip_gradient(model, 0).item() == pytest.approx(whole.norm().item(), rel=1e-6)
    assert torch.equal(whole, torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert clip_gradient(model, 1.0).item() == pytest.approx(whole.norm().item(), rel=1e-6)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert clipped.norm().item() == pytest.approx(1, rel=1e-4)


def trajectory(config: AverageConfig, total: int = 10) -> tuple[WeightAverage, list[Tensor]]:
    """The average after `total` steps and the norm's weight after each."""
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(), 1e-2)
    average = WeightAverage(config, total, model, optimizer)
    weights = []
    for step in range(total):
        steps(model, optimizer, step, step + 1)
        average.update(step + 1)
        weights.append(model.norm.weight.detach().clone())
    return average, weights


def test_uniform_average() -> None:
    average, weights = trajectory(AverageConfig("uniform", start=0.5, every=2))
    expected = torch.stack([weights[4], weights[6], weights[8]]).mean(0)  # after steps 5, 7 and 9 of 10
    torch.testing.assert_close(average.average["norm.weight"], expected)


def test_exponential_average() -> None:
    average, weights = trajectory(AverageConfig("ema", decay=0.3))
    expected = weights[0]
    for count, weight in enumerate(weights[1:], start=2):
        share = max(0.7, 9 / (10 + count))
        expected = (1 - share) * expected + share * weight
    torch.testing.assert_close(average.average["norm.weight"], expected)


def test_averaged_weights_are_applied_and_taken_back() -> None:
    average, weights = trajectory(AverageConfig("uniform"))
    parameter = average.parameters["norm.weight"]
    with average.applied() as differs:
        assert differs
        torch.testing.assert_close(parameter, torch.stack(weights).mean(0))
    assert torch.equal(parameter, weights[-1])


def test_without_an_average_nothing_is_applied() -> None:
    average, weights = trajectory(AverageConfig())
    with average.applied() as differs:
        assert not differs
        assert torch.equal(average.parameters["norm.weight"], weights[-1])


def test_schedule_free_applies_its_own_average() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(name="schedule_free"), 1e-2)
    average = WeightAverage(AverageConfig(), 10, model, optimizer)
    steps(model, optimizer, 0, 4)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    with average.applied() as differs:
        assert differs
        # y = (1 − β₁) z + β₁ x: the trained weights lie between the averaged ones, x, and the base sequence, z.
        z = optimizer.state[model.norm.weight]["z"]
        mixed = 0.1 * z + 0.9 * model.norm.weight
        torch.testing.assert_close(mixed, trained["norm.weight"])
        assert not torch.equal(model.norm.weight, trained["norm.weight"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    steps(model, optimizer, 4, 5)  # the optimizer is back in its training mode
