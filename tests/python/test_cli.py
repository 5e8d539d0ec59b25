"""The command: from text to a packed model that writes, other formats in and out, one clear message for what fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import shared_data, steady_normal

import quest
from quest import _C, cli
from quest.infer.bench import eager_quantize
from quest.models import load_hf, load_packed, save_hf
from quest.models.llama import Llama, LlamaConfig
from quest.reference import hadamard_matrix

Capture = pytest.CaptureFixture[str]


def training_options(directory: Path) -> list[str]:
    """A model that trains in a second."""
    text = directory / "text"
    text.mkdir(exist_ok=True)
    for i in range(40):
        (text / f"{i}.txt").write_text(f"{i} green bottles hanging on the wall, and if one should fall: {i * i}. " * 5)
    return (
        f"--run-dir {directory / 'run'} --data {text} --data.validation-fraction 0.2 --data.vocab-size 300 "
        f"--data.cache-dir {directory / 'cache'} --model.n-layers 1 --model.n-heads 2 --model.d-model 32 "
        "--model.d-hidden 64 --sequence-length 32 --batch-size 4 --log.every 1 --device cpu --log.tensorboard off"
    ).split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run and its packed directory."""
    directory = tmp_path_factory.mktemp("cli")
    assert cli.main(["train", *training_options(directory), "--steps", "4"]) == 0
    assert cli.main(["export", str(directory / "run"), str(directory / "packed")]) == 0
    return directory


