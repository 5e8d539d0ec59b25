"""Text to token ids and back, on the `tokenizers` library.

One class serves three origins: a byte-level BPE trained here, a `tokenizer.json` (Llama's, GPT-2's, or one that a run
saved), and "gpt2" from tiktoken, whose rank table is turned into the merges of the same byte-level BPE. What the rest
of the package relies on:

- text never becomes a control token: a document that spells "<|endoftext|>" is encoded as those characters;
- no truncation, no padding, no token added at either end, whatever the file asks for: the data pipeline places
  separators itself;
- `fingerprint` changes when any id of any text could change, so it names the token caches that a tokenizer may read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from quest.models.files import write_text

END_OF_TEXT = "<|endoftext|>"
# The end-of-document tokens of GPT-2, Llama 1 and 2, and Llama 3, for a tokenizer.json that comes without its
# configuration.
_KNOWN_EOS = (END_OF_TEXT, "</s>", "<|end_of_text|>")
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """Byte-pair encoding with one separator token, `eos_id`, that ends every document.

    Raises ValueError when `eos_token` is not in the vocabulary.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str = END_OF_TEXT) -> None:
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            raise ValueError(f"tokenizer: the end-of-document token {eos_token!r} is not in its vocabulary")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self.eos_token = eos_token
        self.eos_id: int = eos_id

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Loads a directory with `tokenizer.json`, such a file itself, or "gpt2" (needs tiktoken and its rank table).

        Raises FileNotFoundError when nothing is there, ValueError when the file is no tokenizer or names no
        end-of-document token.
        """
        if str(path) == "gpt2":
            return _load_gpt2()
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"tokenizer: {file} does not exist; give a directory with tokenizer.json, such a file, or 'gpt2'"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for every kind of bad file
            raise ValueError(f"tokenizer: {file} is not a tokenizer.json: {error}") from error
        eos_token = _configured_eos(file.parent) or next(
            (t for t in _KNOWN_EOS if backend.token_to_id(t) is not None), None
        )
        if eos_token is None:
            raise ValueError(
                f"tokenizer: {file} has none of {', '.join(_KNOWN_EOS)}; name its end-of-document token as "
                f'"eos_token" in a tokenizer_config.json beside it'
            )
        return cls(backend, eos_token)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and the `tokenizer_config.json` from which Hugging Face's AutoTokenizer loads it
        too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "tokenizer.json", self._backend.to_str(pretty=True))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos_token}
        write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without separator."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without separators, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        """Largest id plus one: the rows that an embedding needs."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, of everything that decides which ids a text gets."""
        content = {"eos": self.eos_token, "tokenizer": json.loads(self._backend.to_str())}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE on `texts`: 256 byte tokens, "<|endoftext|>", and merges up to `vocab_size` tokens.

    A corpus too small for that many merges gives a smaller vocabulary. Raises ValueError when `vocab_size` is below
    257.
    """
    if vocab_size < 257:
        raise ValueError(f"train_bpe: vocab_size is {vocab_size}; at least 257 are needed: 256 bytes and {END_OF_TEXT}")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once teaches nothing
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


class StreamDecoder:
    """Decodes a stream of ids piece by piece; a piece never holds half a UTF-8 character.

    A token may carry part of a character, and a decoder may treat a token by what stands before it (SentencePiece drops
    the space of the first word). So each piece is the difference of two decodings of a short window: the last finished
    group of tokens and what came after it. Text is held back while the window ends in U+FFFD, the mark of bytes that
    are not yet a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the last finished group
        self._pending: list[int] = []  # the ids since
        self._emitted = 0  # characters of the window's text already given out

    def push(self, token_id: int) -> str:
        """Adds one id and returns the text that is complete by now, which may be empty."""
        self._pending.append(token_id)
        text = self._tokenizer.decode(self._context + self._pending)
        settled = text.rstrip(_REPLACEMENT)
        piece = settled[self._emitted :]
        self._emitted += len(piece)
        if settled == text:
            self._context, self._pending = self._pending, []
            self._emitted = len(self._tokenizer.decode(self._context))
        return piece

    def flush(self) -> str:
        """Ends the stream and returns the rest, with U+FFFD for bytes that never became a character."""
        piece = self._tokenizer.decode(self._context + self._pending)[self._emitted :]
        self._context, self._pending, self._emitted = [], [], 0
        return piece


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    """GPT-2's text splitting and its mapping of bytes to printable characters around `model`."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _configured_eos(directory: Path) -> str | None:
    """The end-of-document token that a Hugging Face configuration beside tokenizer.json names, if one does."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = directory / name
        if not file.is_file():
            continue
        try:
            token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"tokenizer: {file} is not a JSON object: {error}") from error
        if isinstance(token, dict):  # older files spell the token with its flags
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def _load_gpt2() -> Tokenizer:
    """GPT-2's BPE from tiktoken's rank table.

    tiktoken keeps no merges: the pair behind a token is what is left when its bytes are merged by all lower ranks.
    """
    remedy = "or give the path of a tokenizer.json"
    try:
        import tiktoken
    except ImportError as error:
        raise ImportError(f"tokenizer: 'gpt2' needs tiktoken; install it, {remedy}") from error
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # what requests raises when the table can be neither found nor fetched
        raise FileNotFoundError(
            f"tokenizer: tiktoken has no rank table of 'gpt2' here and could not fetch it ({error}); "
            f"run tiktoken.get_encoding('gpt2') where there is a network, with TIKTOKEN_CACHE_DIR set to a folder, and "
            f"set it to a copy of that folder here, {remedy}"
        ) from error
    ranks = encoding._mergeable_ranks
    characters = _byte_characters()
    spell = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _merge_below(token, ranks, rank)
            merges.append((spell[left], spell[right]))
    backend = _byte_level(models.BPE({spell[token]: rank for token, rank in ranks.items()}, merges))
    backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return Tokenizer(backend)


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte: itself where it prints, else the next free one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, free = [], 0x100
    for byte in range(256):
        characters.append(chr(byte if byte in printable else free))
        free += byte not in printable
    return characters


def _merge_below(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Parts of `token` after all merges of rank below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        candidates = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, i = min(candidates, default=(limit, 0))
        if rank >= limit:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
