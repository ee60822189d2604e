"""Files read with errors that name them, and written whole: made beside, then renamed."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def read_text(path: Path) -> str:
    """The text of a file, the same from every system: lines end in LF, and no BOM comes first.

    OSError or ValueError names the file that cannot be read, or is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror}), must be a text file") from None
    return decode_text(content, str(path))


def decode_text(content: bytes, name: str) -> str:
    """Bytes as `read_text` reads them; ValueError, with `name`, for the first that is no UTF-8."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: was not UTF-8 at byte {error.start}, must be text") from None
    text = text.removeprefix("\ufeff")
    text = text.replace("\r\n", "\n")
    return text.replace("\r", "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; OSError or ValueError names the file where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror}), must be a JSON file") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path}: was not JSON ({error}), must be a JSON object") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: was a JSON {type(content).__name__}, must be an object")
    return content


def read_json_lines(path: Path) -> list[Any]:
    """The records of a file of JSON lines, but for a last one that a kill cut short.

    None of a file that is not there; ValueError names one that is damaged.
    """
    if not path.exists():
        return []
    with damaged(path, "a JSON record a line"):
        lines = path.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]


def whole_number(content: dict[str, Any], name: str, default: int | None = None) -> int:
    """A whole number above 0 out of a configuration; `default`, if any, for none or null."""
    value = content.get(name)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{name!r} was missing, must be given")
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(f"{name}: was {value!r}, must be a whole number, 1 to 2^31 - 1")
    return value


def positive_number(content: dict[str, Any], name: str, default: float | None = None) -> float:
    """A number above 0 out of a configuration; `default`, if any, where it has no such key."""
    if name not in content and default is not None:
        return default
    value = content[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise ValueError(f"{name}: was {value!r}, must be a number above 0")
    return float(value)


@contextmanager
def name_file(path: Path, part: str = "") -> Iterator[None]:
    """Whatever is wrong in the content of a file is a ValueError that names it, and the part."""
    start = f"{path}: {part}: " if part else f"{path}: "
    try:
        yield
    except KeyError as missing:
        raise ValueError(f"{start}{missing} was missing, must be given") from None
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{start}{error}") from None


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
    write_beside(path, make_json_writer(content))


def make_json_writer(content: Mapping[str, Any] | list[Any]) -> Callable[[Path], object]:
    """A function that writes JSON into a file; what is no JSON fails here, before any writing."""
    text = json.dumps(content, indent=2) + "\n"
    return lambda to: to.write_text(text, encoding="utf-8")


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a temporary file beside `path`, and rename it: all of it, or nothing.

    A link at `path` is replaced, and the file that it names stays as it was: in a cache of
    downloads that file is the only good copy.
    """
    write_together({path: write})


def write_together(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files that belong together as `write_beside` does; rename them once all are written."""
    mask = os.umask(0)  # to read the mask is to set it
    os.umask(mask)
    try:
        for path, write in writers.items():
            temporary = _temporary(path)
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~mask)  # safetensors makes files that nobody else can read
        for path in writers:
            _temporary(path).replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: was not written ({error}), must be on a disk with room") from None
    finally:
        for path in writers:
            _temporary(path).unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """OSError unless `write_beside` can make its file, found out before work is done for it."""
    temporary = _temporary(path)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}), must be writable") from None


def check_folder(folder: Path) -> None:
    """OSError unless files can be made in a folder."""
    check_writable(folder / ".probe")


def _temporary(path: Path) -> Path:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: was a folder, must be a file")
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
