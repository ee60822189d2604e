"""The energy of keys and values by frequency, and what keeping its low band costs.

    python -m experiments.spectrum --model smollm2 --data BOOK.txt --plot
    python -m experiments.spectrum --suggest 0.5      # also a ratio for each layer, of this mean

The paper's motivation, on any model. Transformed is what a round of compression transforms: keys
before RoPE and values of the span, that is of a window less its sinks and recent tokens (with
--sinks 0 all of it). Frequency k of n has a period of 2n/k tokens; 0 is the mean over the span,
which in many heads holds most of the energy of keys: figures are given with it, as the paper has
them, and without. Energy is summed over channels and over windows, --limit of them in all [8],
spaced evenly over the texts.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cli
from dct import dct
from experiments import harness, report
from experiments.harness import Document
from experiments.report import Record
from freqkv import FreqKVCache, FreqKVConfig
from model import Llama, LlamaConfig, Rope, causal_attention

NAMES = ["key", "value"]
BANDS = 64  # stretches of the frequencies above 0 in heat maps and records
SHARES = [90, 95, 99]  # of the energy, in percent
TINY = 1e-300  # instead of an energy of 0, to divide by
LEAST = 5  # what --suggest gives a layer at least, in hundredths of its span
MOST = 95

Errors = dict[str, np.ndarray]  # of what -> relative errors [layers, ratios]


# Measuring


class Probe:
    """A strategy that attends as a plain LLaMA does, and measures every layer on the way.

    The output of attention is compared over the last tokens of a window, with caches of so many
    slots fewer: exactly one round of compression has then happened, at each of the ratios. What a
    layer is given is not compressed, so errors are its own, and not those of layers before it.
    """

    def __init__(
        self, model: LlamaConfig, schedule: FreqKVConfig, names: Sequence[str],
        ratios: Sequence[float], advance: Callable[[int], Any] | None = None,
    ) -> None:  # fmt: skip
        layers = model.num_hidden_layers
        self.schedule = schedule
        self.first = schedule.window - count_compared(schedule, max(ratios))  # of those tokens
        self.names = list(names)
        self.ratios = list(ratios)
        self.advance = advance  # told of each layer
        self.energy = np.zeros((layers, 2, model.num_key_value_heads, schedule.span))
        self.outputs = np.zeros(layers)  # sums of squares
        self.differences = np.zeros((len(self.names), layers, len(self.ratios)))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """q [B, H, N, D], k and v [B, K, N, D], not rotated, to out [B, H, N, D]."""
        start = self.schedule.sinks
        stop = start + self.schedule.span
        for kind, x in enumerate((k, v)):
            energy = energies(x[:, :, start:stop]).sum(0)  # [K, n]
            self.energy[layer, kind] += energy.cpu().numpy()

        out = causal_attention(layer, q, k, v, rope)
        exact = out[:, :, self.first :].float()
        self.outputs[layer] += exact.square().sum().item()
        first = self.first
        cache = FreqKVCache(replace(self.schedule, window=first))
        cache(layer, q[:, :, :first], k[:, :, :first], v[:, :, :first], rope)
        for i, name in enumerate(self.names):
            for j, ratio in enumerate(self.ratios):
                # Until a round comes, caches of all operators and ratios hold the same.
                other = copy.deepcopy(cache)
                other.operator = harness.OPERATORS[name]
                other.config = replace(cache.config, ratio=ratio)
                rest = other(layer, q[:, :, first:], k[:, :, first:], v[:, :, first:], rope)
                error = (rest.float() - exact).square().sum().item()
                self.differences[i, layer, j] += error
        if self.advance is not None:
            self.advance(1)
        return out


def count_compared(schedule: FreqKVConfig, ratio: float) -> int:
    """The last t tokens of a window, which follow one round in a cache of t slots fewer than it.

    They fit what the round frees, t <= (1 - ratio) (span - t); an eighth of the window at most.
    """
    fitting = int((1 - ratio) * schedule.span / (2 - ratio))
    if fitting == 0:
        was = f"{ratio:g} with a span of {schedule.span} slots"
        raise ValueError(f"--ratios: was {was}, must be lower: no token would fit after a round")
    return min(fitting, max(schedule.window // 8, 1))


def energies(x: Tensor) -> Tensor:
    """Energy of x [..., n, D] at each frequency, summed over channels: [..., n], float32.

    By Parseval's theorem it sums to the squares of x.
    """
    return dct(x.float(), dim=-2).square().sum(-1)


def measure_band(energy: np.ndarray, percent: float) -> float:
    """The smallest share of the frequencies [n], from the lowest up, that holds so much energy."""
    held = energy.cumsum()
    return float(np.argmax(100 * held >= percent * held[-1]) + 1) / len(energy)


def measure_loss(energy: np.ndarray, ratio: float) -> float:
    """Relative error of a signal of which the int(ratio n) lowest of n frequencies are kept."""
    return math.sqrt(energy[int(ratio * len(energy)) :].sum() / max(energy.sum(), TINY))


def measure_errors(probe: Probe) -> Errors:
    """Relative errors of keys, of values, and of attention's output by strategy."""
    energy = probe.energy.sum(2)  # [layers, 2, n]
    errors = {}
    for kind, name in enumerate(NAMES):
        rows = []
        for layer in energy[:, kind]:
            rows.append([measure_loss(layer, ratio) for ratio in probe.ratios])
        errors[name] = np.array(rows)
    for name, squares in zip(probe.names, probe.differences, strict=True):
        errors[f"output, {name}"] = np.sqrt(squares / np.maximum(probe.outputs, TINY)[:, None])
    return errors


