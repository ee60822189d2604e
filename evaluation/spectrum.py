"""The energy of keys and values by frequency, and what keeping its low band costs.

    python evaluate.py spectrum --model smollm2 --data BOOK.txt --plot
    python evaluate.py spectrum --suggest 0.5      # also a ratio for each layer, of this mean

The paper's motivation, on any model. Transformed is what a round of compression transforms: keys
before RoPE and values of the span, that is of a window less its sinks and recent tokens (with
--sinks 0 all of it). Frequency k of n has a period of 2n/k tokens; 0 is the mean over the span,
which in many heads holds most of the energy of keys: figures are given with it, as the paper has
them, and without. Energy is summed over channels and over windows, --limit of them in all [8],
spaced evenly over the texts.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cli
from dct import dct
from evaluation.harness import OPERATORS, Bench
from evaluation.perplexity import windows
from evaluation.report import lines, picture, table, write_results
from freqkv import FreqKVCache, FreqKVConfig
from model import Rope, causal_attention

KINDS = ("key", "value")
BANDS = 64  # stretches of the frequencies above 0 in heat maps and records
SHARES = (90, 95, 99)  # of the energy, in percent
TINY = 1e-300  # instead of an energy of 0, to divide by
LEAST, MOST = 5, 95  # what --suggest gives a layer, in hundredths of its span


def add_flags(add: Callable[..., object]) -> None:
    text = "shares of the span to keep, for errors [%(default)s]"
    add("--ratios", type=cli.numbers(float, 0, 1), default="0.125,0.25,0.5,0.75", help=text)
    one = cli.number(float, LEAST / 100, MOST / 100)
    add("--suggest", type=one, metavar="R", help="print a ratio for each layer, with the mean R")


class Probe:
    """A strategy that attends as a plain LLaMA does, and measures every layer on the way.

    The output of attention is compared over the last `queries` tokens, with caches of so many
    slots fewer: exactly one round of compression has then happened, at each of the ratios. What a
    layer is given is not compressed, so errors are its own, and not those of layers before it.
    """

    advance: Callable[[int], Any] = id  # told of each layer

    def __init__(self, bench: Bench, ratios: Sequence[float]) -> None:
        config, model = bench.config, bench.model.config
        self.span = slice(config.sinks, config.sinks + config.span)
        self.first = config.window - queries(config, max(ratios))  # of the tokens compared
        self.config = replace(config, window=self.first)
        self.ways = [*product((name for name in bench.strategies if name != "full"), ratios)]
        layers, heads = model.num_hidden_layers, model.num_key_value_heads
        self.energy = np.zeros((layers, len(KINDS), heads, config.span))
        self.squares = np.zeros((layers, 1 + len(self.ways)))  # of outputs, and of each's error

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """Unrotated q [B, H, N, D]; k, v [B, K, N, D] to out [B, H, N, D]."""
        out = causal_attention(layer, q, k, v, rope)
        band = spectrum(torch.stack((k, v))[..., self.span, :])  # [2, B, K, n]
        self.energy[layer] += band.sum(1).cpu().numpy()
        full, rest = zip(*(x.tensor_split((self.first,), dim=2) for x in (q, k, v)), strict=True)
        exact, errors = out[:, :, self.first :].float(), []
        filled = FreqKVCache(self.config)
        filled(layer, *full, rope)
        for name, ratio in self.ways:
            cache = copy.deepcopy(filled)  # until a round comes all are the same
            cache.config, cache.operator = replace(self.config, ratio=ratio), OPERATORS[name]
            errors.append(cache(layer, *rest, rope).float() - exact)
        self.squares[layer] += [x.square().sum().item() for x in (exact, *errors)]
        self.advance(1)
        return out


def spectrum(x: Tensor) -> Tensor:
    """Energy of x [..., n, D] at each frequency, summed over channels: [..., n], float32.

    By Parseval's theorem it sums to the squares of x.
    """
    return dct(x.float(), dim=-2).square().sum(-1)


def queries(config: FreqKVConfig, ratio: float) -> int:
    """The last t tokens of a window, which follow one round in a cache of t slots fewer than it.

    They fit what the round frees, t <= (1 - ratio) (span - t); an eighth of the window at most.
    """
    fitting = int((1 - ratio) * config.span / (2 - ratio))
    if not fitting:
        was = f"{ratio:g} with a span of {config.span} slots"
        raise ValueError(f"--ratios: was {was}, must be lower: no token would fit after a round")
    return min(fitting, max(config.window // 8, 1))


def band(energy: np.ndarray, percent: float) -> float:
    """The smallest share of the frequencies [n], from the lowest up, that holds so much energy."""
    held = energy.cumsum()
    return float(np.argmax(100 * held >= percent * held[-1]) + 1) / len(energy)


def lost(energy: np.ndarray, ratio: float) -> float:
    """Relative error of a signal of which the int(ratio n) lowest of n frequencies are kept."""
    return math.sqrt(energy[int(ratio * len(energy)) :].sum() / max(energy.sum(), TINY))


def suggest(energy: np.ndarray, mean: float) -> tuple[list[float], np.ndarray]:
    """A ratio for each layer, with the given mean, from energy [layers, 2, n]; and what it holds.

    The cut-off by energy: all layers hold the same share of their energy, keys and values counted
    alike. Each hundredth of a span goes to the layer that holds least so far, so the slots of all
    together are those of one ratio. The mean over the span is left out: any ratio keeps it, and
    where it is large it would hide what tells one token from another.
    """
    rest = energy[..., 1:] / np.maximum(energy[..., 1:].sum(-1, keepdims=True), TINY)
    held = np.pad(rest.mean(1).cumsum(-1), ((0, 0), (2, 0)))  # by the 0 .. n lowest frequencies
    places, at = np.linspace(0, 1, held.shape[1]), np.linspace(0, 1, 101)
    kept = np.stack([np.interp(at, places, layer) for layer in held])  # [layers, 101]
    count = round(100 * mean * len(kept)) - LEAST * len(kept)
    order = np.argsort(kept[:, LEAST:MOST].T, axis=None, kind="stable")  # equal ones in turn
    chosen = LEAST + np.bincount(order[:count] % len(kept), minlength=len(kept))
    return (chosen / 100).tolist(), kept[np.arange(len(kept)), chosen]


def run(bench: Bench) -> None:
    """evaluate.py spectrum"""
    args, layers = bench.args, bench.model.config.num_hidden_layers
    ratios, length, texts = sorted(set(args.ratios)), bench.config.window, bench.documents()
    if not (found := windows(texts, [length], length)):
        longest = max(len(text.tokens) for text in texts)
        raise ValueError(f"--window: was {length}, must be at most the longest text's {longest}")
    some = np.linspace(0, len(found) - 1, min(args.limit or 8, len(found))).round().astype(int)
    probe = Probe(bench, ratios)
    read = cli.count(len(some), "window")
    print(f"{read} of {length:,} tokens, of {cli.count(len(texts), 'text')}\n")
    with tqdm(total=len(some) * layers, unit=" layers") as bar, torch.no_grad():
        probe.advance = bar.update
        for window in (found[i] for i in some):
            tokens = texts[window.document][window.start : window.start + length]
            bench.model.hidden(tokens[None].to(bench.model.norm.weight.device), probe)
    energy, out = probe.energy, args.out
    heads, errors = by_head(energy), by_ratio(probe, ratios)
    print(f"{band_table(heads)}\n\nrelative error, by the ratio that is kept")
    short = {name.removeprefix("output, "): rows for name, rows in errors.items()}
    print(by_layer(short, [f"{ratio:g}" for ratio in ratios], ".2f"), end="\n\n")
    if args.suggest:
        chosen, held = suggest(energy.sum(2), args.suggest)
        print(f"--ratio {','.join(f'{ratio:g}' for ratio in chosen)}")
        print(f"holds {held.min():.1%} or more of each layer's energy besides the mean\n")
    print(write_results("spectrum", heads, args))
    print(write_results("spectrum_bands", by_band(energy), args))
    print(write_results("spectrum_errors", error_records(errors, ratios), args))
    if args.plot:
        print(picture(out / "spectrum_bands.png", lambda f: draw_bands(f, energy), (9, 4.2)))
        print(picture(out / "spectrum_held.png", lambda f: draw_held(f, energy), (9, 4.2)))
        print(picture(out / "spectrum_errors.png", lambda f: draw_errors(f, errors, ratios)))


# Records


def series(energy: np.ndarray) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Each layer's keys and values, together ("all") and by head: what they are, energy [n]."""
    for (layer, kind), heads in ((i, energy[i]) for i in np.ndindex(energy.shape[:2])):
        for head, values in (("all", heads.sum(0)), *enumerate(heads)):
            yield {"layer": layer, "kind": KINDS[kind], "head": head}, values


