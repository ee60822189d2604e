"""Perplexity by length of text and by position, in the paper's protocol.

    python -m experiments.perplexity --limit 64 --plot          # the built-in model
    python -m experiments.perplexity --model smollm2 --data 'books/*.txt' --limit 1

Windows of the given length every --stride tokens of each text; all tokens of a window but its first
are predicted, and counted alike. Strategies run side by side: full (everything), and some that
share one number of slots: freqkv (the low band), distinct (the most distinct keys), window (sinks
and the newest), average (pooling), high (the high band). A measurement that was stopped goes on
where it was when the same command is given again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import cli
from experiments import harness, report
from experiments.harness import Strategy, Window
from experiments.report import Record
from freqkv import FreqKVConfig

NONE = 1e-4  # nats; what differs by less does not differ


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="experiments.perplexity", description=__doc__)
    harness.add_flags(parser)
    harness.add_window_flags(parser, "with commas [the window, 2, 4, 8 times it]")
    text = "measure FreqKV also with a ratio for each layer, as `by-layer`; see spectrum --suggest"
    add = parser.add_argument
    add(
        "--layer-ratios",
        type=cli.several(cli.real(0, 1, below=True), repeats=True),
        metavar="R,R",
        help=text,
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.plot:
        report.check_plots()
    folder = report.open_folder(args.out, "perplexity", args.model, args.adapter)
    model, tokenizer = cli.load(args)
    schedule = cli.choose_schedule(args, model.config)
    strategies = harness.make_strategies(args.strategies, schedule)
    if args.layer_ratios is not None:
        layers = model.config.num_hidden_layers
        paper = harness.require_paper(schedule)
        strategies.append(make_by_layer(paper, args.layer_ratios, layers))
    vocab = model.config.vocab_size
    texts = harness.read_documents(args.data, args.bin_dtype, args.bos, tokenizer, vocab)
    lengths = harness.choose_lengths(args.lengths, texts, schedule.window)
    windows = harness.cut_windows(texts, lengths, args.stride, args.limit)
    print(harness.describe_windows(texts, windows, len(strategies)))

    values = harness.measure_windows(
        model, strategies, texts, windows, lengths, folder / "perplexity.journal.jsonl",
        args.batch_size, args.chunk,
    )  # fmt: skip
    records = []
    points = []
    for strategy in strategies:
        name = {"strategy": strategy.name}
        for length in lengths:
            record = harness.summarize_length(windows, values[strategy], length)
            records.append(name | record | strategy.settings())
        for point in average_positions(windows, values[strategy]):
            points.append(name | point)

    print(format_perplexities(records, lengths))
    settings = vars(args) | harness.describe_place(model)
    report.write_results(folder, "perplexity", records, settings)
    report.write_results(folder, "perplexity_by_position", points, settings)
    if args.plot:
        report.draw_picture(folder / "perplexity.png", draw_lengths, records)
        report.draw_picture(folder / "perplexity_by_position.png", draw_positions, points)


def make_by_layer(schedule: FreqKVConfig, ratios: Sequence[float], layers: int) -> Strategy:
    """FreqKV with these ratios, one for each layer; ValueError for another number of them."""
    if len(ratios) != layers:
        raise ValueError(f"--layer-ratios: were {len(ratios)}, must be {layers}, as many as layers")
    for ratio in ratios:
        replace(schedule, ratio=ratio)  # a ValueError now, for one that cannot be
    return Strategy("by-layer", schedule, tuple(ratios))


def average_positions(windows: Sequence[Window], values: Sequence[Record]) -> list[Record]:
    """Mean loss in each stretch of the longest windows, by the number of tokens read before."""
    longest = max(window.length for window in windows)
    curves = []
    for window, value in zip(windows, values, strict=True):
        if window.length == longest:
            curves.append(value["bins"])
    points = []
    means = np.mean(curves, axis=0).tolist()
    start = 1
    for places, mean in zip(np.array_split(np.arange(longest - 1), len(means)), means, strict=True):
        stop = start + len(places) - 1
        points.append({"tokens_from": start, "tokens_to": stop, "loss": mean})
        start = stop + 1
    return points


def format_perplexities(records: Sequence[Record], lengths: Sequence[int]) -> str:
    """A table: a row for each strategy, a column for each length."""
    head = ["perplexity ±95%"]
    for length in lengths:
        head.append(f"{length:,}")
    rows = []
    for name, group in report.group_by_strategy(records).items():
        row = [name]
        for record in group:
            row.append(harness.format_perplexity(record))
        rows.append(row)
    return report.format_table(head, rows)


# Pictures


def draw_lengths(figure: Any, records: Sequence[Record]) -> None:
    """Perplexity by length, a curve for each strategy."""
    axes = figure.subplots()
    curves = {}
    for name, group in report.group_by_strategy(records).items():
        lengths = [record["length"] for record in group]
        curves[name] = (lengths, [record["perplexity"] for record in group])
    report.draw_curves(axes, curves)
    axes.set(xlabel="length of text (tokens)", ylabel="perplexity a token")
    report.mark_tokens(axes, lengths)
    title = report.cut_high(axes, [record["perplexity"] for record in records])
    axes.set_title(title, fontsize=9)
    report.add_legend(figure)


def draw_positions(figure: Any, points: Sequence[Record]) -> None:
    """Loss by place in the text, and under it how far each strategy is above the best of them.

    The difference is free of the text's own ups and downs.
    """
    losses = {}
    curves = {}
    for name, group in report.group_by_strategy(points).items():
        losses[name] = np.array([point["loss"] for point in group])
        middle = [(point["tokens_from"] + point["tokens_to"]) / 2 for point in group]
        curves[name] = (middle, losses[name])
    if len(losses) == 1:
        upper = lower = figure.subplots()
    else:
        figure.set_size_inches(7, 6)
        upper, lower = figure.subplots(2, sharex=True)
        draw_gaps(lower, middle, losses)
    report.draw_curves(upper, curves)
    upper.set_ylabel("loss (nats a token)")
    upper.set_title(report.cut_high(upper, [point["loss"] for point in points]), fontsize=9)
    lower.set_xlabel("place in the text (tokens)")
    report.add_legend(figure)


def draw_gaps(axes: Any, middle: Sequence[float], losses: dict[str, np.ndarray]) -> None:
    """How far each strategy is above the best of them, of losses [P] at P places."""
    best = min(losses, key=lambda name: losses[name].mean())
    curves = {}
    gaps = []
    for name, values in losses.items():
        gap = values - losses[best]
        curves[name] = (middle, gap)
        if name != best:
            gaps.append(np.abs(gap))
    report.draw_curves(axes, curves)
    axes.set_ylabel(f"above {best} (nats a token)")
    # The axis ends at four times the usual gap, where some are far above it.
    sizes = np.concatenate(gaps)
    if sizes.max() > NONE:
        far = 4 * float(np.median(sizes[sizes > NONE]))
        if far < sizes.max():
            axes.set_ylim(-far / 4, far)


if __name__ == "__main__":
    cli.run(main, "experiments.perplexity", finish=True)
