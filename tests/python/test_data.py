"""Sources, split, token cache, shuffling, resuming, and every kind of bad input that has to be named."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, shared_data

from quest.models.tokenizer import END_OF_TEXT, Tokenizer, train_bpe
from quest.train.data import Corpus, DataConfig, DataError, build_data, module, prepare_tokenizer
from quest.train.data.cache import TokenCache, TokenCacheWriter
from quest.train.data.loader import TrainBatches, ValidationBatches, permute

DOCUMENTS = [f"document {i}: " + "words and wörds; " * (i % 7) + "\nthe end 世界" for i in range(200)]


NOISE = random.Random(0).randbytes(9999).hex().encode()  # text that does not compress to a few bytes


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(DOCUMENTS, 320)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_jsonl(tmp_path / "data.jsonl", DOCUMENTS)
    return DataConfig(train=(str(tmp_path / "data.jsonl"),), validation_fraction=0.1, cache_dir=str(tmp_path / "cache"))


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> None:
    path.write_text("".join(json.dumps({"author": "a", field: text}) + "\n" for text in documents), encoding="utf-8")


def read(*sources: Path | str, **settings: Any) -> list[str]:
    names = tuple(map(str, sources))
    return list(Corpus(names, DataConfig(train=names, **settings)))


def make_cache(path: Path, ids: np.ndarray[Any, Any] | list[int], vocab_size: int = 1 << 17) -> TokenCache:
    with TokenCacheWriter(path, {"corpus": "test"}, vocab_size) as writer:
        writer.append(list(ids))
        writer.end_document(0, len(ids))
    return TokenCache.open(path, {"corpus": "test"})


# --- sources ---------------------------------------------------------------------------------------------------------


def compress_zst(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    middle = len(data) // 2  # two frames, as appending to a file makes them
    compressor = zstandard.ZstdCompressor()
    return bytes(compressor.compress(data[:middle]) + compressor.compress(data[middle:]))


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": compress_zst,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_text_and_jsonl_in_every_compression(compression: str, tmp_path: Path) -> None:
    # Larger than one block, with characters of four bytes that no block boundary respects.
    long = "a" + "🙂" * 300_000
    text = tmp_path / f"one.txt{compression}"
    text.write_bytes(COMPRESSIONS[compression](long.encode()))
    jsonl = tmp_path / f"two.jsonl{compression}"
    lines = "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in ["first", "", long, "last\n"]) + "\n\n"
    jsonl.write_bytes(COMPRESSIONS[compression](lines.encode()))
    assert read(text, jsonl) == [long, "first", long, "last\n"]


def test_separator_divides_text_files_wherever_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quest.train.data.sources._BLOCK", 7)
    path = tmp_path / "a.txt"
    path.write_text("one<|sep|>two ünd<|sep|><|sep|>three", encoding="utf-8")
    assert read(path, separator="<|sep|>") == ["one", "two ünd", "three"]
    assert read(path) == ["one<|sep|>two ünd<|sep|><|sep|>three"]


def test_folder_is_read_recursively_in_path_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.txt", ".git/x.txt", "skip.bin", "d.txt.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        data = name.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read(tmp_path) == ["a/b/c.txt", "a/z.md", "b.txt", "d.txt.gz"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"id": range(600), "content": [f"row {i}" for i in range(600)]}), tmp_path / "a.parquet"
    )
    assert read(tmp_path, text_field="content") == [f"row {i}" for i in range(600)]
    with pytest.raises(DataError, match=r"a\.parquet: no field 'contents'; it has 'content'"):
        read(tmp_path, text_field="contents")
    with pytest.raises(DataError, match="row 1: field 'id' must hold text, got int"):
        read(tmp_path, text_field="id")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        read(tmp_path)


def test_standard_library() -> None:
    documents = read("stdlib")
    assert documents == read("stdlib")
    assert sum(map(len, documents)) > 4_000_000
    assert any(text.startswith('"""Conversion functions between RGB and other color systems.') for text in documents)
    assert not any("class TestCase(unittest" in text for text in documents[:50])


