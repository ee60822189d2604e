"""What a measurement leaves: a journal while it runs; then tables, JSON and CSV, and pictures.

There is one way to make each of them, and it is here.
"""

import csv
import hashlib
import io
import json
import math
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cli
from weights.files import damaged, read_json, read_text, write_beside, write_json

Record = dict[str, Any]
Curve = tuple[Sequence[float], Sequence[float]]  # x, y

# Line, marker and grey of the first curve, the second, ...: told apart in black and white.
LOOKS = [
    ("-", "o", "0"),
    ("--", "s", "0.25"),
    (":", "^", "0.4"),
    ("-.", "v", "0.5"),
    ((0, (5, 1)), "D", "0.15"),
    ((0, (1, 3)), "x", "0.6"),
]


# The folder, and what is in it


def open_folder(out: Path | None, name: str, model: str, adapter: str | None = None) -> Path:
    """The folder for results, made if it is new: `out`, else runs/NAME-MODEL-ADAPTER.

    OSError or ValueError, before any work is done, where results could not go there, or would
    replace those of another model or adapter.
    """
    if out is None:
        words = [name, name_path(model)]
        if adapter is not None:
            words.append(name_path(adapter))
        out = Path("runs") / "-".join(words)
    cli.make_folder("--out", out)
    check_results(out, name, model, adapter)
    return out


def name_path(path: str) -> str:
    """What to call a model or an adapter by its path: train.py calls all that it writes alike."""
    place = Path(path).resolve()
    if place.name in ("model", "adapter"):
        return place.parent.name
    return place.name.removesuffix(".gguf")


def check_results(folder: Path, name: str, model: str | None, adapter: str | None) -> None:
    """ValueError where a folder holds such results of another model or adapter, or of nobody."""
    path = folder / f"{name}.settings.json"
    if not path.exists():
        for ending in ("json", "csv"):
            file = folder / f"{name}.{ending}"
            if file.exists():
                raise ValueError(f"--out: {file} was no result of this, must be in another folder")
        return
    settings = read_json(path).get("settings")
    with damaged(path, "what a measurement has written"):
        held_model = settings.get("model", model)
        held_adapter = settings.get("adapter", adapter)
        is_same = is_same_path(held_model, model) and is_same_path(held_adapter, adapter)
    if not is_same:
        was = format_model(held_model, held_adapter)
        must = format_model(model, adapter)
        raise ValueError(f"--out: {folder} held {name} of {was}, must be of {must}, or new")


def is_same_path(one: str | None, other: str | None) -> bool:
    """Whether two names or paths are of one thing, however they are spelled."""
    if one is None or other is None:
        return one is other
    return Path(one).resolve() == Path(other).resolve()


def format_model(model: str | None, adapter: str | None) -> str:
    """A model and its adapter, if it has one, as a person would say it."""
    text = str(model)
    if adapter is not None:
        text += f" with {adapter}"
    return text


class Journal:
    """What has been measured so far, a JSON line each, so that a stopped run goes on from there.

    `about` is what all values depend on, a key what else one depends on. A line that a kill cut
    short is measured again. ValueError for a file that holds anything else.
    """

    def __init__(self, path: Path, about: object) -> None:
        self.path = path
        self.about = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
        self.known: dict[str, Any] = {}
        with path.open("ab+") as file:  # so that one that cannot be written is told now
            file.seek(0)
            lines = file.read().split(b"\n")
            cut = lines.pop()  # nothing, after a whole line
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    self.known[record["key"]] = record["value"]
                except (ValueError, KeyError, TypeError):
                    was = f"{path}: line {number} was {line[:20]!r}"
                    raise ValueError(f"{was}, must be a record; move the file away") from None
            if cut:
                file.truncate(file.tell() - len(cut))

    def __contains__(self, key: object) -> bool:
        return self._name(key) in self.known

    def __getitem__(self, key: object) -> Any:
        return self.known[self._name(key)]

    def __setitem__(self, key: object, value: Any) -> None:
        name = self._name(key)
        self.known[name] = value
        with self.path.open("a") as file:
            file.write(json.dumps({"key": name, "value": value}) + "\n")

    def _name(self, key: object) -> str:
        return f"{self.about} {key}"


def write_results(
    folder: Path, name: str, records: Sequence[Record], settings: dict[str, Any]
) -> None:
    """Write records to NAME.json and NAME.csv, and what made them to NAME.settings.json."""
    plain = {}
    for key, value in settings.items():
        plain[key] = str(value) if isinstance(value, Path) else value
    program = f"experiments.{Path(sys.argv[0]).stem}"
    about = {
        "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "settings": plain,
    }
    write_json(folder / f"{name}.settings.json", about)  # first: it says whose the others are
    write_json(folder / f"{name}.json", list(records))
    text = format_csv(records)
    write_beside(folder / f"{name}.csv", lambda to: to.write_text(text, encoding="utf-8"))
    print(f"{folder / name}.json, .csv and .settings.json")