def run_quest(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quest", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_training_leaves_what_it_promises(workplace: Path) -> None:
    files = {file.name for file in (workplace / "run").iterdir()}
    assert {"config.toml", "environment.json", "metrics.jsonl", "loss.png", "tokenizer.json", "checkpoints"} <= files


def test_generate_streams_the_prompt_and_its_continuation(workplace: Path, capsys: Capture) -> None:
    texts = []
    for model in ("packed", "packed", "run"):
        options = ["--prompt", "12 green", "--max-new-tokens", "20", "--seed", "3", "--device", "cpu"]
        assert cli.main(["generate", str(workplace / model), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].startswith("12 green")
    assert len(texts[0]) > len("12 green") + 5


def test_empty_prompt_begins_a_document(workplace: Path, capsys: Capture) -> None:
    assert cli.main(["generate", str(workplace / "packed"), "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip()


def test_eval_agrees_before_and_after_packing(workplace: Path, capsys: Capture) -> None:
    results = []
    for model in ("run", "packed"):
        output = workplace / f"{model}.json"
        options = ["--data", str(workplace / "text"), "--max-bytes", "3000", "--device", "cpu", "--output", str(output)]
        assert cli.main(["eval", str(workplace / model), *options]) == 0
        results.append(json.loads(output.read_text())["data"])
    assert "bits per byte" in capsys.readouterr().out
    assert results[0]["text_bytes"] == 3000
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-4)


def test_export_to_hugging_face(workplace: Path) -> None:
    assert cli.main(["export", str(workplace / "packed"), str(workplace / "hf"), "--format", "hf"]) == 0
    config = json.loads((workplace / "hf" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert load_hf(workplace / "hf").config.d_hidden == 64


def test_import_from_hugging_face(tmp_path: Path, capsys: Capture) -> None:
    source = Llama(LlamaConfig(vocab_size=64, n_layers=1, n_heads=2, d_model=32, d_hidden=64, max_seq_len=16)).eval()
    save_hf(source, tmp_path / "hf")
    tokens = torch.arange(10).view(1, 10)
    assert cli.main(["import", f"hf:{tmp_path / 'hf'}", str(tmp_path / "real")]) == 0
    assert cli.main(["import", f"hf:{tmp_path / 'hf'}", str(tmp_path / "packed"), "--quant", "int8"]) == 0
    assert "MB packed" in capsys.readouterr().out
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "real")(tokens), source(tokens))
        quantized = quest.convert(quest.prepare(source, quest.QuantConfig("int8", "int8")))
        assert torch.equal(load_packed(tmp_path / "packed")(tokens), quantized(tokens))


def test_import_from_the_paper(tmp_path: Path) -> None:
    source = f"paper:{shared_data('original_checkpoint_w4a4')}"
    assert cli.main(["import", source, str(tmp_path / "packed")]) == 0
    assert str(load_packed(tmp_path / "packed").blocks[0].mlp.down.weight_quantizer) == "int4-hadamard-trust"


def test_plot(workplace: Path, tmp_path: Path) -> None:
    run = str(workplace / "run")
    assert cli.main(["plot", run, run, "--output", str(tmp_path / "two.png")]) == 0
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


def test_info_is_json(capsys: Capture) -> None:
    assert cli.main(["info"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["quest"]["version"] == quest.__version__
    assert info["torch"]["version"] == torch.__version__
    assert info["cpu"]["isa"] in ("portable", "avx2", "avx512")
    assert all(Path(library).is_file() for library in info["quest"]["libraries"])
    assert info["products"]["int1 × int1"].startswith("planes")


def test_plan_of_real_activations() -> None:
    by_bits = _C.plan_tile("weight_only", 8, 12288, 4096, w_grid="int1")
    assert by_bits["kernel"] == "fixed"
    assert by_bits["wgmma"]
    assert _C.plan_tile("weight_only", 8, 12288, 4096, w_grid="gauss4")["kernel"] == "held"
    with pytest.raises(ValueError, match="w_grid for family weight_only alone, got family int4 with w_grid int1"):
        _C.plan_tile("int4", 8, 12288, 4096, w_grid="int1")
    with pytest.raises(ValueError, match="got family weight_only without"):
        _C.plan_tile("weight_only", 8, 12288, 4096)


def test_bench(capsys: Capture) -> None:
    assert cli.main(["bench", "--m", "4", "--n", "64", "--k", "64", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all(float(line.split()[-1]) > 0 for line in lines[1:])


def test_bench_times_a_peer_that_computes_the_same() -> None:
    x = steady_normal(32, 256, quantizer=quest.Quantizer.parse("int4"))
    codes, scale, passes = eager_quantize(x, hadamard_matrix(128).float())
    expected = quest.ops.quantize(x, quest.Quantizer.parse("int4"))
    assert torch.equal(codes, expected.codes)
    torch.testing.assert_close(scale.squeeze(-1), expected.scale)
    assert torch.equal(passes, quest.ops.unpack(expected.mask.unsqueeze(0), "int1", "planes", 256).bool())


# ---- usage ----


def test_help_lists_the_commands() -> None:
    result = run_quest("--help")
    assert result.returncode == 0
    assert [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")] == list(cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"quest {command}" in capsys.readouterr().out


def test_no_command_is_wrong_usage(capsys: Capture) -> None:
    assert cli.main([]) == 2
    assert "usage: quest COMMAND" in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys: Capture) -> None:
    assert cli.main(["genrate"]) == 2
    assert "unknown command 'genrate'; did you mean 'generate'?" in capsys.readouterr().err


def test_unknown_option_names_the_nearest(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "somewhere", "--tempature", "1"])
    assert end.value.code == 2
    assert "--temperature" in capsys.readouterr().err


# ---- errors ----


def failure(capsys: Capture, *args: str) -> str:
    assert cli.main(args) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.startswith(f"quest {args[0]}: ")
    return error


def test_bad_models_are_named(workplace: Path, tmp_path: Path, capsys: Capture) -> None:
    nothing = str(tmp_path / "nothing")
    assert "nothing does not exist; expected a packed directory" in failure(capsys, "generate", nothing)
    assert "expected a run directory or a checkpoint" in failure(capsys, "generate", str(tmp_path))
    assert "expected hf:DIR or paper:PATH" in failure(capsys, "import", nothing, str(tmp_path / "out"))
    hf = tmp_path / "hf"
    save_hf(load_packed(workplace / "packed"), hf)
    assert f"a Hugging Face Llama is hf:{hf}" in failure(capsys, "eval", str(hf), "--data", "x")
    assert "has no tokenizer; give one with --tokenizer" in failure(capsys, "generate", f"hf:{hf}")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (workplace / "packed").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[:2000])
    assert "damaged/model.safetensors is truncated" in failure(capsys, "generate", str(damaged))


def test_bad_values_are_named(workplace: Path, tmp_path: Path, capsys: Capture) -> None:
    packed = str(workplace / "packed")
    assert "top_p: expected above 0, at most 1, got 2.0" in failure(capsys, "generate", packed, "--top-p", "2")
    long = ["--prompt", "green bottles " * 99]
    assert "prompt: expected 1 to 32 ids" in failure(capsys, "generate", packed, *long)
    assert "quest bench: expected m, n, k" in failure(capsys, "bench", "--m", "0")  # named once
    assert "give --data FILE… or --tasks NAME…" in failure(capsys, "eval", packed)
    assert "gone.txt does not exist" in failure(capsys, "eval", packed, "--data", str(tmp_path / "gone.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8 at byte 3" in failure(capsys, "eval", packed, "--data", str(tmp_path / "latin.txt"))
    assert "has no training records" in failure(capsys, "plot", str(tmp_path))
    (tmp_path / "mine").write_text("text")
    assert "is not a model directory" in failure(capsys, "export", packed, str(tmp_path / "mine"))
    assert cli.main(["export", packed, str(tmp_path / "hf"), "--format", "hf"]) == 0
    assert "did you mean" in failure(capsys, "import", f"hf:{tmp_path / 'hf'}", str(tmp_path / "o"), "--quant", "int44")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_said(workplace: Path, capsys: Capture) -> None:
    assert "torch sees no GPU here" in failure(capsys, "generate", str(workplace / "packed"), "--device", "cuda")
    options = [*training_options(workplace), "--device", "cuda"]
    assert failure(capsys, "train", *options).startswith("quest train: device: expected a CUDA GPU")


def test_training_errors_lose_nothing(workplace: Path, tmp_path: Path, capsys: Capture) -> None:
    options = training_options(workplace)
    before = sorted(path.name for path in (workplace / "run").rglob("*"))
    assert "has step-00000004" in failure(capsys, "train", *options, "--steps", "8")
    other = [*options, "--resume", "auto", "--model.n-layers", "2", "--steps", "8"]
    assert "its model.n_layers is 1, this run's is 2" in failure(capsys, "train", *other)
    (tmp_path / "config.toml").write_text("[optim]\nlearning_rat = 1\n")
    unknown = failure(capsys, "train", "--config", str(tmp_path / "config.toml"))
    assert "did you mean 'optim.learning_rate'" in unknown
    assert sorted(path.name for path in (workplace / "run").rglob("*")) == before


def test_traceback_on_demand(tmp_path: Path) -> None:
    quiet = run_quest("generate", str(tmp_path / "nothing"))
    assert quiet.returncode == 1
    assert quiet.stderr.splitlines()[-1] == "(QUEST_DEBUG=1 shows where)"
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in run_quest("generate", str(tmp_path / "nothing"), QUEST_DEBUG="1").stderr


def start_quest(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "quest", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def test_interrupted_generation_ends_clean(workplace: Path) -> None:
    process = start_quest("generate", str(workplace / "packed"), "--max-new-tokens", "1000000", "--temperature", "5")
    assert process.stdout is not None
    process.stdout.read(1)  # it writes
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == "quest generate: interrupted"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_training_saves_and_goes_on(number: signal.Signals, code: int, tmp_path: Path) -> None:
    options = [*training_options(tmp_path), "--resume", "auto"]
    process = start_quest("train", *options, "--steps", "100000", "--schedule.name", "constant")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "go on with --resume auto" in output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert cli.main(["train", *options, "--steps", str(step + 2), "--schedule.name", "constant"]) == 0


def test_closed_pipe_is_quiet(workplace: Path) -> None:
    process = start_quest("generate", str(workplace / "packed"), "--max-new-tokens", "100000", "--temperature", "5")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
