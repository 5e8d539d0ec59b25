"""Configuration: file and command line as one source, round trips, shorthands, recipes, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from quest.models.llama import PRESETS
from quest.quantizer import Quantizer
from quest.train.config import (
    RECIPES,
    ConfigError,
    ModelConfig,
    QuantSection,
    TrainConfig,
    dump,
    from_dict,
    load,
    parse,
    to_dict,
)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_recipes_are_the_papers(name: str, tmp_path: Path) -> None:
    config = load(name)
    assert config.model.preset == name
    assert (config.learning_rate, config.tokens) == (PRESETS[name].learning_rate, PRESETS[name].tokens)
    assert (config.sequence_length, config.batch_size) == (512, 512)
    assert config.total_steps == round(config.tokens / 512**2)
    assert config.micro_batches(8)[0] * config.micro_batches(8)[1] * 8 == 512
    assert config.data.vocab_size == 32000
    dump(config, tmp_path / "config.toml")
    assert load(tmp_path / "config.toml") == config


def test_every_recipe_is_of_a_preset() -> None:
    assert {file.stem for file in RECIPES.glob("*.toml")} == set(PRESETS) - {"tiny"}


def test_what_is_dumped_is_loaded(tmp_path: Path) -> None:
    config = from_dict(
        {
            "run_dir": "some/where",
            "steps": 7,
            "quant": {"weight": "int2", "overrides": {"blocks.0.*": "none", "*.down": {"weight": "int8"}}},
            "optim": {"betas": [0.8, 0.9], "learning_rate": 1},
            "data": {"train": ["a", "b"], "validation": ["c"]},
            "log": {"wandb_project": "p"},
        }
    )
    dump(config, tmp_path / "config.toml")
    assert load(tmp_path / "config.toml") == config
    assert config.optim.betas == (0.8, 0.9)
    assert isinstance(config.learning_rate, float)


def test_optional_fields_default_to_none() -> None:
    """TOML has no null: a field that may be None must be None when left out, or a round trip would change it."""
    assert from_dict(to_dict(TrainConfig())) == TrainConfig()


def test_command_line_overlays_file_overlays_defaults(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.toml", 'seed = 3\nsteps = 9\nmodel = "50M"\n[optim]\nlearning_rate = 0.5\nz_loss = 0.1\n'
    )
    config = parse(["--config", file, "--optim.learning-rate", "0.25", "--seed=4"])
    assert (config.seed, config.steps, config.model.preset) == (4, 9, "50M")
    assert (config.optim.learning_rate, config.optim.z_loss, config.optim.clip_norm) == (0.25, 0.1, 1.0)


def test_shorthands_in_file_and_on_command_line(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", 'model = "100M"\nquant = "int2"\ndata = "text.jsonl"\n')
    line = ["--model", "100M", "--quant=int2", "--data", "text.jsonl"]
    assert load(file) == parse(line)
    config = parse(["--config", file, "--quant.activation", "int8", "--data", "a", "b"])
    assert (config.quant.weight, config.quant.activation) == ("int2", "int8")
    assert config.data.train == ("a", "b")


def test_overrides_of_the_file_survive_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", '[quant.overrides]\n"blocks.0.*" = "none"\n"*.down" = {weight = "int8"}\n')
    quant = parse(["--config", file, "--quant", "int2"]).quant.build()
    assert quant is not None
    assert quant.quantizers_for("blocks.0.mlp.down") is None
    down = quant.quantizers_for("blocks.1.mlp.down")
    assert down is not None
    assert (down.weight, down.activation) == (Quantizer.parse("int8"), Quantizer.parse("int2"))


def test_none_is_no_quantization() -> None:
    assert QuantSection("none", "none").build() is None
    assert QuantSection("int4", "none").build() is not None
    assert QuantSection("none", "none", overrides={"*.down": {"weight": "int8"}}).build() is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlearning_rat = 1.0", r"unknown key 'optim.learning_rat'; did you mean 'optim.learning_rate'\?"),
        ("sede = 1", r"unknown key 'sede'; did you mean 'seed'\?"),
        ("[data]\ntrian = []", r"did you mean 'data.train'\?"),
        ("seed = 1.5", "seed: expected an integer, got 1.5"),
        ("seed = true", "seed: expected an integer, got True"),
        ("compile = 1", "compile: expected true or false, got 1"),
        ("steps = 'ten'", "steps: expected an integer, got 'ten'"),
        ("optim = 3", "optim: expected a table, got 3"),
        ("model = '31M'", r"model.preset: expected one of tiny, .*did you mean '30M'\?"),
        ("quant = 'int44'", "quant: quantizer 'int44'.*did you mean 'int4'"),
        ("[quant.overrides]\n'*' = {wieght = 'int4'}", "did you mean 'weight'"),
        ("[optim]\nbetas = [0.9]", "optim.betas: expected"),
        ("[optim]\nbetas = [0.9, 1.0]", "optim.betas: expected two numbers"),
        ("steps = 3\ntokens = 4", "expected only one of steps and tokens, got 3 and 4"),
        ("batch_size = 0", "batch_size: expected 1 or more, got 0"),
        ("[optim]\nname = 'schedule_free'", 'schedule.name: expected "constant" with optim.name "schedule_free"'),
        ("seed = ", "not valid TOML"),
    ],
)
def test_what_is_said_of_mistakes_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(write(tmp_path / "c.toml", text))
    assert "c.toml" in str(caught.value)


def test_no_such_file_names_the_recipes() -> None:
    with pytest.raises(ConfigError, match=r"config nowhere: .*30M"):
        parse(["--config", "nowhere"])


def test_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--optim.learning-rat", "3"])
    assert caught.value.code == 2
    assert "--optim.learning-rate" in capsys.readouterr().err


def test_batches_that_do_not_divide() -> None:
    config = TrainConfig(batch_size=12, micro_batch_size=4)
    assert config.micro_batches(1) == (3, 4)
    assert config.micro_batches(3) == (1, 4)
    with pytest.raises(ConfigError, match="expected a multiple of micro_batch_size × processes = 4 × 2, got 12"):
        config.micro_batches(2)
    with pytest.raises(ConfigError, match="batch_size"):
        TrainConfig(batch_size=2).micro_batches(3)


def test_vocabulary_of_the_model() -> None:
    assert ModelConfig().build(1000, 64).vocab_size == 1000
    assert ModelConfig(vocab_size=1024).build(1000, 64).vocab_size == 1024
    with pytest.raises(ConfigError, match=r"model.vocab_size: expected at least the tokenizer's 1000 ids, got 512"):
        ModelConfig(vocab_size=512).build(1000, 64)


def test_length_of_a_run() -> None:
    assert TrainConfig(steps=5).total_steps == 5
    assert TrainConfig(tokens=10_000, batch_size=4, sequence_length=100).total_steps == 25
    assert TrainConfig(model=ModelConfig("30M"), batch_size=512).total_steps == 11444
