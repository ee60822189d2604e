"""From argv to objects: one-line errors, flag types, devices, the flags of a model and a schedule.

Only this file and the scripts' own `main` know an argparse namespace. Wrong input is a ValueError
or an OSError anywhere in the project; `run` makes it one line, and exit code 2.
"""

import argparse
import io
import math
import os
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

import torch

from freqkv import FreqKVCache, FreqKVConfig, Operator, distinct, lowband, newest
from half import use_fastest_products
from levels import LevelsCache, LevelsConfig
from lora import BUILT_IN, find_adapter
from model import FullCache, Llama, LlamaConfig
from weights import Tokenizer, find, load_model, load_tokenizer
from weights.files import check_folder, check_writable, name_file, read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPERATORS: dict[str, Operator] = {"freqkv": lowband, "distinct": distinct, "window": newest}
CACHES = [*OPERATORS, "full"]
DEFAULTS = FreqKVConfig()  # the paper's schedule
Schedule = FreqKVConfig | LevelsConfig
SCHEDULES: dict[str, type[Schedule]] = {"paper": FreqKVConfig, "levels": LevelsConfig}
SETTINGS = ["schedule", "window", "sinks", "ratio", "recent", "block"]  # of any of them
Cache = FreqKVCache | FullCache


# Running a script


class Parser(argparse.ArgumentParser):
    """argparse that leaves a description as it is written, and whose errors are ValueErrors."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def run(main: Callable[[], None], name: str, finish: bool = False) -> NoReturn:
    """Run a script and exit: wrong input is one line on stderr and exit code 2.

    finish: for a script whose work is worth more than what it prints. It goes on when nobody reads
    that any more, as in `| head`; any other ends there, quietly.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show
    if finish:
        sys.stdout = cast(TextIO, UnreadStream(sys.stdout))
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        _redirect_to_nothing(sys.stdout)
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError) as error:
        _fail(name, str(error) or "out of memory")
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        _fail(name, "out of memory")
    sys.exit(0)


