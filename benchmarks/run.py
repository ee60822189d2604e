"""Speed and memory, side by side: a cache of constant size, the plain one, and transformers.

    python benchmarks/run.py --quick                      # all cases, small, in two minutes
    python benchmarks/run.py decode roofline              # some, in full, on SmolLM2-135M
    python benchmarks/run.py decode --model llama-3.2-1b --dtype bfloat16

Cases: decode, time a token by length of text; roofline, the same against the memory's bandwidth;
prefill, tokens read a second; compression, one round of it alone; training, attention with
gradients; memory, the peak by length of text; big, decoding with the shape of LLaMA-2-7B.

Times are medians. What is compared runs in one process, one after the other; measure on a machine
that does nothing else. Results go to the folder --out, as tables, JSON, CSV and pictures.
"""

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cli
from benchmarks import peers
from dct import dct, idct, lowpass_matrix
from evaluation.report import (
    figure_class,
    lines,
    log_ticks,
    open_folder,
    picture,
    table,
    write_results,
)
from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig, compress
from generate import parts
from model import Llama, LlamaConfig, Rope, causal_attention

Record = dict[str, Any]
FULL = {  # what --quick makes smaller
    "model": "smollm2", "windows": [2048, 4096], "lengths": [4096, 16384, 65536, 262144],
    "steps": 32, "reads": [8192, 32768, 131072], "spans": [4092, 8188], "heads": [8, 32],
    "multiples": [2, 4, 8], "texts": [8192, 65536, 524288], "big": "llama-2-7b",
}  # fmt: skip
QUICK = {
    "model": "tiny", "windows": [128, 256], "lengths": [512, 4096], "steps": 8,
    "reads": [1024, 4096], "spans": [508], "heads": [4], "multiples": [2, 4],
    "texts": [2048, 8192], "big": "tiny",
}  # fmt: skip


WARM = 3  # steps before the clock starts


class Bench:
    """Settings, sizes, and the model that is loaded: one at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.sizes = args, QUICK if args.quick else FULL
        self.device, dtype = cli.place(args.device, args.dtype)
        args.model = args.model or self.sizes["model"]
        args.dtype = str(dtype).removeprefix("torch.")
        self.model: Any = None

    def load(self, name: str | None = None, dtype: torch.dtype | None = None) -> Llama:
        self.model = None  # before the next one, not beside it
        dtype = dtype or cli.DTYPES[self.args.dtype]
        self.model = peers.new_model(name or self.args.model, dtype, self.device)
        return self.model

    def config(self, window: int) -> FreqKVConfig:
        return FreqKVConfig(min(window, self.model.config.max_position_embeddings))

    def token_time(self, step: peers.Step, count: int) -> float:
        """Median seconds of a greedy step of one token."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)

        def one() -> None:
            nonlocal token
            token = step(token).argmax(-1, keepdim=True)

        return timed(one, count, self.device, WARM)


# Cases: each returns records


