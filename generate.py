"""Read a text of any length into a cache of constant size, and continue it.

    python generate.py --prompt "def main("      # the built-in model, which writes Python
    python generate.py --model smollm2 --prompt-file BOOK.txt --save-cache book.safetensors
    python generate.py --model smollm2 --load-cache book.safetensors --prompt "Who is Emma?" --chat

The text that the model writes goes to stdout as it is made; progress and a summary go to stderr.
`read_parts`, `read`, `read_token`, `write` and `sample` are also what other scripts read and write
text with.
"""

import copy
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import cli
from cli import Cache
from freqkv import FreqKVCache, distinct, lowband, newest
from levels import LevelsCache, LevelsConfig
from model import Llama
from weights import Tokenizer, chat_stops, chat_tokens, fingerprint, load_tokenizer
from weights.files import decode_text, name_file, read_text, write_beside

Step = Callable[[Tensor], Tensor]
ROUNDS = {lowband: "compression", distinct: "selection", newest: "eviction"}

# Sampling


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """logits [B, V] with all but the k largest of each row at -inf (ties with the k-th stay)."""
    k = min(k, logits.shape[-1])
    least = logits.topk(k).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """logits [B, V] with -inf outside the fewest likeliest tokens that together reach p."""
    ordered, order = logits.sort(descending=True)
    shares = ordered.softmax(-1)
    # A token stays if those before it fall short of p; so the likeliest always does.
    over = shares.cumsum(-1) - shares >= p
    over[:, 0] = False
    ordered = ordered.masked_fill(over, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: the settings of `sample`."""

    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int | None = None  # draw from so many of the likeliest
    top_p: float | None = None  # draw from the fewest likeliest that together reach this share


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token for each row of logits [B, V], as ids [B]. ValueError for NaN or +inf."""
    logits = logits.float()
    if not (logits < torch.inf).all():  # which NaN is not, either
        raise ValueError(
            "logits: were not numbers, must be (a damaged weight, or float16, which overflows: "
            "try another --dtype)"
        )
    if sampling.temperature == 0:
        return logits.argmax(-1)
    largest = logits.amax(-1, keepdim=True)
    logits = (logits - largest) / max(sampling.temperature, 1e-6)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# Reading and writing


@torch.no_grad()
def read_parts(model: Llama, tokens: Tensor, cache: Cache, chunk: int) -> Iterator[Tensor]:
    """Read tokens [B, T] into the cache; hidden states [B, part, E] of one part after another.

    A part has at most `chunk` tokens, and ends where a round begins. So all rounds read the same
    shapes, and what libraries keep for each shape of a matrix (in bfloat16, hundreds of MB) does
    not grow with the text.
    """
    device = model.norm.weight.device
    time = tokens.shape[1]
    start = 0
    while start < time:
        count = min(chunk, time - start)
        if isinstance(cache, FreqKVCache):
            room = cache.room
            if room == 0:  # the next token sets off a round
                room = cache.config.stride
            count = min(count, room)
        part = tokens[:, start : start + count].to(device)
        yield model.hidden(part, cache)
        start += count


@torch.no_grad()
def read(model: Llama, tokens: Tensor, cache: Cache, chunk: int, progress: bool = False) -> Tensor:
    """Read tokens [B, T] into the cache, `chunk` at a time; logits [B, V] after the last one.

    ValueError where there is no token.
    """
    if tokens.shape[1] == 0:
        raise ValueError("tokens: were none, must be one or more")
    bar = tqdm(
        total=tokens.shape[1], unit=" tokens", unit_scale=True, desc="reading", disable=not progress
    )
    with bar:
        for hidden in read_parts(model, tokens, cache, chunk):
            bar.update(hidden.shape[1])
    return model.logits(hidden[:, -1])


@torch.no_grad()
def read_token(model: Llama, tokens: Tensor, cache: Cache) -> Tensor:
    """Read tokens [B], one for each row, into the cache; logits [B, V] after it."""
    hidden = model.hidden(tokens[:, None], cache)
    return model.logits(hidden[:, -1])


def write(
    step: Step,
    logits: Tensor,
    stop_ids: Sequence[int],
    limit: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Iterator[list[int | None]]:
    """Continue after `logits` [B, V]: up to `limit` times one id for each row, as it is made.

    step: reads tokens [B], and gives the next logits: `read_token` of a model and its cache.
    A row that has come to one of `stop_ids` gives None from there on. It ends when all rows have.
    """
    ended = [False] * len(logits)
    for number in range(limit):
        tokens = sample(logits, sampling, generator)
        ids: list[int | None] = []
        for row, token in enumerate(tokens.tolist()):
            if token in stop_ids:
                ended[row] = True
            ids.append(None if ended[row] else token)
        if all(ended):
            return
        yield ids
        if number + 1 < limit:
            logits = step(tokens)


# The saved cache


def save_cache(path: Path, cache: FreqKVCache, model: Llama) -> None:
    """Write a cache to a safetensors file, whole or not at all."""
    names = {operator: name for name, operator in cli.OPERATORS.items()}
    about = {"cache": names[cache.operator], "model": fingerprint(model)}
    state = cache.state_dict()
    write_beside(path, lambda to: save_file(state, to, metadata=about))


def load_cache(path: Path, name: str | None, model: Llama) -> FreqKVCache:
    """The cache in a file by `save_cache`; ValueError for one of another name or another model.

    name: of those in cli.CACHES; where it is None, what the file says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--load-cache: was {str(path)!r}, must be a file of --save-cache")
    state = {}
    try:
        with safe_open(path, framework="pt", device=str(model.norm.weight.device)) as content:
            about = content.metadata() or {}
            for key in content.keys():  # noqa: SIM118 (not a dict)
                state[key] = content.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: was not whole ({error}), must be a saved cache") from None
    if about.get("model") != fingerprint(model):
        raise ValueError(
            f"{path}: was of another model, adapter, dtype or version, must be of this one"
        )
    saved = about.get("cache")
    if saved not in cli.OPERATORS or name not in (None, saved):
        raise ValueError(f"{path}: was of --cache {saved}, must be of {name or 'a known one'}")
    dtype = model.norm.weight.dtype
    for layer in range(model.config.num_hidden_layers):
        for key in (f"k.{layer}", f"v.{layer}"):
            if key not in state or state[key].dtype != dtype:
                raise ValueError(f"{path}: {key} was not there in {dtype}, must be, as every layer")
    cache_type = LevelsCache if LevelsCache.config_name in state else FreqKVCache
    with name_file(path):
        return cache_type.from_state(state, cli.OPERATORS[saved])


def is_saved_cache(path: Path) -> bool:
    """Whether the file is one of `save_cache`."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as content:
            return "cache" in (content.metadata() or {})
    except (SafetensorError, OSError):
        return False


# The prompt


def read_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The texts to continue: those given, else a file's, else stdin's; nothing is an empty one."""
    if given is not None:
        return given
    if file is not None and file != Path("-"):
        return [read_text(file)]
    if file is None and sys.stdin.isatty():
        return [""]
    return [decode_text(sys.stdin.buffer.read(), "stdin")]


def encode_prompts(
    texts: Sequence[str], tokenizer: Tokenizer, chat: bool, continues: bool, free: bool
) -> Tensor:
    """The prompts as tokens [B, T]; ValueError unless they hold some, and are of one length.

    chat: each is a user's message, in the model's template. continues: the text goes on from one
    that was read before, so it does not begin with the token of a beginning. free: an empty prompt
    is fine, where the model has such a token to begin from.
    """
    rows = []
    for text in texts:
        if not text.strip() and not (free and tokenizer.bos_id is not None):
            raise ValueError("prompt: was empty, must be --prompt, --prompt-file, or on stdin")
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"--prompt: was {text[:20]!r}, must be UTF-8 text")
        if chat:
            row = encode_message(text, tokenizer, continues)
        else:
            row = encode_text(text, tokenizer, continues)
        if len(row) == 0:
            raise ValueError(f"prompt: was {text[:20]!r}, must hold a token of the vocabulary")
        rows.append(row)
    if len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows)
        raise ValueError(f"--prompt: a batch was of {lengths} tokens, must be of one length")
    return torch.stack(rows)


def encode_text(text: str, tokenizer: Tokenizer, continues: bool) -> Tensor:
    """A text as tokens [T], with the token of a beginning unless it continues another."""
    blocks = [torch.empty(0, dtype=torch.long)]
    if tokenizer.bos_id is not None and not continues:
        blocks.append(torch.tensor([tokenizer.bos_id]))
    for ids in tokenizer.encode_blocks(text):  # a list of a whole book would take 40 bytes a token
        blocks.append(torch.tensor(ids, dtype=torch.long))
    return torch.cat(blocks)


def encode_message(text: str, tokenizer: Tokenizer, continues: bool) -> Tensor:
    """A user's message in the model's template as tokens [T], up to where the answer begins."""
    ids: list[int] = []
    for segment, _ in chat_tokens(tokenizer, [{"role": "user", "content": text}]):
        ids += segment
    if continues and ids[0] == tokenizer.bos_id:
        ids = ids[1:]
    return torch.tensor(ids, dtype=torch.long)


# The script


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="generate.py", description=__doc__)
    integer = cli.integer
    real = cli.real
    cli.add_model_flags(parser.add_argument_group("model"))
    prompt = parser.add_argument_group("prompt")
    one = prompt.add_mutually_exclusive_group()
    one.add_argument(
        "--prompt", action="append", help="text to continue; several make a batch of one length"
    )
    one.add_argument(
        "--prompt-file", type=Path, help="UTF-8 text to continue; - or nothing is stdin"
    )
    add = prompt.add_argument
    add("--chat", action="store_true", help="the prompt is a message, in the model's template")
    add("--chunk", type=integer(1), default=1024, help="tokens read at a time [%(default)s]")

    cache = parser.add_argument_group("cache")
    add = cache.add_argument
    text = "compressed; the most distinct tokens; sinks and newest; or everything"
    add("--cache", choices=cli.CACHES, help=f"{text} [as tuned; else freqkv]")
    cli.add_schedule_flags(cache)
    add("--save-cache", type=Path, help="write what was read to this file (safetensors)")
    add("--load-cache", type=Path, help="go on from such a file, with its cache and settings")
    text = "write by one compiled graph (steady.py), which takes a minute or more to make"
    add("--compile", action="store_true", help=text)

    add = parser.add_argument_group("writing").add_argument
    add("--max-new-tokens", type=integer(0), default=100, help="tokens to write [%(default)s]")
    add("--temperature", type=real(0), default=0.8, help="0: the likeliest token [%(default)s]")
    add("--top-k", type=integer(1), help="sample from the k likeliest tokens [all]")
    text = "sample from the likeliest that together reach this share [all]"
    add("--top-p", type=real(0, 1, above=True), help=text)
    add("--seed", type=integer(0), default=0, help="same seed, same text [%(default)s]")
    text = "continuations of one reading [%(default)s]"
    add("--num-samples", type=integer(1), default=1, help=text)
    return parser


def check_length(tokens: int, model: Llama) -> None:
    """ValueError unless a full cache of so many tokens stays within the model's positions."""
    most = model.config.max_position_embeddings
    if tokens > most:
        raise ValueError(
            f"--cache full: prompt and new tokens were {tokens}, must be at most the model's "
            f"{most} positions; --cache freqkv reads texts of any length"
        )


def check_batch(texts: int, cache: FreqKVCache) -> None:
    """ValueError unless there are as many prompts as a loaded cache has rows."""
    if texts != cache.batch:
        raise ValueError(
            f"--prompt: was {texts} for a cache of {cache.batch}, "
            "must be as many as --load-cache was made of"
        )


def check_settings(given: dict[str, Any], config: cli.Schedule) -> None:
    """ValueError where a setting was given that the loaded cache does not have."""
    settings = {"schedule": "paper"}
    if isinstance(config, LevelsConfig):
        settings = {"schedule": "levels"}
    settings |= asdict(config)
    for name, value in given.items():
        if name not in settings:
            raise ValueError(f"--{name}: was {value}, must be without, as the saved cache is")
        saved = settings[name]
        if value != saved:
            raise ValueError(f"--{name}: was {value}, must be {saved}, as the saved cache has it")


def continue_text(
    tokenizer: Tokenizer, step: Step, logits: Tensor, context: Tensor,
    stop_ids: Sequence[int], limit: int, sampling: Sampling, generator: torch.Generator,
) -> int:  # fmt: skip
    """Print a continuation of each row of context [B, T]; the number of tokens made.

    One row is printed as it is made, several when all are made.
    """
    before = context[:, -8:].tolist()  # what the tokenizer must know of the text before
    steps = write(step, logits, stop_ids, limit, sampling, generator)
    if len(context) == 1:
        rows: list[list[int]] = [[]]
        for piece in tokenizer.stream(collect_row(steps, rows[0]), before[0]):
            print(piece, end="", flush=True)
        print()
    else:
        rows = [[] for _ in context]
        for ids in steps:
            for row, token in zip(rows, ids, strict=True):
                if token is not None:
                    row.append(token)
        texts = []
        for row, known in zip(rows, before, strict=True):
            texts.append("".join(tokenizer.stream(iter(row), known)))
        print("\n---\n".join(texts))
    return sum(len(row) for row in rows)


def make_step(model: Llama, cache: Cache, compiled: bool) -> Step:
    """What reads single tokens into the cache."""
    if compiled:
        from steady import Steady  # with the compiler, which takes seconds to import

        return Steady(model, cache)
    return partial(read_token, model, cache=cache)


def collect_row(steps: Iterator[list[int | None]], row: list[int]) -> Iterator[int]:
    """The ids of the only row of `write`, each also put into `row`."""
    for ids in steps:
        token = ids[0]
        if token is not None:
            row.append(token)
            yield token


def summarize(
    model: Llama, cache: Cache, read_tokens: int, read_seconds: float, made: int, seconds: float
) -> str:
    """What was done and what it took, in a few lines."""
    lines = [
        f"read {read_tokens:,} tokens in {read_seconds:.1f} s "
        f"({read_tokens / read_seconds:.0f} tokens/s), "
        f"wrote {made:,} in {seconds:.1f} s ({made / max(seconds, 1e-9):.1f} tokens/s)"
    ]
    memory = f"cache: {cli.format_bytes(cache.nbytes)}"
    if isinstance(cache, FreqKVCache):
        lines.append(
            f"{cli.format_count(cache.rounds, 'round')} of {ROUNDS[cache.operator]}; "
            f"{cache.slots:,} of "
            f"{cache.config.window:,} slots in use after {cache.tokens_seen:,} tokens"
        )
        each = cache.nbytes / cache.config.window  # bytes of a token's keys and values
        full = cli.format_bytes(each * cache.tokens_seen)
        memory += f"; a full cache would hold {full}"
    lines.append(memory)
    peak, holder = cli.peak_memory(model.norm.weight.device)
    lines.append(f"peak memory ({holder}): {cli.format_bytes(peak)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)

    # Everything that can be wrong is found before any time is spent.
    device = cli.choose_device(args.device)
    dtype = cli.choose_dtype(args.dtype, device)
    if args.save_cache is not None:
        cli.check_target("--save-cache", args.save_cache, is_saved_cache, "a saved cache")
    name = args.cache
    if name is None and args.load_cache is None:
        name = cli.choose_cache_name(args)
    if name == "full" and (args.save_cache or args.load_cache):
        raise ValueError("--cache: was full, must be another to save or load a cache")
    if args.compile and args.num_samples > 1:  # each would be compiled
        raise ValueError("--compile: was given with --num-samples, must be without")
    if args.compile and name == "full":
        raise ValueError("--compile: was given with --cache full, must be with another")
    tokenizer = load_tokenizer(args.model)
    texts = read_prompts(args.prompt, args.prompt_file)
    continues = args.load_cache is not None
    free = args.prompt is None and args.prompt_file is None and not args.chat and not continues
    tokens = encode_prompts(texts, tokenizer, args.chat, continues, free)
    model = cli.load_model_for(args, device, dtype, tokenizer)
    cache: Cache
    if args.load_cache is not None:
        cache = load_cache(args.load_cache, name, model)
        check_settings(cli.given_settings(args), cache.config)
        check_batch(len(tokens), cache)
    else:
        total = tokens.shape[1] + args.max_new_tokens
        if name == "full":
            check_length(total, model)
        cache = cli.make_cache(name, cli.choose_schedule(args, model.config), total)

    if args.compile:
        from steady import check_compiler  # with the compiler, which takes seconds to import

        check_compiler(device)

    start = cli.read_clock(device)
    logits = read(model, tokens, cache, args.chunk, progress=True)
    read_seconds = cli.read_clock(device) - start
    if args.save_cache is not None:
        save_cache(args.save_cache, cache, model)

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    stop_ids = chat_stops(tokenizer) if args.chat else tokenizer.eos_ids
    start = cli.read_clock(device)
    made = 0
    for number in range(args.num_samples):
        if number > 0:
            print("---")
        last = number == args.num_samples - 1
        own_cache = cache if last else copy.deepcopy(cache)
        step = make_step(model, own_cache, args.compile)
        generator = torch.Generator(device).manual_seed(args.seed + number)
        made += continue_text(
            tokenizer,
            step,
            logits,
            tokens,
            stop_ids,
            args.max_new_tokens,
            sampling,
            generator,
        )
    seconds = cli.read_clock(device) - start
    print(summarize(model, cache, tokens.numel(), read_seconds, made, seconds), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, "generate.py")
