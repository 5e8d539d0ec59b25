"""Loss, perplexity and bits per byte of a model on text.

Documents are joined as in training, each ended by the separator token, and cut into windows of the model's context;
every token is predicted once, from those before it in its window. Then, with nll the summed negative log-likelihood in
nats,

    loss = nll / tokens        perplexity = exp(loss)        bits per byte = nll / (ln 2 · bytes of UTF-8 text)

The first two compare models of one tokenizer; bits per byte compares across tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quest.models.llama import Llama
from quest.models.tokenizer import Tokenizer
from quest.precision import autocast


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured: nats summed over `tokens` predicted tokens, in text of `text_bytes` bytes of UTF-8."""

    nll: float
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # where float64 ends

    @property
    def bits_per_byte(self) -> float:
        return self.nll / (math.log(2) * self.text_bytes)


@torch.inference_mode()
def evaluate_tokens(model: Llama, batches: Iterable[Tensor]) -> tuple[float, int]:
    """Summed negative log-likelihood in nats, and how many tokens were predicted.

    Args:
        model: in evaluation mode, on the device to run on; its products run as in training (`quest.precision`).
        batches: int64 [B, S + 1] each: every token but the first of a row is predicted.
    """
    weight = model.embed.weight
    nll, tokens = torch.zeros((), dtype=torch.float64, device=weight.device), 0  # read once: a GPU need not wait
    for batch_BS in batches:
        batch_BS = batch_BS.to(weight.device)
        with autocast(weight):
            logits_BSV = model(batch_BS[:, :-1]).float()
        targets = batch_BS[:, 1:].flatten()
        nll += F.cross_entropy(logits_BSV.flatten(0, 1), targets, reduction="none").double().sum()
        tokens += targets.numel()
    return nll.item(), tokens


def evaluate(
    model: Llama,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    max_bytes: int | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Evaluates `model` on `documents`.

    Args:
        model: in evaluation mode, on the device to run on.
        tokenizer: the one that the model was trained with.
        documents: texts, such as a `quest.train.data.Corpus`.
        max_bytes: read so many bytes of text and no more; None reads all.
        batch_size: windows that run at once.

    Raises:
        ValueError: when there is no text, or the tokenizer has ids that the model has not.
    """
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"evaluate: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    text = _Text(documents, max_bytes)
    nll, tokens = evaluate_tokens(model, _batches(_windows(text, tokenizer, config.max_seq_len), batch_size))
    if text.bytes == 0:
        raise ValueError("evaluate: the data has no text; expected at least one document that is not empty")
    return Evaluation(nll, tokens, text.bytes)


class _Text:
    """Iterates over documents until `max_bytes`, cutting the last; counts the bytes given out."""

    def __init__(self, documents: Iterable[str], max_bytes: int | None) -> None:
        self.documents = documents
        self.max_bytes = max_bytes
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for document in self.documents:
            encoded = document.encode()
            if self.max_bytes is not None and self.bytes + len(encoded) > self.max_bytes:
                document = encoded[: self.max_bytes - self.bytes].decode(errors="ignore")  # not half a character
                self.bytes += len(document.encode())
                if document:
                    yield document
                return
            self.bytes += len(encoded)
            yield document


def _windows(documents: Iterable[str], tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    """Runs of up to length + 1 ids, the last of one being the first of the next: all but the very first get predicted.

    The very first is a separator, after which training begins documents too.
    """
    ids = [tokenizer.eos_id]
    for document in documents:
        ids += [*tokenizer.encode(document), tokenizer.eos_id]
        start = 0
        while len(ids) - start > length:
            yield ids[start : start + length + 1]
            start += length
        ids = ids[start:]
    if len(ids) > 1:
        yield ids


def _batches(windows: Iterable[list[int]], size: int) -> Iterator[Tensor]:
    """Tensors [up to size, S] of windows of equal length; the shorter last window comes alone."""
    batch: list[list[int]] = []
    for window in windows:
        if batch and (len(batch) == size or len(window) != len(batch[0])):
            yield torch.tensor(batch)
            batch = []
        batch.append(window)
    if batch:
        yield torch.tensor(batch)