def decode(bench: Bench) -> list[Record]:
    """Milliseconds a token after a text of so many tokens."""
    model, count, found = bench.load(), bench.sizes["steps"], []
    token = torch.zeros(1, 1, dtype=torch.long, device=bench.device)

    def add(peer: str, tokens: int, seconds: float, slots: int, **more: float) -> None:
        held = peers.cache_bytes(model, slots)
        about = {"peer": peer, "tokens": tokens, "ms": 1e3 * seconds, "cache_bytes": held}
        found.append(about | more)
        print(f"{peer}, after {tokens:,} tokens: {1e3 * seconds:.1f} ms a token", flush=True)

    for config in map(bench.config, bench.sizes["windows"]):
        for tokens in bench.sizes["lengths"]:
            # As many slots in use at every length: all of them, at the last step.
            rounds = max(0, (tokens - config.window) // config.stride)
            end = config.window + rounds * config.stride
            cache = peers.after(model, end - count - WARM, config)
            seconds = bench.token_time(peers.reading(model, cache), count)
            with_round = median(
                timed(lambda: step(token), 1, bench.device, warm=0)  # noqa: B023 (called at once)
                for step in (
                    peers.reading(model, peers.after(model, end, config)) for _ in range(3)
                )
            )
            share = max(0.0, with_round / seconds - 1) / config.stride
            name = f"FreqKV, window {config.window}"
            add(name, tokens, seconds, config.window, share_of_rounds=share)
    for peer, tokens, step in peers.others(model, bench.sizes["lengths"], count + WARM):
        add(peer, tokens, bench.token_time(step, count), tokens)
        del step  # and its memory, before the next is filled
    return found


def roofline(bench: Bench) -> list[Record]:
    """A token's time against that of reading its bytes once: weights, and the slots in use."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = bench.load(dtype=dtype)
        bandwidth = read_bandwidth(bench)
        weights = sum(p.nbytes for p in model.parameters())
        if model.lm_head is not None:  # of the embedding, one row is read
            weights -= model.embed_tokens.weight.nbytes
        config = bench.config(bench.sizes["windows"][0])
        cache = peers.after(model, config.window - bench.sizes["steps"] - WARM, config)
        seconds = bench.token_time(peers.reading(model, cache), bench.sizes["steps"])
        total = weights + peers.cache_bytes(model, config.window)
        bandwidth = max(bandwidth, read_bandwidth(bench))  # it varies; so before and after
        record = {"dtype": str(dtype).removeprefix("torch."), "bytes": total, "ms": 1e3 * seconds}
        record |= {"bandwidth": bandwidth, "share": total / bandwidth / seconds}
        found.append(record)
    return found


def read_bandwidth(bench: Bench) -> float:
    """Bytes a second at best: of a sum, and of a matrix times a vector, of half a gigabyte."""
    rows = (1 << (21 if bench.args.quick else 27)) // 4096
    matrix = torch.ones(rows, 4096, device=bench.device)  # float32: bytes are bytes
    vector = torch.ones(4096, device=bench.device)
    calls = (lambda: matrix.sum(), lambda: matrix @ vector, lambda: F.linear(vector[None], matrix))
    return max(matrix.nbytes / timed(call, 7, bench.device) for call in calls)


class TimedCache(FreqKVCache):
    """Adds up the seconds of its rounds of compression."""

    seconds = 0.0

    def _compress(self, *about: Any) -> None:
        start = time.perf_counter()
        super()._compress(*about)
        if about[1].is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start


def prefill(bench: Bench) -> list[Record]:
    """Tokens read a second: by FreqKV, a whole text; by the others, the next tokens at a place."""
    model, found, chunk = bench.load(), [], 1024
    vocabulary = model.config.vocab_size
    config = bench.config(bench.sizes["windows"][0])
    for tokens in bench.sizes["reads"]:
        cache, text = TimedCache(config), torch.randint(vocabulary, (1, tokens))
        start = time.perf_counter()
        for part in parts(text, cache, chunk):
            model.hidden(part.to(bench.device), cache)
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        about = {"peer": f"FreqKV, window {config.window}", "tokens": tokens}
        found.append(about | {"rate": tokens / seconds, "rounds": cache.seconds / seconds})
    block = torch.randint(vocabulary, (1, min(chunk, tokens)), device=bench.device)
    for peer, tokens, step in peers.others(model, bench.sizes["reads"], block.shape[1]):
        seconds = timed(partial(step, block), 1, bench.device, warm=0)
        found.append({"peer": peer, "tokens": tokens, "rate": block.shape[1] / seconds})
        del step
    return found


def fft_lowpass(x: Tensor, keep: int) -> Tensor:
    """As `compress`, by fast Fourier transforms at any size."""
    low = dct(x.float(), dim=-2)[..., :keep, :]
    return (math.sqrt(keep / x.shape[-2]) * idct(low, dim=-2)).to(x.dtype)


def compression(bench: Bench) -> list[Record]:
    """One span to half: by `compress` (half products; FFT over 4096), by one product, by FFT."""
    found = []
    for span, heads, dtype in (
        (span, heads, dtype)
        for span in bench.sizes["spans"]
        for heads in bench.sizes["heads"]
        for dtype in (torch.float32, torch.bfloat16)
    ):
        keep, x = span // 2, torch.randn(1, heads, span, 128, device=bench.device).to(dtype)
        matrix = lowpass_matrix(span, keep, torch.float32, bench.device)
        exact = lowpass_matrix(span, keep, torch.float64, bench.device) @ x.double()
        ways = {
            "compress": (compress, matrix.nbytes // 2 if span <= 4096 else 0),
            "one product": (lambda x, keep: (matrix @ x.float()).to(x.dtype), matrix.nbytes),  # noqa: B023
            "FFT": (fft_lowpass, 0),
        }
        for name, (way, constants) in ways.items():
            seconds = timed(lambda: way(x, keep), 9, bench.device)  # noqa: B023 (called at once)
            error = (way(x, keep).double() - exact).norm() / exact.norm()
            record = {"way": name, "span": span, "heads": heads, "ms": 1e3 * seconds}
            record |= {"dtype": str(dtype).removeprefix("torch."), "error": error.item()}
            found.append(record | {"bytes": x.nbytes + x.nbytes // 2 + constants})
    return found


def train_once(config: LlamaConfig, window: int, tokens: int, dtype: str, device: str) -> Record:
    """Attention and its gradients over a text, one layer: the time, and what the process took."""
    place = torch.device(device)
    rope = Rope(config.head_dim, config.rope_theta, config.rope_scaling)
    attend = FreqKVAttention(FreqKVConfig(window)) if window else causal_attention
    q, k, v = (
        torch.randn(1, heads, tokens, config.head_dim, device=place)
        .to(cli.DTYPES[dtype])
        .requires_grad_()
        for heads in (config.num_attention_heads, *2 * [config.num_key_value_heads])
    )
    before, _ = cli.peak_memory(place)

    def step() -> None:
        attend(0, q, k, v, rope).float().square().mean().backward()
        q.grad = k.grad = v.grad = None

    seconds = timed(step, 3, place, warm=1)
    return {"ms": 1e3 * seconds, "peak_bytes": cli.peak_memory(place)[0] - before}


def training(bench: Bench) -> list[Record]:
    """Attention with gradients, one layer, over texts of several windows; full attention beside."""
    found, window = [], bench.sizes["windows"][0]
    config = peers.config_of(bench.args.model)  # here: a model in that process would be its peak
    for multiple in bench.sizes["multiples"]:
        for peer in ("FreqKV", "full attention"):
            about = (config, window if peer == "FreqKV" else 0, multiple * window)
            record = apart(train_once, *about, bench.args.dtype, str(bench.device))
            found.append({"peer": peer, "window": window, "tokens": multiple * window} | record)
    return found


def read_once(name: str, tokens: int, dtype: str, device: str) -> Record:
    """The peak of a process that reads a text of so many tokens, in blocks."""
    place = torch.device(device)
    model = peers.new_model(name, cli.DTYPES[dtype], place)
    cache = FreqKVCache(FreqKVConfig(min(2048, model.config.max_position_embeddings)))
    text = torch.randint(model.config.vocab_size, (1, tokens))
    with torch.inference_mode():
        for part in parts(text, cache, 1024):
            model.hidden(part.to(place), cache)
    return {"peak_bytes": cli.peak_memory(place)[0], "cache_bytes": cache.nbytes}


def memory(bench: Bench) -> list[Record]:
    """The peak of reading texts of several lengths, each in a process of its own."""
    found, name = [], bench.args.model
    for tokens in bench.sizes["texts"]:
        record = apart(read_once, name, tokens, bench.args.dtype, str(bench.device))
        found.append({"model": name, "tokens": tokens} | record)
    return found


def big(bench: Bench) -> list[Record]:
    """The shape of LLaMA-2-7B in bfloat16: a token that sets off a round, and the next ones."""
    name = bench.sizes["big"]
    model = bench.load(name, torch.bfloat16)
    config = bench.config(4096)
    step = peers.reading(model, peers.after(model, config.window, config))
    token = torch.zeros(1, 1, dtype=torch.long, device=bench.device)
    first = timed(lambda: step(token), 1, bench.device, warm=0)
    each = timed(lambda: step(token), 19, bench.device, warm=1)
    weights, (peak, _) = sum(p.nbytes for p in model.parameters()), cli.peak_memory(bench.device)
    record = {"model": name, "window": config.window, "weights_bytes": weights}
    record |= {"cache_bytes": peers.cache_bytes(model, config.window), "peak_bytes": peak}
    return [record | {"round_ms": 1e3 * first, "ms": 1e3 * each}]


# Running and showing


def timed(call: Callable[[], Any], repeats: int, device: torch.device, warm: int = 2) -> float:
    """Median seconds of a call."""
    seconds = []
    for i in range(-warm, repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 0:
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def apart(call: Callable[..., Record], *args: Any) -> Record:
    """What a call returns in a process of its own, whose peak of memory is its alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


SHOWN: list[tuple[str, Callable[[Any], str]]] = [  # how a field is shown, by the end of its name
    ("tokens", "{:,}".format),
    ("ms", "{:.2f}".format),
    ("bytes", cli.size),
    ("bandwidth", lambda x: f"{cli.size(x)}/s"),
    ("rate", "{:.0f} tokens/s".format),
    ("share", "{:.0%}".format),
    ("rounds", "{:.1%}".format),
    ("error", "{:.1e}".format),
]


def shown(records: Sequence[Record]) -> str:
    """Records as a table, a column for each field."""
    names = list(dict.fromkeys(name for record in records for name in record))

    def cell(name: str, record: Record) -> str:
        how = next((how for end, how in SHOWN if name.endswith(end)), str)
        return how(record[name]) if name in record else ""

    head = [name.replace("_", " ") for name in names]
    return table(head, [[cell(name, record) for name in names] for record in records])


def draw(figure: Any, records: Sequence[Record], axis: tuple[str, str, float]) -> None:
    """A field of the records by tokens, a curve for each peer, on two logarithmic axes."""
    from matplotlib.ticker import LogLocator

    axes, curves, (what, label, unit) = figure.subplots(), {}, axis
    for record in records:
        x, y = curves.setdefault(record["peer"], ([], []))
        x.append(record["tokens"])
        y.append(record[what] * unit)
    lines(axes, curves)
    axes.set(yscale="log", xlabel="tokens read before", ylabel=label)
    log_ticks(axes, sorted({record["tokens"] for record in records}))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")


CASES = {f.__name__: f for f in (decode, roofline, prefill, compression, training, memory, big)}
PICTURES = {  # case: file, field, label of its axis, unit
    "decode": [
        ("time.png", "ms", "time a token (ms)", 1),
        ("memory.png", "cache_bytes", "keys and values (GB)", 1e-9),
    ],
    "prefill": [("reading.png", "rate", "tokens read a second", 1)],
}


def parser() -> cli.Parser:
    """The command line."""
    p = cli.Parser(prog="benchmarks/run.py", description=__doc__)
    add = p.add_argument
    add("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} [all]")
    add("--quick", action="store_true", help="small sizes and the built-in model, in two minutes")
    add("--model", help="tiny, smollm2, a path, or a shape with random weights: "
        f"{', '.join(peers.SHAPES)} [smollm2; tiny with --quick]")  # fmt: skip
    add("--device", help="cpu, cuda, ... [cuda where there is one]")
    add("--dtype", choices=["float32", "bfloat16"], help="[bfloat16 on cuda, float32 elsewhere]")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="for results [%(default)s]")
    add("--plot", action="store_true", help="draw pictures too (takes matplotlib)")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    for name in args.cases:
        if name not in CASES:
            raise ValueError(f"CASE: was {name!r}, must be of {', '.join(CASES)}")
    if args.plot:
        figure_class()
    open_folder(args.out)
    bench = Bench(args)
    for name in args.cases or CASES:
        print(f"\n{name}: {CASES[name].__doc__}", flush=True)
        with torch.inference_mode():
            records = CASES[name](bench)
        print(shown(records))
        print(write_results(name, records, args), flush=True)
        for file, *what in PICTURES.get(name, []) if args.plot else []:
            print(picture(args.out / file, partial(draw, records=records, axis=what)))


if __name__ == "__main__":
    cli.run(main, "benchmarks/run.py", finish=True)
