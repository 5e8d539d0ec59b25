"""Generation: cache and sampling agree with their definitions, and wrong arguments are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quest
from quest.infer import fuse_prologues, generate
from quest.infer.generate import _sample
from quest.models import Llama, LlamaConfig

CONFIG = LlamaConfig(vocab_size=50, n_layers=2, n_heads=2, d_model=32, d_hidden=64, max_seq_len=16)
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def model() -> Llama:
    model = Llama(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)  # so that the likeliest token is not a matter of rounding
    return model


def greedy_without_cache(model: Llama, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("quantized", [False, True])
def test_greedy_equals_running_all_anew(model: Llama, quantized: bool) -> None:
    if quantized:
        quest.convert(quest.prepare(model, quest.QuantConfig("int8", "int8")))
    expected = greedy_without_cache(model, PROMPT, 11)
    assert list(generate(model, PROMPT, 11, temperature=0)) == expected
    if quantized:
        assert list(generate(fuse_prologues(model), PROMPT, 11, temperature=0)) == expected


def test_full_context_goes_on_from_its_latter_half(model: Llama) -> None:
    tokens = list(generate(model, PROMPT, 30, temperature=0))
    ids = PROMPT + tokens
    # 16 positions fit: the 17th id comes from the 16 before it; then 8 of 17 are read again, up to 16 in all.
    assert tokens[11] == greedy_without_cache(model, ids[:16], 1)[0]
    assert tokens[12:21] == greedy_without_cache(model, ids[9:17], 9)
    assert tokens[21:30] == greedy_without_cache(model, ids[18:26], 9)


def test_prompt_may_fill_the_context(model: Llama) -> None:
    assert len(list(generate(model, [7] * 16, 3, seed=0))) == 3


def test_seed_decides_the_text(model: Llama) -> None:
    texts = [tuple(generate(model, PROMPT, 10, temperature=5.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len({tuple(generate(model, PROMPT, 10, temperature=5.0)) for _ in range(4)}) > 1


def test_stop_ids_end_it_and_are_not_given(model: Llama) -> None:
    tokens = list(generate(model, PROMPT, 10, temperature=0))
    stop = tokens[4]
    assert list(generate(model, PROMPT, 10, temperature=0, stop=(stop,))) == tokens[: tokens.index(stop)]


def test_tokens_come_one_at_a_time(model: Llama) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_hook(count)
    stream = generate(model, PROMPT, 5)
    assert calls == 0
    next(stream)
    assert calls == 1
    assert len(list(stream)) == 4
    assert calls == 5


def draw(logits: list[float], count: int = 4000, **options: Any) -> torch.Tensor:
    """Shares of the tokens drawn."""
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "generator": torch.Generator().manual_seed(0)}
    drawn = [_sample(torch.tensor(logits), **settings | options) for _ in range(count)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / count


def test_sampling_follows_the_distribution() -> None:
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = p.log().tolist()
    # Four standard deviations of a share of 4000 draws are at most 4 sqrt(0.25 / 4000) = 0.032.
    torch.testing.assert_close(draw(logits), p, atol=0.032, rtol=0)
    hot = p.sqrt() / p.sqrt().sum()
    torch.testing.assert_close(draw(logits, temperature=2.0), hot, atol=0.032, rtol=0)
    torch.testing.assert_close(draw(logits, top_k=2), torch.tensor([0, 4, 0, 3]) / 7, atol=0.032, rtol=0)
    # 0.4 + 0.3 reach 0.6, the token that crosses it included.
    torch.testing.assert_close(draw(logits, top_p=0.6), torch.tensor([0, 4, 0, 3]) / 7, atol=0.032, rtol=0)
    assert draw(logits, count=10, top_p=1e-6)[1] == 1
    assert draw(logits, count=10, temperature=1e-30)[1] == 1
    assert draw(logits, count=10, temperature=0.0)[1] == 1


def test_logits_that_are_not_finite_are_an_error(model: Llama) -> None:
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits that are not finite"):
        next(generate(model, PROMPT, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt: expected 1 to 16 ids, got 0"),
        ({"prompt": [0] * 17}, "prompt: expected 1 to 16 ids, got 17"),
        ({"prompt": [1, 50]}, "prompt: expected ids below 50, got 50"),
        ({"prompt": [-1]}, "prompt: expected ids below 50, got -1"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected 0 or more, got -1"),
        ({"temperature": -0.5}, "temperature: expected 0 or more, got -0.5"),
        ({"top_p": 0.0}, "top_p: expected above 0, at most 1, got 0.0"),
        ({"top_k": 0}, "top_k: expected 1 or more, got 0"),
    ],
)
def test_wrong_arguments_are_named_at_the_call(model: Llama, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompt": PROMPT, "max_new_tokens": 1} | arguments)


def test_runs_on_every_device(model: Llama, device: torch.device) -> None:
    expected = list(generate(model, PROMPT, 8, temperature=0))
    assert list(generate(model.to(device), PROMPT, 8, temperature=0)) == expected
