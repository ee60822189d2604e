"""Perplexity by length of text, by position, and over a grid of settings.

The protocol of the paper: windows of the given length every `stride` tokens of each text; all
tokens of a window but its first are predicted, and counted alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import cli
from evaluation.harness import Bench, Document, interval, new_cache, slot_settings, token_losses
from evaluation.report import by_strategy, lines, log_ticks, picture, table, write_results
from freqkv import FreqKVConfig

BINS = 64  # stretches of the longest window, whose mean losses make the curve by position
Setup = tuple[str, FreqKVConfig]  # a strategy and its schedule
Found = dict[str, Any]  # of a window: its loss summed to each length, and the mean in each bin


def add_flags(
    add: Callable[..., object], lengths: str = "with commas [the window, 2, 4, 8 times it]"
) -> None:
    add("--lengths", type=cli.numbers(int, 2), metavar="N,N", help=f"tokens, {lengths}")
    text = "windows read at a time [as many as fill 4096 slots]"
    add("--batch-size", type=cli.number(int, 1), help=text)
    add("--stride", type=cli.number(int, 1), default=256, help="between windows [%(default)s]")


def add_grid_flags(add: Callable[..., object]) -> None:
    add_flags(add, "one number [4 times the window]")
    add("--ratios", type=cli.numbers(float, 0, 1), default="0.25,0.5,0.75", help="[%(default)s]")
    add("--sink-counts", type=cli.numbers(int, 0), default="0,4", help="[%(default)s]")
    text = "[0, an eighth, a quarter and half of the window]"
    add("--recents", type=cli.numbers(int, 0), help=text)


@dataclass(frozen=True)
class Window:
    document: int
    start: int
    length: int  # the longest of --lengths that fits


def windows(
    texts: Sequence[Document], lengths: Sequence[int], stride: int, limit: int = 0
) -> list[Window]:
    """Where to begin reading, and how far to read: what is shorter is measured on the way.

    limit: of a text, only so many of the windows of its longest length, evenly spaced; 0: all.
    """
    found = []
    for number, text in enumerate(texts):
        fitting = [length for length in lengths if length <= len(text.tokens)]
        least = (max if limit else min)(fitting, default=len(text.tokens) + 1)
        starts = np.arange(0, len(text.tokens) - least + 1, stride)
        if 0 < limit < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, limit).round().astype(int)]
        for start in starts.tolist():
            longest = max(n for n in fitting if start + n <= len(text.tokens))
            found.append(Window(number, start, longest))
    return found


def measure(
    bench: Bench, name: str, setups: Sequence[Setup], texts: Sequence[Document],
    found: Sequence[Window], lengths: Sequence[int],
) -> dict[Setup, list[Found]]:  # fmt: skip
    """What each setup loses in each window; what the journal of `name` has is not read again."""
    journal = bench.journal(name, lengths, *(text.digest() for text in texts))
    # Batches are cut from all windows, known or not: a run that goes on repeats them to the bit.
    todo = [
        (setup, batch)
        for setup, length in product(setups, sorted({x.length for x in found}))
        for batch in batches(bench, setup, [x for x in found if x.length == length])
        if any((setup, window) not in journal for window in batch)
    ]
    total = sum(len(batch) * (batch[0].length - 1) for _, batch in todo)
    with tqdm(total=total, unit=" tokens", unit_scale=True) as bar:
        for setup, batch in todo:
            bar.set_description(setup[0])
            length = batch[0].length
            tokens = torch.stack([texts[x.document][x.start : x.start + length] for x in batch])
            cache = new_cache(*setup, length)
            rows = token_losses(bench.model, tokens, cache, bench.args.chunk, bar.update)
            for window, row in zip(batch, rows.double(), strict=True):
                sums = {str(n): row[: n - 1].sum().item() for n in lengths if n <= length}
                means = [x.mean().item() for x in row.tensor_split(min(BINS, length - 1))]
                journal[setup, window] = {"sums": sums, "bins": means}
    return {setup: [journal[setup, window] for window in found] for setup in setups}


def batches(bench: Bench, setup: Setup, group: Sequence[Window]) -> list[Sequence[Window]]:
    """Windows of one length, in batches of --batch-size, else of about 4096 slots."""
    slots = group[0].length if setup[0] == "full" else setup[1].window
    size = bench.args.batch_size or max(1, 4096 // slots)
    return [group[i : i + size] for i in range(0, len(group), size)]


def by_length(found: Sequence[Window], values: Sequence[Found], length: int) -> dict[str, Any]:
    """Perplexity at a length, with its 95 % interval over texts.

    Of one text, over stretches of that length: the windows that begin in one share their tokens.
    """
    fitting = [(w, v) for w, v in zip(found, values, strict=True) if w.length >= length]
    documents = {window.document for window, _ in fitting}
    units: dict[int, list[float]] = {}
    for window, value in fitting:
        unit = window.document if len(documents) > 1 else window.start // length
        units.setdefault(unit, []).append(value["sums"][str(length)])
    counts = [len(losses) * (length - 1) for losses in units.values()]
    mean, half = interval([sum(losses) for losses in units.values()], counts)
    ends = None if half is None else [exp(mean - half), exp(mean + half)]
    sizes = {"tokens": sum(counts), "windows": len(fitting), "documents": len(documents)}
    return {"length": length, "perplexity": exp(mean), "ci95": ends} | sizes


def exp(loss: float) -> float:
    return math.exp(min(loss, 700))  # about where floats end


def checked(bench: Bench, lengths: Sequence[int] | None) -> tuple[list[Document], list[int]]:
    """The texts, and the lengths in order; ValueError for one that no text has.

    By default the window, twice that and so on, as far as the longest text goes, to eight times.
    """
    texts, window = bench.documents(), bench.config.window
    longest = max(texts, key=lambda text: len(text.tokens))
    most = len(longest.tokens)
    default = [window << i for i in range(4) if 2 <= window << i <= most]
    chosen = sorted(set(lengths or default))
    if not chosen or chosen[-1] > most:
        wanted = chosen[-1] if chosen else max(window, 2)
        was = f"{wanted} tokens, but the longest text, {longest.name}, has {most}"
        raise ValueError(f"--lengths: was {was}; must be at most that")
    return texts, chosen


def summary(texts: Sequence[Document], found: Sequence[Window], setups: int) -> str:
    """What is about to be read, and what is not."""
    total = setups * sum(window.length for window in found)
    short = len(texts) - len({window.document for window in found})
    left = f"; {cli.count(short, 'text')} too short, left out" if short else ""
    read = f"{cli.count(len(found), 'window')} of {cli.count(len(texts) - short, 'text')}"
    return f"{read}{left}; {total:,} tokens in all"


def run(bench: Bench) -> None:
    """evaluate.py perplexity"""
    args = bench.args
    texts, lengths = checked(bench, args.lengths)
    found = windows(texts, lengths, args.stride, args.limit)
    setups = [(strategy, bench.config) for strategy in bench.strategies]
    print(summary(texts, found, len(setups)))
    values = measure(bench, "perplexity", setups, texts, found, lengths)
    records = [
        {"strategy": setup[0]} | by_length(found, values[setup], length) | slot_settings(*setup)
        for setup in setups
        for length in lengths
    ]
    curves = [
        {"strategy": strategy, "tokens_from": start, "tokens_to": stop, "loss": loss}
        for strategy, config in setups
        for start, stop, loss in by_position(found, values[strategy, config])
    ]
    head = ["perplexity ±95%", *(f"{length:,}" for length in lengths)]
    of = {(record["strategy"], record["length"]): record for record in records}
    print(table(head, [[s, *(shown(of[s, n]) for n in lengths)] for s in bench.strategies]))
    print(write_results("perplexity", records, args))
    print(write_results("perplexity_by_position", curves, args))
    if args.plot:
        print(picture(args.out / "perplexity.png", lambda figure: draw_lengths(figure, records)))
        print(picture(args.out / "perplexity_by_position.png", lambda f: draw_curve(f, curves)))


def shown(record: dict[str, Any]) -> str:
    ends = record["ci95"]
    half = "" if ends is None else f" ±{(ends[1] - ends[0]) / 2:.2f}"
    return f"{record['perplexity']:.2f}{half}"


def by_position(found: Sequence[Window], values: Sequence[Found]) -> list[tuple[int, int, float]]:
    """Mean loss in each stretch (from, to) of the longest windows, in tokens read before it."""
    most = max(window.length for window in found)
    curves = [v["bins"] for w, v in zip(found, values, strict=True) if w.length == most]
    stops = np.cumsum([len(x) for x in np.array_split(np.arange(most - 1), len(curves[0]))])
    means = np.mean(curves, axis=0)
    return list(zip([1, *(stops[:-1] + 1).tolist()], stops.tolist(), means.tolist(), strict=True))


def draw_lengths(figure: Any, records: Sequence[dict[str, Any]]) -> None:
    axes = figure.subplots()
    of = by_strategy(records)
    curves = {n: ([r["length"] for r in x], [r["perplexity"] for r in x]) for n, x in of.items()}
    lines(axes, curves)
    axes.set(xlabel="length of text (tokens)", ylabel="perplexity a token")
    log_ticks(axes, sorted({record["length"] for record in records}))
    axes.set_title(clip(axes, [y for _, ys in curves.values() for y in ys]), fontsize=9)


def draw_curve(figure: Any, curves: Sequence[dict[str, Any]]) -> None:
    """Loss by place, and under it how far each strategy is above the best, free of the text's own
    ups and downs."""
    losses = {name: np.array([p["loss"] for p in x]) for name, x in by_strategy(curves).items()}
    first = next(iter(by_strategy(curves).values()))
    middle = [(p["tokens_from"] + p["tokens_to"]) / 2 for p in first]
    best = min(losses, key=lambda name: losses[name].mean())
    figure.set_size_inches(7, 6 if len(losses) > 1 else 4.2)
    axes, *below = figure.subplots(min(len(losses), 2), sharex=True, squeeze=False)[:, 0]
    lines(axes, {name: (middle, y.tolist()) for name, y in losses.items()})
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(clip(axes, [point["loss"] for point in curves]), fontsize=9)
    for under in below:
        lines(under, {name: (middle, (y - losses[best]).tolist()) for name, y in losses.items()})
        under.get_legend().remove()
        under.set_ylabel(f"above {best} (nats)")
        gaps = np.abs([y - losses[best] for name, y in losses.items() if name != best])
        far = 4 * float(np.median(gaps))
        if 0 < far < gaps.max():
            under.set_ylim(-far / 4, far)
    (*below, axes)[0].set_xlabel("place in the text (tokens)")


def clip(axes: Any, values: Sequence[float]) -> str:
    """End the axis at twice the median where a curve leaves for far above; words that say so."""
    top = 2 * float(np.median(values))
    if max(values) <= top:
        return ""
    axes.set_ylim(0.9 * min(values), top)
    return f"cut off at {top:.3g}; the highest is {max(values):.3g}"


# The grid


def ablate(bench: Bench) -> None:
    """evaluate.py ablate"""
    args, base = bench.args, bench.config
    if args.lengths and len(args.lengths) > 1:
        raise ValueError(f"--lengths: was {args.lengths}, must be one for ablate")
    for one, grid in (("ratio", "--ratios"), ("sinks", "--sink-counts"), ("recent", "--recents")):
        if getattr(args, one) is not None:
            raise ValueError(f"--{one}: was given, must be {grid} for ablate")
    if bench.strategies == ("full",):
        raise ValueError("--strategies: was full alone, must have one with slots for ablate")
    texts, lengths = checked(bench, args.lengths or [4 * base.window])
    found = windows(texts, lengths, args.stride, args.limit)
    recents = args.recents or [0, base.window // 8, base.window // 4, base.window // 2]
    grid = product(bench.strategies, args.ratios, args.sink_counts, recents)
    setups: list[Setup] = []
    for strategy, ratio, sinks, recent in grid:
        config = replace(base, ratio=ratio, sinks=sinks, recent=recent)
        setups.append((strategy, base if strategy == "full" else config))
    setups = list(dict.fromkeys(setups))
    print(summary(texts, found, len(setups)))
    values = measure(bench, "ablate", setups, texts, found, lengths)
    records = [
        {"strategy": setup[0]} | slot_settings(*setup) | by_length(found, values[setup], lengths[0])
        for setup in setups
    ]
    head = ["strategy", "ratio", "sinks", "recent", "perplexity ±95%"]
    rows = [[*(str(r.get(name, "")) for name in head[:-1]), shown(r)] for r in records]
    print(table(head, rows))
    print(write_results("ablate", records, args))
    if args.plot:
        print(picture(args.out / "ablate.png", lambda figure: draw_grid(figure, records)))


def draw_grid(figure: Any, records: Sequence[dict[str, Any]]) -> None:
    """A panel for each number of sinks: perplexity against recent, a curve for each ratio."""
    thinned = [record for record in records if record["strategy"] != "full"]
    panels = sorted({(r["strategy"], r["sinks"]) for r in thinned})
    figure.set_size_inches(3.5 * len(panels), 4)
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    values = [record["perplexity"] for record in thinned]
    full = [r["perplexity"] for r in records if r["strategy"] == "full"]
    for axes, (strategy, sinks) in zip(every, panels, strict=True):
        here = [r for r in thinned if (r["strategy"], r["sinks"]) == (strategy, sinks)]
        curves = {}
        for ratio in sorted({r["ratio"] for r in here}):
            points = sorted((r["recent"], r["perplexity"]) for r in here if r["ratio"] == ratio)
            curves[f"ratio {ratio:g}"] = tuple(zip(*points, strict=True))
        lines(axes, curves)
        for y in full if max(full, default=0) < 1.2 * max(values) else ():
            axes.axhline(y, color="0.5", linewidth=1)
        axes.set_title(f"{strategy}, {sinks} sinks", fontsize=10)
        axes.set_xlabel("recent (tokens)")
    every[0].set_ylabel("perplexity a token" + "".join(f" (full: {y:.3g})" for y in full))
    figure.suptitle(clip(every[0], values), fontsize=9)
