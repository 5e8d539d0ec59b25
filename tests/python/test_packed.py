"""Packed directories: what is written is what is read, and anything damaged is named."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quest
from quest.infer import fuse_prologues
from quest.models import Llama, LlamaConfig, Tokenizer, load_packed, save_packed, train_bpe
from quest.models.packed import is_packed, model_sizes

CONFIG = LlamaConfig(vocab_size=300, n_layers=2, n_heads=2, d_model=64, d_hidden=128, max_seq_len=32)
TOKENS = torch.arange(24).view(2, 12)


def packed_model(weight: str = "int4", activation: str = "int4", **options: Any) -> Llama:
    model = Llama(CONFIG).eval()
    return quest.convert(quest.prepare(model, quest.QuantConfig(weight, activation, **options)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat"] * 3, 270)


@pytest.fixture
def directory(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    save_packed(packed_model(), tmp_path / "model", tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        ("int1", "int1"),
        ("int2-none-ste", "int3-none-trust"),
        ("int4", "int4"),
        ("int7", "int7"),
        ("int8", "int8"),
        ("int_zero4-hadamard-trust", "int_zero4-hadamard-trust"),
        ("fp4", "fp4"),
        ("ternary-hadamard-clip1.1", "ternary"),
        ("gauss4", "gauss4"),
        ("int4-hadamard-4:8-trust", "int4"),
        ("int4", "none"),
        ("none", "int4"),
    ],
)
def test_round_trip_is_exact(tmp_path: Path, weight: str, activation: str) -> None:
    model = packed_model(weight, activation)
    save_packed(model, tmp_path / "model")
    loaded = load_packed(tmp_path / "model")
    assert not loaded.training
    assert str(loaded) == str(model)  # the same layers with the same quantizers
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_layers_may_differ(tmp_path: Path) -> None:
    model = packed_model(exclude=("lm_head", "*.0.mlp.*"), overrides={"*.attention.out": {"weight": "int8"}})
    save_packed(model, tmp_path / "model")
    loaded = load_packed(tmp_path / "model")
    assert isinstance(loaded.blocks[0].mlp.down, torch.nn.Linear)
    assert str(loaded.blocks[1].attention.out.weight_quantizer) == "int8-hadamard-trust"
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_files_are_as_documented(directory: Path) -> None:
    assert {file.name for file in directory.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    layer = "blocks.0.mlp.down"
    assert {f"{layer}.weight_codes", f"{layer}.weight_scale", f"{layer}.weight_code_sum"} <= names
    assert f"{layer}.weight_index" not in names
    assert metadata["format_version"] == "1"
    assert metadata[f"{layer}.weight_quantizer"] == "int4-hadamard-trust"
    assert metadata[f"{layer}.k"] == "128"
    block = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "quest"
    assert block["modules"][layer] == {"weight": "int4-hadamard-trust", "activation": "int4-hadamard-trust"}
    assert is_packed(directory)
    assert Tokenizer.load(directory).encode("the cat")


def test_sparse_weights_keep_their_index(tmp_path: Path) -> None:
    save_packed(packed_model("int4-hadamard-4:8-trust", "int4"), tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors")["blocks.0.mlp.down.weight_index"].dtype == torch.uint8


def test_sizes_count_every_weight_once(tmp_path: Path) -> None:
    real = Llama(CONFIG)
    parameters = sum(parameter.numel() for parameter in real.parameters())
    assert model_sizes(real).float32 == model_sizes(real).packed == 4 * parameters
    sizes = save_packed(packed_model(), tmp_path / "model")
    assert sizes.float32 == 4 * parameters
    assert sizes.packed == sum(t.nbytes for t in load_file(tmp_path / "model" / "model.safetensors").values())
    # Half a byte a weight, 8 bytes of scale and sum a row; embedding, head and 5 norms in float32.
    quantized = 2 * (192 + 64 + 256) * 64 + 2 * 64 * 128
    assert sizes.packed == quantized // 2 + 8 * 2 * (192 + 64 + 256 + 64) + 4 * (2 * 300 + 5) * 64


def test_trainable_layer_is_refused(tmp_path: Path) -> None:
    model = quest.prepare(Llama(CONFIG), quest.QuantConfig())
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.qkv is not packed yet; call quest\.convert"):
        save_packed(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_earlier_model(
    directory: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    def full(self: Tokenizer, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_packed(packed_model("int2", "int2"), directory, tokenizer)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    assert list(directory.parent.iterdir()) == [directory]


def test_an_earlier_model_is_replaced(directory: Path) -> None:
    save_packed(packed_model("int2", "int2"), directory)
    assert str(load_packed(directory).blocks[0].mlp.down.weight_quantizer) == "int2-hadamard-trust"
    assert not (directory / "tokenizer.json").exists()
    assert list(directory.parent.iterdir()) == [directory]


def fused_and_not(directory: Path, device: torch.device | str = "cpu") -> tuple[Llama, Llama]:
    return fuse_prologues(load_packed(directory, device)), load_packed(directory, device)


def test_fused_prologues_change_nothing_but_roundings(directory: Path, device: torch.device) -> None:
    fused, plain = fused_and_not(directory, device)
    for block in fused.blocks:
        moved = (block.attention_norm, block.mlp_norm, block.mlp.product)
        assert all(isinstance(module, torch.nn.Identity) for module in moved)
    assert isinstance(fused.norm, torch.nn.RMSNorm)  # lm_head is not quantized
    assert model_sizes(fused) == model_sizes(plain)
    assert str(fuse_prologues(fused)) == str(fused)  # twice is once
    with torch.no_grad():
        logits, expected = fused(TOKENS.to(device)), plain(TOKENS.to(device))
        # Last bits move a code in thousands, and a code some thousandths of a logit.
        assert (logits - expected).norm() <= 0.01 * expected.norm()
        loss, same = (
            torch.nn.functional.cross_entropy(y[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten().to(device))
            for y in (logits, expected)
        )
        assert abs(loss - same) <= 1e-4


def test_fused_layers_that_differ(tmp_path: Path) -> None:
    """A layer that is real, or takes its input as it is, keeps the module before it."""
    model = packed_model(exclude=("lm_head", "*.0.mlp.*"), overrides={"*.1.attention.qkv": {"activation": "none"}})
    with torch.no_grad():
        expected = model(TOKENS)
        logits = fuse_prologues(model)(TOKENS)
    first, second = model.blocks
    assert isinstance(first.mlp_norm, torch.nn.RMSNorm)
    assert isinstance(first.attention_norm, torch.nn.Identity)
    assert isinstance(second.attention_norm, torch.nn.RMSNorm)
    assert isinstance(second.mlp.product, torch.nn.Identity)
    assert (logits - expected).norm() <= 0.01 * expected.norm()


def test_fused_model_compiles_and_exports(directory: Path, device: torch.device) -> None:
    fused, _ = fused_and_not(directory, device)
    tokens = TOKENS.to(device)
    with torch.no_grad():
        expected = fused(tokens)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens), expected)
        program = torch.export.export(fused, (tokens,))
        torch.testing.assert_close(program.module()(tokens), expected)


def test_fused_model_is_not_saved(directory: Path, tmp_path: Path) -> None:
    fused, _ = fused_and_not(directory)
    with pytest.raises(
        ValueError, match=r"save_packed: blocks\.0\.attention\.qkv: expected a layer without a prologue"
    ):
        save_packed(fused, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_other_directories_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(ValueError, match="is not a model directory"):
        save_packed(packed_model(), tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def edit_config(directory: Path, *keys: str, value: Any) -> None:
    file = directory / "config.json"
    config = entry = json.loads(file.read_text())
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    file.write_text(json.dumps(config))


def test_missing_files_are_named(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_packed(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_packed(directory)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights_are_named(directory: Path, keep: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load_packed(directory)


def test_one_wrong_bit_is_found(directory: Path) -> None:
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that config\.json was written with"):
        load_packed(directory)


def test_truncated_config_is_named(directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=r"config\.json is truncated or not JSON"):
        load_packed(directory)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("quantization_config", "format_version"), 2, "expected format_version 1, got 2"),
        (("quantization_config",), None, "expected format_version 1, got None"),
        (("model_type",), "llama", "quest import hf:DIR"),
        (("n_heads",), "two", "does not describe a model"),
        (("quantization_config", "modules", "blocks.9.mlp.down"), {}, "does not describe a model"),
        (("quantization_config", "modules", "embed"), {}, "embed is a Embedding, not a linear layer"),
        (("quantization_config", "modules", "blocks.0.mlp.down", "weight"), "int44", "did you mean"),
        (("quantization_config", "modules", "blocks.0.mlp.down", "weight"), "int2-hadamard-trust", "disagree"),
        (("d_hidden",), 256, "disagree"),
        (("n_layers",), 1, "does not describe a model"),
        (("vocab_size",), 301, r"embed\.weight: expected torch\.float32 \[301, 64\], got torch\.float32 \[300, 64\]"),
        (("n_layers",), 3, r"lacks the tensor blocks\.2\.attention\.out\.weight"),
    ],
)
def test_config_that_does_not_fit(directory: Path, keys: tuple[str, ...], value: Any, message: str) -> None:
    edit_config(directory, *keys, value=value)
    with pytest.raises(ValueError, match=message):
        load_packed(directory)


def test_tensor_of_another_dtype_is_named(directory: Path) -> None:
    file = directory / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    state["blocks.0.mlp.down.weight_codes"] = state["blocks.0.mlp.down.weight_codes"].to(torch.int32)
    save_file(state, file, metadata=metadata)

    edit_config(directory, "quantization_config", "weights_sha256", value=hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=r"weight_codes: expected torch\.uint8 .*, got torch\.int32"):
        load_packed(directory)


def test_model_can_be_copied_and_moved(directory: Path) -> None:
    moved = directory.with_name("moved")
    shutil.copytree(directory, moved)
    with torch.no_grad():
        assert torch.equal(load_packed(moved)(TOKENS), load_packed(directory)(TOKENS))


def test_loads_on_every_device(directory: Path, device: torch.device) -> None:
    model = load_packed(directory, device)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device.type}
    with torch.no_grad():
        assert torch.allclose(model(TOKENS.to(device)).cpu(), load_packed(directory)(TOKENS), atol=1e-4)
