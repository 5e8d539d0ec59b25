"""The configuration of a training run: typed dataclasses that a TOML file and the command line both fill.

    quest train --config recipe.toml --optim.learning-rate 1e-3

The file overlays the defaults and the command line overlays the file. Names are the same in both: `[optim]` with
`learning_rate` is `--optim.learning-rate`. Three sections have a shorthand for what is nearly always meant
(`SHORTHANDS`): `model = "30M"` or `--model 30M` is the preset, `quant = "int4"` the quantizer of weights and
activations, `data = "books.jsonl"` the training text. `dump` writes a configuration so that `load` reads it back
equal; every run keeps that file.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
import tyro

from quest.models.files import write_text
from quest.models.llama import PRESETS, LlamaConfig
from quest.precision import Precision
from quest.quantizer import QuantConfig
from quest.train.data import DataConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

RECIPES = Path(__file__).parent / "recipes"

# section -> the fields that a plain value in its place fills
SHORTHANDS: dict[str, tuple[str, ...]] = {"model": ("preset",), "quant": ("weight", "activation"), "data": ("train",)}


class ConfigError(ValueError):
    """A configuration that cannot be meant: the message names the key, what was expected, what came and a remedy."""


def _require(condition: bool, key: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got}")


@dataclass(frozen=True)
class ModelConfig:
    """Which Llama. What is left out comes from the preset."""

    preset: Literal["tiny", "30M", "50M", "100M", "200M", "430M", "800M", "1.6B"] = "tiny"
    """Size, with its learning rate and its tokens (100 per parameter)."""
    vocab_size: int | None = None
    """Rows of embedding and head; the tokenizer's size when left out."""
    n_layers: int | None = None
    n_heads: int | None = None
    d_model: int | None = None
    n_kv_heads: int | None = None
    d_hidden: int | None = None
    rope_theta: float = 1e4

    def build(self, tokenizer_size: int, sequence_length: int) -> LlamaConfig:
        """The model's shape for a tokenizer of `tokenizer_size` ids.

        Raises:
            ConfigError: when the tokenizer has ids that the model has no row for.
        """
        vocab_size = tokenizer_size if self.vocab_size is None else self.vocab_size
        if vocab_size < tokenizer_size:
            raise ConfigError(
                f"model.vocab_size: expected at least the tokenizer's {tokenizer_size} ids, got {vocab_size}; "
                f"raise it, leave it out, or use a smaller tokenizer"
            )
        preset = PRESETS[self.preset]
        return LlamaConfig(
            vocab_size,
            self.n_layers or preset.n_layers,
            self.n_heads or preset.n_heads,
            self.d_model or preset.d_model,
            self.n_kv_heads,
            self.d_hidden,
            rope_theta=self.rope_theta,
            max_seq_len=sequence_length,
        )


