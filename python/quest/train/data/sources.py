"""Documents from files, folders, the Python standard library and hub data sets.

A `Corpus` turns the sources of a configuration into a fixed order of units (files, hub splits) and streams their
documents: one document in memory at a time. Reading is strict: a file that is not what its name says is an error with
the file and the place, since text that is silently dropped or repaired changes a model in ways nobody will look for.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import hashlib
import io
import json
import lzma
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from quest.train.data.config import DataConfig, DataError

_JSONL = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".text", ".md", ".rst", ".py")
_COMPRESSED = (".gz", ".xz", ".zst")
_BLOCK = 1 << 20  # bytes of a text file decoded at a time
# Not the library itself: packages, tests (some deliberately broken Python), and generated tables of code pages.
_STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "__pycache__"}


@dataclass(frozen=True)
class HubSet:
    """A split of a data set on the Hugging Face hub."""

    name: str
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    revision: str | None = None


# The sets of the paper's code. Two of them are loading scripts, which the library no longer runs: the hub keeps a
# Parquet copy of each on the branch refs/convert/parquet. wikitext comes from a mirror by article, the original being
# one line a record.
_PARQUET_COPY = "refs/convert/parquet"
NAMED_SETS = {
    "c4": HubSet("allenai/c4", "en"),
    "slimpajama": HubSet("cerebras/SlimPajama-627B"),
    "fineweb-edu": HubSet("HuggingFaceFW/fineweb-edu", "sample-100BT"),
    "wikitext": HubSet("EleutherAI/wikitext_document_level", "wikitext-103-raw-v1", text_field="page"),
    "shakespeare": HubSet("karpathy/tiny_shakespeare", revision=_PARQUET_COPY),
    "openwebtext": HubSet("Skylion007/openwebtext", revision=_PARQUET_COPY),
}


class Corpus:
    """The documents of `sources`, in a fixed order.

    Iterating yields non-empty strings and can be repeated. `size` is the number of bytes on disk (None when a hub set
    is among the sources) and `position` how many of them an iteration has read: what a progress display needs.
    Raises DataError for sources that do not exist, at once; for content that cannot be read, while iterating.
    """

    def __init__(self, sources: tuple[str, ...], config: DataConfig) -> None:
        self._config = config
        self._units = [(source, unit) for source in sources for unit in _resolve(source, config)]
        files = [unit for _, unit in self._units if isinstance(unit, Path)]
        self.size = sum(file.stat().st_size for file in files) if len(files) == len(self._units) else None
        self.position = 0

    def identity(self) -> dict[str, Any]:
        """What decides the documents, for naming a cache: settings, hub names; path, size and time of every file.

        A hub set counts by its name: a change on the hub is not noticed.
        """
        sources: dict[str, dict[str, Any]] = {}
        digests: dict[str, Any] = {}
        for source, unit in self._units:
            entry = sources.setdefault(source, {"source": source})
            if isinstance(unit, HubSet):
                entry["hub"] = [unit.name, unit.config, unit.split, unit.text_field, unit.revision]
                continue
            stat = unit.stat()
            entry["files"] = entry.get("files", 0) + 1
            entry["bytes"] = entry.get("bytes", 0) + stat.st_size
            digest = digests.setdefault(source, hashlib.sha256())
            digest.update(f"{unit.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
            entry["digest"] = digest.hexdigest()
        config = self._config
        return {
            "sources": list(sources.values()),
            "text_field": config.text_field,
            "separator": config.separator,
            "max_documents": config.max_documents,
        }

    def overlap(self, other: Corpus) -> list[str]:
        """Names of the files and hub splits that both have."""
        mine = {unit.resolve() if isinstance(unit, Path) else unit for _, unit in self._units}
        return [str(unit) for _, unit in other._units if (unit.resolve() if isinstance(unit, Path) else unit) in mine]

    def __iter__(self) -> Iterator[str]:
        return islice((text for text in self._documents() if text), self._config.max_documents)

    def _documents(self) -> Iterator[str]:
        self.position = finished = 0
        for source, unit in self._units:
            if isinstance(unit, HubSet):
                yield from _read_hub(source, unit, self._config.streaming)
                continue
            for text, position in self._read_file(source, unit):
                self.position = finished + position
                yield text
            finished += unit.stat().st_size

    def _read_file(self, source: str, file: Path) -> Iterator[tuple[str, int]]:
        """Documents of one file, each with the bytes of the file read by then."""
        kind = _kind(file)
        if source == "stdlib":
            with tokenize.open(file) as stream:  # source code may declare another encoding than UTF-8
                yield stream.read(), 0
        elif kind == ".parquet":
            yield from _read_parquet(file, self._config.text_field)
        else:
            with file.open("rb") as raw, _decompress(raw, file) as stream:
                if kind in _JSONL:
                    documents = _read_jsonl(stream, file, self._config.text_field)
                else:
                    documents = _read_text(stream, file, self._config.separator)
                try:
                    for text in documents:
                        yield text, raw.tell()
                except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
                    raise DataError(
                        f"{file}: damaged or cut short near byte {raw.tell()} of {file.stat().st_size}: {error}; "
                        f"fetch or compress it again"
                    ) from error


def _resolve(source: str, config: DataConfig) -> list[Path | HubSet]:
    """Files or hub set behind a source string."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(f for f in root.rglob("*.py") if not _STDLIB_SKIP.intersection(f.relative_to(root).parts))
        if not files:
            raise DataError(
                f"data source 'stdlib': no Python files under {root}; this Python ships its library compiled"
            )
        return list(files)
    name, _, split = source.partition("@")
    if name in NAMED_SETS:
        known = NAMED_SETS[name]
        return [HubSet(known.name, known.config, split or known.split, known.text_field, known.revision)]
    if name.startswith("hf:"):
        hub_name, _, hub_config = name.removeprefix("hf:").partition(":")
        return [HubSet(hub_name, hub_config or None, split or "train", config.text_field)]
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        close = difflib.get_close_matches(name, ["stdlib", *NAMED_SETS], n=1)
        hint = (
            f"; did you mean {close[0]!r}?"
            if close
            else f"; give a file, a folder, 'stdlib', hf:NAME, or one of {', '.join(NAMED_SETS)}"
        )
        raise DataError(f"data source {source!r}: {path} does not exist{hint}")
    known_kinds = (*_TEXT, *_JSONL, ".parquet")
    files = sorted(
        f for f in path.rglob("*") if f.is_file() and _kind(f) in known_kinds and not _hidden(f.relative_to(path))
    )
    if not files:
        raise DataError(
            f"data source {source!r}: the folder has no file that ends in {' '.join(known_kinds)} "
            f"(text and JSONL also with {' '.join(_COMPRESSED)})"
        )
    return list(files)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind(file: Path) -> str:
    """The extension that tells the format, without that of a compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _decompress(raw: IO[bytes], file: Path) -> IO[bytes]:
    match file.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        case ".xz":
            return cast(IO[bytes], lzma.LZMAFile(raw))
        case ".zst":
            return io.BufferedReader(_ZstandardReader(raw, file), _BLOCK)
    return raw


class _ZstandardReader(io.RawIOBase):
    """Decompressed bytes of a .zst file; unlike the library's own stream it notices a file that was cut short."""

    def __init__(self, raw: IO[bytes], file: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"{file}: reading .zst needs the package zstandard; install it, or recompress the file as .xz"
            ) from error
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor()
        self._failure = zstandard.ZstdError
        self._frame: Any = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if self._frame is not None and self._frame.eof:
                block = self._frame.unused_data or self._raw.read(_BLOCK)
                self._frame = None
            else:
                block = self._raw.read(_BLOCK)
            if not block:
                if self._frame is not None:
                    raise EOFError("the last zstandard frame is incomplete")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(block))
            except self._failure as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _read_text(stream: IO[bytes], file: Path, separator: str | None) -> Iterator[str]:
    """The file as one document, or its parts between separators."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, offset, last = "", 0, False
    parts: list[str] = []
    while not last:
        block = stream.read(_BLOCK)
        last = not block
        held = len(decoder.getstate()[0])  # bytes of a character that the block before left unfinished
        try:
            decoded = decoder.decode(block, final=last)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, offset - held + error.start) from error
        offset += len(block)
        if separator is None:
            parts.append(decoded)
            continue
        *documents, text = (text + decoded).split(separator)
        yield from documents
    yield "".join(parts) if separator is None else text


def _read_jsonl(stream: IO[bytes], file: Path, field: str) -> Iterator[str]:
    """The field of each line's object; blank lines are skipped."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        where = f"{file}, line {number}"
        try:
            record = json.loads(line.decode("utf-8")) if line.strip() else None
        except UnicodeDecodeError as error:
            raise _not_utf8(file, offset + error.start, f" (line {number})") from error
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not a JSON object: {error.msg} at column {error.colno}; each line must hold one object"
            ) from error
        offset += len(line)
        if record is None and not line.strip():
            continue
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: expected a JSON object, got {type(record).__name__}; each line must hold one object"
            )
        yield _text_of(record, field, where)


