"""`make demo`: a 4-bit language model from nothing in a few minutes, on whatever this machine is.

Trains a Llama with 4-bit weights and activations on the source of Python's standard library (so nothing is downloaded),
packs it, checks that packing changed nothing, and lets the packed model write. Everything lands in ./demo. Interrupted,
it goes on where it stopped when it is run again; finished, it packs and writes anew.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast

import torch

from quest import cli
from quest.infer import evaluate_tokens, fuse_prologues
from quest.models import Llama, load_packed
from quest.models.packed import save_packed
from quest.surgery import convert
from quest.train.checkpoint import load_model
from quest.train.config import (
    CheckpointConfig,
    EvaluationConfig,
    ModelConfig,
    QuantSection,
    TrainConfig,
    load,
)
from quest.train.data import DataConfig, build_data
from quest.train.trainer import train

DIRECTORY = Path("demo")
RUN, PACKED = DIRECTORY / "run", DIRECTORY / "packed"
# Tokenizer, training and packing together take less than 8 minutes: a slow machine stops training here, at a higher
# loss.
TRAINING_MINUTES = 5.0
VALIDATION_SEQUENCES = 64
TOLERANCE = 1e-4  # nats per token that packing may move the loss


def configuration() -> TrainConfig:
    """The run of an earlier start, to be resumed, or a new one: as large as this machine trains in minutes."""
    if (RUN / "config.toml").exists():
        return replace(load(RUN / "config.toml"), resume="auto", max_minutes=TRAINING_MINUTES)
    small = TrainConfig(
        run_dir=RUN,
        model=ModelConfig("tiny"),
        quant=QuantSection(weight="int4", activation="int4"),
        data=DataConfig(train=("stdlib",), vocab_size=2048, cache_dir=str(DIRECTORY / "data")),
        evaluation=EvaluationConfig(every=200, sequences=VALIDATION_SEQUENCES),
        checkpoint=CheckpointConfig(every=100),
        sequence_length=256,
        batch_size=8,
        steps=700,  # four minutes on two CPU cores
        max_minutes=TRAINING_MINUTES,
        resume="auto",
    )
    if not torch.cuda.is_available():
        return small
    return replace(
        small,
        model=ModelConfig("30M"),
        data=replace(small.data, vocab_size=8192),
        sequence_length=512,
        batch_size=64,
        micro_batch_size=16,  # fits a GPU of 16 GB
        steps=800,
    )


def main() -> int:
    """Trains, packs, compares and generates; 0 when the packed model is as good as the trained one."""
    print("── 1. Train a Llama with 4-bit weights and activations on Python's standard library", flush=True)
    config = configuration()
    result = train(config)
    if result.signal is not None:
        print("interrupted; run it again to go on from here")
        return 128 + result.signal

    print("\n── 2. Pack it", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained, tokenizer, _ = load_model(RUN)
    model = cast(Llama, trained)
    assert tokenizer is not None, "the trainer saves its tokenizer in the run directory"
    batch_size = min(VALIDATION_SEQUENCES, config.micro_batch_size or config.batch_size)  # what fits in training fits
    data = build_data(config.data, tokenizer, config.sequence_length, batch_size, config.seed)

    def validation_loss(network: Llama) -> float:
        nll, tokens = evaluate_tokens(network, islice(iter(data.validation()), VALIDATION_SEQUENCES // batch_size))
        return nll / tokens

    before = validation_loss(model.to(device))
    sizes = save_packed(convert(model), PACKED, tokenizer, {"source": "quest.demo"})
    after = validation_loss(fuse_prologues(load_packed(PACKED, device)))  # as `quest generate` runs it
    data.close()
    print(f"size:            {sizes}")
    print(f"validation loss: {before:.5f} trained, {after:.5f} packed")
    print(f"files:           {RUN / 'loss.png'} (loss curve), {RUN / 'checkpoints'}, {PACKED}")
    if not abs(before - after) <= TOLERANCE:
        print(f"the losses differ by {abs(before - after):.2e}; expected at most {TOLERANCE:g}", file=sys.stderr)
        return 1

    print(f"\n── 3. Let the packed model write:  quest generate {PACKED} --prompt 'def '", flush=True)
    return cli.main(["generate", str(PACKED), "--prompt", "def ", "--seed", "1", "--max-new-tokens", "200"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