def by_head(energy: np.ndarray) -> list[dict[str, Any]]:
    """The share of the energy in the mean, and of the band that holds 90, 95, 99 % of it."""
    records = []
    for about, values in series(energy):
        record = about | {"mean_share": values[0] / max(values.sum(), TINY)}
        record |= {f"band_{p}": band(values, p) for p in SHARES}
        records.append(record | {f"band_{p}_without_mean": band(values[1:], p) for p in SHARES})
    return records


def edges(n: int) -> np.ndarray:
    """Where bands begin, and the last ends: frequency 0 for itself, then even stretches."""
    return np.unique([0, *np.linspace(1, n, BANDS + 1).round().astype(int)])


def by_band(energy: np.ndarray) -> list[dict[str, Any]]:
    """The share of the energy in each band; bounds as shares of all frequencies."""
    n, cuts = energy.shape[-1], edges(energy.shape[-1])
    records = []
    for about, values in series(energy):
        shares = np.add.reduceat(values, cuts[:-1]) / max(values.sum(), TINY)
        for start, stop, share in zip(cuts[:-1] / n, cuts[1:] / n, shares, strict=True):
            records.append(about | {"from": start, "to": stop, "share": share})
    return records


def by_ratio(probe: Probe, ratios: Sequence[float]) -> dict[str, np.ndarray]:
    """Relative errors [layers, ratios]: of keys, of values, of attention's output by strategy."""
    energy, size = probe.energy.sum(2), np.maximum(probe.squares[:, :1], TINY)
    found = {
        kind: np.array([[lost(x, ratio) for ratio in ratios] for x in energy[:, i]])
        for i, kind in enumerate(KINDS)
    }
    names = dict.fromkeys(f"output, {name}" for name, _ in probe.ways)
    outputs = np.sqrt(probe.squares[:, 1:] / size).reshape(len(size), len(names), len(ratios))
    return found | {name: outputs[:, i] for i, name in enumerate(names)}


