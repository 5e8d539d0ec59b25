"""Loss, perplexity and bits per byte against their definitions; lm-eval's requests on a local task."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from quest.infer import Evaluation, evaluate, evaluate_tokens
from quest.models import Llama, LlamaConfig, Tokenizer, train_bpe

TEXTS = ["the cat sat on the mat.", "a naïve café — ünïcödé", "", "the end of the story " * 9]
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS * 3, 280)


@pytest.fixture
def model(tokenizer: Tokenizer) -> Llama:
    config = LlamaConfig(tokenizer.vocab_size, n_layers=1, n_heads=2, d_model=32, d_hidden=64, max_seq_len=LENGTH)
    model = Llama(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform
    return model


def nll_one_by_one(model: Llama, ids: list[int]) -> float:
    """Every id but the first from those before it, back to the start of its window of LENGTH."""
    total = 0.0
    with torch.no_grad():
        for i in range(1, len(ids)):
            start = (i - 1) // LENGTH * LENGTH
            total -= model(torch.tensor([ids[start:i]]))[0, -1].double().log_softmax(-1)[ids[i]].item()
    return total


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_token_is_predicted_once(model: Llama, tokenizer: Tokenizer, batch_size: int) -> None:
    result = evaluate(model, tokenizer, TEXTS, batch_size=batch_size)
    ids = [tokenizer.eos_id]
    for text in TEXTS:
        ids += [*tokenizer.encode(text), tokenizer.eos_id]
    assert result.tokens == len(ids) - 1
    assert result.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert result.nll == pytest.approx(nll_one_by_one(model, ids), rel=1e-5)


def test_measures_follow_from_the_sum() -> None:
    result = Evaluation(nll=20.0, tokens=8, text_bytes=25)
    assert result.loss == 2.5
    assert result.perplexity == pytest.approx(math.exp(2.5))
    assert result.bits_per_byte == pytest.approx(20 / math.log(2) / 25)
    assert Evaluation(1e6, 1, 1).perplexity == math.inf


def test_uniform_model(model: Llama, tokenizer: Tokenizer) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    result = evaluate(model, tokenizer, TEXTS)
    assert result.perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-5)


def test_text_may_be_limited(model: Llama, tokenizer: Tokenizer) -> None:
    text = TEXTS[1]  # 22 characters, of 2 and 3 bytes some
    position = len(text[: text.index("é")].encode())
    result = evaluate(model, tokenizer, [text, "never read"], max_bytes=position + 1)  # in the middle of é
    assert result == evaluate(model, tokenizer, [text[: text.index("é")]])
    assert result.text_bytes == position
    whole = evaluate(model, tokenizer, [TEXTS[0], text], max_bytes=len(TEXTS[0]))
    assert whole == evaluate(model, tokenizer, [TEXTS[0]])


def test_batches_of_tokens(model: Llama) -> None:
    tokens = torch.randint(model.config.vocab_size, (3, LENGTH + 1))
    nll, count = evaluate_tokens(model, [tokens[:2], tokens[2:]])
    assert count == 3 * LENGTH
    assert nll == pytest.approx(sum(nll_one_by_one(model, row) for row in tokens.tolist()), rel=1e-5)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_an_error(model: Llama, tokenizer: Tokenizer, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="no text"):
        evaluate(model, tokenizer, texts)


def test_tokenizer_of_another_model_is_refused(tokenizer: Tokenizer) -> None:
    model = Llama(LlamaConfig(vocab_size=100, n_layers=1, n_heads=2, d_model=32))
    with pytest.raises(ValueError, match=f"the tokenizer has {tokenizer.vocab_size} ids, the model only 100"):
        evaluate(model, tokenizer, TEXTS)


# ---- lm-eval ----


@pytest.fixture
def harness(model: Llama, tokenizer: Tokenizer) -> Any:
    pytest.importorskip("lm_eval")
    from quest.infer.harness import HarnessModel

    return HarnessModel(model, tokenizer, batch_size=2)


def request(*args: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type="loglikelihood", doc={}, arguments=args, idx=0)


def test_harness_loglikelihoods(harness: Any, model: Llama, tokenizer: Tokenizer) -> None:
    pairs = [("the cat", " sat on the mat"), ("a", " story"), ("", "the end"), ("the story of", " the")]
    results = harness.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (likelihood, _) in zip(pairs, results, strict=True):
        before = tokenizer.encode(context) or [tokenizer.eos_id]
        ids = before + tokenizer.encode(context + continuation)[len(tokenizer.encode(context)) :]
        expected = nll_one_by_one(model, ids) - (nll_one_by_one(model, before))
        assert likelihood == pytest.approx(-expected, rel=1e-4)


def test_harness_knows_greedy_continuations(harness: Any, model: Llama, tokenizer: Tokenizer) -> None:
    context = tokenizer.encode("the cat")
    with torch.no_grad():
        likeliest = int(model(torch.tensor([context]))[0, -1].argmax())
    pairs = [(None, context, [likeliest]), (None, context, [(likeliest + 1) % 250])]
    assert [greedy for _, greedy in harness._loglikelihood_tokens(pairs)] == [True, False]


def test_harness_cuts_long_contexts_on_the_left(harness: Any, model: Llama) -> None:
    ids = torch.randint(250, (40,)).tolist()
    ((likelihood, _),) = harness._loglikelihood_tokens([(None, ids[:35], ids[35:])])
    window = ids[-LENGTH - 1 :]
    assert likelihood == pytest.approx(nll_one_by_one(model, window[:-5]) - nll_one_by_one(model, window), rel=1e-4)
    with pytest.raises(ValueError, match="continuation of 17 tokens, the model's context holds 16"):
        harness._loglikelihood_tokens([(None, [1], ids[:17])])


def test_harness_rolling_counts_every_token(harness: Any, model: Llama, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[3])
    assert len(ids) > LENGTH  # more than one window
    (total,) = harness.loglikelihood_rolling([request(TEXTS[3])], disable_tqdm=True)
    assert math.isfinite(total)
    first = [tokenizer.eos_id, *ids[:LENGTH]]
    short = tokenizer.decode(ids[:4])
    assert tokenizer.encode(short) == ids[:4]
    (part,) = harness.loglikelihood_rolling([request(short)], disable_tqdm=True)
    assert part == pytest.approx(-nll_one_by_one(model, first[:5]), rel=1e-4)
    assert total < part


def test_harness_generates_until(harness: Any, tokenizer: Tokenizer) -> None:
    settings = {"until": [], "max_gen_toks": 12}
    (text,) = harness.generate_until([request("the cat", settings)])
    assert text
    mark = text[len(text) // 2 :][:3]
    (cut,) = harness.generate_until([request("the cat", settings | {"until": [mark]})])
    assert cut == text[: text.index(mark)]


def test_local_task_end_to_end(harness: Any, model: Llama, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """lm-eval itself runs a multiple-choice task from a local file; the score is the one computed by hand."""
    pytest.importorskip("datasets")
    from quest.infer.harness import evaluate_tasks

    choices = [" mat", " end", " story"]
    documents = [{"question": text, "label": i % 3} for i, text in enumerate(["the cat", "a story of", "on the"])]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "local_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_target": "label",
        "doc_to_choice": choices,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    right = 0
    for document in documents:
        before = tokenizer.encode(str(document["question"]))
        scores = []
        for choice in choices:
            ids = tokenizer.encode(str(document["question"]) + choice)
            scores.append(nll_one_by_one(model, before) - nll_one_by_one(model, ids))
        right += scores.index(max(scores)) == document["label"]
    results = evaluate_tasks(model, tokenizer, [task])
    assert results["local_choices"]["acc,none"] == pytest.approx(right / 3)


def test_unknown_task_is_named(model: Llama, tokenizer: Tokenizer) -> None:
    pytest.importorskip("lm_eval")
    from quest.infer.harness import evaluate_tasks

    with pytest.raises(ValueError, match="evaluate: lm-eval has no task 'hellaswagg'"):
        evaluate_tasks(model, tokenizer, ["hellaswagg"])
