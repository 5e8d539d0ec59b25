"""From a data configuration to batches: tokenizer, split, token caches, loaders.

Documents are split by a hash of their text, so a document stays on its side when others come or go, and copies of one
text never lie on both. Tokenising streams: a few million characters are in flight, encoded on all cores by the
`tokenizers` library.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from quest.models.tokenizer import Tokenizer, train_bpe
from quest.train.data.cache import TokenCache, TokenCacheWriter, content_key, locked
from quest.train.data.config import DataConfig, DataError
from quest.train.data.loader import TrainBatches, ValidationBatches
from quest.train.data.sources import Corpus

# Text encoded at a time, in pieces that the cores share. While it works, the library takes about 100 bytes a token.
_BATCH_CHARS = 1 << 22
_PIECE_CHARS = 1 << 18
# Merges settle long before; without a limit a vocabulary for a streamed set would read all of it.
_TOKENIZER_CHARS = 100_000_000


class DataModule:
    """The data of a run: `train` (endless) and `validation()` (finite), both of int64 [batch, sequence_length + 1]."""

    def __init__(
        self, train: TrainBatches, validation: ValidationBatches, train_cache: TokenCache, validation_cache: TokenCache
    ) -> None:
        self.train = train
        self.train_cache = train_cache
        self.validation_cache = validation_cache
        self._validation = validation

    def validation(self) -> ValidationBatches:
        """The validation sequences, in the same order each time."""
        return self._validation

    def close(self) -> None:
        """Ends the prefetching thread."""
        self.train.close()


def build_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataModule:
    """Tokenises what is not in the cache yet and opens the loaders of process `rank`.

    `batch_size` is in sequences a process; `pin_memory` is for batches that go to a GPU. Raises DataError for sources,
    caches and sizes that cannot be used.
    """
    if config.validation is None:
        train_cache, validation_cache = _split_caches(config, tokenizer)
    else:
        shared = Corpus(config.train, config).overlap(Corpus(config.validation, config))
        if shared:
            raise DataError(
                f"data.validation has sources that data.train has too: {', '.join(shared[:3])}; "
                f"validate on text that is not trained on"
            )
        train_cache = _whole_cache(config.train, config, tokenizer)
        validation_cache = _whole_cache(config.validation, config, tokenizer)
    train = TrainBatches(train_cache, sequence_length, batch_size, seed, rank, world_size, config.shuffle, pin_memory)
    validation = ValidationBatches(validation_cache, sequence_length, batch_size, rank, world_size)
    return DataModule(train, validation, train_cache, validation_cache)


def prepare_tokenizer(config: DataConfig) -> Tokenizer:
    """Loads the tokenizer of `config`, or trains it on the training documents, once for each corpus and size.

    Raises DataError for sources and caches that cannot be used.
    """
    if config.tokenizer != "train":
        return Tokenizer.load(config.tokenizer)
    corpus = Corpus(config.train, config)
    made_from = {
        **corpus.identity(),
        **_split_identity(config),
        "vocab_size": config.vocab_size,
        "characters": _TOKENIZER_CHARS,
    }
    directory = _cache_dir(config) / f"{_slug(config.train)}-bpe{config.vocab_size}-{content_key(made_from)}"
    with _making("training a tokenizer on", config.train, config), locked(directory):
        if not directory.exists():
            tokenizer = train_bpe(_training_text(corpus, config), config.vocab_size)
            partial = directory.with_name(directory.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            tokenizer.save(partial)
            partial.rename(directory)
        return Tokenizer.load(directory)


@contextmanager
def _making(what: str, sources: tuple[str, ...], config: DataConfig) -> Iterator[None]:
    """Within the block an error of the disk or the network says what was made, of which sources, and where."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{what} {', '.join(sources)} into {_cache_dir(config)}: {error}; "
            f"if its disk is full, free space or choose another data.cache_dir"
        ) from error


def _whole_cache(sources: tuple[str, ...], config: DataConfig, tokenizer: Tokenizer) -> TokenCache:
    """Cache of all documents of `sources`."""
    return _caches(Corpus(sources, config), sources, config, tokenizer, {"all": {}}, lambda text: "all")[0]


def _split_caches(config: DataConfig, tokenizer: Tokenizer) -> list[TokenCache]:
    """Caches of the training and the validation share of the training sources, made in one pass over them."""
    parts = {name: {**_split_identity(config), "part": name} for name in ("train", "validation")}
    corpus = Corpus(config.train, config)
    caches = _caches(
        corpus,
        config.train,
        config,
        tokenizer,
        parts,
        lambda text: "validation" if _in_validation(text, config) else "train",
    )
    train, validation = (cache.documents for cache in caches)
    for name, documents in (("training", train), ("validation", validation)):
        if not documents:
            raise DataError(
                f"the {name} split is empty: {train + validation} document(s), of which data.validation_fraction = "
                f"{config.validation_fraction} sets {validation} apart; name other files in data.validation, change "
                f"the fraction, or set data.separator if a text file holds several documents"
            )
    return caches


