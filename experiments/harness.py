"""What the measurements share: strategies side by side, texts, windows of them, losses a token.

A strategy is what holds the past: everything (`full`), or N slots with an operator that thins them
out. All of them read through one path, in parts, so memory does not depend on the text.
"""

import hashlib
import math
from argparse import ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cli
from data import by_content, check_bin_dtype, data_files, encode_document, map_bin
from experiments.operators import average, by_layer, high
from experiments.report import Journal, Record, mean_interval
from freqkv import FreqKVConfig
from generate import encode_text, read_parts
from levels import LevelsConfig
from model import Attend, FullCache, Llama
from weights import Tokenizer, fingerprint
from weights.files import read_text

OPERATORS = cli.OPERATORS | {"average": average, "high": high}
STRATEGIES = ["full", *OPERATORS]
HELD_OUT = 0.05  # the share of Python's source that train.py holds out by default
BINS = 64  # stretches of a window, whose mean losses make the curve by position


# The command line


def add_flags(parser: cli.Parser) -> None:
    """The flags of every measurement."""
    cli.add_model_flags(parser)
    cli.add_schedule_flags(parser)
    add = parser.add_argument
    text = "text files, folders, patterns, or .bin [what train.py holds out of Python's source]"
    add("--data", nargs="+", metavar="PATH", help=text)
    add("--bin-dtype", choices=["uint16", "uint32"], help="of .bin [uint16 if the ids fit]")
    text = "begin a text with the token of a beginning, if the model's tokenizer does so [--bos]"
    add("--bos", action=BooleanOptionalAction, default=True, help=text)
    text = f"of {','.join(STRATEGIES)}, with commas between [%(default)s]"
    names = one_of_each(STRATEGIES)
    add("--strategies", type=names, default="full,freqkv,window", metavar="S,S", help=text)
    add("--out", type=cli.path, help="folder for results [runs/NAME-MODEL-ADAPTER]")
    add("--plot", action="store_true", help="draw pictures too (takes matplotlib)")
    text = "windows of a text, or records, at most [all; in spectrum, 8 windows]"
    add("--limit", type=cli.integer(0), default=0, help=text)
    text = "tokens read at a time; in spectrum, a window [%(default)s]"
    add("--chunk", type=cli.integer(1), default=512, help=text)


def add_window_flags(parser: cli.Parser, lengths: str) -> None:
    """The flags of what is measured in windows; `lengths` says how many there may be."""
    add = parser.add_argument
    add("--lengths", type=cli.several(cli.integer(2)), metavar="N,N", help=f"tokens, {lengths}")
    text = "windows read at a time [as many as fill 4096 slots]"
    add("--batch-size", type=cli.integer(1), help=text)
    add("--stride", type=cli.integer(1), default=256, help="between windows [%(default)s]")


def one_of_each(known: Collection[str]) -> Callable[[str], list[str]]:
    """The type of a flag that takes some of the names in `known`, with commas between them."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise ArgumentTypeError(f"was {name!r}, must be of {', '.join(known)}")
            if names.count(name) > 1:
                raise ArgumentTypeError(f"was {name} twice, must be once")
        return names

    return parse


def describe_place(model: Llama) -> dict[str, str]:
    """Where and in what the model computes, as the settings of a record say it."""
    weight = model.norm.weight
    return {"device": str(weight.device), "dtype": str(weight.dtype).removeprefix("torch.")}


# Strategies


@dataclass(frozen=True)
class Strategy:
    """What holds the past, and how much of it."""

    name: str
    schedule: cli.Schedule | None  # of its slots; None: it holds everything
    layer_ratios: tuple[float, ...] = ()  # in place of the schedule's ratio, one for each layer

    def make_cache(self, capacity: int) -> Attend:
        """An empty cache, for a text of `capacity` tokens."""
        if self.schedule is None:
            return FullCache(capacity)
        if self.layer_ratios:
            return by_layer(self.schedule, self.layer_ratios)
        return cli.make_slots(self.schedule, OPERATORS[self.name])

    def settings(self) -> dict[str, Any]:
        """The settings that a record carries; those of slots mean nothing to the full cache."""
        if self.schedule is None:
            return {}
        settings = asdict(self.schedule)
        if isinstance(self.schedule, LevelsConfig):
            settings["schedule"] = "levels"
        if self.layer_ratios:
            settings["ratio"] = list(self.layer_ratios)
        return settings


def require_paper(schedule: cli.Schedule) -> FreqKVConfig:
    """A schedule that was chosen, for what only the paper's can be; ValueError for another."""
    if not isinstance(schedule, FreqKVConfig):
        raise ValueError("--schedule: was levels, must be paper here")
    return schedule


def make_strategies(names: Sequence[str], schedule: cli.Schedule) -> list[Strategy]:
    """The strategies of these names, all with as many slots."""
    strategies = []
    for name in names:
        if name == "full":
            strategies.append(Strategy(name, None))
        else:
            strategies.append(Strategy(name, schedule))
    return strategies