@dataclass(frozen=True)
class QuantSection:
    """How linear layers are quantized; "none" trains without."""

    weight: str = "int4"
    """Quantizer of the weights: a grid such as "int4", or in full "int4-hadamard-trust"."""
    activation: str = "int4"
    """Quantizer of the layers' inputs."""
    include: tuple[str, ...] = QuantConfig.include
    """Name patterns of the layers that are quantized."""
    exclude: tuple[str, ...] = QuantConfig.exclude
    """Name patterns of layers that are left alone."""
    overrides: Annotated[dict[str, dict[str, str] | str], tyro.conf.Suppress] = field(default_factory=dict)
    """In the file: name pattern -> {weight = …, activation = …} or "none"; the first match counts."""

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> QuantConfig | None:
        """What `quest.prepare` takes; None when nothing would be quantized."""
        try:
            config = QuantConfig.from_dict(dataclasses.asdict(self))
        except ValueError as error:
            raise ConfigError(f"quant: {error}") from None
        return None if config.weight is None and config.activation is None and not config.overrides else config


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Defaults are the paper's."""

    name: Literal["adamw", "sgd", "schedule_free"] = "adamw"
    """`schedule_free` is AdamW without a decaying schedule (arXiv 2405.15682; package schedulefree)."""
    learning_rate: float | None = None
    """Peak learning rate; the preset's when left out."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    eps: float = 1e-8
    """Of AdamW."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.1
    """On the weights of linear layers only."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    z_loss: float = 0.0
    """Weight of mean(log² Σ exp(logits)), which keeps logits from drifting (PaLM uses 1e-4)."""

    def __post_init__(self) -> None:
        _require(self.learning_rate is None or self.learning_rate > 0, "optim.learning_rate", "> 0", self.learning_rate)
        _require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", "two numbers in [0, 1)", self.betas)
        for name in ("weight_decay", "clip_norm", "z_loss"):
            _require(getattr(self, name) >= 0, f"optim.{name}", "0 or more", getattr(self, name))


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, as shares of its steps and factors of the peak."""

    name: Literal["cosine", "linear", "wsd", "infinite_cosine", "constant"] = "cosine"
    """After the warm-up: `cosine` or `linear` to the final factor; `wsd`, constant and then a short decay;
    `infinite_cosine`, a cosine to the final factor and constant from there; `constant`."""
    warmup: float = 0.1
    """Share of the steps that warm up, linearly."""
    start_factor: float = 0.01
    """Where the warm-up starts."""
    final_factor: float = 0.1
    """Where the decay ends."""
    tail: float = 0.2
    """Last share of the steps: the decay of `wsd`, the constant part of `infinite_cosine`."""
    decay: Literal["linear", "cosine", "mirror_cosine", "exp", "square", "sqrt"] = "linear"
    """Shape of the decay of `wsd`; `sqrt` is 1 − √t."""

    def __post_init__(self) -> None:
        for name in ("warmup", "tail"):
            _require(0 <= getattr(self, name) <= 1, f"schedule.{name}", "a share in [0, 1]", getattr(self, name))
        for name in ("start_factor", "final_factor"):
            _require(getattr(self, name) >= 0, f"schedule.{name}", "0 or more", getattr(self, name))
        _require(
            self.name not in ("wsd", "infinite_cosine") or self.warmup + self.tail <= 1,
            "schedule.tail",
            f"at most {1 - self.warmup:g} beside a warm-up of {self.warmup:g}",
            self.tail,
        )
        _require(
            self.decay != "exp" or self.final_factor > 0,
            "schedule.final_factor",
            "> 0 for decay exp",
            self.final_factor,
        )


@dataclass(frozen=True)
class AverageConfig:
    """Averages of the weights, which then are what is evaluated and exported."""

    name: Literal["none", "ema", "uniform"] = "none"
    decay: float = 0.999
    """Of `ema`: average ← decay · average + (1 − decay) · weights; less of a young average, as it starts."""
    every: int = 1
    """Steps between the weights that enter."""
    start: float = 0.0
    """Share of the run after which the first weights enter."""

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, "average.decay", "a number in [0, 1)", self.decay)
        _require(self.every >= 1, "average.every", "1 or more", self.every)
        _require(0 <= self.start < 1, "average.start", "a share in [0, 1)", self.start)


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss on the validation text."""

    every: int = 250
    """Steps between evaluations; the end of the run has one anyway. 0: none at all."""
    sequences: int = 512
    """The most sequences that one evaluation reads, always the same ones; 0 reads all."""

    def __post_init__(self) -> None:
        for name in ("every", "sequences"):
            _require(getattr(self, name) >= 0, f"evaluation.{name}", "0 or more", getattr(self, name))


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept to resume from."""

    every: int = 500
    """Steps between checkpoints; the end of the run and a signal save one anyway."""
    keep_last: int = 2
    """How many of the latest stay."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps stay for good; 0: none."""
    asynchronous: bool = False
    """Write in the background, from a copy of the state in host memory."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "checkpoint.every", "1 or more", self.every)
        _require(self.keep_last >= 1, "checkpoint.keep_last", "1 or more", self.keep_last)
        _require(self.keep_every >= 0, "checkpoint.keep_every", "0 or more", self.keep_every)


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go beside metrics.jsonl."""

    every: int = 10
    """Steps between records."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """`auto` writes event files when the tensorboard package is installed."""
    wandb_project: str | None = None
    """Also report to this project of Weights & Biases (package wandb)."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "log.every", "1 or more", self.every)


