"""What a quantizer is: four independent choices, written as one string; and which quantizers a model's layers get.

A quantizer is a rotation, a grid, a sparsity and an estimator (QuEST, arXiv 2502.05003, section 3). Its string means
the same here, in torch.ops.quest.*, in C++, on the command line and in the metadata of a packed model:

    GRID[BITS]-ROTATION[-4:8]-ESTIMATOR[BOUND][-original]
    int4-hadamard-trust   int1-hadamard-clip1.3   fp4-none-ste   int4-hadamard-4:8-trust   ternary-none-clip
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

GridKind = Literal["int", "int_zero", "fp4", "gauss", "ternary"]
Rotation = Literal["hadamard", "none"]
Sparsity = Literal["none", "4:8"]
Estimator = Literal["trust", "clip", "ste"]
Output = Literal["rotated", "original"]

# Bits that each kind of grid has. fp4 and ternary have one width, so their strings leave it out.
_BITS: dict[str, range] = {
    "int": range(1, 9),
    "int_zero": range(2, 9),
    "fp4": range(4, 5),
    "gauss": range(2, 9),
    "ternary": range(2, 3),
}


def _expected_one_of(what: str, value: object, known: Iterable[str]) -> str:
    """Error text for a word that is not known: names the nearest one."""
    names = list(known)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.0)
    return f"{what}: expected one of {', '.join(names)}, got {value!r}; did you mean {near[0]!r}?"


@dataclass(frozen=True)
class Quantizer:
    """One quantizer. `str(q)` and `Quantizer.parse` are inverse of each other.

    grid, bits   the levels, in units of the row's scale: `int` of 1-8 bits (the paper's), `int_zero` 2-8 (zero is a
                 level), `fp4` (E2M1; bits=4), `gauss` 2-8 (Lloyd-Max levels of N(0,1)), `ternary` (bits=2)
    rotation     `hadamard`: blocks of the last dimension, of 128 or the largest power of two that divides it; or `none`
    sparsity     `4:8`: of 4 adjacent pairs of values the 2 of smallest L2 norm become 0; or `none`
    estimator    which gradients pass: `trust` |x_hat - x| <= T sigma, `clip` |x| <= k * top level, `ste` all
    bound        the T of trust (in units of the row's rms sigma) or the k of clip; None: the default, which is half a
                 step for trust, and 1 for clip (at 1 bit 1.30 rotated, 1.25 not)
    output       whether x_hat stays `rotated` or is rotated back to the `original` space

    Raises ValueError for a part that does not exist, naming the nearest one that does.
    """

    grid: GridKind = "int"
    bits: int = 4
    rotation: Rotation = "hadamard"
    sparsity: Sparsity = "none"
    estimator: Estimator = "trust"
    bound: float | None = None
    output: Output = "rotated"

    def __post_init__(self) -> None:
        choices = {
            "grid": GridKind,
            "rotation": Rotation,
            "sparsity": Sparsity,
            "estimator": Estimator,
            "output": Output,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(_expected_one_of(f"Quantizer: {name}", getattr(self, name), get_args(kind)))
        allowed = _BITS[self.grid]
        if self.bits not in allowed:
            expected = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 1 else f"{allowed[0]}"
            nearest = min(allowed, key=lambda bits: abs(bits - self.bits))
            raise ValueError(
                f"Quantizer: bits: expected {expected} for grid {self.grid!r}, got {self.bits}; nearest: {nearest}"
            )
        if self.bound is not None:
            if self.estimator == "ste":
                raise ValueError(f"Quantizer: bound: the ste estimator has none, got {self.bound}; use trust or clip")
            # Within these limits repr writes digits alone; 1e-05 would read as two parts of the string.
            if not 1e-4 <= self.bound <= 1e4:
                raise ValueError(
                    f"Quantizer: bound: expected 1e-4 to 1e4, got {self.bound}; leave it out for the default"
                )

    @property
    def grid_name(self) -> str:
        """The grid as one word, as the operations take it: "int4", "int_zero4", "fp4", "gauss4", "ternary"."""
        return self.grid if len(_BITS[self.grid]) == 1 else f"{self.grid}{self.bits}"

    @property
    def sparse(self) -> bool:
        return self.sparsity != "none"

    def __str__(self) -> str:
        bound = "" if self.bound is None else repr(float(self.bound))
        parts = [self.grid_name, self.rotation, self.sparsity if self.sparse else "", self.estimator + bound]
        return "-".join([part for part in parts if part] + (["original"] if self.output == "original" else []))

    @staticmethod
    def parse(text: str) -> Quantizer:
        """The quantizer that `text` names. A grid alone, such as "int4", is short for "int4-hadamard-trust"; "int1" for
        "int1-hadamard-clip", which trains best at one bit.

        Raises ValueError naming the part that was not understood and the nearest that would be.
        """
        grid_word, *parts = text.split("-")
        grid, bits = _parse_grid(grid_word, f"quantizer {text!r}: grid")
        if not parts:
            return Quantizer(grid, bits, estimator="clip" if (grid, bits) == ("int", 1) else "trust")

        def fail(what: str, value: str, known: tuple[str, ...]) -> ValueError:
            return ValueError(_expected_one_of(f"quantizer {text!r}: {what}", value, known))

        rotation: Any
        rotation, *parts = parts
        if rotation not in get_args(Rotation):
            raise fail("rotation", rotation, get_args(Rotation))
        sparsity: Any = "4:8" if parts[:1] == ["4:8"] else "none"
        word, *parts = (parts[1:] if sparsity == "4:8" else parts) or [""]
        estimator: Any = word.rstrip("0123456789.")
        bound = word[len(estimator) :]
        if estimator not in get_args(Estimator) or bound.count(".") > 1 or bound == ".":
            raise fail("estimator", word, get_args(Estimator))
        output: Any = "-".join(parts) or "rotated"
        if output not in get_args(Output):
            raise fail("output", output, get_args(Output))
        try:
            return Quantizer(grid, bits, rotation, sparsity, estimator, float(bound) if bound else None, output)
        except ValueError as error:
            raise ValueError(f"quantizer {text!r}: {error}") from None


def grid_bits(grid: str) -> int:
    """Bits of a code of a grid such as "int4" or "fp4"."""
    return _parse_grid(grid, "grid")[1]


def _parse_grid(word: str, what: str) -> tuple[GridKind, int]:
    names: dict[str, tuple[Any, int]] = {}
    for kind, allowed in _BITS.items():
        for bits in allowed:
            names[kind if len(allowed) == 1 else f"{kind}{bits}"] = (kind, bits)
    if word not in names:
        raise ValueError(_expected_one_of(what, word, names))
    return names[word]


QuantizerLike = str | Quantizer | None


def as_quantizer(value: QuantizerLike) -> Quantizer | None:
    """A Quantizer from itself, its string, or None / "none" (not quantized)."""
    if value is None or value == "none":
        return None
    if isinstance(value, Quantizer):
        return value
    if isinstance(value, str):
        return Quantizer.parse(value)
    raise ValueError(f"expected a quest.Quantizer, its string or None, got {type(value).__name__}")


@dataclass(frozen=True)
class LinearQuantizers:
    """What one linear layer gets: the quantizers of its weight and of its input; None leaves that side real."""

    weight: Quantizer | None
    activation: Quantizer | None


@dataclass(frozen=True)
class QuantConfig:
    """Which linear layers of a model are quantized, and how.

    weight, activation   quantizer (or its string) of the weight and of the layer's input; None or "none": real
    include, exclude     shell patterns over full module names ("blocks.*.mlp.*"): quantized is what an include pattern
                         matches and no exclude pattern does. By default embeddings and the lm_head are excluded.
    overrides            pattern -> {"weight": ..., "activation": ...}, replacing what it names for the modules it
                         matches, or None to leave them real. The first matching pattern counts, and counts before
                         include and exclude.
    """

    weight: QuantizerLike = "int4"
    activation: QuantizerLike = "int4"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("lm_head", "*.lm_head", "*embed*")
    overrides: Mapping[str, Mapping[str, QuantizerLike] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # the way to normalise a field of a frozen dataclass

        put("weight", as_quantizer(self.weight))
        put("activation", as_quantizer(self.activation))
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            put(name, (patterns,) if isinstance(patterns, str) else tuple(patterns))
        put("overrides", {pattern: self._override(pattern, value) for pattern, value in self.overrides.items()})

    @staticmethod
    def _override(pattern: str, value: Mapping[str, QuantizerLike] | str | None) -> dict[str, Quantizer | None] | None:
        if value is None or value == "none":
            return None
        if not isinstance(value, Mapping):
            raise ValueError(f"QuantConfig: overrides[{pattern!r}]: expected a mapping or None, got {value!r}")
        for key in value:
            if key not in ("weight", "activation"):
                raise ValueError(
                    _expected_one_of(f"QuantConfig: overrides[{pattern!r}]", key, ("weight", "activation"))
                )
        return {key: as_quantizer(item) for key, item in value.items()}

    def quantizers_for(self, name: str) -> LinearQuantizers | None:
        """The quantizers of the linear layer with this full module name; None where it stays as it is."""
        chosen: dict[str, Any] = {"weight": self.weight, "activation": self.activation}
        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern):
                if override is None:
                    return None
                chosen.update(override)
                break
        else:
            if not _matches(name, self.include) or _matches(name, self.exclude):
                return None
        quantizers = LinearQuantizers(**chosen)
        return None if quantizers == LinearQuantizers(None, None) else quantizers

    def to_dict(self) -> dict[str, Any]:
        """Strings, lists and dictionaries only (JSON and TOML can both hold it); `from_dict` is the inverse."""

        def words(value: Any) -> str:
            return "none" if value is None else str(value)

        return {
            "weight": words(self.weight),
            "activation": words(self.activation),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "overrides": {
                pattern: "none" if override is None else {key: words(value) for key, value in override.items()}
                for pattern, override in self.overrides.items()
            },
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> QuantConfig:
        """Inverse of `to_dict`. Raises ValueError for an unknown key, naming the nearest."""
        known = tuple(QuantConfig.__dataclass_fields__)
        for key in data:
            if key not in known:
                raise ValueError(_expected_one_of("QuantConfig: key", key, known))
        return QuantConfig(**data)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