# Texts


@dataclass
class Document:
    name: str
    tokens: np.ndarray  # [T]; of a .bin, mapped and not read

    def cut(self, start: int, length: int) -> Tensor:
        """A stretch of the tokens: [length], int64."""
        return torch.from_numpy(self.tokens[start : start + length].astype(np.int64))

    def digest(self) -> str:
        """What tells one text from another: a hash of its tokens, and of how wide they are."""
        content = hashlib.sha256(str(self.tokens.dtype).encode())
        content.update(np.ascontiguousarray(self.tokens))
        return content.hexdigest()


def read_documents(
    patterns: Sequence[str] | None, bin_dtype: str | None, bos: bool, tokenizer: Tokenizer,
    vocab: int,
) -> list[Document]:  # fmt: skip
    """What --data names, a document a file; without it what train.py holds out, as one stream.

    bos: begin the text of a file with the token of a beginning, if the tokenizer has one. What is
    tokens already is left as it is.
    """
    if patterns is None:
        return [Document("held-out source of Python", read_held_out(tokenizer))]
    documents = []
    files = data_files(patterns)
    check_bin_dtype(files, bin_dtype)
    for file in files:
        if file.suffix == ".bin":
            tokens = map_bin(file, bin_dtype, vocab)
        else:
            tokens = encode(file, tokenizer, bos)
        documents.append(Document(file.name, tokens))
    return documents


def encode(file: Path, tokenizer: Tokenizer, bos: bool = True) -> np.ndarray:
    """A text file as tokens [T], with the token of a beginning first unless bos is False."""
    return encode_text(read_text(file), tokenizer, continues=not bos).numpy()


def read_held_out(tokenizer: Tokenizer) -> np.ndarray:
    """The whole files at the end of Python's source that train.py holds out, as it packs them."""
    files = list(by_content(data_files(None)).values())
    sizes = [file.stat().st_size for file in files]
    room = int(HELD_OUT * sum(sizes))
    parts: list[np.ndarray] = []
    while files and sizes[-1] <= room:
        room -= sizes.pop()
        parts.insert(0, encode_document(read_text(files.pop()), tokenizer))
    if not parts:
        raise ValueError("--data: was not given, must be: no source of Python is held out here")
    return np.concatenate(parts)


# Windows


@dataclass(frozen=True)
class Window:
    document: int
    start: int
    length: int  # the longest of --lengths that fits


def choose_lengths(given: list[int] | None, texts: Sequence[Document], window: int) -> list[int]:
    """The lengths to measure, in order; ValueError for one that no text has.

    By default the window, twice that and so on, as far as the longest text goes, to eight times.
    """
    longest = max(texts, key=lambda text: len(text.tokens))
    most = len(longest.tokens)
    if given:
        lengths = sorted(set(given))
    else:
        usual = [window, 2 * window, 4 * window, 8 * window]
        lengths = [length for length in usual if 2 <= length <= most]
    if not lengths or lengths[-1] > most:
        wanted = lengths[-1] if lengths else max(window, 2)
        was = f"{wanted} tokens, but the longest text, {longest.name}, has {most}"
        raise ValueError(f"--lengths: was {was}; must be at most that")
    return lengths


def cut_windows(
    texts: Sequence[Document], lengths: Sequence[int], stride: int, limit: int = 0
) -> list[Window]:
    """Where to begin reading, and how far to read: what is shorter is measured on the way.

    limit: of a text, only so many of the windows of its longest length, evenly spaced; 0: all.
    """
    windows = []
    for number, text in enumerate(texts):
        size = len(text.tokens)
        fitting = [length for length in lengths if length <= size]
        if not fitting:
            continue
        least = max(fitting) if limit else min(fitting)
        starts = np.arange(0, size - least + 1, stride)
        if 0 < limit < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, limit).round().astype(int)]
        for start in starts.tolist():
            longest = max(length for length in fitting if start + length <= size)
            windows.append(Window(number, start, longest))
    return windows


def describe_windows(texts: Sequence[Document], windows: Sequence[Window], times: int) -> str:
    """What is about to be read, so many times, and what is not."""
    read = len({window.document for window in windows})
    short = len(texts) - read
    total = times * sum(window.length for window in windows)
    text = f"{cli.format_count(len(windows), 'window')} of {cli.format_count(read, 'text')}"
    if short:
        text += f"; {cli.format_count(short, 'text')} too short, left out"
    return f"{text}; {total:,} tokens in all"


# Reading


def open_journal(path: Path, model: Llama, *about: object) -> Journal:
    """The journal of what is measured of this model, and of `about`."""
    return Journal(path, (fingerprint(model), describe_place(model)["dtype"], about))


