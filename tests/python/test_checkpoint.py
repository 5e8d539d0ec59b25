"""Checkpoints: written whole or not at all, kept as configured, and checked before a value is used."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quest.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
    check_same_model,
    find_latest,
    list_checkpoints,
    load_model,
    read_state,
    read_tensors,
)
from quest.train.config import CheckpointConfig


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/a.weight": torch.randn(37, 53, generator=generator),
        "model/b": torch.randn(5, generator=generator).bfloat16(),
        "optimizer/a.weight/step": torch.tensor(7.0),
        "random/cpu": torch.get_rng_state(),
    }


def saved(directory: Path, *steps: int, **config: int | bool) -> CheckpointStore:
    store = CheckpointStore(directory, CheckpointConfig(**config))
    for step in steps:
        store.save(step, some_tensors(step), {"note": step})
    store.close()
    return store


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_read(asynchronous: bool, tmp_path: Path) -> None:
    tensors = some_tensors()
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    store = CheckpointStore(tmp_path, CheckpointConfig(asynchronous=asynchronous))
    store.save(12, tensors, {"note": ["x", 0.1]})
    for tensor in tensors.values():  # training goes on while the copy is written
        tensor.zero_()
    store.close()
    path = tmp_path / "step-00000012"
    assert find_latest(tmp_path) == path
    state = read_state(path)
    assert (state["step"], state["note"]) == (12, ["x", 0.1])
    read = read_tensors(path)
    assert set(read) == set(expected)
    if asynchronous:
        for name, tensor in expected.items():
            assert torch.equal(read[name], tensor), name
            assert read[name].dtype == tensor.dtype
    assert set(read_tensors(path, ("model/",))) == {"model/a.weight", "model/b"}


def test_synchronous_values(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    for name, tensor in read_tensors(tmp_path / "step-00000003").items():
        assert torch.equal(tensor, some_tensors(3)[name]), name


def test_keeps_the_last_and_the_permanent_ones(tmp_path: Path) -> None:
    saved(tmp_path, *range(1, 9), keep_last=2, keep_every=3)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 6, 7, 8)]


def test_leftovers_of_a_killed_run_are_no_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / ".step-00000002").mkdir()
    (tmp_path / ".step-00000002" / "__0_0.distcp").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    CheckpointStore(tmp_path, CheckpointConfig())
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_last_good_one(asynchronous: bool, tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    store = CheckpointStore(tmp_path, CheckpointConfig(asynchronous=asynchronous))
    message = (
        r"step-00000002 could not be written \(torch .+ full disk; .* MB are free there\); "
        r"the last good one is .*step-00000001. Free disk space"
    )

    def save_to_the_end() -> None:
        store.save(2, some_tensors(), {})
        store.wait()

    with no_file_above(4096), pytest.raises(CheckpointError, match=message):
        save_to_the_end()
    assert names(tmp_path) == ["step-00000001"]
    assert read_state(tmp_path / "step-00000001")["step"] == 1
    store.save(3, some_tensors(), {})  # and when there is room again, saving goes on
    store.close()
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("__0_0.distcp", truncate, "__0_0.distcp is .* bytes long where .* were written"),
        ("__0_0.distcp", flip_a_bit, "__0_0.distcp is of another content"),
        (".metadata", flip_a_bit, ".metadata is of another content"),
        (".metadata", Path.unlink, ".metadata is missing"),
        ("state.json", truncate, "state.json is not readable"),
    ],
)
def test_damage_is_named_with_a_way_out(file: str, damage: object, message: str, tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    path = tmp_path / "step-00000002"
    damage(path / file)
    with pytest.raises(CheckpointError, match=f"step-00000002 is damaged: {message}.*delete .* to go on from step-0+1"):
        read_state(path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a checkpoint .* No such file"):
        read_state(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="expected a run directory or a checkpoint, found none"):
        load_model(tmp_path)


def test_another_format_version(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    file = tmp_path / "step-00000001" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="expected checkpoint format 1, got 99"):
        read_state(tmp_path / "step-00000001")


def test_the_first_difference_of_two_models() -> None:
    quant = {"weight": "int4-hadamard-trust", "activation": "none"}
    model = {"vocab_size": 10, "n_layers": 2, "n_heads": 2}
    own = {"model": model, "quant": quant}
    check_same_model(Path("p"), {"model": dict(model), "quant": dict(quant)}, own)
    for other, message in [
        ({"model": model | {"n_layers": 3, "n_heads": 4}, "quant": quant}, "its model.n_layers is 3, this run's is 2"),
        ({"model": model, "quant": quant | {"activation": "int8"}}, "its quant.activation is int8, this run's is none"),
        ({"model": model, "quant": None}, "its quant is None, this run's is int4-hadamard-trust"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            check_same_model(Path("p"), other, own)
