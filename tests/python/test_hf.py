"""Hugging Face Llama directories, in and out: the same logits as transformers, and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file

import quest
from quest.models import Llama, LlamaConfig, load_hf, save_hf, train_bpe

TOKENS = torch.arange(60).view(2, 30)
CONFIG = LlamaConfig(
    vocab_size=100, n_layers=2, n_heads=4, d_model=64, n_kv_heads=2, d_hidden=160, rope_theta=5e5, max_seq_len=64
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_hf(Llama(CONFIG), tmp_path / "hf")
    return tmp_path / "hf"


def hf_model(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,  # logits of several units, so that 1e-4 means something
            **changes,
        }
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("changes", "saving"),
    [
        ({}, {}),
        ({"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, {}),
        ({"rope_theta": 5e5}, {}),
        ({"tie_word_embeddings": True}, {}),
        ({}, {"max_shard_size": "50KB"}),
    ],
    ids=["grouped", "one key per query", "rope theta", "tied", "sharded"],
)
def test_logits_equal_those_of_transformers(tmp_path: Path, changes: dict[str, Any], saving: dict[str, Any]) -> None:
    theirs = hf_model(**changes)
    theirs.save_pretrained(tmp_path / "in", **saving)
    assert (tmp_path / "in" / "model.safetensors.index.json").exists() == bool(saving)
    ours = load_hf(tmp_path / "in")
    save_hf(ours, tmp_path / "out")
    back = type(theirs).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert expected.abs().max() > 3
        torch.testing.assert_close(ours(TOKENS), expected, atol=1e-4, rtol=0)
        assert torch.equal(back(TOKENS).logits, expected)


def test_older_config_files(tmp_path: Path) -> None:
    """rope_theta at the top and no head_dim, as transformers 4 wrote it."""
    theirs = hf_model(rope_theta=5e5)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config.pop("head_dim")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        torch.testing.assert_close(load_hf(tmp_path)(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_quantized_weights_are_written_as_the_numbers_they_stand_for(tmp_path: Path, packed: bool) -> None:
    """With real activations the logits there are those of the quantized model here."""
    model = quest.prepare(Llama(CONFIG).eval(), quest.QuantConfig("int4", None))
    if packed:
        quest.convert(model)
    save_hf(model, tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(load_hf(tmp_path / "hf")(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-4)
    if not packed:
        quantizer = quest.Quantizer(output="original")
        weight = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
        assert torch.equal(weight, quest.fake_quantize(model.blocks[0].mlp.down.weight, quantizer))


def test_tokenizer_goes_along(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe(["the cat sat on the mat"] * 3, 270)
    save_hf(Llama(CONFIG), tmp_path / "hf", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("the cat")["input_ids"] == tokenizer.encode("the cat")
    assert theirs.eos_token_id == tokenizer.eos_id


def test_half_precision_is_widened(directory: Path) -> None:
    expected = load_hf(directory)
    state = load_file(directory / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, directory / "model.safetensors")
    model = load_hf(directory)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight.bfloat16().float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "expected model_type = 'llama', got 'mistral'"),
        ({"hidden_act": "gelu"}, "expected hidden_act = 'silu', got 'gelu'"),
        ({"attention_bias": True}, "expected attention_bias = False, got True"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            "expected rope_type = 'default', got 'llama3'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "expected rope_type = 'default', got 'linear'"),
        ({"head_dim": 32}, r"expected head_dim \* num_attention_heads = 64, got 128"),
        ({"intermediate_size": 161}, r"gate_proj\.weight: expected \[161, 64\] by config\.json, got \[160, 64\]"),
        ({"num_hidden_layers": 3}, r"lacks the tensor 'model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"has a tensor 'model\.layers\.1\..*' that this Llama has no place for"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_what_cannot_be_imported_is_named(directory: Path, changes: dict[str, Any], message: str) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        load_hf(directory)


def test_missing_and_damaged_files_are_named(directory: Path) -> None:
    file = directory / "model.safetensors"
    content = file.read_bytes()
    for size in (0, 5, 1000, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
            load_hf(directory)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="pickled weights"):
        load_hf(directory)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "gone.safetensors"}}')
    with pytest.raises(ValueError, match=r"lacks the tensor 'model\.embed_tokens\.weight'"):
        load_hf(directory)
    names = dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], "gone.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors, named in the index, is missing"):
        load_hf(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_hf(directory)


def test_fine_tuning_example() -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, str(REPOSITORY / "examples" / "finetune_hf.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    losses = [float(line.split()[-1]) for line in result.stdout.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.6 * losses[0]
    change = float(result.stdout.split()[-1])
    assert change < 1e-4
