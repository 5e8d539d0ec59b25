"""The demonstration, with a model that trains in a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quest import demo
from quest.train.config import ModelConfig
from quest.train.data import DataConfig


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(f"def square_{i}(): return {i * i}\n" * 20)
    chosen = demo.configuration

    def configuration() -> demo.TrainConfig:
        data = DataConfig(train=(str(text),), validation_fraction=0.2, vocab_size=300, cache_dir="cache")
        model = ModelConfig(n_layers=1, n_heads=2, d_model=32, d_hidden=64)
        return replace(
            chosen(), data=data, model=model, sequence_length=32, batch_size=8, micro_batch_size=None, steps=6
        )

    monkeypatch.setattr(demo, "configuration", configuration)
    monkeypatch.setattr(demo, "VALIDATION_SEQUENCES", 8)


def test_trains_packs_compares_and_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    output = capsys.readouterr().out
    assert "MB packed" in output
    before, after = (float(word) for word in output.split("validation loss: ")[1].replace(",", "").split()[0:3:2])
    assert before == pytest.approx(after, abs=1e-4)
    assert output.split("quest generate")[1].splitlines()[1].startswith("def ")
    assert (demo.RUN / "loss.png").is_file()
    assert (demo.PACKED / "model.safetensors").is_file()
    # Again: nothing is left to train, the rest is done anew.
    assert demo.main() == 0
    assert "resumed after step 6 of 6" in capsys.readouterr().out


def test_a_gpus_bfloat16_is_packed_without_a_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With every product in bfloat16, as on a GPU, the losses before and after still agree to the last digit shown."""
    monkeypatch.setattr("quest.precision.product_dtype", lambda *_: torch.bfloat16)
    assert demo.main() == 0
    words = capsys.readouterr().out.split("validation loss: ")[1].replace(",", "").split()
    assert words[0] == words[2]


def test_time_that_is_up_ends_training_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = demo.configuration
    monkeypatch.setattr(demo, "configuration", lambda: replace(chosen(), steps=1_000_000, max_minutes=0.05))
    assert demo.main() == 0
    output = capsys.readouterr().out
    assert "stopped by the time limit at step" in output
    assert "validation loss: " in output


def test_packing_that_changes_the_loss_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([(100.0, 10), (100.002, 10)])
    monkeypatch.setattr(demo, "evaluate_tokens", lambda *_: next(losses))
    assert demo.main() == 1
    assert "the losses differ by 2.00e-04" in capsys.readouterr().err
