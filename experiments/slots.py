"""Draws docs/slots.png, what the slots of the cache hold: python -m experiments.slots

Every token is given a value that is 1 in a channel of its own. After a text has been read, channel
t of a slot is therefore the weight of token t in it: the picture is read off the cache itself.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cli
from experiments.report import check_picture, draw_picture
from freqkv import FreqKVCache, FreqKVConfig

SCHEDULE = FreqKVConfig(window=64, sinks=4, ratio=0.5)
LENGTHS = [64, 94, 184]  # tokens: the window full; after one round; after four
OUT = Path(__file__).parents[1] / "docs/slots.png"


def read_weights(length: int) -> Tensor:
    """The weight of each token in each slot after `length` tokens: [slots in use, length]."""
    cache = FreqKVCache(SCHEDULE)
    values = torch.eye(length)[None, None]  # [1, 1, T, D = T]
    keys = torch.zeros_like(values)
    cache(0, keys, keys, values, leave_unrotated)
    return cache.state_dict()["v.0"][0, 0]


def leave_unrotated(x: Tensor, start: int = 0, inverse: bool = False) -> Tensor:
    return x


def draw_slots(figure: Any) -> None:
    """A panel for each length: slots downwards, tokens to the right."""
    from matplotlib.colors import PowerNorm

    figure.set_size_inches(10, 2.7)
    panels = figure.subplots(1, len(LENGTHS), width_ratios=LENGTHS, sharey=True)
    for axes, length in zip(panels, LENGTHS, strict=True):
        weights = read_weights(length).abs().numpy()
        image = axes.imshow(weights, cmap="gray_r", norm=PowerNorm(0.6, 0, 1))
        rounds = cli.format_count(SCHEDULE.rounds(length), "round")
        axes.set_title(f"{length} tokens, {rounds}", fontsize=10)
        axes.set_xlabel("token of the text")
    panels[0].set_ylabel("slot of the cache")
    figure.colorbar(image, ax=panels, label="weight, absolute", shrink=0.9)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="experiments.slots", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the picture [docs/slots.png]")
    args = parser.parse_args(argv)
    check_picture("--out", args.out)
    draw_picture(args.out, draw_slots)


if __name__ == "__main__":
    cli.run(main, "experiments.slots")
