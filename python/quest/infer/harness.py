"""A quest model for lm-eval (the package `lm_eval`, optional): HellaSwag, ARC, PIQA and the other tasks it knows.

lm-eval asks for log-likelihoods of continuations, of whole texts, and for generated text; its base class turns text
into pairs of token lists. Several requests run at once, longest first, padded at the end: with causal attention what
follows a position does not touch it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"evaluation tasks need the package lm_eval: pip install 'quest[eval]' ({error})") from error

from quest.infer.generate import generate
from quest.models.llama import Llama
from quest.models.tokenizer import StreamDecoder, Tokenizer
from quest.precision import autocast

DEFAULT_NEW_TOKENS = 256  # lm-eval's own default where a task says nothing


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """`model` (in evaluation mode, on its device) and its tokenizer as lm-eval sees them."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        super().__init__()
        self.model = model
        self.text = tokenizer
        self.batch_size = batch_size
        self.context = model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.text.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of (…, context, continuation): log-likelihood of the continuation, and whether greedy decoding gives it."""
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
        results = [(0.0, True)] * len(pairs)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, result in zip(batch, self._score([pairs[i] for i in batch]), strict=True):
                results[i] = result
        return results

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """Input ids and how many of them were continuation; what the model's context cannot hold is cut on the left."""
        if len(continuation) > self.context:
            raise ValueError(
                f"lm-eval asks for a continuation of {len(continuation)} tokens, the model's context holds "
                f"{self.context}"
            )
        return (context + continuation)[-self.context - 1 :], len(continuation)

    @torch.inference_mode()
    def _score(self, batch: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        longest = max(len(ids) for ids, _ in batch)
        padded = torch.tensor([ids + [self.text.eos_id] * (longest - len(ids)) for ids, _ in batch])
        padded = padded.to(self.model.embed.weight.device)
        with autocast(self.model.embed.weight):
            logprobs_BSV = self.model(padded[:, :-1]).float().log_softmax(-1)
        results = []
        for row, (ids, count) in enumerate(batch):
            logprobs_SV = logprobs_BSV[row, len(ids) - 1 - count : len(ids) - 1]
            target = padded[row, len(ids) - count : len(ids)]
            likelihood = logprobs_SV.gather(-1, target.unsqueeze(-1)).double().sum().item()
            results.append((likelihood, bool((logprobs_SV.argmax(-1) == target).all())))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once, in windows of the model's context."""
        totals = []
        for request in requests:
            ids = self.text.encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.context, context_len=1)
            scores = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            totals.append(sum(score for score, _ in scores))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text that follows a context until a stop string, the end-of-document token or a number of tokens."""
        return [self._generate_until(*request.args) for request in requests]

    def _generate_until(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        room = settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)
        prompt = self.text.encode(context)[-max(1, self.context - room) :] or [self.text.eos_id]
        temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
        decoder, text = StreamDecoder(self.text), ""
        for token in generate(self.model, prompt, room, temperature=temperature, seed=0, stop=(self.text.eos_id,)):
            text += decoder.push(token)
            ends = [text.index(mark) for mark in until if mark in text]
            if ends:
                return text[: min(ends)]
        return text + decoder.flush()


def evaluate_tasks(
    model: Llama, tokenizer: Tokenizer, tasks: Sequence[Any], *, batch_size: int = 8, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Runs lm-eval tasks: task -> metric -> value.

    Args:
        tasks: names that lm-eval knows (most fetch a data set), or task configurations as dictionaries.
        limit: at most so many examples of each task.

    Raises:
        ValueError: for a name that lm-eval does not know.
    """
    manager = TaskManager()
    for task in tasks:
        if isinstance(task, str) and not manager.match_tasks([task]):
            raise ValueError(f"evaluate: lm-eval has no task {task!r}; `lm-eval ls tasks` lists them")
    harness = HarnessModel(model, tokenizer, batch_size)
    results = simple_evaluate(model=harness, tasks=list(tasks), limit=limit, task_manager=manager)
    scores: dict[str, dict[str, Any]] = results["results"]
    return scores
