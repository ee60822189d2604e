"""Draws what several runs have measured, side by side.

    python -m experiments.compare frontier OUT.png "full attention=runs/full" "eviction=runs/window"
    python -m experiments.compare by-position OUT.png "full attention=runs/full" ...

Every folder holds what experiments.perplexity and experiments.recall have written with --out
FOLDER, for one strategy. frontier: perplexity against recall, within the window and past it.
by-position: the loss by place in the text, above that of the first folder.
"""

import argparse
import json
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
)

LENGTH = 8192  # tokens: where perplexity is taken
WINDOW = 2048  # tokens: what recall is within, or past


def read_records(folder: Path, name: str) -> list[Record]:
    """The records that a measurement has left in a folder."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def draw_frontier(figure: Any, folders: dict[str, Path]) -> None:
    """Perplexity against the nats that a fact takes off the loss of the answer, a point a run."""
    within = {}
    past = {}
    for name, folder in folders.items():
        records = read_records(folder, "perplexity")
        height = next(r["perplexity"] for r in records if r["length"] == LENGTH)
        gains: dict[bool, list[float]] = {True: [], False: []}
        for record in read_records(folder, "recall"):
            if record["loss_absent"] is None:
                raise ValueError(f"{folder}: was measured with --planted-only, must be without")
            gains[record["distance"] < WINDOW].append(record["loss_absent"] - record["loss"])
        within[name] = ([fmean(gains[True])], [height])
        past[name] = ([fmean(gains[False])], [height])
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
    first = next(iter(folders))
    base = read_records(folders[first], "perplexity_by_position")
    middle = [(point["tokens_from"] + point["tokens_to"]) / 2 for point in base]
    curves = {}
    for name, folder in folders.items():
        points = read_records(folder, "perplexity_by_position")
        pairs = zip(points, base, strict=True)
        curves[name] = (middle, [point["loss"] - other["loss"] for point, other in pairs])
    del curves[first]
    axes = figure.subplots()
    draw_curves(axes, curves)
    axes.set(xlabel="place in the text (tokens)", ylabel=f"above {first} (nats a token)")
    add_legend(figure)


PICTURES = {"frontier": draw_frontier, "by-position": draw_positions}


def parse_run(text: str) -> tuple[str, Path]:
    """The type of a flag that takes NAME=FOLDER."""
    name, sign, folder = text.partition("=")
    if not sign or not Path(folder).is_dir():
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
    draw_picture(args.out, PICTURES[args.what], dict(args.runs))


if __name__ == "__main__":
    cli.run(main, "experiments.compare")
