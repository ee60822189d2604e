"""Perplexity over a grid of operators and settings.

    python -m experiments.ablation --strategies full,freqkv,window,average --limit 24 --plot

As experiments.perplexity, at one length; --ratios, --sink-counts and --recents take the place of
--ratio, --sinks and --recent.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import cli
from experiments import harness, report
from experiments.harness import Strategy
from experiments.report import Record
from freqkv import FreqKVConfig

INSTEAD = {"ratio": "--ratios", "sinks": "--sink-counts", "recent": "--recents"}


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="experiments.ablation", description=__doc__)
    harness.add_flags(parser)
    harness.add_window_flags(parser, "one number [4 times the window]")
    add = parser.add_argument
    ratios = cli.several(cli.real(0, 1, below=True))
    counts = cli.several(cli.integer(0))
    add("--ratios", type=ratios, default="0.25,0.5,0.75", metavar="R,R", help="[%(default)s]")
    add("--sink-counts", type=counts, default="0,4", metavar="N,N", help="[%(default)s]")
    text = "[0, an eighth, a quarter and half of the window]"
    add("--recents", type=counts, metavar="N,N", help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.lengths and len(args.lengths) > 1:
        raise ValueError(f"--lengths: was {args.lengths}, must be one")
    for name in cli.given_settings(args):
        if name in INSTEAD:
            raise ValueError(f"--{name}: was given, must be {INSTEAD[name]} here")
    if args.strategies == ["full"]:
        raise ValueError("--strategies: was full alone, must have one with slots")
    if args.plot:
        report.check_plots()
    folder = report.open_folder(args.out, "ablation", args.model, args.adapter)
    model, tokenizer = cli.load(args)
    base = harness.require_paper(cli.choose_schedule(args, model.config))
    strategies = make_grid(args.strategies, base, args.ratios, args.sink_counts, args.recents)
    vocab = model.config.vocab_size
    texts = harness.read_documents(args.data, args.bin_dtype, args.bos, tokenizer, vocab)
    lengths = harness.choose_lengths(args.lengths or [4 * base.window], texts, base.window)
    windows = harness.cut_windows(texts, lengths, args.stride, args.limit)
    print(harness.describe_windows(texts, windows, len(strategies)))

    values = harness.measure_windows(
        model, strategies, texts, windows, lengths, folder / "ablation.journal.jsonl",
        args.batch_size, args.chunk,
    )  # fmt: skip
    records = []
    for strategy in strategies:
        record = {"strategy": strategy.name} | strategy.settings()
        records.append(record | harness.summarize_length(windows, values[strategy], lengths[0]))

    print(format_grid(records))
    report.write_results(folder, "ablation", records, vars(args) | harness.describe_place(model))
    if args.plot:
        report.draw_picture(folder / "ablation.png", draw_grid, records)


def make_grid(
    names: Sequence[str], base: FreqKVConfig, ratios: Sequence[float], sink_counts: Sequence[int],
    recents: Sequence[int] | None,
) -> list[Strategy]:  # fmt: skip
    """Every strategy with every setting; full attention once, since it has no slots."""
    if recents is None:
        recents = [0, base.window // 8, base.window // 4, base.window // 2]
    schedules = []
    for ratio, sinks, recent in product(ratios, sink_counts, recents):
        schedules.append(replace(base, ratio=ratio, sinks=sinks, recent=recent))
    grid = []
    for name in names:
        for schedule in schedules:
            grid += harness.make_strategies([name], schedule)
    return list(dict.fromkeys(grid))


def format_grid(records: Sequence[Record]) -> str:
    """A table, a row for each strategy and its settings."""
    rows = []
    for record in records:
        settings = [str(record.get(name, "")) for name in ("strategy", "ratio", "sinks", "recent")]
        rows.append([*settings, harness.format_perplexity(record)])
    return report.format_table(["strategy", "ratio", "sinks", "recent", "perplexity ±95%"], rows)


def draw_grid(figure: Any, records: Sequence[Record]) -> None:
    """Perplexity by recent: a panel for each strategy and number of sinks, a curve for each ratio.

    Full attention is a line across, where it is near enough.
    """
    panels: dict[tuple[str, int], list[Record]] = {}
    values = []
    full = None
    for record in records:
        if record["strategy"] == "full":
            full = record["perplexity"]
        else:
            panels.setdefault((record["strategy"], record["sinks"]), []).append(record)
            values.append(record["perplexity"])
    figure.set_size_inches(2 + 3.2 * len(panels), 4)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (strategy, sinks) in zip(row, sorted(panels), strict=True):
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for record in sorted(panels[strategy, sinks], key=lambda r: (r["ratio"], r["recent"])):
            x, y = curves.setdefault(f"ratio {record['ratio']:g}", ([], []))
            x.append(record["recent"])
            y.append(record["perplexity"])
        report.draw_curves(axes, curves)
        if full is not None and full < 1.2 * max(values):
            axes.axhline(full, color="0.5", linewidth=1)
        axes.set_title(f"{strategy}, {sinks} sinks", fontsize=10)
        axes.set_xlabel("recent (tokens)")
    label = "perplexity a token"
    if full is not None:
        label += f" (full: {full:.3g})"
    row[0].set_ylabel(label)
    report.add_legend(figure)
    figure.suptitle(report.cut_high(row[0], values), fontsize=9)


if __name__ == "__main__":
    cli.run(main, "experiments.ablation", finish=True)