@dataclass(frozen=True)
class DiagnoseConfig:
    """Per quantized layer: share of masked weights, error of the quantizer, gradient against full precision."""

    every: int = 0
    """Steps between diagnoses, each the price of two more micro-batches; 0: none."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "diagnose.every", "0 or more", self.every)


@dataclass(frozen=True)
class TrainConfig:
    """A training run. What is left out comes from the preset or is the paper's."""

    run_dir: Path = Path("runs/quest")
    """Everything that the run writes goes here."""
    model: ModelConfig = ModelConfig()
    quant: QuantSection = field(default_factory=QuantSection)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    average: AverageConfig = AverageConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    diagnose: DiagnoseConfig = DiagnoseConfig()
    sequence_length: int = 512
    """Tokens of one sequence."""
    batch_size: int = 32
    """Sequences of one optimizer step, over all processes."""
    micro_batch_size: int | None = None
    """Sequences that one process runs at once; left out, all its share of the batch. Fewer: gradients accumulate."""
    steps: int | None = None
    """Optimizer steps; or give tokens."""
    tokens: int | None = None
    """Tokens to train on; the preset's when steps is left out too."""
    max_minutes: float | None = None
    """Stop after so long with a checkpoint, as a job's time limit asks for; left out, only the steps count."""
    seed: int = 0
    """Of the weights' initialisation and the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "auto"
    """Of the products; weights and optimizer are float32. `auto`: bfloat16 on CUDA, float32 on the CPU."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Sum in a fixed order on a GPU too, so that a run can be repeated and a resumed one is as if it had never stopped.
    Slower in the gradient of attention."""
    resume: str = "none"
    """`auto` goes on from the run's latest checkpoint if there is one; or a checkpoint's path; `none` starts anew."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size", "micro_batch_size", "steps", "tokens"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "1 or more", value)
        if self.max_minutes is not None:
            _require(self.max_minutes > 0, "max_minutes", "a positive number", self.max_minutes)
        if self.steps is not None and self.tokens is not None:
            raise ConfigError(f"tokens: expected only one of steps and tokens, got {self.steps} and {self.tokens}")
        if self.optim.name == "schedule_free" and self.schedule.name != "constant":
            raise ConfigError(
                f'schedule.name: expected "constant" with optim.name "schedule_free", got "{self.schedule.name}"; '
                f"the averaging of that optimizer takes the place of a decay"
            )

    @property
    def learning_rate(self) -> float:
        """Peak learning rate: the configured one or the preset's."""
        given = self.optim.learning_rate
        return PRESETS[self.model.preset].learning_rate if given is None else given

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        tokens = PRESETS[self.model.preset].tokens if self.tokens is None else self.tokens
        return max(1, round(tokens / (self.batch_size * self.sequence_length)))

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """How each of `world_size` processes splits its share of the batch: (how many, sequences in each).

        Raises:
            ConfigError: when the batch does not divide.
        """
        size = self.micro_batch_size or self.batch_size // world_size
        if size == 0 or self.batch_size % (size * world_size):
            raise ConfigError(
                f"batch_size: expected a multiple of micro_batch_size × processes = {size} × {world_size}, "
                f"got {self.batch_size}"
            )
        return self.batch_size // (size * world_size), size


def parse(args: Sequence[str]) -> TrainConfig:
    """The configuration that a command line asks for, `--config FILE` included.

    FILE is a path or the name of a recipe ("30M"). Wrong options end the program as command lines do (exit code 2,
    after a message that names the nearest option).

    Raises:
        ConfigError: for what the file says wrongly, or values that do not go together.
    """
    rest: list[str] = []
    base = TrainConfig()
    for option, values in _options(args):
        section = option.removeprefix("--")
        if option == "--config":
            if len(values) != 1:
                raise ConfigError(f"--config: expected one file or recipe, got {len(values)}")
            base = load(values[0])
        elif option.startswith("--") and section in SHORTHANDS:
            for leaf in SHORTHANDS[section]:
                rest += [f"--{section}.{leaf}", *values]
        else:
            rest += [option, *values]
    return tyro.cli(TrainConfig, prog="quest train", args=rest, default=base)