def _fail(name: str, message: str) -> NoReturn:
    """End a script by one line on stderr."""
    message = " ".join(message.split("\n"))  # packages have messages of several
    with suppress(OSError):  # nobody there to be told
        print(f"{name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


class UnreadStream:
    """A stream that goes on, into nothing, once its reader has gone."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            _redirect_to_nothing(self.stream)
            return self.stream.write(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            _redirect_to_nothing(self.stream)
            self.stream.flush()


def _redirect_to_nothing(stream: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_closed_streams() -> None:
    """Give the script all three streams, where its caller has closed one."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 (for good)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


# Types of flags


def integer(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of a flag that takes a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            limit = "" if most == 2**63 - 1 and value < least else f", at most {most}"
            raise ArgumentTypeError(f"was {text!r}, must be a whole number, {least} or more{limit}")
        return value

    return parse


def real(
    least: float, most: float = math.inf, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """The type of a flag that takes a finite number from `least` to `most`.

    above, below: whether it must be more than `least`, less than `most`.
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        high_enough = value > least if above else value >= least
        low_enough = value < most if below else value <= most
        if not (high_enough and low_enough and math.isfinite(value)):
            start = f"more than {least}" if above else f"{least} or more"
            limit = ""
            if most < math.inf:
                limit = f", below {most}" if below else f", at most {most}"
            raise ArgumentTypeError(f"was {text!r}, must be a number, {start}{limit}")
        return value

    return parse


def name_or_path(text: str) -> str:
    """The type of a flag that takes a name or a path, which nothing is neither."""
    if not text:
        raise ArgumentTypeError("was '', must be a name or a path")
    return text


def path(text: str) -> Path:
    """The type of a flag that takes a path."""
    if not text:
        raise ArgumentTypeError("was '', must be a path")
    return Path(text)


def several(parse: Callable[[str], Any], repeats: bool = False) -> Callable[[str], list[Any]]:
    """The type of a flag that takes values of such a type, with commas between them.

    repeats: whether a value may come twice.
    """

    def parse_all(text: str) -> list[Any]:
        values = [parse(part.strip()) for part in text.split(",")]
        if not repeats and len(set(values)) < len(values):
            raise ArgumentTypeError(f"was {text!r}, must be without repeats")
        return values

    return parse_all


# Files to write


def make_folder(flag: str, path: Path) -> None:
    """Make a folder, if it is not there; OSError, which names the flag, where it cannot be used."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{flag}: {path}: {error.strerror}, must be a folder, or new") from None
    check_folder(path)


def check_target(flag: str, path: Path, is_own: Callable[[Path], bool], what: str) -> None:
    """OSError or ValueError unless a file can be written to `path`, at no other file's cost.

    is_own: whether a file that is there is what is written here, `what`, which may be replaced.
    """
    if not path.parent.is_dir() or path.is_dir() or not path.name:
        raise ValueError(f"{flag}: was {str(path)!r}, must be a file in an existing folder")
    if path.exists() and not is_own(path):
        raise ValueError(f"{flag}: {path} was there, must be new, or {what}")
    check_writable(path)


# Numbers for people


def format_count(number: int, noun: str) -> str:
    """A number of things: "1 round", "2,046 rounds"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_bytes(count: float) -> str:
    """A number of bytes as people read it, in powers of 1000."""
    units = ["B", "kB", "MB", "GB", "TB"]
    for unit in units:
        if count < 999.5 or unit == units[-1]:
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


# Devices


def choose_device(name: str | None) -> torch.device:
    """The device that --device names; CUDA where there is one, else the CPU. ValueError.

    On CUDA it turns off cuDNN's attention, for the whole process.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("holds no numbers")
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0][:100]
        raise ValueError(
            f"--device: was {name!r}, must be a device of this machine ({reason})"
        ) from None
    if device.type == "cuda":
        # cuDNN's attention, which newer cards prefer, prepares itself anew for each number of keys,
        # which here is another with every token.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype that --dtype names; bfloat16 on CUDA where the card has it, else float32."""
    if name is not None:
        return DTYPES[name]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def read_clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Most bytes held so far, and by what: the CUDA allocator, or this process."""
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


# The model and the schedule


def add_model_flags(parser: argparse._ActionsContainer) -> None:
    """The flags that choose a model, and where and in what to compute."""
    add = parser.add_argument
    text = "a name (tiny, smollm2) or a path [%(default)s]"
    add("--model", type=name_or_path, default="tiny", help=text)
    text = f"{BUILT_IN} (for smollm2), or a folder with a LoRA in PEFT's layout"
    add("--adapter", type=name_or_path, help=text)
    add("--device", help="cpu, cuda, cuda:1, ... [cuda where there is one]")
    add("--dtype", choices=list(DTYPES), help="[bfloat16 on cuda, float32 elsewhere]")


def add_schedule_flags(parser: argparse._ActionsContainer, tuned: str = "as tuned; else") -> None:
    """The flags of the slots, which `given_settings` reads.

    tuned: what help says of the settings that a model was tuned with.
    """
    add = parser.add_argument
    text = f"rounds as in the paper, or on a ladder of levels (levels.py) [{tuned} paper]"
    add("--schedule", choices=list(SCHEDULES), help=text)
    text = f"slots N a layer [{tuned} {DEFAULTS.window}, or the model's positions if fewer]"
    add("--window", type=integer(1), help=text)
    text = f"first tokens, never compressed [{tuned} {DEFAULTS.sinks}]"
    add("--sinks", type=integer(0), help=text)
    text = f"share of the span that a round keeps [{tuned} {DEFAULTS.ratio}]"
    add("--ratio", type=real(0, 1, below=True), help=text)
    text = f"newest tokens, left as they are [{tuned} {DEFAULTS.recent}; levels: window/4]"
    add("--recent", type=integer(0), help=text)
    add("--block", type=integer(1), help=f"slots of a block of levels [{tuned} window/64]")


def load(args: Namespace) -> tuple[Llama, Tokenizer]:
    """The model and the tokenizer that the flags name; ValueError unless they fit."""
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    tokenizer = load_tokenizer(args.model)
    return load_model_for(args, device, dtype, tokenizer), tokenizer


def load_model_for(
    args: Namespace, device: torch.device, dtype: torch.dtype, tokenizer: Tokenizer
) -> Llama:
    """The model that the flags name, to read and write with; ValueError unless it fits."""
    model = load_model(args.model, dtype, device, args.adapter)
    tokenizer.check_fits(model.config.vocab_size)
    use_fastest_products(model)
    return model


def choose_schedule(args: Namespace, model: LlamaConfig) -> Schedule:
    """The schedule: flags first, then what the model was tuned with, then the paper's settings."""
    given = given_settings(args)
    path = find_tuned(args.model, args.adapter)
    if path is None:
        return make_schedule(given, model)
    tuned = read_tuned(path)
    try:
        return make_schedule(given, model, tuned)
    except ValueError:
        with name_file(path):  # it may be wrong without any flags
            make_schedule({}, model, tuned)
        raise


def choose_cache_name(args: Namespace) -> str:
    """The name of the cache: as the flag says, or as the model was tuned, or the paper's."""
    if args.cache is not None:
        return args.cache
    return tuned_settings(args.model, args.adapter).get("attention", "freqkv")


def given_settings(source: object) -> dict[str, Any]:
    """The settings of the schedule that flags give, or those of a run: what is not None."""
    settings = {}
    for name in SETTINGS:
        value = getattr(source, name)
        if value is not None:
            settings[name] = value
    return settings


def tuned_settings(model: str, adapter: str | None) -> dict[str, Any]:
    """The settings that train.py has left with an adapter, or else with a model, if any."""
    path = find_tuned(model, adapter)
    return {} if path is None else read_tuned(path)


def find_tuned(model: str, adapter: str | None) -> Path | None:
    """The file of these settings, if there is one."""
    folders = [find(model)]
    if adapter is not None:
        folders.insert(0, find_adapter(adapter))
    for folder in folders:
        path = folder / "freqkv.json"
        if path.exists():
            return path
    return None


def read_tuned(path: Path) -> dict[str, Any]:
    """The settings in such a file; ValueError unless they are such as train.py writes."""
    settings = read_json(path)
    check_tuned(path, settings)
    return settings


def check_tuned(path: Path, settings: dict[str, Any]) -> None:
    """ValueError unless the settings, out of a freqkv.json, are such as train.py writes."""
    for name, choices in (("attention", CACHES), ("schedule", list(SCHEDULES))):
        if name in settings and settings[name] not in choices:
            must = ", ".join(choices)
            raise ValueError(f"{path}: {name} was {settings[name]!r}, must be of {must}")
    for name in ("window", "sinks", "recent", "block"):
        value = settings.get(name, 0)
        if type(value) is not int or value < 0:
            raise ValueError(f"{path}: {name} was {value!r}, must be a whole number, 0 or more")
    ratio = settings.get("ratio", 0.0)
    if type(ratio) not in (int, float) or not 0 <= ratio < 1:
        raise ValueError(f"{path}: ratio was {ratio!r}, must be a number, 0 or more, below 1")


def keep_tuned(tuned: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Of the settings that a model was tuned with, those that hold beside the ones that were given.

    With another window or schedule, what depends on these is left at its default.
    """
    names = ["attention", *SETTINGS]
    schedule = tuned.get("schedule", "paper")
    window = tuned.get("window")
    if given.get("schedule", schedule) != schedule:
        names = ["attention", "window", "sinks"]
    elif given.get("window", window) != window:
        names = ["attention", "schedule", "sinks", "ratio"]
    kept = {}
    for name in names:
        if name in tuned and name not in given:
            kept[name] = tuned[name]
    return kept


def make_schedule(
    given: dict[str, Any], model: LlamaConfig, tuned: dict[str, Any] | None = None
) -> Schedule:
    """A schedule for a model, of settings that were given, or else of those it was tuned with.

    A window that is not given is the paper's, or the model's positions if fewer. ValueError for a
    window that is longer than these, or a setting of another schedule.
    """
    settings = keep_tuned(tuned or {}, given) | given
    name = settings.pop("schedule", "paper")
    if name == "levels" and "ratio" in given:
        raise ValueError(f"--ratio: was {given['ratio']}, must be with --schedule paper")
    if name == "paper" and "block" in given:
        raise ValueError(f"--block: was {given['block']}, must be with --schedule levels")

    most = model.max_position_embeddings
    settings.setdefault("window", min(DEFAULTS.window, most))
    if name == "levels":
        settings.setdefault("recent", settings["window"] // 4)
        settings.setdefault("block", max(settings["window"] // 64, 1))
    values = {}
    for field in fields(SCHEDULES[name]):
        if field.name in settings:
            values[field.name] = settings[field.name]
    config = SCHEDULES[name](**values)
    if config.window > most:
        raise ValueError(f"--window: was {config.window}, must be at most the model's {most}")
    return config


def make_cache(name: str, schedule: Schedule, capacity: int) -> Cache:
    """An empty cache, by one of the names in CACHES; `capacity` is how much the full one holds."""
    if name == "full":
        return FullCache(capacity)
    return make_slots(schedule, OPERATORS[name])


def make_slots(schedule: Schedule, operator: Operator) -> FreqKVCache:
    """An empty cache of slots."""
    if isinstance(schedule, LevelsConfig):
        return LevelsCache(schedule, operator)
    return FreqKVCache(schedule, operator)
