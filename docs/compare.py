"""Draws what several runs of evaluate.py found, side by side.

    python docs/compare.py frontier OUT.png "full attention=runs/full" "eviction=runs/window" ...
    python docs/compare.py by-position OUT.png "full attention=runs/full" ...

Every folder holds what `evaluate.py perplexity --out FOLDER` and `evaluate.py recall --out FOLDER`
have written, for one strategy. frontier: perplexity against recall, within the window and past it.
by-position: the loss by place in the text, above that of the first folder.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cli
from evaluation.report import lines, picture

LENGTH, WINDOW = 8192, 2048  # tokens: where perplexity is taken; what recall is past of


def read(folder: str, name: str) -> list[dict[str, Any]]:
    return json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))


def recalled(folder: str, here: Callable[[int], bool]) -> float:
    """Nats that the fact takes off the loss of the answer, on average over distances."""
    gains = [r["loss_absent"] - r["loss"] for r in read(folder, "recall") if here(r["distance"])]
    return sum(gains) / len(gains)


def frontier(figure: Any, folders: dict[str, str]) -> None:
    figure.set_size_inches(9, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    heights = {
        name: r["perplexity"]
        for name, folder in folders.items()
        for r in read(folder, "perplexity")
        if r["length"] == LENGTH
    }
    places = (("within the window", WINDOW.__gt__), ("past the window", WINDOW.__le__))
    for axes, (where, here) in zip(panels, places, strict=True):
        points = {n: ([recalled(folder, here)], [heights[n]]) for n, folder in folders.items()}
        lines(axes, points)
        for point in axes.get_lines():
            point.set(linestyle="none", markersize=7)
        axes.legend()
        axes.set(xlabel="recall of a fact (nats)", title=where)
    panels[0].get_legend().remove()
    panels[0].set_ylabel(f"perplexity a token at {LENGTH:,} tokens")


def by_position(figure: Any, folders: dict[str, str]) -> None:
    points = {name: read(folder, "perplexity_by_position") for name, folder in folders.items()}
    first, *others = points
    middle = [(p["tokens_from"] + p["tokens_to"]) / 2 for p in points[first]]
    pairs = {name: zip(points[name], points[first], strict=True) for name in others}
    axes = figure.subplots()
    lines(axes, {n: (middle, [p["loss"] - q["loss"] for p, q in x]) for n, x in pairs.items()})
    axes.set(xlabel="place in the text (tokens)", ylabel=f"above {first} (nats)")


DRAWN = {"frontier": frontier, "by-position": by_position}


def run(text: str) -> tuple[str, str]:
    """The flag type of NAME=FOLDER."""
    name, is_one, folder = text.partition("=")
    if not is_one or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"was {text!r}, must be NAME=FOLDER, of evaluate.py --out")
    return name, folder


def main(argv: list[str] | None = None) -> None:
    p = cli.Parser(prog="docs/compare.py", description=__doc__)
    p.add_argument("what", choices=list(DRAWN), help="what to draw")
    p.add_argument("out", type=Path, metavar="OUT.png", help="the picture")
    p.add_argument("runs", type=run, nargs="+", metavar="NAME=FOLDER", help="of evaluate.py --out")
    args = p.parse_args(argv)
    print(picture(args.out, partial(DRAWN[args.what], folders=dict(args.runs))))


if __name__ == "__main__":
    cli.run(main, "docs/compare.py")
