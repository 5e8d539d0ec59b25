"""The compact Llama: shapes, initialisation, causality, cache, presets, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest.models.llama import PRESETS, Llama, LlamaConfig, rotary_table, rotate_pairs

# Float32 sums in another order: 1e-5 is far above their rounding here and far below any wrong position or mask.
TOLERANCE = 1e-5


def small(**changes: int) -> LlamaConfig:
    fields = {
        "vocab_size": 61,
        "n_layers": 2,
        "n_heads": 4,
        "d_model": 32,
        "d_hidden": 48,
        "max_seq_len": 24,
        **changes,
    }
    return LlamaConfig(**fields)


def tokens(config: LlamaConfig, batch: int = 2, count: int = 17) -> Tensor:
    return torch.randint(config.vocab_size, (batch, count))


@pytest.mark.parametrize(
    ("name", "millions", "learning_rate"),
    [
        ("30M", 30, 1.2e-3),
        ("50M", 50, 1.2e-3),
        ("100M", 100, 6e-4),
        ("200M", 200, 3e-4),
        ("430M", 430, 1.5e-4),
        ("800M", 800, 7.5e-5),
        ("1.6B", 1600, 3.75e-5),
    ],
)
def test_presets_are_the_papers(name: str, millions: int, learning_rate: float) -> None:
    preset = PRESETS[name]
    count = preset.config(32000).non_embedding_parameters
    assert abs(count / 1e6 - millions) < 0.04 * millions
    assert preset.tokens == 100e6 * millions
    assert preset.learning_rate == learning_rate


def test_parameter_count_is_that_of_the_model() -> None:
    for config in (small(), small(n_kv_heads=2), PRESETS["tiny"].config(100)):
        with torch.device("meta"):
            model = Llama(config)
        total = sum(p.numel() for p in model.parameters())
        assert total == config.non_embedding_parameters + 2 * config.vocab_size * config.d_model


def test_initialisation() -> None:
    model = Llama(PRESETS["tiny"].config(2000))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all()
            continue
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        expected = 0.02 / math.sqrt(2 * model.config.n_layers) if residual else 0.02
        # The deviation of n normal samples is known to 1/√(2n): six of those.
        assert abs(parameter.std().item() / expected - 1) < 6 / math.sqrt(2 * parameter.numel()), name


def test_rotary_turns_pairs_and_keeps_relative_position() -> None:
    cos, sin = rotary_table(0, 9, 8, 1e4, torch.device("cpu"))
    x, y = torch.randn(8), torch.randn(8)
    turned_x, turned_y = (rotate_pairs(v.expand(1, 1, 9, 8), cos, sin)[0, 0] for v in (x, y))
    # As complex numbers, neighbouring pairs are multiplied by exp(i · position · frequency).
    frequencies = 1e4 ** (-torch.arange(0, 8, 2) / 8)
    factors = torch.exp(1j * torch.arange(9)[:, None] * frequencies)
    expected = torch.view_as_real(torch.view_as_complex(x.view(4, 2)) * factors).flatten(1)
    torch.testing.assert_close(turned_x, expected, atol=TOLERANCE, rtol=0)
    products = turned_x @ turned_y.T
    for distance in range(1, 4):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4, rtol=0)
    later_cos, later_sin = rotary_table(5, 4, 8, 1e4, torch.device("cpu"))
    assert torch.equal(later_cos, cos[5:])
    assert torch.equal(later_sin, sin[5:])


def test_forward_is_the_written_out_formula() -> None:
    """One block, one head, computed again from the definition."""
    config = small(n_layers=1, n_heads=1, d_model=8, d_hidden=12)
    model = Llama(config)
    for parameter in model.parameters():  # of unit size, so that no part drowns in another
        nn.init.normal_(parameter)
    ids = tokens(config, 1, 6)

    def norm(x: Tensor, module: nn.RMSNorm) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight

    x = model.embed.weight[ids[0]]
    block = model.blocks[0]
    q, k, v = (norm(x, block.attention_norm) @ block.attention.qkv.weight.T).split(8, dim=-1)
    cos, sin = rotary_table(0, 6, 8, 1e4, torch.device("cpu"))
    q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
    scores = (q @ k.T / math.sqrt(8)).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    x = x + scores.softmax(-1) @ v @ block.attention.out.weight.T
    gate, up = (norm(x, block.mlp_norm) @ block.mlp.gate_up.weight.T).split(12, dim=-1)
    x = x + (gate * gate.sigmoid() * up) @ block.mlp.down.weight.T
    expected = norm(x, model.norm) @ model.lm_head.weight.T
    torch.testing.assert_close(model(ids)[0], expected, atol=1e-4, rtol=1e-4)


def test_no_position_sees_a_later_one() -> None:
    model = Llama(small())
    ids = tokens(model.config)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % model.config.vocab_size
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=TOLERANCE, rtol=0)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=TOLERANCE)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("chunks", [[17], [1] * 17, [5, 7, 5], [8, 1, 1, 7], [1, 16]])
def test_cache_in_any_chunks_gives_the_same_logits(n_kv_heads: int, chunks: list[int]) -> None:
    model = Llama(small(n_kv_heads=n_kv_heads)).eval()
    ids = tokens(model.config)
    with torch.no_grad():
        expected = model(ids)
        cache = model.new_cache(2, 20, torch.device("cpu"), torch.float32)
        pieces = [model(chunk, cache) for chunk in ids.split(chunks, dim=1)]
    assert cache.length == 17
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=TOLERANCE, rtol=0)


def test_grouped_heads_are_repeated_full_heads() -> None:
    grouped = Llama(small(n_kv_heads=2))
    full = Llama(small())
    state = grouped.state_dict()
    for layer in range(2):
        name = f"blocks.{layer}.attention.qkv.weight"
        q, k, v = state[name].unflatten(0, (-1, 8)).split([4, 2, 2])
        state[name] = torch.cat([q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)]).flatten(0, 1)
    full.load_state_dict(state)
    ids = tokens(full.config)
    torch.testing.assert_close(grouped(ids), full(ids), atol=TOLERANCE, rtol=0)


def test_gradients_reach_every_parameter() -> None:
    model = Llama(small(n_kv_heads=2))
    ids = tokens(model.config)
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_built_on_meta_and_filled() -> None:
    model = Llama(small())
    with torch.device("meta"):
        empty = Llama(small())
    empty.load_state_dict(model.state_dict(), assign=True)
    ids = tokens(model.config)
    assert torch.equal(empty(ids), model(ids))


def test_compiles_without_a_break() -> None:
    model = Llama(small(n_kv_heads=2))
    ids = tokens(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "n_heads must divide d_model"),
        ({"n_heads": 32}, "even width"),
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads=4, got 3"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
    ],
)
def test_shapes_that_cannot_be(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_too_many_positions() -> None:
    model = Llama(small())
    with pytest.raises(ValueError, match="0 cached and 25 new positions exceed the 24 that max_seq_len"):
        model(tokens(model.config, count=25))
    with pytest.raises(ValueError, match="max_len must be at most max_seq_len=24, got 25"):
        model.new_cache(1, 25, torch.device("cpu"), torch.float32)
    cache = model.new_cache(2, 10, torch.device("cpu"), torch.float32)
    model(tokens(model.config, count=8), cache)
    with pytest.raises(ValueError, match="8 cached and 3 new positions exceed the 10 that the cache holds"):
        model(tokens(model.config, count=3), cache)
