"""Speed and memory, side by side: FreqKV, the plain cache, and `transformers`.

    python -m experiments.speed --quick                      # all cases, small, in a minute or so
    python -m experiments.speed decode roofline              # some, in full, on SmolLM2-135M
    python -m experiments.speed decode --model llama-3.2-1b --dtype bfloat16

Cases: decode, time a token by length of text; roofline, the same against the memory's bandwidth;
prefill, tokens read a second; compression, one round of it alone; training, attention with
gradients; memory, the peak by length of text; big, decoding with the shape of LLaMA-2-7B.

Times are medians; decoding also gives the longest. What is compared runs one after the other;
measure on a machine that does nothing else. Results go to the folder --out, as tables, JSON, CSV
and pictures.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cli
from dct import MAX_MATRIX_LENGTH, _is_split, _lowpass_by_fft, lowpass, lowpass_matrix
from experiments import peers, report
from experiments.report import Record
from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig
from generate import read_parts
from levels import LevelsCache, LevelsConfig
from model import Attend, Llama, LlamaConfig, Rope, causal_attention

WARM = 3  # tokens before the clock starts
ROUNDS = 3  # tokens timed that set off a round
CHUNK = 1024  # tokens read at a time


@dataclass(frozen=True)
class Sizes:
    """How much each case measures."""

    model: str  # that of all cases but `big`, unless --model names another
    big: str  # that of `big`
    windows: Sequence[int]  # decode: slots; the other cases take the first
    lengths: Sequence[int]  # decode: tokens read before
    steps: int  # decode, roofline: tokens timed
    bandwidth: int  # roofline: bytes that are read to measure it
    reads: Sequence[int]  # prefill: tokens
    spans: Sequence[int]  # compression: slots
    heads: Sequence[int]  # compression: kv heads
    multiples: Sequence[int]  # training: lengths of text, in windows
    texts: Sequence[int]  # memory: tokens


FULL = Sizes(
    model="smollm2",
    big="llama-2-7b",
    windows=(2048, 4096),
    lengths=(4096, 16384, 65536, 262144),
    steps=32,
    bandwidth=1 << 29,
    reads=(8192, 32768, 131072),
    spans=(4092, 8188),
    heads=(8, 32),
    multiples=(2, 4, 8),
    texts=(8192, 65536, 524288),
)
QUICK = Sizes(
    model="tiny",
    big="tiny",
    windows=(128, 256),
    lengths=(512, 4096),
    steps=8,
    bandwidth=1 << 23,
    reads=(1024, 4096),
    spans=(508,),
    heads=(4,),
    multiples=(4,),
    texts=(2048, 8192),
)


@dataclass(frozen=True)
class Setup:
    """What every case is given."""

    sizes: Sizes
    model: str  # as peers.make_model takes it
    device: torch.device
    dtype: torch.dtype
    compiled: bool = False  # decode: FreqKV by one compiled graph too


def make_schedule(window: int, model: LlamaConfig) -> FreqKVConfig:
    """The paper's schedule with so many slots, or the model's positions if fewer."""
    return FreqKVConfig(min(window, model.max_position_embeddings))


# Clocks


def time_calls(
    call: Callable[[], object], repeats: int, device: torch.device, warm: int = 2
) -> list[float]:
    """Seconds of each of `repeats` calls, after `warm` calls that are not timed."""
    for _ in range(warm):
        call()
    seconds = []
    for _ in range(repeats):
        start = cli.read_clock(device)
        call()
        seconds.append(cli.read_clock(device) - start)
    return seconds


def time_tokens(reader: peers.Reader, count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` greedy tokens, after WARM that are not timed."""
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    def write_token() -> None:
        nonlocal token
        token = reader(token).argmax(-1, keepdim=True)

    return time_calls(write_token, count, device, WARM)


def time_rounds(model: Llama, schedule: FreqKVConfig, tokens: int) -> list[float]:
    """Seconds of each of ROUNDS tokens that set off a round; the `tokens` before take all slots."""
    device = model.norm.weight.device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    seconds = []
    for _ in range(1 + ROUNDS):
        cache = peers.fill_freqkv_cache(model, tokens, schedule)
        reader = peers.make_reader(model, cache)
        seconds += time_calls(partial(reader, token), 1, device, warm=0)
        cache.reset()  # its memory is free before the next one is filled
    return seconds[1:]  # the first also made the matrices


