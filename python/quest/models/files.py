"""What the formats share: directories and files that appear whole or not at all, and JSON files with clear errors."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """A directory to fill, which takes the name `target` when the block ends well and is removed when it does not.

    It stands beside the target while it is filled, so that the renaming stays within one file system. An earlier model
    of that name is replaced only then: a full disk or a killed process leaves it as it was.

    Raises:
        ValueError: when `target` holds something else than a model (a directory with config.json), or is a file.
    """
    target = Path(target).absolute()
    if target.exists() and not (target / "config.json").is_file() and (target.is_file() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not a model directory; choose another name or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        for file in new.iterdir():
            file.chmod(new.stat().st_mode & 0o666)  # safetensors makes files that only their owner reads
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(work)


def write_text(file: Path, text: str) -> None:
    """Writes or replaces a text file, in UTF-8: a full disk or a killed process leaves an earlier one as it was."""
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: when it is missing.
        ValueError: when it is truncated or holds something else than an object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no {file}; expected a model directory with {file.name} in it")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file} is truncated or not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content
