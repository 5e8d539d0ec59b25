"""One dtype for the products of training and inference: bfloat16 on a GPU, that of the weights on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import quest
from quest.infer import evaluate_tokens, generate
from quest.models import Llama, LlamaConfig
from quest.models.llama import KVCache
from quest.precision import autocast, product_dtype

CONFIG = LlamaConfig(vocab_size=64, n_layers=2, n_heads=2, d_model=64, d_hidden=128, max_seq_len=32)


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference decides as on a GPU, wherever it runs."""
    monkeypatch.setattr("quest.precision.product_dtype", lambda *_: torch.bfloat16)


def model_on(device: torch.device, weight: str = "int4", activation: str = "int4") -> Llama:
    model = Llama(CONFIG).to(device).eval()
    return quest.prepare(model, quest.QuantConfig(weight, activation)) if weight != "none" else model


@contextmanager
def logits_of(model: nn.Module) -> Iterator[list[Tensor]]:
    collected: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, inputs, output: collected.append(output))
    yield collected
    hook.remove()


def test_the_dtype_of_products(device: torch.device) -> None:
    weight = torch.zeros(1, device=device)
    on_its_own = torch.bfloat16 if device.type == "cuda" else torch.float32
    assert product_dtype(weight) == on_its_own
    assert product_dtype(weight, "bfloat16") == torch.bfloat16
    assert product_dtype(weight, "float32") == torch.float32
    assert product_dtype(weight.half()) == torch.float16  # a model that was converted stays as it is
    for precision, dtype in (("auto", on_its_own), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        with autocast(weight, precision):
            assert nn.functional.linear(weight, weight[None]).dtype == dtype


def test_what_is_around_stands_where_nothing_is_asked_for() -> None:
    weight = torch.zeros(1)
    with torch.autocast("cpu", torch.bfloat16), autocast(weight):
        assert nn.functional.linear(weight, weight[None]).dtype == torch.bfloat16


def test_a_cpu_evaluates_and_generates_in_float32() -> None:
    model = model_on(torch.device("cpu"))
    with logits_of(model) as logits:
        evaluate_tokens(model, [torch.randint(64, (1, 9))])
        list(generate(model, [1, 2], 2))
    assert {tensor.dtype for tensor in logits} == {torch.float32}


@pytest.mark.usefixtures("bfloat16")
def test_evaluation_and_generation_in_bfloat16(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[KVCache] = []
    new_cache = Llama.new_cache

    def keeping(*args: object) -> KVCache:
        caches.append(new_cache(*args))
        return caches[-1]

    monkeypatch.setattr(Llama, "new_cache", keeping)
    model = quest.convert(model_on(device))
    with logits_of(model) as logits:
        evaluate_tokens(model, [torch.randint(64, (1, 9))])
        for _ in generate(model, [1, 2], 3, seed=0):
            assert not torch.is_autocast_enabled(device.type)  # what the consumer of the stream computes is its own
    assert {tensor.dtype for tensor in logits} == {torch.bfloat16}
    assert caches[0].keys.dtype == caches[0].values.dtype == torch.bfloat16


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize(
    ("weight", "activation"),
    [("int4", "int4"), ("int1", "int1"), ("int2", "int2"), ("int8", "int8"), ("fp4", "fp4"), ("gauss4", "gauss4")],
)
def test_packing_changes_no_logit_in_bfloat16(weight: str, activation: str, device: torch.device) -> None:
    """The trained layer and the packed one quantize the same numbers and round the same sums once."""
    model = model_on(device, weight, activation)
    tokens = torch.randint(64, (2, 33))
    with logits_of(model) as logits:
        before = evaluate_tokens(model, [tokens])
        after = evaluate_tokens(quest.convert(model), [tokens])
    assert torch.equal(*logits)
    assert before == after


@pytest.mark.usefixtures("bfloat16")
def test_weights_alone_multiply_in_bfloat16(device: torch.device) -> None:
    """The kernel gets bfloat16; the trained layer rounds w_hat to it too, the packed one multiplies codes."""
    model = model_on(device, "int4", "none")
    tokens = torch.randint(64, (2, 33))
    seen: list[torch.dtype] = []
    before, count = evaluate_tokens(model, [tokens])
    packed = quest.convert(model)
    layer = packed.blocks[0].attention.qkv
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    after, _ = evaluate_tokens(packed, [tokens])
    assert seen == [torch.bfloat16]
    assert before / count == pytest.approx(after / count, abs=2e-3)
