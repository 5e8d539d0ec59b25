"""The token cache: tokens of a corpus in a memory-mapped file that says what made it.

    bytes 0-7     b"QUESTTOK"
    bytes 8-11    format version, uint32 (all numbers little-endian)
    bytes 12-15   length h of the header, uint32
    bytes 16-     header: a JSON object, padded with spaces to h, so that the tokens start at a multiple of 64
    then          the tokens, uint16 while the vocabulary fits, else uint32; each document ends with the separator

The file name carries a hash of the header's "made_from" (sources, settings, tokenizer), so another corpus or another
tokenizer means another file and a stale one is never opened by accident. What remains is checked on opening: length,
checksum, and that "made_from" is what the caller asked for. A cache is written under a temporary name, flushed to disk
and renamed: it is whole or it is not there. A lock file beside it lets the processes of one machine, of one run or of
several, wait for a single writer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from quest.train.data.config import DataError

FORMAT_VERSION = 1
_MAGIC = b"QUESTTOK"
_PREFIX = struct.Struct("<8sII")
_ALIGNMENT = 64
_CHECK_BLOCK = 1 << 24  # bytes checksummed at a time
_COUNTERS = ("tokens", "documents", "text_bytes", "crc32")


def content_key(made_from: dict[str, Any]) -> str:
    """Name of what is made from `made_from`: 16 hex digits of the sha256 of its canonical JSON."""
    canonical = json.dumps(made_from, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of `path`; the system releases it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class TokenCache:
    """An open cache. `tokens` [n] is a read-only memory map of uint16 or uint32."""

    path: Path
    tokens: npt.NDArray[np.integer[Any]]
    documents: int
    text_bytes: int
    """UTF-8 bytes of the text behind the tokens, for bits per byte."""
    checksum: int
    """CRC-32 of the tokens: with their number, the identity of the data wherever it lies."""

    @classmethod
    def open(cls, path: Path, made_from: dict[str, Any]) -> TokenCache:
        """Opens the cache at `path` after checking that it is whole and was made from `made_from`.

        Raises DataError that names the file, what is wrong with it, and what to do.
        """
        remedy = "delete the file; it is made again from the text"
        with path.open("rb") as stream:
            prefix = stream.read(_PREFIX.size)
            if len(prefix) < _PREFIX.size or not prefix.startswith(_MAGIC):
                raise DataError(f"token cache {path}: not a token cache; {remedy}")
            _, version, length = _PREFIX.unpack(prefix)
            if version != FORMAT_VERSION:
                raise DataError(
                    f"token cache {path}: format version {version}, this program reads {FORMAT_VERSION}; {remedy}"
                )
            try:
                header = json.loads(stream.read(length))
                dtype = np.dtype(header["dtype"])
                count, documents, text_bytes, checksum = (int(header[name]) for name in _COUNTERS)
                found: dict[str, Any] = header["made_from"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"token cache {path}: its header is damaged ({error!r}); {remedy}") from error
            start = _PREFIX.size + length
            size, expected = path.stat().st_size, start + count * dtype.itemsize
            if size != expected:
                problem = "truncated" if size < expected else "longer than its header says"
                raise DataError(
                    f"token cache {path}: {problem}: {size} bytes where {count} tokens need {expected}; {remedy}"
                )
            _check_made_from(path, found, made_from)
            actual = 0
            while block := stream.read(_CHECK_BLOCK):
                actual = zlib.crc32(block, actual)
            if actual != checksum:
                raise DataError(
                    f"token cache {path}: damaged: checksum {actual:08x} where the header says {checksum:08x}; {remedy}"
                )
        # numpy cannot map a file's empty tail
        tokens = np.memmap(path, dtype, "r", start, (count,)) if count else np.empty(0, dtype)
        return cls(path, tokens, documents, text_bytes, checksum)


def _check_made_from(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise DataError(
                f"token cache {path}: made with another {name}: {found.get(name)!r} where this run has "
                f"{expected.get(name)!r}; delete the file, or use another data.cache_dir"
            )


class TokenCacheWriter:
    """Writes a cache document by document; a context manager that leaves a whole file or none."""

    def __init__(self, path: Path, made_from: dict[str, Any], vocab_size: int) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._header: dict[str, Any] = {"dtype": self._dtype.str, "made_from": made_from}
        self.counts = dict.fromkeys(_COUNTERS, 0)
        # The counters are known at the end only: room for them (20 digits hold any uint64) is left in the header.
        length = len(self._header_json()) + 20 * len(_COUNTERS)
        self._length = -(_PREFIX.size + length) % _ALIGNMENT + length

    def _header_json(self) -> bytes:
        return json.dumps({**self.counts, **self._header}).encode()

    def __enter__(self) -> TokenCacheWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._partial.open("wb")
        self._stream.write(_PREFIX.pack(_MAGIC, FORMAT_VERSION, self._length) + b" " * self._length)
        return self

    def append(self, ids: Sequence[int]) -> None:
        """Adds tokens."""
        data = np.asarray(ids, dtype=self._dtype).tobytes()
        self._stream.write(data)
        self.counts["tokens"] += len(ids)
        self.counts["crc32"] = zlib.crc32(data, self.counts["crc32"])

    def end_document(self, separator: int, text_bytes: int) -> None:
        """Adds the separator after a document of `text_bytes` bytes of text."""
        self.append([separator])
        self.counts["documents"] += 1
        self.counts["text_bytes"] += text_bytes

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._stream.seek(_PREFIX.size)
                self._stream.write(self._header_json().ljust(self._length))
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._stream.close()
                self._partial.replace(self._path)
        finally:
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                self._stream.close()
            self._partial.unlink(missing_ok=True)
