"""An hour of one GPU: tests, speed, tuning, and what it was worth, in pieces of under ten minutes.

    python -m experiments.cuda --data 'books/*.txt' --texts 'other/*.txt'
    python -m experiments.cuda --quick --device cpu       # the same with the built-in model, small

The tests that need CUDA; the speed of everything beside transformers; SmolLM2 tuned by the paper's
recipe with each kind of attention, for as many minutes each; then perplexity and recall of each. A
piece that is done is not done again: stop it at any time, and give the same command to go on. What
the pieces print is kept in FOLDER/NAME.log. At the end a table, which is also in table.txt.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import cli
from experiments import report
from weights.files import read_json, write_json

ROOT = Path(__file__).parents[1]
SPEED = ["decode", "roofline", "prefill", "compression", "training", "memory"]


@dataclass(frozen=True)
class Run:
    """A model to tune, and what it is tuned and measured with."""

    name: str
    attention: str  # of cli.CACHES
    recent: float = 0  # share of the window that is left to the newest tokens


RUNS = [
    Run("full", "full"),
    Run("window", "window"),
    Run("freqkv", "freqkv"),
    Run("freqkv-recent", "freqkv", recent=0.5),
    Run("distinct", "distinct"),
]


@dataclass(frozen=True)
class Plan:
    """How large everything is."""

    model: str
    window: int
    seq_len: int
    lengths: str  # of perplexity, tokens
    distances: str  # of recall, tokens
    task: str
    trials: int
    limit: int  # windows of a text
    batch: list[str]  # flags of train.py
    first_steps: int  # to find out how long one takes


FULL = Plan(
    model="smollm2",
    window=2048,
    seq_len=8192,
    lengths="2048,4096,8192,16384,32768",
    distances="1024,2048,4096,8192,32768",
    task="passkey",
    trials=32,
    limit=4,
    batch=["--batch-size", "1", "--accumulate", "64", "--no-checkpointing"],
    first_steps=3,
)
QUICK = Plan(
    model="tiny",
    window=64,
    seq_len=128,
    lengths="64,256",
    distances="32,128",
    task="assignment",
    trials=2,
    limit=1,
    batch=["--batch-size", "1", "--accumulate", "2"],
    first_steps=1,
)


# Pieces


def run_piece(folder: Path, name: str, command: Sequence[str]) -> None:
    """Run a command unless it is done, with what it prints in NAME.log; ValueError if it fails."""
    done = folder / f"{name}.done"
    if done.exists():
        print(f"{name}: done before")
        return
    log = folder / f"{name}.log"
    print(f"{name}: {' '.join(command)}", flush=True)
    with log.open("w") as out:
        ended = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
    if ended.returncode != 0:
        last = log.read_text(errors="replace").strip().split("\n")[-1]
        raise ValueError(f"{name}: ended with {ended.returncode} ({last}); all of it: {log}")
    done.touch()


def tune(folder: Path, run: Run, plan: Plan, flags: Sequence[str], seconds: float) -> None:
    """Tune a model for about so many seconds: a few steps, which tell how many fit."""
    out = folder / run.name
    command = ["train.py", "--model", plan.model, "--lora", "--out", str(out), "--resume"]
    command += ["--window", str(plan.window), "--seq-len", str(plan.seq_len)]
    if run.attention != "full":
        command += ["--recent", str(int(plan.window * run.recent))]
    command += ["--attention", run.attention, *plan.batch]
    command += ["--warmup", "0", "--eval-every", "0", *flags]
    run_piece(folder, f"{run.name}-first", [*command, "--steps", str(plan.first_steps)])
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    times = [record["seconds"] for record in records if "seconds" in record]
    steps = max(int(seconds / median(times)), plan.first_steps + 1)
    steps_file = folder / f"{run.name}.steps"  # kept: it goes on to the same number of steps
    if not steps_file.exists():
        steps_file.write_text(str(steps))
    run_piece(folder, f"{run.name}-tuned", [*command, "--steps", steps_file.read_text()])


def measure(folder: Path, run: Run, plan: Plan, device: Sequence[str], data: list[str]) -> None:
    """Perplexity and recall of a tuned model, with the attention that it was tuned with."""
    adapter = folder / run.name / "adapter"
    about = ["--model", plan.model, "--adapter", str(adapter), *device, *data]
    about += ["--strategies", run.attention, "--out", str(folder / f"{run.name}-results")]
    command = ["-m", "experiments.perplexity", *about, "--lengths", plan.lengths]
    run_piece(folder, f"{run.name}-perplexity", [*command, "--limit", str(plan.limit)])
    command = ["-m", "experiments.recall", *about, "--tasks", plan.task]
    command += ["--distances", plan.distances, "--trials", str(plan.trials)]
    run_piece(folder, f"{run.name}-recall", command)


def format_results(folder: Path) -> str:
    """Perplexity by length and right answers by distance, a row for each run."""
    rows = []
    head = [""]
    for run in RUNS:
        results = folder / f"{run.name}-results"
        perplexities = json.loads((results / "perplexity.json").read_text())
        recalls = json.loads((results / "recall.json").read_text())
        head = ["", *(f"{record['length']:,}" for record in perplexities)]
        head += [f"told {record['distance']:,} ago" for record in recalls]
        cells = [run.name, *(f"{record['perplexity']:.2f}" for record in perplexities)]
        cells += [f"{record['accuracy']:.0%}" for record in recalls]
        rows.append(cells)
    return report.format_table(head, rows)


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what the pieces in a folder are made with; ValueError where that was another."""
    path = folder / "cuda.settings.json"
    if not path.exists():
        write_json(path, settings)
        return
    for name, value in read_json(path).items():
        if value != settings[name]:
            raise ValueError(f"--{name}: was {settings[name]}, must be {value}, as {folder} began")