def suggest(energy: np.ndarray, mean: float) -> tuple[list[float], np.ndarray]:
    """A ratio for each layer, with the given mean, from energy [layers, 2, n]; and what it holds.

    The cut-off by energy: all layers hold the same share of their energy, keys and values counted
    alike. Each hundredth of a span goes to the layer that holds least so far, so the slots of all
    together are those of one ratio. The mean over the span is left out: any ratio keeps it, and
    where it is large it would hide what tells one token from another.
    """
    rest = energy[:, :, 1:]
    shares = rest / np.maximum(rest.sum(-1, keepdims=True), TINY)
    held = shares.mean(1).cumsum(-1)  # [layers, n - 1]: by the 2 .. n lowest frequencies
    held = np.pad(held, ((0, 0), (2, 0)))  # [layers, n + 1]: by the 0 .. n lowest
    places = np.linspace(0, 1, held.shape[1])
    hundredths = np.linspace(0, 1, 101)
    kept = np.stack([np.interp(hundredths, places, layer) for layer in held])  # [layers, 101]
    chosen = np.full(len(kept), LEAST)
    layers = np.arange(len(kept))
    for _ in range(round(100 * mean * len(kept)) - chosen.sum()):
        holds = np.where(chosen < MOST, kept[layers, chosen], np.inf)
        # Of those that hold equally little, the one that has least.
        chosen[np.where(holds == holds.min(), chosen, MOST).argmin()] += 1
    return (chosen / 100).tolist(), kept[layers, chosen]


# Records


def group_energy(energy: np.ndarray) -> list[tuple[Record, np.ndarray]]:
    """Each layer's keys and values, together ("all") and by head: what they are, energy [n]."""
    groups = []
    for layer, kinds in enumerate(energy):
        for name, heads in zip(NAMES, kinds, strict=True):
            about = {"layer": layer, "kind": name}
            groups.append((about | {"head": "all"}, heads.sum(0)))
            for head, values in enumerate(heads):
                groups.append((about | {"head": head}, values))
    return groups


def record_heads(energy: np.ndarray) -> list[Record]:
    """The share of the energy in the mean, and of the band that holds 90, 95, 99 % of it."""
    records = []
    for record, values in group_energy(energy):
        record["mean_share"] = values[0] / max(values.sum(), TINY)
        for percent in SHARES:
            record[f"band_{percent}"] = measure_band(values, percent)
        for percent in SHARES:
            record[f"band_{percent}_without_mean"] = measure_band(values[1:], percent)
        records.append(record)
    return records


def record_bands(energy: np.ndarray) -> list[Record]:
    """The share of the energy in each band; bounds as shares of all frequencies."""
    n = energy.shape[-1]
    cuts = band_edges(n)
    records = []
    for about, values in group_energy(energy):
        shares = np.add.reduceat(values, cuts[:-1]) / max(values.sum(), TINY)
        for start, stop, share in zip(cuts[:-1] / n, cuts[1:] / n, shares, strict=True):
            records.append(about | {"from": start, "to": stop, "share": share})
    return records


