"""prepare and convert on models of every make: which layers they touch, what they keep, that the result trains."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest import PackedLinear, QuantConfig, Quantizer, QuestLinear, convert, frozen_weights, prepare


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 128, bias=False)
        self.up = nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(Mlp() for _ in range(2))
        self.lm_head = nn.Linear(64, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear | PackedLinear)}


def train(model: nn.Module, device: torch.device, steps: int = 30) -> list[float]:
    """Losses of predicting a fixed sequence, two micro-batches a step."""
    tokens = torch.randint(0, 50, (8, 17), generator=torch.Generator().manual_seed(1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        with frozen_weights(model):
            for part in tokens.chunk(2):
                loss = F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
                (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("weight", "activation"),
    [("int4", "int4"), ("int1", "int1"), ("int4", None), ("int4-hadamard-4:8-trust", "int4"), (None, "int4")],
)
def test_trains_packs_and_says_the_same(weight: str | None, activation: str | None, device: torch.device) -> None:
    model = Model().to(device)
    keys = list(model.state_dict())
    assert prepare(model, QuantConfig(weight, activation)) is model
    assert list(model.state_dict()) == keys
    losses = train(model, device)
    assert losses[-1] < 0.5 * losses[0]
    tokens = torch.randint(0, 50, (3, 9), device=device)
    with torch.no_grad():
        expected = model(tokens)
        assert convert(model) is model
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)
    assert set(kinds(model).values()) == ({"Linear", "PackedLinear"} if weight else {"Linear", "QuestLinear"})


def test_which_layers() -> None:
    model = prepare(Model(), QuantConfig())
    expected = {f"blocks.{i}.{name}": "QuestLinear" for i in range(2) for name in ("gate", "up", "down")}
    assert kinds(model) == {**expected, "lm_head": "Linear"}
    overrides = {"*.down": {"weight": "int8"}, "lm_head": {"activation": None}}
    config = QuantConfig(include=("blocks.1.*",), overrides=overrides)
    model = prepare(Model(), config)
    assert [name for name, kind in kinds(model).items() if kind == "QuestLinear"] == [
        "blocks.0.down", "blocks.1.gate", "blocks.1.up", "blocks.1.down", "lm_head",
    ]  # fmt: skip
    assert model.blocks[0].down.weight_quantizer == Quantizer(bits=8)
    assert model.lm_head.activation_quantizer is None


def test_nothing_to_quantize_changes_nothing() -> None:
    assert "QuestLinear" not in kinds(prepare(Model(), QuantConfig(None, None))).values()


def test_parameters_stay_the_same_objects() -> None:
    model = Model().eval()
    before = dict(model.named_parameters())
    prepare(model, QuantConfig())
    assert dict(model.named_parameters()) == before
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in before.items())
    assert not any(module.training for module in model.modules())


def test_a_linear_itself() -> None:
    linear = nn.Linear(64, 32)
    layer = prepare(linear, QuantConfig())
    assert isinstance(layer, QuestLinear)
    assert layer.weight is linear.weight
    assert isinstance(convert(layer), PackedLinear)


def test_a_module_in_two_places_is_replaced_once() -> None:
    model = Model()
    model.blocks[1] = model.blocks[0]
    prepare(model, QuantConfig())
    assert model.blocks[0].up is model.blocks[1].up
    convert(model)
    assert isinstance(model.blocks[0].up, PackedLinear)
    assert model.blocks[0].up is model.blocks[1].up


def test_tied_weights_warn() -> None:
    model = Model()
    model.lm_head.weight = model.embed.weight
    config = QuantConfig(overrides={"lm_head": {}})
    with pytest.warns(UserWarning, match=r"lm_head.weight is tied to embed.weight"):
        prepare(model, config)
    assert model.lm_head.weight is model.embed.weight


def test_subclasses_are_left_alone() -> None:
    model = nn.Sequential(nn.MultiheadAttention(64, 4), nn.Linear(64, 64))
    prepare(model, QuantConfig())
    assert kinds(model) == {"0.out_proj": "NonDynamicallyQuantizableLinear", "1": "QuestLinear"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantConfig(include=("layers.*",)), r"no nn.Linear matches include=\('layers.\*',\) .* has: blocks.0.gate"),
        (
            QuantConfig(overrides={"b.*.dwn": None}),
            r"override 'b.\*.dwn' matches no linear layer; the nearest is 'blocks",
        ),
    ],
)
def test_patterns_that_match_nothing(config: QuantConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(Model(), config)


def test_preparing_twice_is_an_error() -> None:
    model = prepare(nn.Sequential(nn.Linear(8, 8)), QuantConfig())
    with pytest.raises(ValueError, match="is it prepared already"):
        prepare(model, QuantConfig())


def test_meta_then_load(device: torch.device) -> None:
    """A packed model from its state_dict alone: nothing is computed, and no real weight is ever allocated."""
    packed = convert(prepare(Model().to(device), QuantConfig()))
    with torch.device("meta"):
        empty = convert(prepare(Model(), QuantConfig()))
    empty.load_state_dict(packed.state_dict(), assign=True)
    tokens = torch.randint(0, 50, (2, 5), device=device)
    assert torch.equal(empty(tokens), packed(tokens))


def test_deepcopy_and_compile(device: torch.device) -> None:
    model = prepare(Model().to(device), QuantConfig())
    clone = copy.deepcopy(model)
    tokens = torch.randint(0, 50, (2, 5), device=device)
    compiled = torch.compile(clone, fullgraph=True, backend="aot_eager")
    expected = model(tokens)
    expected.sum().backward()
    y = compiled(tokens)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    for parameter, other in zip(clone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_export_of_a_packed_model(device: torch.device) -> None:
    model = convert(prepare(Model().to(device), QuantConfig())).eval()
    tokens = torch.randint(0, 50, (2, 5), device=device)
    program = torch.export.export(model, (tokens,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=64)},))
    longer = torch.randint(0, 50, (2, 11), device=device)
    torch.testing.assert_close(program.module()(longer), model(longer))


def test_hugging_face_llama(device: torch.device) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(device)
    prepare(model, QuantConfig())
    quantized = [name for name, kind in kinds(model).items() if kind == "QuestLinear"]
    assert len(quantized) == 14
    assert type(model.lm_head) is nn.Linear
    tokens = torch.randint(0, 100, (2, 9), device=device)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        expected = model(tokens).logits
        convert(model)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    generated = model.eval().generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 13)
