"""Opens any model that quest can read, ready for inference."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from quest.models.hf import load_hf
from quest.models.llama import Llama
from quest.models.packed import is_packed, load_packed
from quest.models.paper import load_paper_checkpoint
from quest.models.tokenizer import Tokenizer
from quest.surgery import convert


def open_model(source: str, device: torch.device | str = "cpu") -> tuple[Llama, Tokenizer | None]:
    """The model that `source` names, quantized layers packed, in evaluation mode; with its tokenizer if it has one.

    Args:
        source: a packed directory, a run directory or one of its checkpoints, "hf:DIR" (a Hugging Face Llama) or
            "paper:PATH" (a checkpoint of the paper's code).

    Raises:
        FileNotFoundError, ValueError, CheckpointError: as the reader of that kind says.
    """
    kind, colon, path = source.partition(":")
    tokenizer = None
    if colon and kind == "paper":
        model = load_paper_checkpoint(path)
    elif colon and kind == "hf":
        model = load_hf(path)
        tokenizer = _tokenizer_in(Path(path))
    elif is_packed(source):
        return load_packed(source, device), _tokenizer_in(Path(source))
    elif not Path(source).exists():
        raise FileNotFoundError(
            f"{source} does not exist; expected a packed directory, a run directory, a checkpoint, hf:DIR or paper:PATH"
        )
    elif (Path(source) / "config.json").is_file():
        raise ValueError(
            f"{source} has a config.json that is not of a packed model; a Hugging Face Llama is hf:{source}"
        )
    else:
        from quest.train.checkpoint import load_model  # inference alone does not load the trainer

        trained, tokenizer, _ = load_model(source)
        model = cast(Llama, trained)
    return convert(model.to(device)), tokenizer


def _tokenizer_in(directory: Path) -> Tokenizer | None:
    return Tokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None