def read_results(folder: Path, name: str) -> list[Record]:
    """The records that `write_results` has written; OSError or ValueError names the file."""
    path = folder / f"{name}.json"
    text = read_text(path)
    with damaged(path, "what a measurement has written"):
        return json.loads(text)


def format_csv(records: Sequence[Record]) -> str:
    """Records as CSV, a column for each field; an interval, a pair or None, makes two columns."""
    rows = []
    names: dict[str, None] = {}  # in the order in which they first come
    for record in records:
        row = dict(record)
        if "ci95" in row:
            low, high = row.pop("ci95") or (None, None)
            row["ci95_low"] = low
            row["ci95_high"] = high
        rows.append(row)
        names |= dict.fromkeys(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# Figures


def mean_interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Mean loss a token of texts (sum, count), and half its 95 % interval over the texts.

    The ratio estimator with Student's t: texts are drawn at random, and the tokens within one are
    alike. A single text has no interval: None.
    """
    total = sum(counts)
    n = len(sums)
    mean = sum(sums) / total
    if n == 1:
        return mean, None
    spread = 0.0
    for loss, count in zip(sums, counts, strict=True):
        spread += (loss - mean * count) ** 2
    return mean, student_t(n - 1) * math.sqrt(n / (n - 1) * spread) / total


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: with t = sqrt(f) tan(u), the density is cos(u)^(f-1)."""
    u = (np.arange(200_000) + 0.5) / 200_000 * math.pi - math.pi / 2
    share = np.cumsum(np.cos(u) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(u[np.searchsorted(share, 0.975 * share[-1])])


def group_by_strategy(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each strategy, in the order in which they come."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["strategy"], []).append(record)
    return groups


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text, the first at the left and the others at the right."""
    lines = [head, *rows]
    widths = [0] * len(head)
    for line in lines:
        for column, cell in enumerate(line):
            widths[column] = max(widths[column], len(cell))
    texts = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        for cell, width in zip(line[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        texts.append("  ".join(cells))
    return "\n".join(texts)


# Pictures


def check_plots() -> None:
    """ImportError, with advice, where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError("pictures: matplotlib was not found: pip install matplotlib") from None


def check_picture(flag: str, path: Path) -> None:
    """ImportError or ValueError unless a picture can be drawn into the file that a flag names."""
    check_plots()
    cli.check_target(flag, path, is_picture, "a picture in PNG")


def is_picture(path: Path) -> bool:
    """Whether the file is one of `draw_picture`."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x89PNG"


def draw_picture(path: Path, draw: Callable[..., None], *about: Any) -> None:
    """Have `draw(figure, *about)` draw on a matplotlib figure of 7 by 4.2 inches, and write it.

    It may make the figure larger.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    draw(figure, *about)
    write_beside(path, lambda to: figure.savefig(to, dpi=150, format="png"))
    print(f"drawn: {path}")


def draw_curves(axes: Any, curves: Mapping[str, Curve]) -> None:
    """Draw named curves that differ in line, marker and grey; from the seventh on, hollow."""
    for number, (name, (x, y)) in enumerate(curves.items()):
        line, marker, grey = LOOKS[number % len(LOOKS)]
        hollow = number // len(LOOKS) % 2 == 1
        axes.plot(
            x, y, label=name, linestyle=line, marker=marker, color=grey, markersize=4,
            fillstyle="none" if hollow else "full", markevery=max(1, len(x) // 20),
        )  # fmt: skip
    axes.grid(color="0.9")


def add_legend(figure: Any) -> None:
    """Name the curves of the first panel, which are those of all, beside the figure."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper")


def mark_tokens(axes: Any, places: Sequence[int]) -> None:
    """Make x a logarithmic axis of tokens, marked at `places` and nowhere between."""
    axes.set_xscale("log")
    axes.set_xticks(places, places, rotation=45)
    axes.minorticks_off()


def cut_high(axes: Any, values: Sequence[float]) -> str:
    """End y at twice the median where some values are far above; words that say so."""
    top = 2 * float(np.median(values))
    highest = max(values)
    if highest <= top:
        return ""
    axes.set_ylim(0.9 * min(values), top)
    return f"cut off at {top:.3g}; the highest is {highest:.3g}"
