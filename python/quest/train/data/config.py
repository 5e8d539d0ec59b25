"""What a run reads: the data section of a training configuration."""

from __future__ import annotations

from dataclasses import dataclass


class DataError(ValueError):
    """Input data, a token cache or a data setting that cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes sequences of tokens. Sources are read in the order given, each one of

    - a file: `.jsonl` (also `.ndjson`, `.json`: one object a line), `.parquet`, anything else is UTF-8 text;
      text and JSONL also compressed, with `.gz`, `.xz` or `.zst` behind;
    - a folder: its files of known extension, recursively, in the order of their paths;
    - "stdlib": the Python standard library's own source and docstrings;
    - a data set of the Hugging Face hub: "hf:NAME[:CONFIG][@SPLIT]";
    - a set of known name: c4, slimpajama, fineweb-edu, wikitext, shakespeare, openwebtext, each with "[@SPLIT]".

    A split that is not named is "train".
    """

    train: tuple[str, ...] = ("stdlib",)
    """Sources to train on."""
    validation: tuple[str, ...] | None = None
    """Sources to validate on; None sets `validation_fraction` of the training documents apart."""
    validation_fraction: float = 0.02
    """Share of documents set apart when `validation` is None; which ones depends on their text alone."""
    text_field: str = "text"
    """Field of JSONL, Parquet and hub records that holds the text; sets of known name know their own."""
    separator: str | None = None
    """Text that divides a text file into documents; None: a file is one document."""
    max_documents: int | None = None
    """Read at most so many documents of the training sources, and as many of the validation sources."""
    streaming: bool = True
    """Hub sets: True streams once through the set, False reads it from the local Hugging Face cache (downloading it
    first)."""
    tokenizer: str = "train"
    """"train" trains a byte-level BPE on the training documents; else a directory or tokenizer.json, or "gpt2"."""
    vocab_size: int = 8192
    """Size of a vocabulary that is trained here."""
    shuffle: bool = True
    """Visit the sequences in a new random order every epoch; False: in the order of the text."""
    cache_dir: str = "~/.cache/quest"
    """Folder for token caches and trained tokenizers; their names come from what made them."""

    def __post_init__(self) -> None:
        if not self.train:
            raise DataError("data.train is empty; name at least one source, such as a file, a folder or 'stdlib'")
        if self.validation is not None and not self.validation:
            raise DataError(
                "data.validation is an empty list; leave it out to validate on a share of the training documents"
            )
        if self.validation is None and not 0 < self.validation_fraction < 1:
            raise DataError(f"data.validation_fraction must lie between 0 and 1, got {self.validation_fraction}")
        if self.separator == "":
            raise DataError("data.separator is the empty string; leave it out for one document a file")
        if self.max_documents is not None and self.max_documents < 1:
            raise DataError(f"data.max_documents must be at least 1, got {self.max_documents}")
