"""Time and memory of a token of SmolLM2: in transformers, with FreqKV attached, and in model.py.

    python -m examples.time_transformers                  # after 4096, 16384 and 65536 tokens

The caches are filled with random keys and values, which cost what real ones cost. The three take
turns, so that what else the machine does falls on all of them alike.
"""

from statistics import median

import torch

import cli
import weights
from examples.transformers_freqkv import Conversation, attach, detach
from experiments import peers
from experiments.speed import WARM, find_round, time_tokens
from freqkv import FreqKVConfig

TOKENS = 8  # timed in each turn
TURNS = 4


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="examples.time_transformers", description=__doc__)
    usual = [4096, 16384, 65536]
    text = "of texts, in tokens [4096 16384 65536]"
    parser.add_argument(
        "lengths", nargs="*", type=cli.integer(64, 1 << 24), default=usual, help=text
    )
    lengths = parser.parse_args(argv).lengths
    model = weights.load_model("smollm2")
    host = peers.make_twin(model)
    config = FreqKVConfig(window=2048)
    for tokens in lengths:
        # No round comes before the last token has been timed, which finds all slots taken, or as
        # many as there are tokens.
        end = min(tokens, find_round(config, tokens))
        start = end - TURNS * (WARM + TOKENS)
        own = peers.fill_freqkv_cache(model, start, config)
        talk = Conversation(config)
        talk.freqkv = peers.fill_freqkv_cache(model, start, config)
        full = peers.fill_their_cache(model, tokens)
        times: dict[str, list[float]] = {"transformers": [], "with FreqKV": [], "model.py": []}
        for _ in range(TURNS):
            reader = peers.make_their_reader(host, full)
            times["transformers"] += time_tokens(reader, TOKENS, torch.device("cpu"))
            attach(host, config)
            reader = peers.make_their_reader(host, talk)
            times["with FreqKV"] += time_tokens(reader, TOKENS, torch.device("cpu"))
            detach(host)
            reader = peers.make_reader(model, own)
            times["model.py"] += time_tokens(reader, TOKENS, torch.device("cpu"))
        full_bytes = peers.count_cache_bytes(model, tokens)
        sizes = [full_bytes, talk.freqkv.nbytes, own.nbytes]
        for (name, seconds), size in zip(times.items(), sizes, strict=True):
            ms = 1000 * median(seconds)
            print(f"{tokens:,} tokens, {name}: {ms:.1f} ms a token, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    cli.run(main, "examples.time_transformers")
