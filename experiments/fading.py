"""Draws docs/fading.png, why a merged memory fades: python -m experiments.fading

One token's key points where a later question looks; the keys of all other tokens are random. After
each round of compression: how far the best slot's score stands above the average one, as a share of
what it was (the margin), and how much of the attention it gets. Merging two slots into one halves
the margin, each round again; a selection leaves it whole for as long as the token is selected.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cli
from experiments.operators import average
from experiments.report import (
    Curve,
    add_legend,
    check_picture,
    draw_curves,
    draw_picture,
    format_table,
)
from freqkv import FreqKVConfig, Operator, compress, distinct, lowband

SCHEDULE = FreqKVConfig(window=2048, sinks=4, ratio=0.5)
ROUNDS = 8
DIM = 64  # of a head
MARGIN = 14.0  # of the planted key's score, in nats: all but all of the attention
TRIALS = 64
OUT = Path(__file__).parents[1] / "docs/fading.png"
OPERATORS: dict[str, Operator] = {"low band": lowband, "averages": average, "distinct": distinct}


def measure_margins(operator: Operator, seed: int = 0) -> tuple[list[float], list[float]]:
    """The margin in nats and the share of the attention after 0, 1, ... rounds: means of trials."""
    generator = torch.Generator().manual_seed(seed)
    question = torch.zeros(DIM)
    question[0] = MARGIN
    keys = make_keys(generator, SCHEDULE.window)  # [TRIALS, 1, N, D]
    trials = torch.arange(TRIALS)
    places = torch.randint(SCHEDULE.sinks, SCHEDULE.window, (TRIALS,), generator=generator)
    keys[trials, 0, places, 0] = 1.0
    margins = []
    shares = []
    for _ in range(ROUNDS + 1):
        scores = keys[:, 0] @ question  # [TRIALS, slots]
        best = scores.amax(-1)
        margins.append((best - scores.mean(-1)).mean().item())
        shares.append((best - scores.logsumexp(-1)).exp().mean().item())
        kept, _ = compress(keys, keys, SCHEDULE, operator)
        fresh = make_keys(generator, SCHEDULE.window - kept.shape[2])
        keys = torch.cat((kept, fresh), dim=2)
    return margins, shares


def make_keys(generator: torch.Generator, count: int) -> Tensor:
    """Keys of other tokens, [TRIALS, 1, count, D]: they know nothing of the question.

    Channel 1 is the same in all of them: the mean that real keys have (79 % of their energy).
    """
    keys = torch.randn(TRIALS, 1, count, DIM, generator=generator) / math.sqrt(DIM)
    keys[..., 0] = 0.0
    keys[..., 1] = 2.0
    return keys


def predict_margins() -> tuple[list[float], list[float]]:
    """The same by theory: a mean of m keys gives one of them an m-th, and m doubles each round."""
    margins = [MARGIN * 0.5**rounds for rounds in range(ROUNDS + 1)]
    others = SCHEDULE.window - 1
    shares = [math.exp(margin) / (math.exp(margin) + others) for margin in margins]
    return margins, shares


def draw_fading(figure: Any, curves: dict[str, tuple[list[float], list[float]]]) -> None:
    """Left the margin by round, right the share of the attention."""
    figure.set_size_inches(9, 3.6)
    left, right = figure.subplots(1, 2)
    rounds = list(range(ROUNDS + 1))
    margins: dict[str, Curve] = {}
    shares: dict[str, Curve] = {}
    for name, (margin, share) in curves.items():
        margins[name] = (rounds, [value / MARGIN for value in margin])
        shares[name] = (rounds, share)
    draw_curves(left, margins)
    draw_curves(right, shares)
    left.set(xlabel="rounds of compression", ylabel="margin of its score, of what it was")
    right.set(xlabel="rounds of compression", ylabel="share of the attention")
    add_legend(figure)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="experiments.fading", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the picture [docs/fading.png]")
    args = parser.parse_args(argv)
    check_picture("--out", args.out)
    curves = {"theory: 1/2 a round": predict_margins()}
    for name, operator in OPERATORS.items():
        curves[name] = measure_margins(operator)
    rows = []
    for name, (margins, shares) in curves.items():
        row = [name]
        for margin, share in zip(margins, shares, strict=True):
            row.append(f"{margin:.2f} {share:4.0%}")
        rows.append(row)
    head = ["rounds"]
    for count in range(ROUNDS + 1):
        head.append(str(count))
    print(format_table(head, rows))
    draw_picture(args.out, draw_fading, curves)


if __name__ == "__main__":
    cli.run(main, "experiments.fading")
