"""Text generation: one token at a time, each fed back through a KV cache.

Sampling happens on the CPU in float32, so that a seed gives the same text wherever the logits are the same. When the
model's context is full, its latter half is read again into an empty cache and generation goes on from there: half a
context of work for half a context of new tokens, and no position beyond those seen in training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from quest import precision
from quest.models.llama import Llama


def generate(
    model: Llama,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yields up to `max_new_tokens` ids that follow `prompt`, each as soon as it is known.

    Args:
        model: in evaluation mode, on the device to run on; its products run as in training (`quest.precision`).
        prompt: at least one id, at most `model.config.max_seq_len`.
        max_new_tokens: how many at most.
        temperature: divides the logits; 0 takes the likeliest token every time.
        top_p: sample from the fewest tokens whose probabilities reach this sum (1: from all).
        top_k: sample from the k likeliest tokens alone.
        seed: of the sampling; None draws anew each time.
        stop: ids that end the generation; they are not yielded.

    Raises:
        ValueError: naming the argument that is out of range (at the call, before anything runs).
    """
    _require(
        "prompt", 1 <= len(prompt) <= model.config.max_seq_len, f"1 to {model.config.max_seq_len} ids", len(prompt)
    )
    vocabulary = model.config.vocab_size
    _require("prompt", min(prompt) >= 0 and max(prompt) < vocabulary, f"ids below {vocabulary}", max(prompt, key=abs))
    _require("max_new_tokens", max_new_tokens >= 0, "0 or more", max_new_tokens)
    _require("temperature", temperature >= 0, "0 or more", temperature)
    _require("top_p", 0 < top_p <= 1, "above 0, at most 1", top_p)
    _require("top_k", top_k is None or top_k >= 1, "1 or more", top_k)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    return _tokens(
        model, list(prompt), max_new_tokens, lambda logits: _sample(logits, temperature, top_p, top_k, generator), stop
    )


def _tokens(
    model: Llama, ids: list[int], count: int, choose: Callable[[Tensor], int], stop: Collection[int]
) -> Iterator[int]:
    weight, limit = model.embed.weight, model.config.max_seq_len
    cache = model.new_cache(1, limit, weight.device, precision.product_dtype(weight))
    seen = 0  # how many of the ids the cache has met
    for _ in range(count):
        if cache.length == limit:
            cache.length, seen = 0, len(ids) - (limit + 1) // 2
        with torch.inference_mode(), precision.autocast(weight):
            logits_V = model(torch.tensor([ids[seen:]], device=weight.device), cache)[0, -1].float().cpu()
        seen = len(ids)
        token = choose(logits_V)
        if token in stop:
            return
        yield token
        ids.append(token)


def _sample(logits_V: Tensor, temperature: float, top_p: float, top_k: int | None, generator: torch.Generator) -> int:
    if not logits_V.isfinite().all():
        raise ValueError("generate: the model gave logits that are not finite; its weights or its input are damaged")
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V, ids_V = logits_V.sort(descending=True, stable=True)
    probabilities_V = ((logits_V[:top_k] - logits_V[0]) / temperature).softmax(-1)  # no overflow at tiny temperatures
    probabilities_V[probabilities_V.cumsum(-1) - probabilities_V >= top_p] = 0  # the token that crosses the sum stays
    return int(ids_V[torch.multinomial(probabilities_V, 1, generator=generator)])


def _require(argument: str, ok: bool, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"generate: {argument}: expected {expected}, got {got}")
