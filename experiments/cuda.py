"""An hour of one GPU: tests, speed, tuning, and what it was worth, in pieces of under ten minutes.

    python -m experiments.cuda --data 'books/*.txt' --texts 'other/*.txt'
    python -m experiments.cuda --quick --device cpu       # the same with the built-in model, small

The tests that need CUDA; the speed of everything beside transformers; SmolLM2 tuned by the paper's
recipe with each kind of attention, for as many minutes each; then perplexity and recall of each. A
piece that is done is not done again: stop it at any time, and give the same command to go on. One
that fails does not stop the others. What the pieces print is kept in FOLDER/NAME.log. At the end a
table, which is also in table.txt.
"""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import cli
from data import data_files
from experiments import report
from weights.files import (
    damaged,
    name_file,
    read_json,
    read_json_lines,
    write_beside,
    write_json,
)

ROOT = Path(__file__).parents[1]
SPEED = ["decode", "roofline", "prefill", "compression", "training", "memory"]
MINUTES = 8.0  # of tuning, for each kind of attention


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
    batch: dict[str, Any]  # flags of train.py
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
    batch={"batch-size": 1, "accumulate": 64, "no-checkpointing": True},
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
    batch={"batch-size": 1, "accumulate": 2},
    first_steps=1,
)


# Pieces


def make_command(program: list[str], flags: dict[str, Any]) -> list[str]:
    """A program and its flags: True is one without a value, None one that is left out."""
    command = list(program)
    for name, value in flags.items():
        if value is None:
            continue
        command.append(f"--{name}")
        if isinstance(value, list):
            command += [str(part) for part in value]
        elif value is not True:
            command.append(str(value))
    return command


def run_piece(
    folder: Path, name: str, command: Sequence[str], is_done: Callable[[], bool] | None = None
) -> None:
    """Run a command unless it is done, with what it prints in NAME.log; ValueError if it fails.

    is_done: whether it has come to its end, where its exit code does not say so.
    """
    done = folder / f"{name}.done"
    if done.exists():
        print(f"{name}: done before")
        return
    log = folder / f"{name}.log"
    print(f"{name}: {' '.join(command)}", flush=True)
    with log.open("w") as out:
        code = run_to_its_end([sys.executable, *command], out)
    if code != 0 or (is_done is not None and not is_done()):
        last = log.read_text(errors="replace").strip().split("\n")[-1]
        raise ValueError(f"{name}: ended with {code} ({last}); all of it: {log}")
    done.touch()


def run_to_its_end(command: Sequence[str], out: TextIO) -> int:
    """Run a program in the project's folder; its exit code.

    On Ctrl-C, which the program receives as well, and on SIGTERM, which is passed on to it, it has
    time to save what it has.
    """
    with subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT) as program:

        def stop(number: int, frame: Any) -> None:
            program.terminate()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        try:
            return program.wait()
        except KeyboardInterrupt:
            program.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def attempt(failures: list[str], work: Callable[..., None], *about: Any) -> bool:
    """Do what is left of the work; where it fails, say so, and note it for the end."""
    try:
        work(*about)
    except ValueError as error:
        print(f"failed: {error}", flush=True)
        failures.append(str(error))
        return False
    return True


def tune(folder: Path, run: Run, plan: Plan, about: dict[str, Any], seconds: float) -> None:
    """Tune a model for about so many seconds: a few steps, which tell how many fit."""
    out = folder / run.name
    flags = {
        "model": plan.model,
        "lora": True,
        "out": out,
        "resume": True,
        "window": plan.window,
        "recent": int(plan.window * run.recent),
        "attention": run.attention,
        "seq-len": plan.seq_len,
        "warmup": 0,
        "eval-every": 0,
    }
    flags |= plan.batch | about
    if run.attention == "full":
        del flags["recent"]
    first = make_command(["train.py"], flags | {"steps": plan.first_steps})
    first_is_done = partial(has_steps, out, plan.first_steps)
    run_piece(folder, f"{run.name}-first", first, first_is_done)
    times = [record["seconds"] for record in read_log(out) if "seconds" in record]
    steps = max(int(seconds / median(times)), plan.first_steps + 1)
    steps_file = folder / f"{run.name}.steps"  # kept: it goes on to the same number of steps
    if not steps_file.exists():
        write_beside(steps_file, lambda to: to.write_text(str(steps)))
    with damaged(steps_file, "a whole number, or removed"):
        steps = int(steps_file.read_text())
    whole = make_command(["train.py"], flags | {"steps": steps})
    run_piece(folder, f"{run.name}-tuned", whole, partial(has_steps, out, steps))


def read_log(out: Path) -> list[dict[str, Any]]:
    """The records of a run of train.py, which is a script, and not imported."""
    return read_json_lines(out / "log.jsonl")


def has_steps(out: Path, steps: int) -> bool:
    """Whether a run of train.py has done so many steps: it may have been stopped before."""
    return any(record["step"] >= steps for record in read_log(out))