def time_freqkv(
    model: Llama, schedule: FreqKVConfig, tokens: int, count: int
) -> tuple[list[float], list[float]]:
    """Seconds of each of `count` tokens between two rounds, and of ROUNDS that set off a round.

    The text before is of `tokens` tokens, or a little less: so that all slots are in use at the
    last token, whatever the length.
    """
    end = find_round(schedule, tokens)
    cache = peers.fill_freqkv_cache(model, end - count - WARM, schedule)
    reader = peers.make_reader(model, cache)
    between = time_tokens(reader, count, model.norm.weight.device)
    cache.reset()
    return between, time_rounds(model, schedule, end)


def find_round(schedule: FreqKVConfig, tokens: int) -> int:
    """The most tokens, up to about so many, after which all slots are in use."""
    rounds = max(0, (tokens - schedule.window) // schedule.stride)
    return schedule.window + rounds * schedule.stride


def time_compiled(
    model: Llama, schedule: FreqKVConfig, tokens: int, count: int
) -> tuple[list[float], list[float]]:
    """As `time_freqkv`, by one compiled graph; of tokens that set off a round it times one."""
    from steady import Steady  # with the compiler, which takes seconds to import

    torch._dynamo.reset()  # it compiles a step a few times only, and this is another
    device = model.norm.weight.device
    end = find_round(schedule, tokens)
    read_token = Steady(model, peers.fill_freqkv_cache(model, end - count - WARM, schedule))

    def reader(tokens: Tensor) -> Tensor:
        return read_token(tokens[:, 0])

    between = time_tokens(reader, count, device)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    return between, time_calls(partial(reader, token), 1, device, warm=0)


def run_apart(call: Callable[..., Record], *arguments: Any) -> Record:
    """What a call returns in a process of its own, whose peak of memory is its alone.

    MemoryError where that process is killed.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what this process holds no longer is the other one's to use
    context = multiprocessing.get_context("spawn")
    without_cudnn = torch.backends.cuda.enable_cudnn_sdp  # as cli.choose_device has it
    with ProcessPoolExecutor(1, context, without_cudnn, (False,)) as pool:
        try:
            return pool.submit(call, *arguments).result()
        except BrokenProcessPool:
            raise MemoryError(
                f"{call.__name__}: its process was killed, most likely for want of memory"
            ) from None


# Cases: each returns records


@torch.inference_mode()
def decode(setup: Setup) -> list[Record]:
    """Milliseconds of the usual token, and of the longest, after a text of so many tokens."""
    model = peers.make_model(setup.model, setup.dtype, setup.device)
    sizes = setup.sizes
    records = []
    for window in sizes.windows:
        schedule = make_schedule(window, model.config)
        for tokens in sizes.lengths:
            between, rounds = time_freqkv(model, schedule, tokens, sizes.steps)
            record = describe_decoding(model, schedule, tokens, between, rounds)
            print_tokens(record)
            records.append(record)
        if setup.compiled:
            tokens = sizes.lengths[-1]  # alone: each length is compiled anew
            between, rounds = time_compiled(model, schedule, tokens, sizes.steps)
            record = describe_decoding(model, schedule, tokens, between, rounds)
            record["peer"] += ", compiled"
            print_tokens(record)
            records.append(record)
    for peer, tokens, reader in peers.other_readers(model, sizes.lengths, sizes.steps + WARM):
        seconds = time_tokens(reader, sizes.steps, setup.device)
        record = {
            "peer": peer,
            "tokens": tokens,
            "ms": 1e3 * median(seconds),
            "longest_ms": 1e3 * max(seconds),
            "cache_bytes": peers.count_cache_bytes(model, tokens),
        }
        print_tokens(record)
        records.append(record)
        del reader  # and its cache, before the next one is filled
    return records


def describe_decoding(
    model: Llama, schedule: FreqKVConfig, tokens: int, between: list[float], rounds: list[float]
) -> Record:
    """A record of `decode`: seconds of tokens between two rounds, and of those that meet one."""
    # What a round takes beyond a token, spread over the tokens that it makes room for.
    share = (median(rounds) / median(between) - 1) / schedule.stride
    return {
        "peer": f"FreqKV, window {schedule.window}",
        "tokens": tokens,
        "ms": 1e3 * median(between),
        "longest_ms": 1e3 * max(between + rounds),
        "cache_bytes": peers.count_cache_bytes(model, schedule.window),
        "share_of_rounds": max(0.0, share),
    }


def print_tokens(record: Record) -> None:
    """A line for a record of `decode`, to be read while the next one is measured."""
    about = f"{record['peer']}, after {record['tokens']:,} tokens"
    times = f"{record['ms']:.1f} ms a token, the longest {record['longest_ms']:.1f}"
    print(f"{about}: {times}", flush=True)


@torch.inference_mode()
def roofline(setup: Setup) -> list[Record]:
    """A token's time against that of reading its bytes once: weights, and the slots in use."""
    sizes = setup.sizes
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        model = peers.make_model(setup.model, dtype, setup.device)
        before = measure_bandwidth(sizes.bandwidth, setup.device)
        schedule = make_schedule(sizes.windows[0], model.config)
        cache = peers.fill_freqkv_cache(model, schedule.window - sizes.steps - WARM, schedule)
        reader = peers.make_reader(model, cache)
        seconds = median(time_tokens(reader, sizes.steps, setup.device))
        total = count_token_bytes(model, schedule.window)
        after = measure_bandwidth(sizes.bandwidth, setup.device)
        bandwidth = max(before, after)  # it varies
        records.append(
            {
                "dtype": format_dtype(dtype),
                "bytes": total,
                "ms": 1e3 * seconds,
                "bandwidth": bandwidth,
                "share": total / bandwidth / seconds,
            }
        )
        del model, cache, reader  # before the next one is loaded
    return records


def count_token_bytes(model: Llama, slots: int) -> int:
    """Bytes that one token has to read: all weights, and the keys and values of so many slots."""
    total = peers.count_cache_bytes(model, slots)
    for weight in model.parameters():
        total += weight.nbytes
    if not model.config.tie_word_embeddings:  # of the embedding one row is read, and no more
        total -= model.embed_tokens.weight.nbytes
    return total


def measure_bandwidth(size: int, device: torch.device) -> float:
    """Bytes a second at best, of a sum and two products that read `size` bytes."""
    if device.type == "cuda":
        size *= 4  # to read half a gigabyte takes hardly longer than to ask for it
    matrix = torch.ones(size // (4 * 4096), 4096, device=device)  # float32: bytes are bytes
    vector = torch.ones(4096, device=device)
    calls: list[Callable[[], Tensor]] = [
        matrix.sum,
        partial(torch.mv, matrix, vector),
        partial(F.linear, vector[None], matrix),
    ]
    seconds = [median(time_calls(call, 7, device)) for call in calls]
    return matrix.nbytes / min(seconds)


class TimedCache(FreqKVCache):
    """A FreqKV cache that keeps the seconds of each of its rounds, by their place in the text."""

    def reset(self) -> None:
        super().reset()
        self.seconds: dict[int, float] = {}  # of all layers, after so many tokens

    def _make_room(self, keys: Tensor, values: Tensor, seen: int, rope: Any) -> tuple[int, int]:
        if self.config.rounds(seen + 1) == self.config.rounds(seen):  # none now: ask no clock
            return super()._make_room(keys, values, seen, rope)
        start = cli.read_clock(keys.device)
        room = super()._make_room(keys, values, seen, rope)
        took = cli.read_clock(keys.device) - start
        self.seconds[seen] = self.seconds.get(seen, 0.0) + took
        return room


class TimedLevelsCache(TimedCache, LevelsCache):
    """The same on levels."""


@torch.inference_mode()
def prefill(setup: Setup) -> list[Record]:
    """Tokens read a second: on slots, a whole text; by the others, the next tokens at a place."""
    model = peers.make_model(setup.model, setup.dtype, setup.device)
    paper = make_schedule(setup.sizes.windows[0], model.config)
    ladder = cli.make_schedule({"schedule": "levels", "window": paper.window}, model.config)
    reads = setup.sizes.reads
    # The ladder at one length alone: from the first windows on, either costs the same for ever.
    plan = [("FreqKV", paper, reads), ("levels", ladder, reads[:1])]
    records = []
    for name, schedule, lengths in plan:
        # The first rounds of all make the matrices.
        time_reading(model, schedule, schedule.window + 1)
        for tokens in lengths:
            seconds, rounds = time_reading(model, schedule, tokens)
            records.append(
                {
                    "peer": f"{name}, window {schedule.window}",
                    "tokens": tokens,
                    "rate": tokens / seconds,
                    "rounds": sum(rounds) / seconds,
                    "longest_round_ms": 1e3 * max(rounds),
                }
            )
    # The others read a part to warm up, from a little earlier, and then one that is timed.
    count = min(CHUNK, min(reads) // 2)
    part = torch.randint(model.config.vocab_size, (1, count), device=setup.device)
    starts = [tokens - count for tokens in reads]
    for peer, start, reader in peers.other_readers(model, starts, 2 * count):
        [seconds] = time_calls(partial(reader, part), 1, setup.device, warm=1)
        records.append({"peer": peer, "tokens": start + count, "rate": count / seconds})
        del reader  # and its cache, before the next one is filled
    return records


def time_reading(model: Llama, schedule: cli.Schedule, tokens: int) -> tuple[float, list[float]]:
    """Seconds of reading a text of so many tokens, and of each round of compression in it."""
    device = model.norm.weight.device
    text = torch.randint(model.config.vocab_size, (1, tokens))
    cache: TimedCache
    if isinstance(schedule, LevelsConfig):
        cache = TimedLevelsCache(schedule)
    else:
        cache = TimedCache(schedule)
    start = cli.read_clock(device)
    for _ in read_parts(model, text, cache, CHUNK):
        pass
    return cli.read_clock(device) - start, list(cache.seconds.values())


@torch.inference_mode()
def compression(setup: Setup) -> list[Record]:
    """One span to half: by `lowpass` (half products; FFT over 4096), by one product, by FFT."""
    records = []
    for span in setup.sizes.spans:
        for heads in setup.sizes.heads:
            for dtype in (torch.float32, torch.bfloat16):
                records += compare_ways(span, heads, dtype, setup.device)
    return records


def compare_ways(span: int, heads: int, dtype: torch.dtype, device: torch.device) -> list[Record]:
    """Records of the three ways to compress the keys or values of one layer."""
    keep = span // 2
    x = torch.randn(1, heads, span, 128, device=device).to(dtype)
    matrix = lowpass_matrix(span, keep, torch.float32, device)
    exact = lowpass_matrix(span, keep, torch.float64, device) @ x.double()
    ways: dict[str, Callable[[], Tensor]] = {
        "lowpass": lambda: lowpass(x, keep),
        "one product": lambda: (matrix @ x.float()).to(dtype),
        "FFT": lambda: _lowpass_by_fft(x.float(), keep).to(dtype),
    }
    constants = {"lowpass": 0, "one product": matrix.nbytes, "FFT": 0}
    if span <= MAX_MATRIX_LENGTH:
        constants["lowpass"] = count_half_products(span, keep) * matrix.element_size()
    records = []
    for name, way in ways.items():
        seconds = median(time_calls(way, 9, device))
        error = (way().double() - exact).norm() / exact.norm()
        records.append(
            {
                "way": name,
                "span": span,
                "heads": heads,
                "ms": 1e3 * seconds,
                "dtype": format_dtype(dtype),
                "error": error.item(),
                "bytes": x.nbytes + x.nbytes // 2 + constants[name],
            }
        )
    return records


def count_half_products(n: int, keep: int) -> int:
    """Numbers in the matrices by which `lowpass` makes `keep` of n samples."""
    one = ((keep + 1) // 2) * ((n + 1) // 2)
    if _is_split(n, keep):
        return one + count_half_products(n // 2, keep // 2)
    return 2 * one


def training(setup: Setup) -> list[Record]:
    """Attention with gradients, one layer, over texts of several windows; full attention beside."""
    window = setup.sizes.windows[0]
    # Read here: there, the model would be the peak of memory.
    config = peers.read_config(setup.model)
    attends: dict[str, Attend] = {
        "FreqKV": FreqKVAttention(FreqKVConfig(window)),
        "full attention": causal_attention,
    }
    records = []
    for multiple in setup.sizes.multiples:
        tokens = multiple * window
        for peer, attend in attends.items():
            record = run_apart(train_once, config, attend, tokens, setup.dtype, setup.device)
            records.append({"peer": peer, "window": window, "tokens": tokens} | record)
    return records


def train_once(
    config: LlamaConfig, attend: Attend, tokens: int, dtype: torch.dtype, device: torch.device
) -> Record:
    """Attention and its gradients over a text, one layer: the time, and what the process took."""
    rope = Rope(config.head_dim, config.rope_theta, config.rope_scaling)

    def make_input(heads: int) -> Tensor:
        shape = (1, heads, tokens, config.head_dim)
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    q = make_input(config.num_attention_heads)
    k = make_input(config.num_key_value_heads)
    v = make_input(config.num_key_value_heads)
    before, _ = cli.peak_memory(device)

    def step() -> None:
        out = attend(0, q, k, v, rope)
        torch.autograd.grad(out.float().square().mean(), (q, k, v))

    seconds = median(time_calls(step, 3, device, warm=1))
    peak, _ = cli.peak_memory(device)
    return {"ms": 1e3 * seconds, "peak_bytes": peak - before}


def memory(setup: Setup) -> list[Record]:
    """The peak of reading texts of several lengths, each in a process of its own."""
    window = setup.sizes.windows[0]
    records = []
    for tokens in setup.sizes.texts:
        record = run_apart(read_once, setup.model, window, tokens, setup.dtype, setup.device)
        records.append({"model": setup.model, "tokens": tokens} | record)
    return records


def read_once(
    name: str, window: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> Record:
    """The peak of a process that reads a text of so many tokens, in parts."""
    model = peers.make_model(name, dtype, device)
    cache = FreqKVCache(make_schedule(window, model.config))
    text = torch.randint(model.config.vocab_size, (1, tokens))
    for _ in read_parts(model, text, cache, CHUNK):
        pass
    peak, _ = cli.peak_memory(device)
    return {"peak_bytes": peak, "cache_bytes": cache.nbytes}


def big(setup: Setup) -> list[Record]:
    """The shape of LLaMA-2-7B in bfloat16: a token that sets off a round, and the others."""
    return [run_apart(decode_once, setup.sizes.big, torch.bfloat16, setup.device)]


@torch.inference_mode()
def decode_once(name: str, dtype: torch.dtype, device: torch.device) -> Record:
    """Decoding with the paper's window: times, and the peak of the process."""
    model = peers.make_model(name, dtype, device)
    schedule = make_schedule(4096, model.config)
    between, rounds = time_freqkv(model, schedule, schedule.window, 19)
    peak, _ = cli.peak_memory(device)
    return {
        "model": name,
        "window": schedule.window,
        "weights_bytes": sum(weight.nbytes for weight in model.parameters()),
        "cache_bytes": peers.count_cache_bytes(model, schedule.window),
        "peak_bytes": peak,
        "round_ms": 1e3 * median(rounds),
        "ms": 1e3 * median(between),
    }


CASES: dict[str, Callable[[Setup], list[Record]]] = {
    "decode": decode,
    "roofline": roofline,
    "prefill": prefill,
    "compression": compression,
    "training": training,
    "memory": memory,
    "big": big,
}

# Tables and pictures


FORMATS: dict[str, Callable[[Any], str]] = {  # by the end of a field's name
    "tokens": "{:,}".format,
    "ms": "{:.2f}".format,
    "bytes": cli.format_bytes,
    "bandwidth": lambda rate: f"{cli.format_bytes(rate)}/s",
    "rate": "{:.0f} tokens/s".format,
    "share": "{:.0%}".format,
    "rounds": "{:.1%}".format,
    "error": "{:.1e}".format,
}


def format_dtype(dtype: torch.dtype) -> str:
    """The name of a dtype, as --dtype takes it."""
    return str(dtype).removeprefix("torch.")


def format_field(name: str, value: Any) -> str:
    """A field of a record as people read it."""
    for end, form in FORMATS.items():
        if name.endswith(end):
            return form(value)
    return str(value)


def format_records(records: Sequence[Record]) -> str:
    """Records as a table, with a column for each field that any of them has."""
    names: list[str] = []
    for record in records:
        names += [name for name in record if name not in names]
    rows = []
    for record in records:
        row = []
        for name in names:
            row.append(format_field(name, record[name]) if name in record else "")
        rows.append(row)
    return report.format_table([name.replace("_", " ") for name in names], rows)


@dataclass(frozen=True)
class Picture:
    """A field of the records by tokens, with a curve for each peer."""

    file: str
    field: str
    label: str  # of its axis
    scale: float = 1  # of its axis


PICTURES = {
    "decode": [
        Picture("time.png", "ms", "time a token (ms)"),
        Picture("memory.png", "cache_bytes", "keys and values (GB)", 1e-9),
    ],
    "prefill": [Picture("reading.png", "rate", "tokens read a second")],
}


def draw(figure: Any, records: Sequence[Record], what: Picture) -> None:
    """Draw on a matplotlib figure, on two logarithmic axes."""
    from matplotlib.ticker import LogLocator

    axes = figure.subplots()
    curves: dict[str, tuple[list[float], list[float]]] = {}  # x, y
    for record in records:
        x, y = curves.setdefault(record["peer"], ([], []))
        x.append(record["tokens"])
        y.append(record[what.field] * what.scale)
    # What was measured at one length alone, as --compile is, stands in the table.
    curves = {peer: curve for peer, curve in curves.items() if len(curve[0]) > 1}
    report.draw_curves(axes, curves)
    report.add_legend(figure)
    axes.set(yscale="log", xlabel="tokens read before", ylabel=what.label)
    report.mark_tokens(axes, sorted({record["tokens"] for record in records}))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")


# The script


FIXED = ["compression", "big"]  # whose records say what they are of, whatever the flags do


def add_flags(parser: cli.Parser) -> None:
    """The command line."""
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} [all]")
    add("--quick", action="store_true", help="small sizes and the built-in model")
    shapes = ", ".join(peers.SHAPES)
    text = f"tiny, smollm2, a path, or a shape with random weights: {shapes}"
    add("--model", help=f"{text} [{FULL.model}; {QUICK.model} with --quick]")
    add("--device", help="cpu, cuda, ... [cuda where there is one]")
    add("--dtype", choices=["float32", "bfloat16"], help="[bfloat16 on cuda, float32 elsewhere]")
    add("--compile", action="store_true", help="decode: by one compiled graph too (steady.py)")
    add("--out", type=cli.path, help="folder for results [runs/speed-MODEL]")
    add("--plot", action="store_true", help="draw pictures too (takes matplotlib)")


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="experiments.speed", description=__doc__)
    add_flags(parser)
    args = parser.parse_args(argv)

    # Everything that can be wrong is found before any time is spent.
    for name in args.cases:
        if name not in CASES:
            raise ValueError(f"CASE: was {name!r}, must be of {', '.join(CASES)}")
    sizes = QUICK if args.quick else FULL
    device = cli.choose_device(args.device)
    dtype = cli.choose_dtype(args.dtype, device)
    if args.model is None:
        args.model = sizes.model
    args.dtype = format_dtype(dtype)  # the settings that are written say what was chosen
    peers.check_model(args.model)
    if args.plot:
        report.check_plots()
    cases = args.cases or list(CASES)
    if args.compile and "decode" not in cases:
        raise ValueError(f"--compile: was given with {', '.join(cases)}, must be with decode")
    folder = report.open_folder(args.out, "speed", args.model)
    for name in cases:
        report.check_results(folder, name, None if name in FIXED else args.model, None)
    if args.compile:
        from steady import check_compiler  # with the compiler, which takes seconds to import

        check_compiler(device)

    setup = Setup(sizes, args.model, device, dtype, args.compile)
    for name in cases:
        print(f"\n{name}: {CASES[name].__doc__}", flush=True)
        records = CASES[name](setup)
        print(format_records(records))
        settings = vars(args)
        if name in FIXED:
            settings = settings | {"model": None, "dtype": None}
        report.write_results(folder, name, records, settings)
        if args.plot:
            for what in PICTURES.get(name, []):
                report.draw_picture(folder / what.file, draw, records, what)


if __name__ == "__main__":
    cli.run(main, "experiments.speed", finish=True)
