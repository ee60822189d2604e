"""Does the method hold, and what does it remember? Numbers and pictures, on any model.

    python evaluate.py perplexity --limit 64 --plot           # the built-in model
    python evaluate.py perplexity --model smollm2 --data 'books/*.txt' --limit 1
    python evaluate.py recall --model smollm2 --data BOOK.txt --plot

Strategies run side by side: full (everything), and four that share one number of slots: freqkv
(the low band), window (sinks and the newest), average (pooling), high (the high band).
A measurement that was stopped goes on where it was when the same command is given again, but for
spectrum, which takes minutes.
"""

from collections.abc import Callable
from pathlib import Path

import cli
from evaluation import longbench, perplexity, recall, spectrum
from evaluation.harness import STRATEGIES, prepare
from generate import add_model_flags

MEASUREMENTS = {  # name: what it measures, what adds its flags, what runs it
    "perplexity": (
        "perplexity by length of text and by position, in the paper's protocol",
        perplexity.add_flags,
        perplexity.run,
    ),
    "ablate": (
        "perplexity over a grid of operators and settings "
        "(--ratios, --sink-counts, --recents in place of --ratio, --sinks, --recent)",
        perplexity.add_grid_flags,
        perplexity.ablate,
    ),
    "recall": ("what is remembered, by age", recall.add_flags, recall.run),
    "spectrum": (
        "the energy of keys and values by frequency, and errors by ratio beside full attention",
        spectrum.add_flags,
        spectrum.run,
    ),
    "longbench": (
        "answers about long texts, by LongBench's published files (--data: their folder)",
        longbench.add_flags,
        longbench.run,
    ),
}


def parser() -> cli.Parser:
    """The command line: what all measurements take, and what each adds."""
    p = cli.Parser(prog="evaluate.py", description=__doc__)
    commands = p.add_subparsers(dest="measurement", required=True, metavar="MEASUREMENT")
    for name, (text, add_flags, _) in MEASUREMENTS.items():
        add = commands.add_parser(name, help=text, description=f"Measures {text}.").add_argument
        add_common(add)
        add_flags(add)
    return p


def add_common(add: Callable[..., object]) -> None:
    """The flags of every measurement."""
    text = "text files, folders, patterns, or .bin [what train.py holds out of Python's source]"
    add_model_flags(add)
    add("--data", nargs="+", metavar="PATH", help=text)
    add("--bin-dtype", choices=["uint16", "uint32"], help="of .bin [uint16 if the ids fit]")
    text = f"of {','.join(STRATEGIES)}, with commas between [%(default)s]"
    add("--strategies", default="full,freqkv,window", metavar="S,S", help=text)
    add("--out", type=Path, help="folder for results [runs/evaluate-MODEL]")
    add("--plot", action="store_true", help="draw pictures too (takes matplotlib)")
    text = "windows of a text, or records, at most [all; in spectrum, 8 windows]"
    add("--limit", type=cli.number(int, 0), default=0, help=text)
    text = "tokens read at a time; in spectrum, a window [%(default)s]"
    add("--chunk", type=cli.number(int, 1), default=512, help=text)


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    _, _, run = MEASUREMENTS[args.measurement]
    run(prepare(args))


if __name__ == "__main__":
    cli.run(main, "evaluate.py", finish=True)