def measure(folder: Path, run: Run, plan: Plan, about: dict[str, Any]) -> None:
    """Perplexity and recall of a tuned model, with the attention that it was tuned with."""
    flags = {
        "model": plan.model,
        "adapter": folder / run.name / "adapter",
        "strategies": run.attention,
        "out": folder / f"{run.name}-results",
    }
    flags |= about
    lengths = {"lengths": plan.lengths, "limit": plan.limit}
    command = make_command(["-m", "experiments.perplexity"], flags | lengths)
    run_piece(folder, f"{run.name}-perplexity", command)
    trials = {"tasks": plan.task, "distances": plan.distances, "trials": plan.trials}
    command = make_command(["-m", "experiments.recall"], flags | trials)
    run_piece(folder, f"{run.name}-recall", command)


def format_results(folder: Path) -> str:
    """Perplexity by length and right answers by distance, a row for each run that has both."""
    rows = []
    head = [""]
    for run in RUNS:
        results = folder / f"{run.name}-results"
        if not (folder / f"{run.name}-recall.done").exists():
            continue
        head = [""]
        row = [run.name]
        with name_file(results):
            for record in report.read_results(results, "perplexity"):
                head.append(f"{record['length']:,}")
                row.append(f"{record['perplexity']:.2f}")
            for record in report.read_results(results, "recall"):
                head.append(f"told {record['distance']:,} ago")
                row.append(f"{record['accuracy']:.0%}")
        rows.append(row)
    return report.format_table(head, rows)


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what the pieces in a folder are made with; ValueError where that was another.

    FileExistsError where the folder is one of something else.
    """
    path = folder / "cuda.settings.json"
    if not path.exists():
        if any(folder.glob("[!.]*")):
            raise FileExistsError(f"--out: {folder} was there already, must be new, or one of cuda")
        write_json(path, settings)
        return
    for name, value in read_json(path).items():
        given = settings.get(name)
        if value != given:
            raise ValueError(f"--{name}: was {given}, must be {value}, as {folder} began")


# The script


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="experiments.cuda", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="[%(default)s]")
    add("--data", nargs="+", metavar="PATH", help="texts to tune on [Python's own source]")
    add("--texts", nargs="+", metavar="PATH", help="texts to measure on [Python's, held out]")
    text = f"of tuning, for each kind of attention [{MINUTES:g}]"
    add("--minutes", type=cli.real(0, 600), help=text)
    add("--out", type=cli.path, default=Path("runs/cuda"), help="folder [%(default)s]")
    text = "the built-in model and small sizes: does every piece run?"
    add("--quick", action="store_true", help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.quick and args.minutes is not None:
        raise ValueError("--minutes: was given with --quick, must be without")
    minutes = MINUTES if args.minutes is None else args.minutes
    cli.choose_device(args.device)
    data_files(args.data, "--data")
    data_files(args.texts, "--texts")
    cli.make_folder("--out", args.out)
    folder = args.out.absolute()
    plan = QUICK if args.quick else FULL
    settings = vars(args).copy()
    del settings["out"]
    keep_settings(folder, settings)
    failures = run_all(plan, folder, args.device, args.data, args.texts, minutes)
    table = format_results(folder)
    (folder / "table.txt").write_text(table + "\n")
    print(table)
    if failures:
        count = cli.format_count(len(failures), "piece")
        raise ValueError(f"{count} failed, as said above; the same command tries them again")


def run_all(
    plan: Plan,
    folder: Path,
    device: str,
    data: list[str] | None,
    texts: list[str] | None,
    minutes: float,
) -> list[str]:
    """All pieces, one after another; what is to be said of those that failed."""
    quick = plan is QUICK
    failures: list[str] = []
    attempt(failures, run_piece, folder, "tests", ["-m", "pytest", "-m", "cuda", "tests"])
    flags = {"device": device, "out": folder / "speed"}
    if quick:
        flags["quick"] = True
    cases = SPEED[:1] if quick else SPEED
    for case in cases:
        command = make_command(["-m", "experiments.speed", case], flags)
        attempt(failures, run_piece, folder, f"speed-{case}", command)
    if not quick:  # apart: it takes a compiler, which not every machine has
        flags |= {"out": folder / "speed-compiled", "compile": True}
        command = make_command(["-m", "experiments.speed", "decode"], flags)
        attempt(failures, run_piece, folder, "speed-compiled", command)

    seconds = 0.0 if quick else 60 * minutes
    tuned = []
    about = {"device": device, "data": make_absolute(data)}
    for run in RUNS:
        if attempt(failures, tune, folder, run, plan, about, seconds):
            tuned.append(run)
    about = {"device": device, "data": make_absolute(texts)}
    for run in tuned:
        attempt(failures, measure, folder, run, plan, about)
    return failures


def make_absolute(paths: list[str] | None) -> list[Path] | None:
    """Paths for a piece, which runs in another folder."""
    if paths is None:
        return None
    return [Path(path).absolute() for path in paths]


if __name__ == "__main__":
    cli.run(main, "experiments.cuda", finish=True)
