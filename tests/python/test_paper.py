"""Checkpoints of the paper's code: names of quantizers, layouts of files, and the logits that the code itself gave."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shared_data

import quest
from quest import Quantizer, QuestLinear, reference
from quest.models import Llama, load_paper_checkpoint
from quest.models.paper import paper_quantizer

# Learned steps, pruning alone; and what the paper's code slips in (an inverted mask, a clamp without its division, a
# lopsided ternary grid), so that its vectors do not bind.
NOT_COMPOSED = ("LSQ", "PACT", "FourEightMasked")
NOT_BINDING = ("TrustQuantizer|bits=4,centered=False", "STEQuantizer|bits=1.585")


def keyword_arguments(text: str) -> dict[str, Any]:
    return {key: json.loads(value.lower()) for key, value in (pair.split("=") for pair in text.split(",") if pair)}


def test_every_class_of_the_golden_vectors_maps_to_its_quantizer(golden: dict[str, np.ndarray]) -> None:
    x = torch.from_numpy(golden["x"])
    checked = 0
    for key in golden:
        name, _, rest = key.partition("|")
        arguments, _, what = rest.partition("|")
        if what != "y":
            continue
        if name.startswith(NOT_COMPOSED):
            with pytest.raises(ValueError, match=f"'{name}' is not a rotation, grid, sparsity and estimator composed"):
                paper_quantizer(name, keyword_arguments(arguments))
            continue
        quantizer = paper_quantizer(name, keyword_arguments(arguments))
        assert quantizer is not None
        if f"{name}|{arguments}" in NOT_BINDING:
            continue
        expected = torch.from_numpy(golden[key])
        if quantizer.rotation == "hadamard" and quantizer.output == "original":  # compare where errors are elementwise
            expected = reference.hadamard(expected)
        error = (reference.quantize(x, quantizer).x_hat - expected).abs()
        assert (error > 1e-4).float().mean() <= 1e-3, key
        checked += 1
    assert checked > 60


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("HalfHadamardTrustQuantizer", {"bits": 4}, "int4-hadamard-trust"),
        ("HadamardTrustQuantizer", {"bits": 2}, "int2-hadamard-trust-original"),
        ("HalfHadamardTrustQuantizer", {"bits": 4, "trust": 0.2}, "int4-hadamard-trust0.2"),
        ("HalfHadamardClipQuantizer", {"bits": 1, "clip_scale": 1.3}, "int1-hadamard-clip1.3"),
        ("ClipQuantizer", {"bits": 1}, "int1-none-clip1.0"),
        ("STEQuantizer", {"bits": 4, "centered": False}, "int_zero4-none-ste"),
        ("STEQuantizer", {"bits": 1.585}, "ternary-none-ste"),
        ("HalfHadamardGaussianTrustQuantizer", {}, "gauss4-hadamard-trust"),
        ("HalfHadamardFourEightTrustQuantizer", {"bits": 4}, "int4-hadamard-4:8-trust"),
        ("FP4ClipQuantizer", {}, "fp4-none-clip1.0"),
    ],
)
def test_names_compose(name: str, arguments: dict[str, Any], expected: str) -> None:
    assert paper_quantizer(name, arguments) == Quantizer.parse(expected)


def test_no_quantizer() -> None:
    assert paper_quantizer("NoQuantizer", {"bits": 16}) is None


def test_unknown_argument_is_named() -> None:
    with pytest.raises(ValueError, match="TrustQuantizer has an argument 'group_size'"):
        paper_quantizer("TrustQuantizer", {"bits": 4, "group_size": 128})


# ---- files; a small checkpoint of ours in their layout ----

ARGUMENTS = {
    "model": "llama",
    "vocab_size": 96,
    "n_embd": 64,
    "n_head": 2,
    "n_layer": 2,
    "sequence_length": 16,
    "multiple_of": 256,
    "mlp_dim_exp_factor": 1.0,
    "rmsnorm_eps": 1e-5,
    "w_quant": "HalfHadamardTrustQuantizer",
    "w_quant_kwargs": {"bits": 4},
    "a_quant": "HalfHadamardTrustQuantizer",
    "a_quant_kwargs": {"bits": 4},
}


def their_state() -> OrderedDict[str, torch.Tensor]:
    shapes = {"transformer.wte": (96, 64), "transformer.ln_f": (64,), "lm_head": (96, 64)}
    for layer in range(2):
        for name, shape in {
            "ln_1": (64,),
            "attn.c_attn": (192, 64),
            "attn.c_proj": (64, 64),
            "ln_2": (64,),
            "mlp.w1": (256, 64),
            "mlp.w2": (256, 64),
            "mlp.c_proj": (64, 256),
        }.items():
            shapes[f"transformer.h.{layer}.{name}"] = shape
    return OrderedDict((f"_orig_mod.module.{name}.weight", torch.randn(shape)) for name, shape in shapes.items())


def write(directory: Path, state: Any, **changes: Any) -> Path:
    torch.save(state, directory / "main.pt")
    (directory / "summary.json").write_text(json.dumps({"args": ARGUMENTS | changes}))
    return directory


@pytest.mark.parametrize("nested", [False, True])
def test_both_layouts(tmp_path: Path, nested: bool) -> None:
    state = their_state()
    write(tmp_path, {"model": state, "optimizer": {"state": {}}, "itr": 10} if nested else state)
    model = load_paper_checkpoint(tmp_path / "main.pt" if nested else tmp_path)
    assert isinstance(model, Llama)
    assert not model.training
    stacked = torch.cat([state[f"_orig_mod.module.transformer.h.1.mlp.{name}.weight"] for name in ("w1", "w2")])
    layer = model.blocks[1].mlp.gate_up
    assert torch.equal(layer.weight, stacked)
    assert isinstance(layer, QuestLinear)
    assert str(layer.weight_quantizer) == str(layer.activation_quantizer) == "int4-hadamard-trust"
    assert type(model.lm_head) is torch.nn.Linear


def test_weight_only_and_not_quantized(tmp_path: Path) -> None:
    write(tmp_path, their_state(), a_quant="NoQuantizer", w_quant="HadamardTrustQuantizer")
    layer = load_paper_checkpoint(tmp_path).blocks[0].mlp.down
    assert (str(layer.weight_quantizer), layer.activation_quantizer) == ("int4-hadamard-trust-original", None)
    write(tmp_path, their_state(), a_quant="NoQuantizer", w_quant="NoQuantizer")
    assert not any(isinstance(module, QuestLinear) for module in load_paper_checkpoint(tmp_path).modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_quant": "LSQQuantizer"}, "'LSQQuantizer' is not a rotation"),
        ({"a_quant": "NoQuantizer"}, "leave one operand rotated and the other not"),
        ({"model": "gpt2"}, "expected model 'llama', got 'gpt2'"),
        ({"n_layer": 1}, "has a tensor 'transformer.h.1.attn.c_attn.weight' that this Llama has no place for"),
        ({"n_layer": 3}, r"lacks the tensor 'transformer\.h\.2\.ln_1\.weight'"),
        ({"vocab_size": 97}, r"transformer\.wte: expected shape \[97, 64\] by summary\.json, got \[96, 64\]"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_paper_checkpoint(write(tmp_path, their_state(), **changes))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"main\.pt"):
        load_paper_checkpoint(tmp_path)
    write(tmp_path, their_state())
    (tmp_path / "summary.json").write_text('{"arguments": {}}')
    with pytest.raises(ValueError, match=r"summary\.json is not a JSON object with 'args'"):
        load_paper_checkpoint(tmp_path)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"summary\.json"):
        load_paper_checkpoint(tmp_path)
    write(tmp_path, their_state())
    content = (tmp_path / "main.pt").read_bytes()
    for size in (0, 100, len(content) // 2):
        (tmp_path / "main.pt").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"main\.pt is truncated or not a torch checkpoint of plain tensors"):
            load_paper_checkpoint(tmp_path)


class Trap:
    """What a pickle must not be able to do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {"model": their_state(), "trap": Trap()})
    with pytest.raises(ValueError, match="not a torch checkpoint of plain tensors"):
        load_paper_checkpoint(tmp_path)
    assert "executed" not in capsys.readouterr().out


# ---- the logits of the paper's code ----


@pytest.fixture
def published() -> tuple[Llama, torch.Tensor, torch.Tensor]:
    directory = shared_data("original_checkpoint_w4a4")
    expected = torch.load(directory / "expected.pt", weights_only=True)
    return load_paper_checkpoint(directory), expected["input_ids"], expected["logits"]


def test_logits_by_the_definition(
    published: tuple[Llama, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The importer alone: every layer computed by the reference."""

    def forward(layer: QuestLinear, x: torch.Tensor) -> torch.Tensor:
        y = reference.linear(x, layer.weight, layer.bias, layer.activation_quantizer, layer.weight_quantizer)
        return y.float()

    monkeypatch.setattr(QuestLinear, "forward", forward)
    model, tokens, logits = published
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), logits, atol=2e-3, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_logits_by_the_operations(published: tuple[Llama, torch.Tensor, torch.Tensor], packed: bool) -> None:
    model, tokens, logits = published
    if packed:
        quest.convert(model)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), logits, atol=2e-3, rtol=0)