def band_edges(n: int) -> np.ndarray:
    """Where bands begin, and the last ends: frequency 0 for itself, then even stretches."""
    return np.unique([0, *np.linspace(1, n, BANDS + 1).round().astype(int)])


def record_errors(errors: Errors, ratios: Sequence[float]) -> list[Record]:
    records = []
    for name, rows in errors.items():
        for layer, row in enumerate(rows):
            for ratio, error in zip(ratios, row, strict=True):
                records.append({"of": name, "layer": layer, "ratio": ratio, "error": error})
    return records


# The script


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="experiments.spectrum", description=__doc__)
    harness.add_flags(parser)
    add = parser.add_argument
    ratios = cli.several(cli.real(0, 1, below=True))
    text = "shares of the span to keep, for errors [%(default)s]"
    add("--ratios", type=ratios, default="0.125,0.25,0.5,0.75", metavar="R,R", help=text)
    mean = cli.real(LEAST / 100, MOST / 100)
    text = "print a ratio for each layer, with the mean R, for perplexity --layer-ratios"
    add("--suggest", type=mean, metavar="R", help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.ratio is not None:
        raise ValueError("--ratio: was given, must be --ratios here")
    if args.plot:
        report.check_plots()
    folder = report.open_folder(args.out, "spectrum", args.model, args.adapter)
    model, tokenizer = cli.load(args)
    schedule = harness.require_paper(cli.choose_schedule(args, model.config))
    vocab = model.config.vocab_size
    texts = harness.read_documents(args.data, args.bin_dtype, args.bos, tokenizer, vocab)
    names = [name for name in args.strategies if name != "full"]
    probe = Probe(model.config, schedule, names, sorted(set(args.ratios)))
    windows = choose_windows(texts, schedule.window, args.limit or 8)
    read = cli.format_count(len(windows), "window")
    print(f"{read} of {schedule.window:,} tokens, of {cli.format_count(len(texts), 'text')}\n")

    measure(model, probe, windows)
    energy = probe.energy
    if not np.isfinite(energy).all():
        raise ValueError("keys and values: were not numbers, must be; a weight may be damaged")
    heads = record_heads(energy)
    errors = measure_errors(probe)

    print(f"{format_heads(heads)}\n")
    print(f"{format_errors(errors, probe.ratios)}\n")
    if args.suggest is not None:
        ratios, held = suggest(energy.sum(2), args.suggest)
        print(f"--layer-ratios {','.join(f'{ratio:g}' for ratio in ratios)}")
        print(f"holds {held.min():.1%} or more of each layer's energy besides the mean\n")
    settings = vars(args) | harness.describe_place(model)
    report.write_results(folder, "spectrum", heads, settings)
    report.write_results(folder, "spectrum_bands", record_bands(energy), settings)
    report.write_results(folder, "spectrum_errors", record_errors(errors, probe.ratios), settings)
    if args.plot:
        report.draw_picture(folder / "spectrum_bands.png", draw_bands, energy)
        report.draw_picture(folder / "spectrum_held.png", draw_held, energy)
        report.draw_picture(folder / "spectrum_errors.png", draw_errors, errors, probe.ratios)


def choose_windows(texts: Sequence[Document], length: int, limit: int) -> list[Tensor]:
    """At most `limit` stretches of that length, evenly spaced over the texts: [length] each."""
    windows = harness.cut_windows(texts, [length], length)
    if not windows:
        longest = max(len(text.tokens) for text in texts)
        raise ValueError(f"--window: was {length}, must be at most the longest text's {longest}")
    places = np.linspace(0, len(windows) - 1, min(limit, len(windows))).round().astype(int)
    chosen = [windows[place] for place in places]
    return [texts[window.document].cut(window.start, length) for window in chosen]


def measure(model: Llama, probe: Probe, windows: Sequence[Tensor]) -> None:
    """Have the model read each of the windows through the probe."""
    device = model.norm.weight.device
    with tqdm(total=len(windows) * len(probe.outputs), unit=" layers") as bar, torch.no_grad():
        probe.advance = bar.update
        for window in windows:
            model.hidden(window[None].to(device), probe)


# Tables


def format_heads(heads: Sequence[Record]) -> str:
    """The bands of each layer, all heads together, in percent."""
    names = [name for name in heads[0] if name not in ("layer", "kind", "head")]
    groups = {}
    for kind in NAMES:
        rows = []
        for record in heads:
            if record["kind"] == kind and record["head"] == "all":
                rows.append([100 * record[name] for name in names])
        groups[kind] = np.array(rows)
    head = ["mean", "90", "95", "99", "90*", "95*", "99*"]
    about = "energy in the mean, and lowest band that holds 90, 95, 99 % of all (* but the mean), %"
    return f"{about}\n{format_layers(groups, head, '.1f')}"


def format_errors(errors: Errors, ratios: Sequence[float]) -> str:
    """The errors of each layer, by the ratio that is kept."""
    groups = {name.removeprefix("output, "): rows for name, rows in errors.items()}
    head = [f"{ratio:g}" for ratio in ratios]
    return f"relative error, by the ratio that is kept\n{format_layers(groups, head, '.2f')}"


def format_layers(groups: dict[str, np.ndarray], names: Sequence[str], form: str) -> str:
    """A table of groups of columns [layers, len(names)], and their means over layers."""
    head = ["layer"]
    for group in groups:
        head.append(f"{group}: {names[0]}")
        head += names[1:]
    values = np.hstack(list(groups.values()))
    rows = []
    for layer, row in enumerate(values):
        rows.append([str(layer), *(f"{x:{form}}" for x in row)])
    rows.append(["all", *(f"{x:{form}}" for x in values.mean(0))])
    return report.format_table(head, rows)


# Pictures


def draw_bands(figure: Any, energy: np.ndarray) -> None:
    """A row for each head of each layer; the mean at the left edge, as wide as a band."""
    figure.set_size_inches(9, 4.2)
    layers, _, heads, n = energy.shape
    cuts = band_edges(n)
    bands = np.add.reduceat(energy, cuts[:-1], -1) / np.diff(cuts)
    average = np.maximum(energy[..., 1:].mean(-1, keepdims=True), TINY)
    bands = np.log2(np.maximum(bands / average, 1e-3))
    low, high = np.quantile(bands[..., 1:], [0.002, 0.998])
    panels = figure.subplots(1, 2, sharey=True)
    for kind, axes in enumerate(panels):
        image = axes.imshow(
            bands[:, kind].reshape(layers * heads, -1), vmin=low, vmax=high, cmap="Greys",
            extent=(-1 / (len(cuts) - 2), 1, layers - 0.5, -0.5), aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axes.set(title=f"{NAMES[kind]}s", xlabel="frequency (share of the band)")
    panels[0].set_ylabel("layer (a row for each head)")
    label = "log2 of energy / average above frequency 0\n(the mean, left edge: off the scale)"
    figure.colorbar(image, ax=panels, extend="both", label=label)


def draw_held(figure: Any, energy: np.ndarray) -> None:
    """The share of the energy in the lowest frequencies, by how many, of some layers."""
    figure.set_size_inches(9, 4.2)
    layers = len(energy)
    n = energy.shape[-1]
    counts = np.unique(np.geomspace(1, n, 20).round().astype(int))  # of the lowest frequencies
    some = np.unique(np.linspace(0, layers - 1, 5).round().astype(int)).tolist()
    panels = figure.subplots(1, 2, sharey=True)
    for kind, axes in enumerate(panels):
        curves = {}
        for layer in some:
            held = energy[layer, kind].sum(0).cumsum()
            curves[f"layer {layer}"] = (counts / n, held[counts - 1] / max(held[-1], TINY))
        report.draw_curves(axes, curves)
        axes.set(title=f"{NAMES[kind]}s", xscale="log", ylim=(0, 1.02))
    report.add_legend(figure)
    figure.supxlabel("lowest frequencies (share of the band; the first point is the mean)", size=10)
    panels[0].set_ylabel("share of the energy that they hold")


def draw_errors(figure: Any, errors: Errors, ratios: Sequence[float]) -> None:
    """The mean over layers of each error, by the ratio that is kept."""
    axes = figure.subplots()
    report.draw_curves(axes, {name: (ratios, rows.mean(0)) for name, rows in errors.items()})
    report.add_legend(figure)
    axes.set(xlabel="ratio (share of the span that is kept)", ylim=(0, None))
    axes.set_ylabel("relative error, mean over layers")


if __name__ == "__main__":
    cli.run(main, "experiments.spectrum", finish=True)