def test_max_documents_and_empty_documents(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", "a", "", "b", "c"])
    assert read(tmp_path / "a.jsonl", max_documents=2) == ["a", "b"]


def test_position_reaches_size(config: DataConfig) -> None:
    corpus = Corpus(config.train, config)
    assert corpus.size == Path(config.train[0]).stat().st_size
    assert len(list(corpus)) == len(DOCUMENTS)
    assert corpus.position == corpus.size


# The bytes must be the same in every process, or parallel test runs collect different tests: no time stamp in gzip.
BAD_CONTENT: dict[str, tuple[str, bytes, str]] = {
    "utf8": ("a.txt", b"good \xc3\xa9 then \xff bad", "a.txt: not UTF-8 at byte 13; convert the file"),
    "utf8-cut": ("a.txt", b"cut character \xf0\x9f\x99", "a.txt: not UTF-8 at byte 14;"),
    "utf8-jsonl": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a.jsonl: not UTF-8 at byte 24 \(line 2\)"),
    "json-open": ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "a.jsonl, line 3: not a JSON object: .* at column"),
    "json-list": ("a.jsonl", b'["text"]\n', "a.jsonl, line 1: expected a JSON object, got list"),
    "json-null": ("a.jsonl", b"null\n", "a.jsonl, line 1: expected a JSON object, got NoneType"),
    "no-field": ("a.jsonl", b'{"txt": "a", "title": "b"}\n', "a.jsonl, line 1: no field 'text'; it has 'txt'"),
    "no-field-remedy": (
        "a.jsonl",
        b'{"author": "a", "body": "b"}\n',
        "no field 'text'; it has 'author', 'body'; set data.text_field",
    ),
    "field-int": ("a.jsonl", b'{"text": 5}\n', "a.jsonl, line 1: field 'text' must hold text, got int"),
    "surrogate": (
        "a.jsonl",
        b'{"text": "ab\\ud800"}\n',
        "line 1: field 'text' has half a surrogate pair at character 2",
    ),
    "not-xz": ("a.txt.xz", b"not xz", "a.txt.xz: damaged or cut short near byte"),
    "xz-cut": ("a.txt.xz", lzma.compress(NOISE)[:5000], "a.txt.xz: damaged or cut short near byte 5000 of 5000"),
    "gzip-cut": ("a.jsonl.gz", gzip.compress(NOISE, mtime=0)[:5000], "a.jsonl.gz: damaged or cut short"),
    "gzip-body": ("a.jsonl.gz", b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 50, "a.jsonl.gz: damaged or cut short"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_CONTENT.values(), ids=BAD_CONTENT)
def test_bad_content_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_bad_utf8_is_placed_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quest.train.data.sources._BLOCK", 4)
    (tmp_path / "a.txt").write_bytes(b"abc\xe4\xb8x")  # the character begun at byte 3 is broken in the next block
    with pytest.raises(DataError, match="not UTF-8 at byte 3;"):
        read(tmp_path / "a.txt")


def test_damaged_zstandard(tmp_path: Path) -> None:
    whole = compress_zst(NOISE * 8)
    for content in (whole[:-10], whole[: len(whole) // 4], b"not zstandard"):
        (tmp_path / "a.txt.zst").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.txt\.zst: damaged or cut short"):
            read(tmp_path / "a.txt.zst")


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data source '/no/such\.txt': .* does not exist; give a file"):
        read("/no/such.txt")
    with pytest.raises(DataError, match=r"'fineweb-edo': .* did you mean 'fineweb-edu'"):
        read("fineweb-edo")
    (tmp_path / "picture.png").touch()
    with pytest.raises(DataError, match=r"the folder has no file that ends in \.txt"):
        read(tmp_path)


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, name in (("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=f"needs the package {package}; install it"):
            read(tmp_path / name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="'c4': hub data sets need the package datasets"):
        read("c4")


# --- hub data sets ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for `datasets` that has the set "known" and otherwise no network; returns the list of its calls."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(
        name: str, config: str | None, *, split: str, revision: str | None, streaming: bool
    ) -> Iterator[dict[str, str]]:
        calls.append((name, config, split, revision, streaming))
        if name != "known":
            raise ConnectionError("cannot reach the hub")
        return iter([{"page": "one", "text": "1"}, {"page": "two", "text": "2"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hub_names(hub: list[tuple[Any, ...]]) -> None:
    assert read("hf:known:config@test", streaming=False) == ["1", "2"]
    assert read("hf:known", text_field="page") == ["one", "two"]
    assert hub == [("known", "config", "test", None, False), ("known", None, "train", None, True)]
    with pytest.raises(DataError, match="'hf:known', record 1: no field 'pages'; it has 'page'"):
        read("hf:known", text_field="pages")


def test_named_set_offline(hub: list[tuple[Any, ...]]) -> None:
    for name in ("c4", "slimpajama", "fineweb-edu", "wikitext", "shakespeare", "openwebtext"):
        with pytest.raises(
            DataError, match=f"'{name}': could not read .*/.* streaming: .*cannot reach.*HF_HOME.*JSONL"
        ):
            read(name)
    with pytest.raises(
        DataError, match="'c4@validation': could not read allenai/c4, configuration en, split validation"
    ):
        read("c4@validation", streaming=False)
    assert hub[0] == ("allenai/c4", "en", "train", None, True)
    assert hub[-1] == ("allenai/c4", "en", "validation", None, False)


def test_hub_set_is_tokenized_once(hub: list[tuple[Any, ...]], tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = DataConfig(("hf:known",), ("hf:known@test",), cache_dir=str(tmp_path), text_field="page")
    for _ in range(2):
        build_data(config, tokenizer, 2, 1, seed=0).close()
    assert len(hub) == 2


def test_real_hub_library_on_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", ["a", "b"])
    for streaming in (True, False):
        assert read(f"hf:{tmp_path / 'set'}", streaming=streaming) == ["a", "b"]


# --- tokenizing and the split ----------------------------------------------------------------------------------------


def decode_documents(cache: TokenCache, tokenizer: Tokenizer) -> list[str]:
    ids = cache.tokens.tolist()
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_id]
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(ids[start:end]) for start, end in zip([0, *(e + 1 for e in ends)], ends, strict=False)]


def test_split_by_document_keeps_every_document_whole(config: DataConfig, tokenizer: Tokenizer) -> None:
    data = build_data(config, tokenizer, 16, 4, seed=0)
    train = decode_documents(data.train_cache, tokenizer)
    validation = decode_documents(data.validation_cache, tokenizer)
    data.close()
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert train == [text for text in DOCUMENTS if text in set(train)]
    assert 5 < len(validation) < 40
    assert data.train_cache.documents == len(train)
    assert data.validation_cache.text_bytes == sum(len(text.encode()) for text in validation)
    assert data.train_cache.tokens.dtype == np.uint16


def test_split_of_a_document_does_not_depend_on_the_others(config: DataConfig, tokenizer: Tokenizer) -> None:
    def validation() -> set[str]:
        data = build_data(config, tokenizer, 16, 4, seed=0)
        data.close()
        return set(decode_documents(data.validation_cache, tokenizer))

    before = validation()
    write_jsonl(Path(config.train[0]), [*DOCUMENTS[:50], "new document", *DOCUMENTS[50:], *DOCUMENTS])
    assert validation() - {"new document"} == before


def test_literal_separator_in_text_stays_text(config: DataConfig, tokenizer: Tokenizer) -> None:
    texts = [f"{i} {END_OF_TEXT} inside" for i in range(50)]
    write_jsonl(Path(config.train[0]), texts)
    data = build_data(config, tokenizer, 16, 4, seed=0)
    data.close()
    assert data.train_cache.documents + data.validation_cache.documents == 50
    assert set(decode_documents(data.train_cache, tokenizer)) < set(texts)


def test_long_documents_in_pieces_give_the_same_tokens(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(DOCUMENTS), "\n\n".join(DOCUMENTS), "no boundary:" + "!?" * 500]
    write_jsonl(Path(config.train[0]), texts)
    monkeypatch.setattr(module, "_PIECE_CHARS", 50)
    monkeypatch.setattr(module, "_BATCH_CHARS", 300)
    cache = module._whole_cache(config.train, config, tokenizer)
    ids = cache.tokens.tolist()
    whole = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert ids[: len(whole[0]) + len(whole[1])] == whole[0] + whole[1]
    assert decode_documents(cache, tokenizer) == texts


def test_tokenizer_is_trained_once_and_on_training_documents_alone(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(texts: Iterator[str], vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train_bpe(seen, vocab_size)

    monkeypatch.setattr(module, "train_bpe", spy)
    config = replace(config, vocab_size=300)
    first = prepare_tokenizer(config)
    assert first.vocab_size == 300
    data = build_data(config, first, 16, 4, seed=0)
    data.close()
    assert seen == decode_documents(data.train_cache, first)
    assert prepare_tokenizer(config).fingerprint == first.fingerprint
    assert len(seen) == data.train_cache.documents  # not trained again
    prepare_tokenizer(replace(config, vocab_size=310))
    assert len(seen) == 2 * data.train_cache.documents


def test_tokenizer_on_a_full_disk(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", fail)
    message = f"training a tokenizer on .* into {config.cache_dir}: .*No space left on device; .*another data.cache_dir"
    with pytest.raises(DataError, match=message):
        prepare_tokenizer(config)


def test_tokenizer_from_a_path(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    assert prepare_tokenizer(replace(config, tokenizer=str(tmp_path / "saved"))).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ()}, "data.train is empty"),
        ({"validation": ()}, "data.validation is an empty list"),
        ({"validation_fraction": 0.0}, "data.validation_fraction must lie between 0 and 1, got 0.0"),
        ({"separator": ""}, "data.separator is the empty string"),
        ({"max_documents": 0}, "data.max_documents must be at least 1, got 0"),
    ],
    ids=["train", "validation", "validation_fraction", "separator", "max_documents"],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DataConfig(**settings)


def test_empty_splits(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"the validation split is empty: 200 document\(s\), of which .* = 1e-09 sets 0"
    ):
        build_data(replace(config, validation_fraction=1e-9), tokenizer, 16, 4, seed=0)
    with pytest.raises(DataError, match="the training split is empty"):
        build_data(replace(config, validation_fraction=1 - 1e-9), tokenizer, 16, 4, seed=0)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty.*: 0 tokens, but 1 sequence"):
        build_data(replace(config, validation=(str(tmp_path / "empty.txt"),)), tokenizer, 16, 4, seed=0)
    with pytest.raises(DataError, match="has no text to train a tokenizer on"):
        prepare_tokenizer(replace(config, train=(str(tmp_path / "empty.txt"),)))


def test_sequence_longer_than_the_data(config: DataConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        DataError, match=r"tokens, but 1 sequence\(s\) of 100000 need 100001; use more data or a shorter"
    ):
        build_data(config, tokenizer, 100_000, 4, seed=0)


def test_validation_on_training_data_is_refused(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"validation has sources that data.train has too: .*data\.jsonl"):
        build_data(replace(config, validation=(str(tmp_path),)), tokenizer, 16, 4, seed=0)


# --- the token cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_cache_round_trip(vocab_size: int, dtype: type, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, vocab_size, 10_000)
    ids[0] = vocab_size - 1
    cache = make_cache(tmp_path / "a.tokens", ids, vocab_size)
    assert cache.tokens.dtype == dtype
    assert cache.tokens[:-1].tolist() == ids.tolist()
    assert (cache.documents, cache.text_bytes) == (1, 10_000)
    assert cache.tokens.ctypes.data % 64 == 0
    assert not cache.tokens.flags.writeable
    assert [path.name for path in tmp_path.iterdir()] == ["a.tokens"]


def edit_version(data: bytearray) -> None:
    data[8] = 99


def edit_header(data: bytearray) -> None:
    data[20:24] = b"\xff\xff\xff\xff"


def edit_token(data: bytearray) -> None:
    data[-9] ^= 1


def edit_length(data: bytearray) -> None:
    del data[-2:]


def append_bytes(data: bytearray) -> None:
    data.extend(b"ab")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.clear(), "not a token cache"),
        (lambda data: data.__setitem__(0, 0), "not a token cache"),
        (edit_version, "format version 99, this program reads 1"),
        (edit_header, "its header is damaged"),
        (edit_token, "damaged: checksum"),
        (edit_length, "truncated: .* bytes where .* tokens need"),
        (append_bytes, "longer than its header says"),
    ],
    ids=["empty", "magic", "version", "header", "token", "length", "appended"],
)
def test_damaged_cache_is_named_and_not_reused(
    edit: Callable[[bytearray], None], message: str, config: DataConfig, tokenizer: Tokenizer
) -> None:
    build_data(config, tokenizer, 16, 4, seed=0).close()
    path = next(Path(config.cache_dir).glob("*-train-*.tokens"))
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"token cache {path}: {message}.*delete the file"):
        build_data(config, tokenizer, 16, 4, seed=0)


def test_cache_of_another_tokenizer_or_corpus_is_refused(config: DataConfig, tokenizer: Tokenizer) -> None:
    """The names keep them apart; a file that was renamed by hand is still caught."""
    other = train_bpe(DOCUMENTS, 300)

    def train_file(config: DataConfig, tokenizer: Tokenizer) -> Path:
        data = build_data(config, tokenizer, 16, 4, seed=0)
        data.close()
        return data.train_cache.path

    mine, theirs = train_file(config, tokenizer), train_file(config, other)
    assert mine != theirs
    theirs.replace(mine)
    with pytest.raises(DataError, match=f"made with another tokenizer: '{other.fingerprint}' where this run has"):
        build_data(config, tokenizer, 16, 4, seed=0)
    mine.unlink()
    mine = train_file(config, tokenizer)
    fewer = train_file(replace(config, max_documents=100), tokenizer)
    fewer.replace(mine)
    with pytest.raises(DataError, match="made with another max_documents: 100 where this run has None"):
        build_data(config, tokenizer, 16, 4, seed=0)


def test_changed_input_gets_a_new_cache(config: DataConfig, tokenizer: Tokenizer) -> None:
    build_data(config, tokenizer, 16, 4, seed=0).close()
    files = {path: path.stat().st_mtime_ns for path in Path(config.cache_dir).glob("*.tokens")}
    build_data(config, tokenizer, 16, 4, seed=0).close()
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert len(files) == 2
    write_jsonl(Path(config.train[0]), [text.upper() for text in DOCUMENTS])
    data = build_data(config, tokenizer, 16, 4, seed=0)
    data.close()
    assert data.train_cache.path not in files
    assert all("DOCUMENT" in text for text in decode_documents(data.train_cache, tokenizer))


def test_failed_write_leaves_nothing(config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, and Ctrl-C, in the middle."""
    append = TokenCacheWriter.append
    for failure, expected in (
        (OSError(28, "No space left on device"), DataError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def fail_late(self: TokenCacheWriter, ids: list[int], failure: BaseException = failure) -> None:
            if self.counts["documents"] > 20:
                raise failure
            append(self, ids)

        monkeypatch.setattr(TokenCacheWriter, "append", fail_late)
        with pytest.raises(expected, match="No space left" if expected is DataError else None):
            build_data(config, tokenizer, 16, 4, seed=0)
        assert [path for path in Path(config.cache_dir).iterdir() if path.suffix != ".lock"] == []
    monkeypatch.undo()
    build_data(config, tokenizer, 16, 4, seed=0).close()


def test_killed_writer_leaves_no_cache_and_no_lock(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    script = """
import sys, time
from quest.train.data import DataConfig, build_data, prepare_tokenizer, cache
write = cache.TokenCacheWriter.end_document
def slow(self, *arguments):
    write(self, *arguments)
    if self.counts["documents"] == 20:
        print("half way", flush=True)
        time.sleep(60)
cache.TokenCacheWriter.end_document = slow
config = DataConfig((sys.argv[1],), validation_fraction=0.1, cache_dir=sys.argv[2], tokenizer=sys.argv[3])
build_data(config, prepare_tokenizer(config), 16, 4, seed=0)
"""
    command = [sys.executable, "-c", script, config.train[0], config.cache_dir, str(tmp_path / "saved")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        process.send_signal(signal.SIGKILL)
    assert not list(Path(config.cache_dir).glob("*.tokens"))
    data = build_data(config, tokenizer, 16, 4, seed=0)
    data.close()
    assert data.train_cache.documents + data.validation_cache.documents == len(DOCUMENTS)
    assert not list(Path(config.cache_dir).glob("*.partial"))


def test_processes_wait_for_one_writer(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    tokenize = module._tokenize

    def slow(*arguments: Any) -> None:
        runs.append(threading.get_ident())
        time.sleep(0.2)
        tokenize(*arguments)

    monkeypatch.setattr(module, "_tokenize", slow)
    threads = [threading.Thread(target=lambda: build_data(config, tokenizer, 16, 4, 0).close()) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1


# --- order, sharding, resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 65_537])
def test_permute_is_a_permutation_of_its_own_for_every_epoch_and_seed(length: int) -> None:
    positions = np.arange(length, dtype=np.uint64)
    orders = [
        tuple(permute(positions, np.full_like(positions, epoch), length, seed).tolist())
        for epoch, seed in [(0, 0), (1, 0), (0, 1)]
    ]
    for order in orders:
        assert sorted(order) == list(range(length))
    if length > 60:
        assert len(set(orders)) == 3
        # A random permutation has one fixed point on average and no correlation with the identity (5 deviations).
        assert sum(i == j for i, j in enumerate(orders[0])) < 8
        correlation = np.corrcoef(np.arange(length), orders[0])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(length)


def test_permute_small_is_uniform() -> None:
    """Every order of three windows is about as frequent: 6000 epochs, 1000 ± 5 · 29 each."""
    epochs = np.repeat(np.arange(6000, dtype=np.uint64), 3)
    orders = permute(np.tile(np.arange(3, dtype=np.uint64), 6000), epochs, 3, seed=7).reshape(-1, 3)
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 145 for count in counts.values())


@pytest.fixture
def counting(tmp_path: Path) -> TokenCache:
    """Tokens 0, 1, 2 …: 101 windows of 8, so that the first token of a sequence names its window."""
    return make_cache(tmp_path / "counting.tokens", np.arange(101 * 8 + 1))


def take(batches: TrainBatches, count: int) -> list[torch.Tensor]:
    return [next(batches) for _ in range(count)]


def windows(batches: list[torch.Tensor]) -> list[int]:
    return [int(row[0]) // 8 for batch in batches for row in batch]


def test_each_epoch_visits_every_window_once(counting: TokenCache) -> None:
    batches = TrainBatches(counting, 8, batch_size=4, seed=1)
    taken = take(batches, 101)
    batches.close()
    for batch in taken:
        assert batch.shape == (4, 9)
        assert batch.dtype == torch.int64
        assert torch.equal(batch - batch[:, :1], torch.arange(9).expand(4, 9))
    epochs = np.array(windows(taken)).reshape(4, 101)
    assert all(sorted(epoch) == list(range(101)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_without_shuffle_the_order_is_that_of_the_text(counting: TokenCache) -> None:
    batches = TrainBatches(counting, 8, batch_size=4, seed=1, shuffle=False)
    assert windows(take(batches, 30)) == [i % 101 for i in range(120)]
    batches.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_order_of_one_process(world_size: int, counting: TokenCache) -> None:
    alone = TrainBatches(counting, 8, batch_size=6, seed=3)
    ranks = [TrainBatches(counting, 8, 6 // world_size, 3, rank, world_size) for rank in range(world_size)]
    for _ in range(40):
        assert torch.equal(torch.cat([next(rank) for rank in ranks]), next(alone))
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)
    for batches in (alone, *ranks):
        batches.close()


@pytest.mark.parametrize("stop", [0, 1, 7, 60])
def test_resume_is_exact(stop: int, counting: TokenCache) -> None:
    straight = TrainBatches(counting, 8, batch_size=4, seed=5)
    stopped = TrainBatches(counting, 8, batch_size=4, seed=5)
    expected = take(straight, stop + 20)
    take(stopped, stop)
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state["sample"] == 4 * stop  # batches prepared ahead do not count
    resumed = TrainBatches(counting, 8, batch_size=4, seed=5)
    take(resumed, 3)  # what was prepared before loading must not leak
    resumed.load_state_dict(state)
    assert torch.equal(torch.stack(take(resumed, 20)), torch.stack(expected[stop:]))
    other = [TrainBatches(counting, 8, 2, 5, rank, 2) for rank in range(2)]
    for batches in other:
        batches.load_state_dict(state)
    for batch in expected[stop:]:
        assert torch.equal(torch.cat([next(batches) for batches in other]), batch)
    for batches in (straight, stopped, resumed, *other):
        batches.close()


def test_resume_with_other_data_is_refused(counting: TokenCache, tmp_path: Path) -> None:
    batches = TrainBatches(counting, 8, batch_size=4, seed=5)
    state = batches.state_dict()
    others = {
        "checksum": TrainBatches(make_cache(tmp_path / "other.tokens", np.arange(101 * 8 + 1) + 1), 8, 4, seed=5),
        "sequence_length": TrainBatches(counting, 16, 4, seed=5),
        "seed": TrainBatches(counting, 8, 4, seed=6),
        "shuffle": TrainBatches(counting, 8, 4, seed=5, shuffle=False),
    }
    for name, other in others.items():
        with pytest.raises(DataError, match=f"resuming data: {name} was .* and is .* now; resume with the data"):
            other.load_state_dict(state)
        other.close()
    moved = counting.path.rename(tmp_path / "moved.tokens")  # where the data lies does not matter
    same = TrainBatches(TokenCache.open(moved, {"corpus": "test"}), 8, 4, seed=5)
    same.load_state_dict(state)
    same.close()
    batches.close()


def test_batches_are_prepared_ahead_and_errors_arrive(counting: TokenCache, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = TrainBatches(counting, 8, batch_size=4, seed=5)
    prepared = []
    make = batches._batch

    def watched(sample: int) -> torch.Tensor:
        prepared.append(threading.current_thread())
        if sample >= 40:
            raise OSError("disk is gone")
        return make(sample)

    monkeypatch.setattr(batches, "_batch", watched)
    next(batches)
    deadline = time.monotonic() + 10
    while len(prepared) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(prepared) == 5  # one consumed, four ahead
    assert threading.main_thread() not in prepared
    take(batches, 9)
    for _ in range(2):
        with pytest.raises(OSError, match="disk is gone"):
            next(batches)
    assert batches.state_dict()["sample"] == 40
    batches.close()


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_validation_order_and_shares(world_size: int, counting: TokenCache) -> None:
    ranks = [ValidationBatches(counting, 8, 8, rank, world_size) for rank in range(world_size)]
    seen = [windows(list(rank)) for rank in ranks]
    assert [windows(list(rank)) for rank in ranks] == seen
    assert len({len(part) for part in seen}) == 1
    assert sorted(chain(*seen)) == list(range(101 - 101 % world_size))
    assert all(len(rank) == len(list(rank)) for rank in ranks)
    if world_size == 1:
        assert [len(batch) for batch in ranks[0]] == [8] * 12 + [5]


def test_books(tmp_path: Path) -> None:
    """Real text end to end: every book of the validation file comes back from the cache to the character."""
    path = shared_data("books-val.jsonl.xz")
    tokenizer_of = DataConfig(train=(str(path),), max_documents=2, vocab_size=1000, cache_dir=str(tmp_path))
    tokenizer = prepare_tokenizer(tokenizer_of)
    books = read(path)
    config = DataConfig(train=(str(REPOSITORY / "python"),), validation=(str(path),), cache_dir=str(tmp_path))
    data = build_data(config, tokenizer, 256, 8, seed=0)
    data.close()
    assert decode_documents(data.validation_cache, tokenizer) == books
    assert sum(len(batch) for batch in data.validation()) == (len(data.validation_cache.tokens) - 1) // 256