def _options(args: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The command line as options, each with the values that follow it or stand behind its "="."""
    options: list[tuple[str, list[str]]] = []
    for argument in args:
        if argument.startswith("--") or not options:
            option, equals, value = argument.partition("=")
            options.append((option, [value] if equals else []))
        else:
            options[-1][1].append(argument)
    return options


def load(path: str | Path) -> TrainConfig:
    """The configuration in a TOML file, over the defaults.

    Args:
        path: a file, or the name of a recipe in `RECIPES`.

    Raises:
        ConfigError: when there is no such file, it is no TOML, or it has a key or value that does not fit.
    """
    file = Path(path)
    if not file.exists() and (RECIPES / f"{path}.toml").exists():
        file = RECIPES / f"{path}.toml"
    try:
        with file.open("rb") as stream:
            data = tomllib.load(stream)
    except OSError as error:
        names = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise ConfigError(f"config {path}: {error.strerror}; expected a TOML file or a recipe ({names})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config {file}: not valid TOML: {error}") from None
    try:
        return from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"config {file}: {error}") from None


def dump(config: TrainConfig, path: Path) -> None:
    """Writes every field, defaults too, so that the file means the same when defaults change."""
    write_text(path, tomli_w.dumps(to_dict(config)))


def from_dict(data: dict[str, Any]) -> TrainConfig:
    """Inverse of `to_dict`; what is left out is the default. Raises ConfigError."""
    return _structure(TrainConfig, data, "")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested dictionaries of numbers, strings and lists. TOML has no null: None, always a default here, is left out."""
    plain: dict[str, Any] = _plain(config)
    return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((item.name, getattr(value, item.name)) for item in dataclasses.fields(value))
        return {name: _plain(item) for name, item in pairs if item is not None}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _structure(kind: type[T], value: Any, key: str) -> T:
    """`value`, as TOML or JSON gives it, as a `kind`; ConfigError names `key`."""
    return typing.cast(T, _convert(kind, value, key))


def _convert(kind: Any, value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _convert(arguments[0], value, key)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_section(kind, value, key)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, key)
    if origin is Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), [str(item) for item in arguments], n=1, cutoff=0)
            choices = ", ".join(str(item) for item in arguments)
            raise ConfigError(f"{key}: expected one of {choices}, got {value!r}; did you mean {near[0]!r}?")
        return value
    if origin is tuple and arguments[-1] is Ellipsis and isinstance(value, str):
        value = [value]
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], item, key) for item in value)
        if len(arguments) == len(value):
            return tuple(_convert(part, item, key) for part, item in zip(arguments, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {name: _convert(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # An exact type: isinstance would take true for the integer 1.
    if kind is type(value):
        return value
    raise ConfigError(f"{key}: expected {_words(kind)}, got {value!r}")


def _convert_section(kind: type, value: Any, key: str) -> Any:
    if key in SHORTHANDS and not isinstance(value, dict):
        value = dict.fromkeys(SHORTHANDS[key], value)
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: expected a table, got {value!r}")
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {}
    for name, item in value.items():
        path = f"{key}.{name}" if key else name
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1, cutoff=0)[0]
            raise ConfigError(f"unknown key {path!r}; did you mean {f'{key}.{near}' if key else near!r}?")
        fields[name] = _convert(hints[name], item, path)
    return kind(**fields)


def _convert_union(arms: tuple[Any, ...], value: Any, key: str) -> Any:
    for arm in arms:
        try:
            return _convert(arm, value, key)
        except ConfigError:
            continue
    raise ConfigError(
        f"{key}: expected {' or '.join(_words(arm) for arm in arms if arm is not type(None))}, got {value!r}"
    )


def _words(kind: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path"}
    return names.get(kind, str(kind))
