"""Quantizer strings and QuantConfig: inverse of each other, and clear about what they do not understand."""

from __future__ import annotations

import itertools
import json
from dataclasses import FrozenInstanceError

import pytest

from quest import _C, QuantConfig, Quantizer, reference
from quest.quantizer import LinearQuantizers

GRIDS = [
    *(("int", bits) for bits in range(1, 9)),
    *((kind, bits) for kind in ("int_zero", "gauss") for bits in range(2, 9)),
    ("fp4", 4),
    ("ternary", 2),
]
EVERY = [
    Quantizer(grid, bits, rotation, sparsity, estimator, bound, output)
    for (grid, bits), rotation, sparsity, (estimator, bound), output in itertools.product(
        GRIDS,
        ("hadamard", "none"),
        ("none", "4:8"),
        (("trust", None), ("trust", 0.3), ("clip", None), ("clip", 1.3), ("ste", None)),
        ("rotated", "original"),
    )
]


def test_parse_inverts_str() -> None:
    for q in EVERY:
        assert Quantizer.parse(str(q)) == q
    assert len({str(q) for q in EVERY}) == len(EVERY)


@pytest.mark.parametrize("bound", [1e-4, 0.1 + 0.2, 1, 1.25, 9999.5])
def test_bounds_keep_every_digit(bound: float) -> None:
    assert Quantizer.parse(str(Quantizer(bound=bound))).bound == bound


def test_strings_of_the_documentation() -> None:
    assert str(Quantizer()) == "int4-hadamard-trust"
    assert str(Quantizer("int", 1, estimator="clip", bound=1.3)) == "int1-hadamard-clip1.3"
    assert str(Quantizer("fp4", rotation="none", estimator="ste")) == "fp4-none-ste"
    assert str(Quantizer(sparsity="4:8", output="original")) == "int4-hadamard-4:8-trust-original"
    assert str(Quantizer("ternary", 2, rotation="none", estimator="clip")) == "ternary-none-clip"


def test_shorthands() -> None:
    assert Quantizer.parse("int4") == Quantizer("int", 4, "hadamard", "none", "trust")
    assert Quantizer.parse("int1") == Quantizer("int", 1, "hadamard", "none", "clip")
    assert Quantizer.parse("ternary") == Quantizer("ternary", 2)


def test_the_compiled_side_reads_the_same_strings_and_has_the_same_constants() -> None:
    for q in EVERY:
        got = _C.default_bound(str(q))
        assert got is None if q.estimator == "ste" else got == pytest.approx(reference.default_bound(q), rel=1e-6)
    for grid, bits in GRIDS:
        q = Quantizer(grid, bits)
        assert _C.grid_levels(q.grid_name) == pytest.approx(reference.levels(q).tolist(), rel=1e-6)
    for bits, alpha in reference.ALPHA.items():
        assert _C.int_alpha(bits) == alpha


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9-hadamard-trust", "grid: expected one of .* got 'int9'; did you mean 'int8'"),
        ("in4", "did you mean 'int4'"),
        ("int4-hadamrd-trust", "rotation: .* got 'hadamrd'; did you mean 'hadamard'"),
        ("int4-hadamard", "estimator: expected one of trust, clip, ste, got ''"),
        ("int4-hadamard-2:4-trust", "estimator: .* got '2:4'"),
        ("int4-hadamard-trusty", "got 'trusty'; did you mean 'trust'"),
        ("int4-hadamard-trust-orginal", "output: .* got 'orginal'; did you mean 'original'"),
        ("int4-hadamard-trust-original-more", "output: .* got 'original-more'"),
        ("int4-hadamard-ste1.3", "bound: the ste estimator has none"),
        ("int4-hadamard-clip0", "bound: expected 1e-4 to 1e4, got 0.0"),
        ("", "grid: .* got ''"),
    ],
)
def test_bad_strings(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantizer.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": "intt"}, "grid: .* did you mean 'int'"),
        ({"bits": 9}, "bits: expected 1 to 8 for grid 'int', got 9; nearest: 8"),
        ({"grid": "ternary"}, "bits: expected 2 for grid 'ternary', got 4; nearest: 2"),
        ({"rotation": "haar"}, "rotation: .* got 'haar'"),
        ({"sparsity": "2:4"}, "sparsity: .* did you mean '4:8'"),
        ({"estimator": "STE"}, "estimator: "),
        ({"output": "back"}, "output: "),
        ({"bound": float("nan")}, "bound: expected 1e-4 to 1e4, got nan"),
    ],
)
def test_bad_fields(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantizer(**arguments)


def test_quantizer_is_a_frozen_key() -> None:
    assert {Quantizer(): 1}[Quantizer.parse("int4-hadamard-trust")] == 1
    with pytest.raises(FrozenInstanceError):
        Quantizer().bits = 3  # type: ignore[misc]


def test_config_patterns() -> None:
    config = QuantConfig(
        "int4",
        None,
        include=("blocks.*",),
        exclude=("*.gate",),
        overrides={"*.down": {"weight": "int8"}, "lm_head": {"activation": "int8"}, "blocks.0.*": None},
    )
    int4, int8 = Quantizer.parse("int4"), Quantizer.parse("int8")
    assert config.quantizers_for("blocks.1.up") == LinearQuantizers(int4, None)
    assert config.quantizers_for("blocks.1.gate") is None
    assert config.quantizers_for("head") is None
    assert config.quantizers_for("blocks.1.down") == LinearQuantizers(int8, None)
    assert config.quantizers_for("lm_head") == LinearQuantizers(int4, int8)
    assert config.quantizers_for("blocks.0.down") == LinearQuantizers(int8, None)  # the first matching override counts
    assert config.quantizers_for("blocks.0.up") is None


def test_config_leaves_heads_and_embeddings_alone() -> None:
    config = QuantConfig()
    assert [config.quantizers_for(name) for name in ("lm_head", "model.lm_head", "embed", "model.embed_tokens")] == [
        None
    ] * 4
    assert config.quantizers_for("blocks.0.attention.qkv") is not None
    assert QuantConfig("none", None).quantizers_for("blocks.0.attention.qkv") is None


def test_config_dict_round_trip() -> None:
    config = QuantConfig(
        "int1", "none", include=("a*", "b"), exclude="head", overrides={"x": {"weight": None}, "y": None, "z": {}}
    )
    words = config.to_dict()
    assert words["weight"] == "int1-hadamard-clip"
    assert QuantConfig.from_dict(json.loads(json.dumps(words))) == config
    assert QuantConfig.from_dict({}) == QuantConfig()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"wieght": "int4"}, "key: .* got 'wieght'; did you mean 'weight'"),
        ({"overrides": {"a": {"activ": "int4"}}}, r"overrides\['a'\]: .* did you mean 'activation'"),
        ({"overrides": {"a": "int4"}}, r"overrides\['a'\]: expected a mapping or None"),
        ({"weight": 4}, "expected a quest.Quantizer, its string or None, got int"),
    ],
)
def test_bad_configs(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig.from_dict(data)
