"""What the scripts share: one-line errors, number types for flags, device and dtype."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    """argparse that shows each default in its help, and an error as one line, exit code 2."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(
    kind: type, least: float, most: float = float("inf"), above: bool = False
) -> Callable[[str], float]:
    """A flag's type: an int or float in [least, most], or in (least, most] with `above`."""

    most = min(most, 2**63 - 1) if kind is int else most  # what torch can take

    def parse(text: str) -> float:
        must = f"{'a whole number' if kind is int else 'a number'}, "
        must += f"more than {least}" if above else f"{least} or more"
        must += f", at most {most}" if most != float("inf") else ""
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if (
            not (least < value if above else least <= value)
            or not value <= most
            or value == float("inf")
        ):
            raise argparse.ArgumentTypeError(f"was {text!r}, must be {must}")
        return value

    return parse


def numbers(kind: type, least: float, most: float = float("inf")) -> Callable[[str], list[float]]:
    """A flag's type: such numbers with commas between them."""
    return lambda text: [number(kind, least, most)(part) for part in text.split(",")]


def ratio(text: str) -> float | list[float]:
    """A flag's type: the ratio of all layers, or one for each, with commas between them."""
    found = numbers(float, 0, 1)(text)
    return found if len(found) > 1 else found[0]


def count(number: int, noun: str) -> str:
    """A number of things: "1 round", "2,046 rounds"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def place(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Where to compute and in what: CUDA if there is one, else the CPU; bfloat16, else float32."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
        if found.type == "meta":
            raise RuntimeError("holds no numbers")
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0][:100]
        raise ValueError(
            f"--device: was {name!r}, must be a device of this machine ({reason})"
        ) from None
    return found, DTYPES[dtype or ("bfloat16" if found.type == "cuda" else "float32")]


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Most bytes held so far, and of what: the CUDA allocator, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "CUDA"
    try:
        # Not getrusage: its figure is inherited from the process that started this one.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024, "process"
    except (OSError, IndexError):  # no Linux
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


def size(count: float) -> str:
    """A number of bytes as people read it, in powers of 1000."""
    power = min(len(str(int(count))) - 1, 14) // 3
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


class Unread:
    """A stream that goes on, into nothing, once its reader has gone, as in `| head`."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Callable[..., Any], *args: str) -> Any:
        try:
            return call(*args)
        except BrokenPipeError:
            _into_nothing(self.stream)
            return call(*args)


def _into_nothing(stream: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run(main: Callable[[], None], name: str, finish: bool = False) -> NoReturn:
    """Run a script: wrong input is one line and exit code 2.

    finish: one whose work is worth more than what it prints goes on when nobody reads that any
    more; otherwise a closed pipe ends it quietly.
    """
    for stream in ("stdin", "stdout", "stderr"):  # which a caller may have closed
        if getattr(sys, stream) is None:
            mode = "r" if stream == "stdin" else "w"
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115 (for good)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show
    if finish:
        sys.stdout = cast(TextIO, Unread(sys.stdout))
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the text has gone, as in `| head`
        _into_nothing(sys.stdout)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        with suppress(OSError):  # nobody there to be told
            print(f"{name}: error: {str(error) or 'out of memory'}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(0)
