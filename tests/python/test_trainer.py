"""The trainer, from configuration to files: it learns, stops, resumes to the bit, and says what is wrong."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import quest
from quest.models.tokenizer import Tokenizer
from quest.train import trainer as trainer_module
from quest.train.checkpoint import CheckpointError, load_model, read_state, read_tensors
from quest.train.config import ConfigError, TrainConfig, dump, from_dict, load
from quest.train.metrics import MetricsLog, flops_per_token, named_peak_flops, read_records
from quest.train.plot import plot_losses
from quest.train.trainer import StopRequest, TrainingError, TrainResult, losses_of, train

SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards box with jolly liquor"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A data section: sentences of few words, which a small model learns in a few steps."""
    folder = tmp_path_factory.mktemp("data")
    chooser = random.Random(0)
    documents = [" ".join(chooser.choices(SENTENCE.split(), k=60)) for _ in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return {
        "train": [str(folder / "text.jsonl")],
        "validation_fraction": 0.1,
        "vocab_size": 300,
        "cache_dir": str(folder / "cache"),
    }


@pytest.fixture
def configured(data: dict[str, Any], tmp_path: Path) -> functools.partial[TrainConfig]:
    """Makes a configuration of a small run; sections and keys can be given."""

    def make(run: str = "run", **sections: Any) -> TrainConfig:
        base: dict[str, Any] = {
            "run_dir": str(tmp_path / run),
            "model": {"n_layers": 1, "n_heads": 2, "d_model": 32, "d_hidden": 64},
            "data": data,
            "sequence_length": 32,
            "batch_size": 4,
            "steps": 8,
            "device": "cpu",
            "log": {"every": 1, "tensorboard": "off"},
            "evaluation": {"every": 4, "sequences": 8},
            "checkpoint": {"every": 4, "keep_last": 10},
        }
        for name, value in sections.items():
            base[name] = base.get(name, {}) | value if isinstance(value, dict) else value
        return from_dict(base)

    return functools.partial(make)


@pytest.fixture(params=[1, 10])
def log_every(request: pytest.FixtureRequest) -> int:
    """With and without a record before a run of fewer steps ends; only one has losses to plot."""
    return int(request.param)


@pytest.fixture(autouse=True)
def without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than most of these runs; tests marked so by their argument `plots` draw."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(trainer_module, "plot_losses", lambda runs, output: None)


@pytest.fixture
def plots() -> None:
    """Asks for the plot that a run draws."""


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_records(run_dir) if "loss" in record]


def final_tensors(result: TrainResult) -> dict[str, torch.Tensor]:
    return read_tensors(result.run_dir / "checkpoints" / f"step-{result.step:08d}")


# What a run does and leaves.


def test_a_run_learns_and_leaves_its_files(configured: Any, plots: None, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(configured(steps=60, evaluation={"every": 30}, checkpoint={"every": 50}))
    run = result.run_dir
    assert result.finished
    assert result.step == 60
    curve = losses(run)
    assert [step for step, _ in curve] == list(range(1, 61))
    assert curve[0][1] == pytest.approx(5.7, abs=0.15)  # ln 300: nothing is known before
    assert curve[-1][1] < 4.5
    assert result.loss == curve[-1][1]
    evaluations = [record for record in read_records(run) if "validation_loss" in record]
    assert [record["step"] for record in evaluations] == [30, 60]
    assert evaluations[1]["validation_loss"] == result.validation_loss < evaluations[0]["validation_loss"]
    assert load(run / "config.toml") == configured(steps=60, evaluation={"every": 30}, checkpoint={"every": 50})
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"]["version"] == torch.__version__
    assert environment["quest"]["version"] == quest.__version__
    assert (environment["device"], environment["processes"]) == ("cpu", 1)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000050", "step-00000060"]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step 7/60  loss ") for line in lines) == 1
    assert any("int4-hadamard-trust weights" in line for line in lines)


