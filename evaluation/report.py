"""What a measurement leaves: a table on the terminal, JSON and CSV with settings, pictures."""

import csv
import io
import platform
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch

from weights.files import check_writable, write_beside, write_json

# Told apart in black and white, in the order in which they are drawn.
STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "v"), ((0, (5, 1)), "D"), ((0, (1, 3)), "x")]
SHADES = ["0", "0.25", "0.4", "0.5", "0.15", "0.6"]


def open_folder(out: Path) -> None:
    """Make the folder --out; OSError, before any work is done, where results could not go there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out: {out}: {error.strerror}, must be a folder, or new") from None
    check_writable(out / "settings.json")


def write_results(name: str, records: list[dict[str, Any]], args: Namespace) -> str:
    """Write OUT/name.json and .csv (a list of records), and what made them, name.settings.json."""
    out, text = Path(args.out), io.StringIO()
    rows = [flat(record) for record in records]
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_json(out / f"{name}.json", records)
    write_beside(out / f"{name}.csv", lambda to: to.write_text(text.getvalue(), encoding="utf-8"))
    made = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "settings": {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()},
    }
    write_json(out / f"{name}.settings.json", made)
    return f"{out / name}.json, .csv and .settings.json"


def by_strategy(records: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records of each strategy, in the order in which they come."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["strategy"], []).append(record)
    return found


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """A record for CSV: with its interval, a pair or None, as two fields."""
    low, high = record.get("ci95") or (None, None)
    ends = {"ci95_low": low, "ci95_high": high} if "ci95" in record else {}
    return {name: x for name, x in record.items() if name != "ci95"} | ends


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text, the first at the left and the others at the right."""
    cells = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def figure_class() -> Any:
    """matplotlib's Figure; ImportError, with advice, where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot: matplotlib was not found: pip install matplotlib") from None
    return Figure


def picture(path: Path, draw: Callable[[Any], None], size: tuple[float, float] = (7, 4.2)) -> str:
    """Have `draw(figure)` draw on a matplotlib figure, and write it; a line that says so."""
    figure = figure_class()(figsize=size, layout="constrained")
    draw(figure)
    write_beside(path, lambda to: figure.savefig(to, dpi=150, format="png"))
    return f"drawn: {path}"


def lines(axes: Any, curves: dict[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Draw named curves (x, y) that differ in line, marker and shade; from the seventh, hollow."""
    looks = cycle(product(("full", "none"), zip(STYLES, SHADES, strict=True)))
    for (name, (x, y)), (fill, ((line, marker), shade)) in zip(curves.items(), looks, strict=False):
        look = {"linestyle": line, "marker": marker, "color": shade, "fillstyle": fill}
        axes.plot(x, y, **look, label=name, markersize=4)
    axes.grid(color="0.9")
    axes.legend()


def log_ticks(axes: Any, places: Sequence[int]) -> None:
    """A logarithmic axis of tokens, marked at `places` and nowhere between."""
    axes.set_xscale("log")
    axes.set_xticks(places, places, rotation=45)
    axes.minorticks_off()
