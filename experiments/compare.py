"""Draws what several runs have measured, side by side.

    python -m experiments.compare frontier OUT.png "full attention=runs/full" "eviction=runs/window"
    python -m experiments.compare by-position OUT.png "full attention=runs/full" ...

Every folder holds what experiments.perplexity and experiments.recall have written with --out
FOLDER, for one strategy. frontier: perplexity against recall, within the window and past it.
by-position: the loss by place in the text, above that of the first folder.
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import cli
from experiments.report import (
    Record,
    add_legend,
    check_picture,
    draw_curves,
    draw_picture,
    read_results,
)
from weights.files import name_file

LENGTH = 8192  # tokens: where perplexity is taken
WINDOW = 2048  # tokens: what recall is within, or past
Stretch = tuple[int, int]  # of a text: its first token and its last


def read_run(folder: Path, name: str) -> list[Record]:
    """What a run has measured; ValueError for a run of several strategies."""
    records = read_results(folder, name)
    with name_file(folder):
        names = {record["strategy"] for record in records}
        if len(names) > 1:
            raise ValueError(f"held {', '.join(sorted(names))}, must be of one strategy")
    return records


def read_perplexity(folder: Path) -> float:
    """The perplexity of a run at LENGTH tokens; ValueError where it was not measured there."""
    records = read_run(folder, "perplexity")
    with name_file(folder):
        for record in records:
            if record["length"] == LENGTH:
                return record["perplexity"]
        raise ValueError(f"perplexity was measured without --lengths {LENGTH}, must be with it")


def read_gains(folder: Path) -> tuple[float, float]:
    """The nats that a fact takes off the loss of the answer, told within the window, and before.

    ValueError where a run was not measured so.
    """
    records = read_run(folder, "recall")
    gains: dict[bool, list[float]] = {True: [], False: []}
    with name_file(folder):
        for record in records:
            if record["loss_absent"] is None:
                raise ValueError("recall was measured with --planted-only, must be without")
            gains[record["distance"] < WINDOW].append(record["loss_absent"] - record["loss"])
        if not gains[True] or not gains[False]:
            raise ValueError(f"recall must be measured at --distances below and above {WINDOW}")
    return fmean(gains[True]), fmean(gains[False])


def read_losses(folder: Path) -> dict[Stretch, float]:
    """The loss of a run in each stretch of its texts."""
    records = read_run(folder, "perplexity_by_position")
    losses = {}
    with name_file(folder):
        for record in records:
            losses[record["tokens_from"], record["tokens_to"]] = record["loss"]
    return losses


def draw_frontier(figure: Any, folders: dict[str, Path]) -> None:
    """Perplexity against the nats that a fact takes off the loss of the answer, a point a run."""
    within = {}
    past = {}
    for name, folder in folders.items():
        height = read_perplexity(folder)
        gain_within, gain_past = read_gains(folder)
        within[name] = ([gain_within], [height])
        past[name] = ([gain_past], [height])
    figure.set_size_inches(9, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, points, where in ((left, within, "within"), (right, past, "past")):
        draw_curves(axes, points)
        for point in axes.get_lines():
            point.set(linestyle="none", markersize=7)
        axes.set(xlabel="recall of a fact (nats)", title=f"{where} the window")
    left.set_ylabel(f"perplexity a token at {LENGTH:,} tokens")
    add_legend(figure)


def draw_positions(figure: Any, folders: dict[str, Path]) -> None:
    """The loss by place in the text, above that of the first run, a curve for each other one."""
    first, *others = folders
    if not others:
        raise ValueError("NAME=FOLDER: was one, must be two or more, to draw by position")
    base = read_losses(folders[first])
    places = [(start + stop) / 2 for start, stop in base]
    curves = {}
    for name in others:
        losses = read_losses(folders[name])
        if losses.keys() != base.keys():
            folder = folders[name]
            raise ValueError(f"{folder}: was of other lengths, must be as {folders[first]}")
        above = [losses[stretch] - base[stretch] for stretch in base]
        curves[name] = (places, above)
    axes = figure.subplots()
    draw_curves(axes, curves)
    axes.set(xlabel="place in the text (tokens)", ylabel=f"above {first} (nats a token)")
    add_legend(figure)


PICTURES = {"frontier": draw_frontier, "by-position": draw_positions}


def parse_run(text: str) -> tuple[str, Path]:
    """The type of a flag that takes NAME=FOLDER."""
    name, sign, folder = text.partition("=")
    if not name or not sign or not folder or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"was {text!r}, must be NAME=FOLDER, of results")
    return name, Path(folder)


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="experiments.compare", description=__doc__)
    add = parser.add_argument
    add("what", choices=list(PICTURES), help="what to draw")
    add("out", type=Path, metavar="OUT.png", help="the picture")
    add("runs", type=parse_run, nargs="+", metavar="NAME=FOLDER", help="what a --out was")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    check_picture("OUT.png", args.out)
    folders = dict(args.runs)
    if len(folders) < len(args.runs):
        raise ValueError("NAME=FOLDER: had a name twice, must be another for each")
    draw_picture(args.out, PICTURES[args.what], folders)


if __name__ == "__main__":
    cli.run(main, "experiments.compare")