def error_records(errors: dict[str, np.ndarray], ratios: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"of": name, "layer": layer, "ratio": ratios[i], "error": error}
        for name, rows in errors.items()
        for (layer, i), error in np.ndenumerate(rows)
    ]


# The terminal and pictures


def band_table(heads: Sequence[dict[str, Any]]) -> str:
    names = ["mean", *(f"{p}{x}" for x in ("", "*") for p in SHARES)]
    rows = [[100 * x for x in [*r.values()][3:]] for r in heads if r["head"] == "all"]
    groups = {kind: np.array(rows[i :: len(KINDS)]) for i, kind in enumerate(KINDS)}
    about = "energy in the mean, and lowest band that holds 90, 95, 99 % of all (* but the mean), %"
    return f"{about}\n{by_layer(groups, names, '.1f')}"


def by_layer(groups: dict[str, np.ndarray], names: Sequence[str], form: str) -> str:
    """A table of groups of columns [layers, len(names)], and their means over layers."""
    head = [name for group in groups for name in (f"{group}: {names[0]}", *names[1:])]
    rows = np.hstack([*groups.values()])
    every = [*enumerate(rows), ("all", rows.mean(0))]
    return table(["layer", *head], [[str(i), *(f"{x:{form}}" for x in row)] for i, row in every])


def draw_bands(figure: Any, energy: np.ndarray) -> None:
    """A row for each head of each layer; the mean at the left edge, as wide as a band."""
    layers, _, heads, n = energy.shape
    cuts = edges(n)
    bands = np.add.reduceat(energy, cuts[:-1], -1) / np.diff(cuts)
    average = np.maximum(energy[..., 1:].mean(-1, keepdims=True), TINY)
    bands = np.log2(np.maximum(bands / average, 1e-3))
    low, high = np.quantile(bands[..., 1:], [0.002, 0.998])
    every = figure.subplots(1, len(KINDS), sharey=True)
    for axes, kind, rows in zip(every, KINDS, bands.swapaxes(0, 1), strict=True):
        image = axes.imshow(
            rows.reshape(layers * heads, -1), vmin=low, vmax=high, cmap="Greys", aspect="auto",
            extent=(-1 / (len(cuts) - 2), 1, layers - 0.5, -0.5), interpolation="nearest",
        )  # fmt: skip
        axes.set(title=f"{kind}s", xlabel="frequency (share of the band)")
    every[0].set_ylabel("layer (a row for each head)")
    label = "log2 of energy / average above frequency 0\n(the mean, left edge: off the scale)"
    figure.colorbar(image, ax=every, extend="both", label=label)


def draw_held(figure: Any, energy: np.ndarray) -> None:
    layers, n = len(energy), energy.shape[-1]
    counts = np.unique(np.geomspace(1, n, 20).round().astype(int))  # of the lowest frequencies
    some = np.unique(np.linspace(0, layers - 1, 5).round().astype(int)).tolist()
    every = figure.subplots(1, len(KINDS), sharey=True)
    for kind, axes in enumerate(every):
        held = {i: energy[i, kind].sum(0).cumsum() for i in some}
        shares = {i: x[counts - 1] / max(x[-1], TINY) for i, x in held.items()}
        lines(axes, {f"layer {i}": (counts / n, y) for i, y in shares.items()})
        axes.set(title=f"{KINDS[kind]}s", xscale="log", ylim=(0, 1.02))
    figure.supxlabel("lowest frequencies (share of the band; the first point is the mean)", size=10)
    every[0].set_ylabel("share of the energy that they hold")


def draw_errors(figure: Any, errors: dict[str, np.ndarray], ratios: Sequence[float]) -> None:
    axes = figure.subplots()
    lines(axes, {name: (ratios, rows.mean(0)) for name, rows in errors.items()})
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")  # off the curves
    axes.get_legend().remove()
    axes.set(xlabel="ratio (share of the span that is kept)", ylim=(0, None))
    axes.set_ylabel("relative error, mean over layers")
