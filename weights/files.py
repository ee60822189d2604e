"""Files read with errors that name them, and written whole: made beside, then renamed."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError names the file where it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: was not there, must be a JSON file") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path}: was not JSON ({error}), must be a JSON object") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: was a JSON {type(content).__name__}, must be an object")
    return content


@contextmanager
def damaged(path: Path, must: str) -> Iterator[None]:
    """Whatever the content of a damaged file raises is a ValueError that names the file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: was damaged ({error!r}), must be {must}") from None


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Write JSON into a file, whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    write_beside(path, lambda to: to.write_text(text, encoding="utf-8"))


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a temporary file beside `path`, and rename it: all of it, or nothing."""
    beside = _beside(path)
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)  # safetensors makes files that nobody else can read
        beside.replace(path.resolve())
    except SafetensorError as error:
        raise OSError(f"{path}: was not written ({error}), must be on a disk with room") from None
    finally:
        beside.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """OSError unless `write_beside` can make its file, found out before work is done for it."""
    try:
        _beside(path).touch()
        _beside(path).unlink()
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}), must be writable") from None


def _beside(path: Path) -> Path:
    path = path.resolve()  # through a link, to the file that it names
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