# The script


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="experiments.cuda", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="[%(default)s]")
    add("--data", nargs="+", metavar="PATH", help="texts to tune on [Python's own source]")
    add("--texts", nargs="+", metavar="PATH", help="texts to measure on [Python's, held out]")
    text = "of tuning, for each kind of attention [%(default)s]"
    add("--minutes", type=cli.real(0, 600), default=8.0, help=text)
    add("--out", type=Path, default=Path("runs/cuda"), help="folder [%(default)s]")
    text = "the built-in model and small sizes: does every piece run?"
    add("--quick", action="store_true", help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    cli.choose_device(args.device)
    folder = report.open_folder(args.out, "cuda", "all").absolute()
    plan = QUICK if args.quick else FULL
    keep_settings(
        folder,
        {
            "quick": args.quick,
            "minutes": args.minutes,
            "data": args.data,
            "texts": args.texts,
            "device": args.device,
        },
    )
    run_all(args, plan, folder)
    table = format_results(folder)
    (folder / "table.txt").write_text(table + "\n")
    print(table)


def name_texts(paths: list[str] | None) -> list[str]:
    """The flag --data for a piece, which runs in another folder."""
    if not paths:
        return []
    return ["--data", *(str(Path(path).absolute()) for path in paths)]


def run_all(args: argparse.Namespace, plan: Plan, folder: Path) -> None:
    """All pieces, one after another."""
    device = ["--device", args.device]
    run_piece(folder, "tests", ["-m", "pytest", "-m", "cuda", "tests"])
    for case in SPEED[: 1 if args.quick else None]:
        command = ["-m", "experiments.speed", case, *device, "--out", str(folder / "speed")]
        if args.quick:
            command.append("--quick")
        elif case == "decode":
            command.append("--compile")
        run_piece(folder, f"speed-{case}", command)
    seconds = 0.0 if args.quick else 60 * args.minutes
    data = name_texts(args.data)
    texts = name_texts(args.texts)
    for run in RUNS:
        tune(folder, run, plan, [*device, *data], seconds)
    for run in RUNS:
        measure(folder, run, plan, device, texts)


if __name__ == "__main__":
    cli.run(main, "experiments.cuda", finish=True)
