"""The diagnostics of quantized layers against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quest
from quest.models.llama import Llama, LlamaConfig
from quest.train.diagnostics import Diagnostics, full_precision

CONFIG = LlamaConfig(vocab_size=31, n_layers=1, n_heads=2, d_model=32, d_hidden=64, max_seq_len=16)


def model_and_loss(quant: quest.QuantConfig | None) -> tuple[Llama, Tensor]:
    torch.manual_seed(0)
    model = Llama(CONFIG)
    return (quest.prepare(model, quant) if quant else model), torch.randint(31, (2, 17))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def test_quantities_of_a_layer() -> None:
    model, tokens = model_and_loss(quest.QuantConfig("int2", "int4"))
    report = Diagnostics(model).measure(lambda: loss_of(model, tokens))
    assert set(report) == {f"blocks.0.{name}" for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")}
    layer = model.blocks[0].mlp.down
    weight = layer.weight.detach()
    rotated = quest.ops.hadamard(weight)
    sigma = weight.square().mean(-1, keepdim=True).sqrt()
    # DESIGN's mask of the int grid: |x| ≤ n·s, with s = α σ/(n − 1), n = 4.
    outside = (rotated.abs() > 4 * 1.4935346200015913 * sigma / 3).float().mean().item()
    assert report["blocks.0.mlp.down"]["masked"] == pytest.approx(outside, abs=2 / weight.numel())
    # Error of 2-bit quantization of normal samples, of which there are 2048: √0.11885 within 10 %.
    assert report["blocks.0.mlp.down"]["quantizer_rmse"] == pytest.approx(0.11885**0.5, rel=0.1)
    assert report["blocks.0.mlp.down"]["still_masked"] is None


def test_gradient_cosine_is_against_the_plain_model() -> None:
    model, tokens = model_and_loss(quest.QuantConfig("int3", "int3"))
    plain, _ = model_and_loss(None)
    report = Diagnostics(model).measure(lambda: loss_of(model, tokens))
    loss_of(model, tokens).backward()
    loss_of(plain, tokens).backward()
    expected = dict(plain.named_parameters())
    for name, row in report.items():
        a, b = model.get_submodule(name).weight.grad, expected[f"{name}.weight"].grad
        assert row["gradient_cosine"] == pytest.approx(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item())
        assert 0 < row["gradient_cosine"] < 0.999


def test_still_masked_is_the_share_that_stays() -> None:
    model, tokens = model_and_loss(quest.QuantConfig("int4-none-trust", "int4"))
    diagnostics = Diagnostics(model)
    layer = model.blocks[0].mlp.down

    def measure() -> dict[str, float | None]:
        return diagnostics.measure(lambda: loss_of(model, tokens))["blocks.0.mlp.down"]

    with torch.no_grad():  # one outlier in each of two rows, 1 of 64, is masked
        layer.weight.fill_(1.0)
        layer.weight[:2, 5] = 100.0
    assert measure()["masked"] == pytest.approx(2 / layer.weight.numel())
    assert measure()["still_masked"] == 1.0
    with torch.no_grad():
        layer.weight[1, 5] = 1.0
    assert measure()["still_masked"] == 0.5


def test_activations_alone() -> None:
    model, tokens = model_and_loss(quest.QuantConfig("none", "int2"))
    row = Diagnostics(model).measure(lambda: loss_of(model, tokens))["blocks.0.mlp.down"]
    assert (row["masked"], row["quantizer_rmse"]) == (None, None)
    assert 0 < row["gradient_cosine"] < 0.999


def test_leaves_the_model_as_it_was() -> None:
    model, tokens = model_and_loss(quest.QuantConfig())
    before = {name: id(module) for name, module in model.named_modules()}
    Diagnostics(model).measure(lambda: loss_of(model, tokens))
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    with full_precision(model):
        assert type(model.blocks[0].mlp.down) is nn.Linear
    assert type(model.blocks[0].mlp.down) is quest.QuestLinear


def test_a_model_without_quantized_layers() -> None:
    model, tokens = model_and_loss(None)
    assert Diagnostics(model).measure(lambda: loss_of(model, tokens)) == {}