def _split_identity(config: DataConfig) -> dict[str, Any]:
    return {} if config.validation is not None else {"validation_fraction": config.validation_fraction}


def _in_validation(text: str, config: DataConfig) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < config.validation_fraction * 2**64


def _training_text(corpus: Corpus, config: DataConfig) -> Iterator[str]:
    """Training documents, up to the limit for a tokenizer."""
    characters = 0
    for text in corpus:
        if config.validation is None and _in_validation(text, config):
            continue
        yield text
        characters += len(text)
        if characters >= _TOKENIZER_CHARS:
            return
    if not characters:
        raise DataError(f"data.train ({', '.join(config.train)}) has no text to train a tokenizer on")


def _caches(
    corpus: Corpus,
    sources: tuple[str, ...],
    config: DataConfig,
    tokenizer: Tokenizer,
    parts: dict[str, dict[str, Any]],
    part_of: Callable[[str], str],
) -> list[TokenCache]:
    """One cache for each of `parts` (name → what marks it), made in one pass; `part_of` sorts the documents."""
    common = {**corpus.identity(), "tokenizer": tokenizer.fingerprint}
    made_from = {name: {**common, **mark} for name, mark in parts.items()}
    paths = {
        name: _cache_dir(config) / f"{_slug(sources)}-{name}-{content_key(m)}.tokens" for name, m in made_from.items()
    }
    with _making("tokenizing", sources, config), locked(next(iter(paths.values()))):
        if not all(path.exists() for path in paths.values()):
            with ExitStack() as stack:
                writers = {
                    name: stack.enter_context(TokenCacheWriter(paths[name], made_from[name], tokenizer.vocab_size))
                    for name in parts
                }
                _tokenize(corpus, tokenizer, lambda text: writers[part_of(text)], f"tokenizing {_slug(sources)}")
    return [TokenCache.open(paths[name], made_from[name]) for name in parts]  # unlocked: each process checks its bytes


def _tokenize(corpus: Corpus, tokenizer: Tokenizer, writer_of: Callable[[str], TokenCacheWriter], title: str) -> None:
    """Encodes every document of `corpus` and appends it, with the separator, to its writer."""
    with _progress() as progress:
        task = progress.add_task(title, total=corpus.size, rate="")
        tokens = 0
        for batch in _batches(corpus, writer_of):
            ids_of_pieces = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, ids in zip(batch, ids_of_pieces, strict=True):
                piece.writer.append(ids)
                if piece.document_bytes is not None:
                    piece.writer.end_document(tokenizer.eos_id, piece.document_bytes)
                tokens += len(ids)
            seconds = progress.tasks[task].elapsed or 0.0
            rate = f"{tokens / 1e6:.1f}M tokens, {tokens / max(seconds, 1e-3) / 1e6:.2f}M/s"
            progress.update(task, completed=corpus.position, rate=rate)


class _Piece(NamedTuple):
    """Part of a document; the last one has the document's size in UTF-8 bytes."""

    writer: TokenCacheWriter
    text: str
    document_bytes: int | None


def _batches(corpus: Corpus, writer_of: Callable[[str], TokenCacheWriter]) -> Iterator[list[_Piece]]:
    """The documents in pieces, in batches of about _BATCH_CHARS characters."""
    batch: list[_Piece] = []
    characters = 0
    for document in corpus:
        writer = writer_of(document)
        start = 0
        while start < len(document):
            end = _piece_end(document, start)
            batch.append(_Piece(writer, document[start:end], len(document.encode()) if end == len(document) else None))
            characters += end - start
            start = end
            if characters >= _BATCH_CHARS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _piece_end(text: str, start: int) -> int:
    """Where the piece of `text` from `start` ends.

    Between a letter or digit and white space the splitting rules of GPT-2 and Llama 3 always separate, so cutting there
    changes no token. (SentencePiece tokenizers put one space token more before each piece after the first: one in about
    65,000.)
    """
    limit = start + _PIECE_CHARS
    if limit >= len(text):
        return len(text)
    for end in range(limit, start + 1, -1):
        if text[end - 1].isalnum() and text[end].isspace():
            return end
    return limit


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )


def _cache_dir(config: DataConfig) -> Path:
    return Path(config.cache_dir).expanduser()


def _slug(sources: Sequence[str]) -> str:
    """A readable beginning for file names: the first source's own name."""
    name = Path(sources[0]).name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9]+", "-", name)[:40].strip("-") or "data"
