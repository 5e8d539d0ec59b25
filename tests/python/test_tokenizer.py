"""The tokenizer: training, saving, loading from its three origins, and decoding a stream."""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from quest.models.tokenizer import END_OF_TEXT, StreamDecoder, Tokenizer, train_bpe

CORPUS = ["the quick brown fox jumps over the lazy dog\n" * 20, "déjà vu, naïve café; 你好，世界! 👩‍💻🙂 1234\n\n" * 20]
TEXTS = [
    "",
    "the quick dog",
    " leading and trailing ",
    "tabs\tand\r\nlines\n\n\n",
    "naïve 世界 👩‍💻🙂",
    "a\x00b\x7f",
    "\ufffd real replacement",
    "x" * 1000,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(CORPUS, 400)


def llama_style(directory: Path) -> Path:
    """A SentencePiece-like tokenizer.json as Llama 2 has it: a space mark before words and byte fallback."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "c", "▁a", "ab", "▁ab"]:
        vocab[token] = len(vocab)
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(directory / "tokenizer.json"))
    return directory


def test_round_trip(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert len(tokenizer.encode("the the")) < 7  # merges were learned


def test_text_never_becomes_the_separator(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id]) == "a"


def test_training_is_deterministic_and_bounded(tokenizer: Tokenizer) -> None:
    assert train_bpe(CORPUS, 400).fingerprint == tokenizer.fingerprint
    assert train_bpe(CORPUS, 300).fingerprint != tokenizer.fingerprint
    assert train_bpe(CORPUS, 300).vocab_size == 300
    assert train_bpe(["ab"], 1000).vocab_size == 257
    with pytest.raises(ValueError, match="vocab_size is 256; at least 257"):
        train_bpe(CORPUS, 256)


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new")
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        assert loaded.encode(f"fox {END_OF_TEXT}") == tokenizer.encode(f"fox {END_OF_TEXT}")
    assert json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())["eos_token"] == END_OF_TEXT


def test_llama_style_file(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(llama_style(tmp_path))
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.vocab_size == 266
    # Ten characters: neither the truncation nor the padding of the file applies.
    assert tokenizer.decode(tokenizer.encode("ab ab c 世界 x")) == "ab ab c 世界 x"
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"


def test_separator_from_the_configuration(tmp_path: Path) -> None:
    llama_style(tmp_path)
    plain = Tokenizer.load(tmp_path).fingerprint
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    configured = Tokenizer.load(tmp_path)
    assert configured.eos_id == 1
    assert configured.fingerprint != plain
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(ValueError, match="'<none>' is not in its vocabulary"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not a JSON object"):
        Tokenizer.load(tmp_path)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a directory"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    tokenizers.Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"has none of <\|endoftext\|>, </s>"):
        Tokenizer.load(tmp_path)


def test_gpt2_ranks_give_the_same_ids_as_tiktoken(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    # A rank table in tiktoken's form of the BPE trained here: the bytes of every token but the separator, in order.
    content = json.loads(tokenizer._backend.to_str())["model"]
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    byte_of = {chr(b): b for b in printable} | {
        chr(0x100 + i): b for i, b in enumerate(sorted({*range(256)} - printable))
    }
    tokens = sorted((t for t in content["vocab"] if t != END_OF_TEXT), key=content["vocab"].__getitem__)
    ranks = {bytes(byte_of[c] for c in token): rank for rank, token in enumerate(tokens)}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    gpt2 = Tokenizer.load("gpt2")
    assert gpt2.eos_id == len(ranks)
    assert gpt2.vocab_size == len(ranks) + 1
    for text in [*TEXTS, *CORPUS]:
        assert gpt2.encode(text) == encoding.encode_ordinary(text)


def test_gpt2_without_tiktoken_or_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match="'gpt2' needs tiktoken; install it, or give the path"):
        Tokenizer.load("gpt2")

    def offline(name: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=offline))
    with pytest.raises(FileNotFoundError, match=r"no route to host.*TIKTOKEN_CACHE_DIR"):
        Tokenizer.load("gpt2")


@pytest.mark.parametrize("origin", ["bytes", "llama"])
def test_stream_equals_whole_text(origin: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    if origin == "llama":
        tokenizer = Tokenizer.load(llama_style(tmp_path))
    for text in [t for t in TEXTS if "\ufffd" not in t] + ["世界" * 20, "ab a ab", "🙂🙂 a🙂"]:
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.push(token) for token in tokenizer.encode(text)]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + decoder.flush() == text


def test_stream_gives_a_character_as_soon_as_it_is_whole() -> None:
    tokenizer = train_bpe(["x"], 257)  # one token a byte
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(token) for token in tokenizer.encode("a🙂b")] == ["a", "", "", "", "🙂", "b"]


def test_stream_of_any_ids_equals_decode() -> None:
    tokenizer = train_bpe(["x"], 257)
    ids = random.Random(0).choices(range(257), k=2000)  # mostly bytes that are not UTF-8, and separators
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push(token) for token in ids) + decoder.flush() == tokenizer.decode(ids)


def test_stream_flush_gives_the_unfinished_character() -> None:
    tokenizer = train_bpe(["x"], 257)
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(tokenizer.encode("é")[0]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(tokenizer.encode("z")[0]) == "z"