def test_the_loss_is_the_models_on_the_data(configured: Any) -> None:
    """The first step's loss, computed again by hand from the first checkpoint's configuration."""
    config = configured(steps=1, quant="none", optim={"learning_rate": 1e-3}, micro_batch_size=2)
    train(config)
    model, tokenizer, _ = load_model(config.run_dir)
    assert isinstance(tokenizer, Tokenizer)
    torch.manual_seed(config.seed)
    fresh = type(model)(model.config)
    batches = trainer_module.build_data(config.data, tokenizer, 32, 4, config.seed)
    with torch.no_grad():
        expected, _ = losses_of(fresh, next(batches.train), 0.0)
    batches.close()
    assert losses(config.run_dir)[0][1] == pytest.approx(expected.item(), abs=1e-6)


def test_accumulation_is_one_large_batch(configured: Any) -> None:
    """Equal but for the order of float32 sums; without quantization, whose codes may jump at a rounding."""
    whole = train(configured("whole", quant="none"))
    parts = train(configured("parts", quant="none", micro_batch_size=1))
    for (_, a), (_, b) in zip(losses(whole.run_dir), losses(parts.run_dir), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_weights_are_quantized_once_a_step(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    original = quest.QuestLinear.weight_codes
    monkeypatch.setattr(quest.QuestLinear, "weight_codes", lambda layer: counted.append(layer) or original(layer))
    train(configured(steps=3, micro_batch_size=1, evaluation={"every": 0}))
    assert len(counted) == 3 * 4  # four layers, however many micro-batches


def test_z_loss_adds_the_squared_log_partition() -> None:
    logits = torch.randn(2, 5, 7)
    tokens = torch.randint(7, (2, 6))
    cross_entropy, objective = losses_of(lambda _: logits, tokens, 0.25)
    partition = logits.exp().sum(-1).log()
    torch.testing.assert_close(objective, cross_entropy + 0.25 * (partition**2).mean())
    picked = logits.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(cross_entropy, (partition - picked).mean())


@pytest.mark.parametrize(
    "sections",
    [
        {"optim": {"name": "sgd", "learning_rate": 0.5}},
        {"optim": {"name": "schedule_free"}, "schedule": {"name": "constant"}},
        {"average": {"name": "ema"}},
        {"average": {"name": "uniform", "start": 0.2}},
        {"schedule": {"name": "wsd", "decay": "sqrt"}},
        {"schedule": {"name": "infinite_cosine"}},
        {"optim": {"z_loss": 1e-3, "clip_norm": 0.0}},
        {"quant": "none"},
        {"quant": {"weight": "int2", "activation": "none"}},
        {"quant": {"overrides": {"*.down": "none", "*.qkv": {"weight": "fp4"}}}},
        {"precision": "bfloat16", "micro_batch_size": 2},
        {"checkpoint": {"asynchronous": True}},
    ],
    ids=lambda sections: "-".join(sections),
)
def test_every_option_trains_and_resumes_to_the_bit(sections: dict[str, Any], configured: Any) -> None:
    straight = train(configured("straight", **sections))
    assert losses(straight.run_dir)[-1][1] < losses(straight.run_dir)[0][1]
    middle = straight.run_dir / "checkpoints" / "step-00000004"
    resumed = train(configured("resumed", **sections, resume=str(middle)))
    assert losses(resumed.run_dir) == losses(straight.run_dir)[4:]
    assert resumed.validation_loss == straight.validation_loss
    expected = final_tensors(straight)
    for name, tensor in final_tensors(resumed).items():
        assert torch.equal(tensor, expected[name]), name


def test_resumed_losses_are_those_of_the_run_never_stopped(configured: Any, device: torch.device) -> None:
    """On a GPU too, in bfloat16."""
    sections = {
        "device": device.type,
        "precision": "auto",
        "deterministic": True,
        "average": {"name": "ema"},
        "checkpoint": {"asynchronous": True},
    }
    straight = train(configured("straight", **sections))
    middle = straight.run_dir / "checkpoints" / "step-00000004"
    resumed = train(configured("resumed", **sections, resume=str(middle)))
    for (step, a), (other, b) in zip(losses(resumed.run_dir), losses(straight.run_dir)[4:], strict=True):
        assert step == other
        assert a == pytest.approx(b, rel=1e-6)
    assert resumed.validation_loss == pytest.approx(straight.validation_loss, rel=1e-6)
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_holds_while_it_trains(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(*arguments: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return losses_of(*arguments)

    monkeypatch.setattr(trainer_module, "losses_of", look)
    train(configured("usual", steps=1))
    train(configured("deterministic", steps=1, deterministic=True))
    assert set(seen[: len(seen) // 2]) == {False}
    assert set(seen[len(seen) // 2 :]) == {True}
    assert not torch.are_deterministic_algorithms_enabled()


def test_overrides_reach_the_layers(configured: Any) -> None:
    overrides = {"*.down": "none", "*.qkv": {"weight": "fp4"}}
    result = train(configured(steps=1, quant={"overrides": overrides}))
    model, _, _ = load_model(result.run_dir)
    block = model.get_submodule("blocks.0")
    assert type(block.mlp.down) is torch.nn.Linear
    assert str(block.attention.qkv.weight_quantizer) == "fp4-hadamard-trust"
    assert str(block.attention.qkv.activation_quantizer) == "int4-hadamard-trust"
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("average", ["none", "ema"])
def test_the_loaded_model_has_the_reported_loss(average: str, configured: Any) -> None:
    config = configured(average={"name": average})
    result = train(config)
    model, tokenizer, loaded = load_model(result.run_dir)
    assert loaded == config
    assert not model.training
    batches = trainer_module.build_data(config.data, tokenizer, 32, 8, config.seed)
    with torch.no_grad():
        loss, _ = losses_of(model, next(iter(batches.validation())), 0.0)
    batches.close()
    assert loss.item() == pytest.approx(result.validation_loss, abs=1e-5)


def test_diagnostics_are_recorded(configured: Any) -> None:
    result = train(configured(diagnose={"every": 4}))
    plain = train(configured("plain"))
    reports = [record["diagnostics"] for record in read_records(result.run_dir) if "diagnostics" in record]
    assert len(reports) == 2
    assert len(reports[0]) == 4
    assert 0 <= reports[1]["blocks.0.mlp.down"]["still_masked"] <= 1
    assert losses(result.run_dir) == losses(plain.run_dir)  # looking changes nothing
    # A resumed run compares with the masks of before.
    middle = result.run_dir / "checkpoints" / "step-00000004"
    resumed = train(configured("resumed", diagnose={"every": 4}, resume=str(middle)))
    assert [r["diagnostics"] for r in read_records(resumed.run_dir) if "diagnostics" in r] == reports[1:]


def test_compiled_without_a_break(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tracing of torch.compile without its code generation, which takes half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    compiled = train(configured("compiled", steps=3, compile=True, micro_batch_size=2, optim={"z_loss": 1e-4}))
    eager = train(configured("eager", steps=3, micro_batch_size=2, optim={"z_loss": 1e-4}))
    for (_, a), (_, b) in zip(losses(compiled.run_dir), losses(eager.run_dir), strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_compiles_once(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen codes are other tensors at each step, and evaluation, diagnosis and a smaller last validation batch come
    between: none of it compiles anything again."""
    compiled = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting, fullgraph=True))
    train(
        configured(
            compile=True,
            micro_batch_size=2,
            average={"name": "ema"},
            evaluation={"every": 2, "sequences": 3},
            diagnose={"every": 2},
        )
    )
    assert len(compiled) == 1


def test_the_first_step_is_no_measure_of_the_rate(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = trainer_module.Trainer._train_step
    seconds: list[float] = []

    def slow_at_first(trainer: trainer_module.Trainer) -> dict[str, Any]:
        begin = time.perf_counter()
        time.sleep(1.0 if trainer.step == 0 else 0.0)
        record = step(trainer)
        seconds.append(time.perf_counter() - begin)
        return record

    monkeypatch.setattr(trainer_module.Trainer, "_train_step", slow_at_first)
    result = train(configured(log={"every": 4}, evaluation={"every": 0}))
    rate = read_records(result.run_dir)[0]["tokens_per_second"]
    assert rate > 4 * 4 * 32 / (
        0.5 + 4 / 3 * sum(seconds[1:4])
    )  # as if the first had been like the others, not a second more


def test_memory_is_pinned_for_a_gpu_alone(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on the CPU pins none, whether the machine has a GPU or not; one on a GPU asks for it by `pin_memory`."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    config = configured(steps=1, evaluation={"every": 0})
    train(config)
    assert not pinned
    data = trainer_module.build_data(config.data, load_model(config.run_dir)[1], 32, 4, 0, pin_memory=True)
    next(data.train)
    data.close()
    assert pinned


def test_two_processes_train_as_one(configured: Any, tmp_path: Path) -> None:
    """Gradients averaged between processes: one large batch again, equal but for the order of float32 sums."""
    alone = train(configured("alone", quant="none", micro_batch_size=1))
    dump(configured("pair", quant="none", micro_batch_size=1), tmp_path / "pair.toml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "quest", "train", "--config", str(tmp_path / "pair.toml")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 3/8  loss") == 1  # one process reports
    for (_, a), (_, b) in zip(losses(alone.run_dir), losses(tmp_path / "pair"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    mine, theirs = (
        [record["validation_loss"] for record in read_records(run) if "validation_loss" in record]
        for run in (alone.run_dir, tmp_path / "pair")
    )
    assert mine == pytest.approx(theirs, abs=1e-4)
    # The checkpoint of two processes is resumed by one.
    shutil.rmtree(tmp_path / "pair" / "checkpoints" / "step-00000008")
    train(configured("pair", quant="none", micro_batch_size=1, resume="auto"))
    for (_, a), (_, b) in zip(losses(alone.run_dir), losses(tmp_path / "pair"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


# Stopping and going on.


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that tests start: sums of other numbers of threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def environment() -> dict[str, str]:
    """One thread for each process, as the tests share few cores, and the package under test."""
    paths = [str(Path(quest.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def start(config_file: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "quest", "train", "--config", str(config_file), *options]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        records = read_records(run_dir)
        if records and records[-1]["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1]}")


def test_killed_anywhere_the_loss_curve_is_that_of_a_run_never_stopped(
    configured: Any, one_thread: None, tmp_path: Path
) -> None:
    sections = {
        "steps": 120,
        "micro_batch_size": 2,
        "average": {"name": "ema"},
        "evaluation": {"every": 10},
        "checkpoint": {"every": 3, "keep_last": 2, "asynchronous": True},
    }
    dump(configured("killed", **sections), tmp_path / "killed.toml")
    chooser = random.Random()
    for kill in range(5):
        process = start(tmp_path / "killed.toml", "--resume", "auto")
        wait_for_step(process, tmp_path / "killed", 20 * kill + chooser.randint(1, 20))
        time.sleep(chooser.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = start(tmp_path / "killed.toml", "--resume", "auto")
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    train(configured("straight", **sections))
    assert len(losses(tmp_path / "killed")) == 120
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()) == [
        "step-00000117",
        "step-00000120",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run(number: signal.Signals, configured: Any, tmp_path: Path) -> None:
    def interrupt() -> None:
        while len(read_records(tmp_path / "run")) < 3:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=interrupt, daemon=True)
    sender.start()
    result = train(configured(steps=100_000, checkpoint={"every": 100_000}, evaluation={"every": 0}))
    sender.join()
    assert result.signal == number
    assert not result.finished
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert read_state(checkpoint)["step"] == result.step == losses(tmp_path / "run")[-1][0]
    assert train(configured(steps=result.step + 1, resume="auto")).finished


def test_a_time_limit_saves_and_ends_the_run(configured: Any, tmp_path: Path) -> None:
    result = train(configured(steps=100_000, max_minutes=0.01, checkpoint={"every": 100_000}))
    assert not result.finished
    assert result.signal is None
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert read_state(checkpoint)["step"] == result.step


def test_an_interrupt_before_the_first_step_aborts(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it reads and tokenizes there is nothing to save."""
    monkeypatch.setattr(trainer_module, "build_data", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(configured())


def test_a_second_interrupt_aborts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(None) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.made
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_auto_starts_where_there_is_nothing(configured: Any) -> None:
    assert train(configured(resume="auto", steps=2)).step == 2


def test_a_finished_run_resumed_has_nothing_to_do(configured: Any) -> None:
    first = train(configured())
    again = train(configured(resume="auto"))
    assert (again.step, again.finished) == (8, True)
    assert len(losses(first.run_dir)) == 8


def test_a_new_run_does_not_touch_an_old_one(configured: Any) -> None:
    result = train(configured())
    with pytest.raises(ConfigError, match="has step-00000008; go on from there with --resume auto"):
        train(configured())
    with pytest.raises(ConfigError, match="has step-00000008"):
        train(configured(resume=str(result.run_dir / "checkpoints" / "step-00000004")))
    assert len(losses(result.run_dir)) == 8


# What is said when things are wrong.


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"n_layers": 2, "n_heads": 4}}, "its model.n_layers is 1, this run's is 2"),
        ({"quant": "int8"}, "its quant.weight is int4-hadamard-trust, this run's is int8-hadamard-trust"),
        ({"quant": "none"}, "its quant is int4-hadamard-trust, this run's is None"),
        ({"optim": {"name": "sgd"}}, "the optimizer was adamw and is now sgd"),
        ({"average": {"name": "ema"}}, "the average was none and is now ema"),
    ],
)
def test_resuming_with_something_else(sections: dict[str, Any], message: str, configured: Any) -> None:
    result = train(configured(steps=2))
    before = losses(result.run_dir)
    with pytest.raises(CheckpointError, match=message):
        train(configured(steps=4, resume="auto", **sections))
    assert losses(result.run_dir) == before


def test_resuming_with_other_data(configured: Any) -> None:
    train(configured(steps=2))
    with pytest.raises(ValueError, match="seed was 0 and is 1 now"):
        train(configured(steps=4, resume="auto", seed=1))


def test_resuming_from_a_damaged_checkpoint(configured: Any) -> None:
    result = train(configured())
    file = result.run_dir / "checkpoints" / "step-00000008" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-00000008 is damaged: __0_0.distcp .*to go on from step-00000004"):
        train(configured(resume="auto", steps=9))


def test_a_loss_that_is_not_finite(configured: Any, plots: None, log_every: int) -> None:
    config = configured(
        optim={"name": "sgd", "learning_rate": 1e30, "clip_norm": 0.0},
        checkpoint={"every": 1},
        log={"every": log_every},
    )
    with pytest.raises(
        TrainingError, match=r"is (nan|inf) at step \d+; no weight was changed .* is .*step-0"
    ) as caught:
        train(config)
    step = int(str(caught.value).split("at step ")[1].split(";")[0])
    assert step > 1
    before = config.run_dir / "checkpoints" / f"step-{step - 1:08d}"
    assert str(before) in str(caught.value)
    assert all(tensor.isfinite().all() for tensor in read_tensors(before, ("model/",)).values())
    assert [done for done, _ in losses(config.run_dir)] == [done for done in range(1, step) if done % log_every == 0]
    assert (config.run_dir / "loss.png").exists() == (log_every == 1)


NO_SPACE = OSError(28, "No space left on device")


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(
    configured: Any, plots: None, log_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = trainer_module.checkpoints.CheckpointStore.save

    def full_at_step_eight(store: Any, step: int, tensors: Any, state: Any) -> None:
        if step == 8:
            monkeypatch.setattr(os, "fsync", fail)
        save(store, step, tensors, state)

    def fail(_: int) -> None:
        raise NO_SPACE

    monkeypatch.setattr(trainer_module.checkpoints.CheckpointStore, "save", full_at_step_eight)
    with pytest.raises(CheckpointError, match=r"step-00000008 .*No space left on device.*last good one is .*step-0+4"):
        train(configured(log={"every": log_every}, evaluation={"every": 0}, steps=9))
    assert [path.name for path in (configured().run_dir / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.parametrize(("method", "step"), [("__init__", 0), ("write", 1)])
def test_records_on_a_full_disk(
    method: str, step: int, configured: Any, plots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where closing the files and drawing the losses fail like what ended the run."""
    config = configured()

    def fail(*_: Any) -> None:
        raise NO_SPACE

    for name in (method, "close"):
        monkeypatch.setattr(MetricsLog, name, fail)
    message = rf"{config.run_dir} could not be written at step {step} .*No space left on device.*Free disk space"
    with pytest.raises(TrainingError, match=message):
        train(config)


@pytest.mark.parametrize(
    ("module", "log", "message"),
    [
        ("wandb", {"wandb_project": "p"}, "log.wandb_project: needs the package wandb, which is not installed"),
        ("torch.utils.tensorboard", {"tensorboard": "on"}, "needs the package tensorboard, which is not installed"),
    ],
)
def test_a_sink_that_is_not_installed(
    module: str, log: dict[str, str], message: str, configured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=message):
        train(configured(log=log))


def test_a_vocabulary_larger_than_the_model(configured: Any) -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size: expected at least the tokenizer's"):
        train(configured(model={"vocab_size": 257}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(configured: Any) -> None:
    with pytest.raises(ConfigError, match="expected a CUDA GPU for device cuda, found none; choose cpu or auto"):
        train(configured(device="cuda"))


# Reporting.


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ("none", "not quantized"),
        ({"weight": "int4", "activation": "none"}, "int4-hadamard-trust weights, real activations"),
        ({"weight": "none", "activation": "int8"}, "real weights, int8-hadamard-trust activations"),
    ],
)
def test_the_first_line_says_what_is_quantized(
    quant: Any, said: str, configured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    train(configured(quant=quant, steps=1, evaluation={"every": 0}))
    assert f"parameters, {said}, on 1 × cpu" in capsys.readouterr().out


def test_tensorboard_has_the_curve(configured: Any) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(configured(log={"tensorboard": "on"}))
    events = accumulator.EventAccumulator(str(result.run_dir / "tensorboard")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in curve] == list(range(1, 9))
    assert [value for _, value in curve] == pytest.approx([loss for _, loss in losses(result.run_dir)], rel=1e-6)


def test_records_that_will_be_done_again_are_dropped(configured: Any, tmp_path: Path) -> None:
    config = configured().log
    log = MetricsLog(tmp_path, config, 0, {})
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step), "tokens": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # a killed run
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3]
    log = MetricsLog(tmp_path, config, 2, {})
    log.write(3, {"loss": 9.0, "tokens": 3})
    log.close()
    assert losses(tmp_path) == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_flops_of_a_token() -> None:
    """Against the operations counted by torch for a model whose attention is a small part."""
    from torch.utils.flop_counter import FlopCounterMode

    from quest.models.llama import Llama, LlamaConfig

    config = LlamaConfig(vocab_size=500, n_layers=2, n_heads=2, d_model=64, max_seq_len=16)
    model = Llama(config)
    tokens = torch.randint(500, (2, 17))
    with FlopCounterMode(display=False) as counter:
        losses_of(model, tokens, 0.0)[1].backward()
    assert flops_per_token(config, 16) * 32 == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla T4", None),
    ],
)
def test_peak_of_a_gpu_by_its_name(name: str, teraflops: int | None) -> None:
    assert named_peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


def test_a_plot_of_several_runs(configured: Any, tmp_path: Path) -> None:
    runs = [train(configured(name, steps=3)).run_dir for name in ("one", "two")]
    plot_losses(runs, tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing has no training records"):
        plot_losses([tmp_path / "nothing"], tmp_path / "none.png")