def _read_parquet(file: Path, field: str) -> Iterator[tuple[str, int]]:
    """The column of a Parquet file, with the share of its bytes that the rows read by then stand for."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{file}: reading Parquet needs the package pyarrow; install it, or convert the file to JSONL"
        ) from error
    try:
        table = parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            raise _no_field(field, table.schema_arrow.names, str(file))
        size, rows, row = file.stat().st_size, table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=256, columns=[field]):  # 256 web pages are about a megabyte
            for text in batch.column(0).to_pylist():
                row += 1
                yield _text_of({field: text}, field, f"{file}, row {row}"), size * row // rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}; write or fetch it again") from error


def _read_hub(source: str, hub: HubSet, streaming: bool) -> Iterator[str]:
    """The field of every record of a hub split."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data source {source!r}: hub data sets need the package datasets; install it, or give files"
        ) from error
    described = f"{hub.name}, configuration {hub.config or 'default'}, split {hub.split}"
    try:
        records = datasets.load_dataset(
            hub.name, hub.config, split=hub.split, revision=hub.revision, streaming=streaming
        )
        for number, record in enumerate(records, start=1):
            yield _text_of(record, hub.text_field, f"data source {source!r}, record {number}")
    except DataError:
        raise
    except Exception as error:  # for the same offline machine the library raises its own, requests' or httpx's errors
        how = "streaming" if streaming else "from the local Hugging Face cache and the hub"
        raise DataError(
            f"data source {source!r}: could not read {described} {how}: {type(error).__name__}: {error}; "
            f"check the name and the network, or fetch it once where there is one (datasets.load_dataset), copy that "
            f"HF_HOME here and set data.streaming to false, "
            f"or save it as JSONL or Parquet files and give their folder"
        ) from error


def _text_of(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise _no_field(field, list(record), where)
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} must hold text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell what UTF-8 cannot
        raise DataError(
            f"{where}: field {field!r} has half a surrogate pair at character {error.start}; remove or replace it"
        ) from error
    return text


def _no_field(field: str, fields: list[str], where: str) -> DataError:
    near = difflib.get_close_matches(field, fields, n=3) or fields[:8]
    return DataError(
        f"{where}: no field {field!r}; it has {', '.join(map(repr, near)) or 'no fields'}; "
        f"set data.text_field to the one that holds the text"
    )


def _not_utf8(file: Path, offset: int, detail: str = "") -> DataError:
    return DataError(f"{file}: not UTF-8 at byte {offset}{detail}; convert the file, for example with iconv -t UTF-8")