@torch.no_grad()
def token_losses(
    model: Llama, tokens: Tensor, cache: Attend, chunk: int,
    advance: Callable[[int], Any] | None = None,
) -> Tensor:  # fmt: skip
    """The loss of each of tokens [B, T] but the first, given those before it: [B, T - 1] float32.

    Read through the cache `chunk` tokens at a time: neither logits nor slots grow with T. Each
    time `advance` gets the number of tokens read. ValueError where a loss is no number.
    """
    losses = torch.empty(len(tokens), tokens.shape[1] - 1)  # at once: parts would scatter the heap
    start = 0
    for hidden in read_parts(model, tokens[:, :-1], cache, chunk):
        stop = start + hidden.shape[1]
        target = tokens[:, start + 1 : stop + 1].to(hidden.device)
        logits = model.logits(hidden)
        # One row of logits a token: over a middle dimension the softmax takes five times as long.
        flat = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
        if not flat.isfinite().all():
            dtype = str(logits.dtype).removeprefix("torch.")
            raise ValueError(f"losses: were not numbers in {dtype}, must be; try another --dtype")
        losses[:, start:stop] = flat.view_as(target)
        if advance is not None:
            advance(target.numel())
        start = stop
    return losses


def measure_windows(
    model: Llama, strategies: Sequence[Strategy], texts: Sequence[Document],
    windows: Sequence[Window], lengths: Sequence[int], path: Path, batch_size: int | None,
    chunk: int,
) -> dict[Strategy, list[Record]]:  # fmt: skip
    """What each strategy loses in each window; what the journal at `path` knows is not read again.

    Of a window, what `summarize_losses` makes of it.
    """
    journal = open_journal(path, model, lengths, [text.digest() for text in texts])
    todo = []
    for strategy in strategies:
        for batch in make_batches(strategy, windows, batch_size):
            if any((strategy, window) not in journal for window in batch):
                todo.append((strategy, batch))
    total = sum(len(batch) * (batch[0].length - 1) for _, batch in todo)
    with tqdm(total=total, unit=" tokens", unit_scale=True) as bar:
        for strategy, batch in todo:
            bar.set_description(strategy.name)
            length = batch[0].length
            rows = [texts[window.document].cut(window.start, length) for window in batch]
            cache = strategy.make_cache(length)
            losses = token_losses(model, torch.stack(rows), cache, chunk, bar.update)
            for window, row in zip(batch, losses.double(), strict=True):
                journal[strategy, window] = summarize_losses(row, lengths)
    values = {}
    for strategy in strategies:
        values[strategy] = [journal[strategy, window] for window in windows]
    return values


def summarize_losses(losses: Tensor, lengths: Sequence[int]) -> Record:
    """Of the losses [n - 1] of n tokens: "sums", to each of the lengths, and "bins", the means of
    stretches.
    """
    sums = {}
    for length in lengths:
        if length - 1 <= len(losses):
            sums[str(length)] = losses[: length - 1].sum().item()
    bins = []
    for stretch in losses.tensor_split(min(BINS, len(losses))):
        bins.append(stretch.mean().item())
    return {"sums": sums, "bins": bins}


def make_batches(
    strategy: Strategy, windows: Sequence[Window], size: int | None
) -> list[list[Window]]:
    """Windows of one length, in batches of that size, else of about 4096 slots.

    All windows, known or not: so a run that goes on reads the same batches, to the bit.
    """
    batches = []
    for length in sorted({window.length for window in windows}):
        group = [window for window in windows if window.length == length]
        slots = length if strategy.schedule is None else strategy.schedule.window
        count = size or max(1, 4096 // slots)
        for start in range(0, len(group), count):
            batches.append(group[start : start + count])
    return batches


def summarize_length(windows: Sequence[Window], values: Sequence[Record], length: int) -> Record:
    """Perplexity at a length, with its 95 % interval over texts.

    Of one text, over stretches of that length: the windows that begin in one share their tokens.
    """
    losses = []  # of the windows that are as long, each a pair: window, loss
    for window, value in zip(windows, values, strict=True):
        if window.length >= length:
            losses.append((window, value["sums"][str(length)]))
    documents = {window.document for window, _ in losses}
    units: dict[int, list[float]] = {}
    for window, loss in losses:
        unit = window.document if len(documents) > 1 else window.start // length
        units.setdefault(unit, []).append(loss)
    sums = []
    counts = []
    for unit_losses in units.values():
        sums.append(sum(unit_losses))
        counts.append(len(unit_losses) * (length - 1))
    mean, half = mean_interval(sums, counts)
    return {
        "length": length,
        "perplexity": exp(mean),
        "ci95": None if half is None else [exp(mean - half), exp(mean + half)],
        "tokens": sum(counts),
        "windows": len(losses),
        "documents": len(documents),
    }


def exp(loss: float) -> float:
    """e to the power of a loss; a number, however large."""
    return math.exp(min(loss, 700))  # about where floats end


def format_perplexity(record: Record) -> str:
    """The perplexity of a record, and half the width of its interval."""
    text = f"{record['perplexity']:.2f}"
    if record["ci95"] is not None:
        low, high = record["ci95"]
        text += f" ±{(high - low) / 2:.2f}"
    return text
