"""Read a text of any length into a cache of constant size, and continue it.

    python generate.py --prompt "def main("      # the built-in model, which writes Python
    python generate.py --model smollm2 --prompt-file BOOK.txt --save-cache book.safetensors
    python generate.py --model smollm2 --load-cache book.safetensors --prompt "Who is Emma?" --chat

The text that the model writes goes to stdout as it is made; progress and a summary go to stderr.
"""

import copy
import hashlib
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import cli
from freqkv import FreqKVCache, FreqKVConfig, compress, newest
from model import FullCache, Llama, LlamaConfig
from weights import Tokenizer, chat_tokens, find, load_model, load_tokenizer
from weights.files import check_writable, read_json, write_beside
from weights.lora import BUILT_IN, find_adapter

OPERATORS = {"freqkv": compress, "window": newest}
SETTINGS = [field.name for field in fields(FreqKVConfig)]  # window, sinks, ratio, recent
Cache = FreqKVCache | FullCache


# Sampling


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """logits [B, V] with all but the k largest of each row at -inf (ties with the k-th stay)."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
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


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row of logits [B, V], as ids [B]; temperature 0 takes the likeliest."""
    logits = logits.float()
    if logits.isnan().any():
        raise ValueError("logits: were not numbers, must be (float16 overflows: try another dtype)")
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-6)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# Reading and writing


def parts(tokens: Tensor, cache: Cache, chunk: int) -> Iterator[Tensor]:
    """tokens [B, T] in parts of at most `chunk`, each read into `cache` before the next is taken.

    A part ends where a round begins. The shapes of all rounds are then the same, and what libraries
    keep for each shape of a matrix (in bfloat16, hundreds of MB) does not grow with the text.
    """
    while tokens.shape[1]:
        room = chunk
        if isinstance(cache, FreqKVCache):
            layers = [cache.config.at(i) for i in range(len(cache.config.ratios))]
            room = min(c.window - c.slots(cache.tokens_seen) or c.stride for c in layers)
        part, tokens = tokens.tensor_split((min(chunk, room),), dim=1)
        yield part


@torch.no_grad()
def read(model: Llama, tokens: Tensor, cache: Cache, chunk: int, progress: bool = False) -> Tensor:
    """Read tokens [B, T] into the cache, `chunk` at a time; logits [B, V] after the last."""
    device = model.norm.weight.device
    unit = {"unit": " tokens", "unit_scale": True, "desc": "reading"}
    with tqdm(total=tokens.shape[1], disable=not progress, **unit) as bar:
        for part in parts(tokens, cache, chunk):
            hidden = model.hidden(part.to(device), cache)
            bar.update(part.shape[1])
    return model.logits(hidden[:, -1])


@torch.no_grad()
def write(
    model: Llama,
    logits: Tensor,
    cache: Cache,
    stop: tuple[int, ...],
    limit: int,
    **sampling: object,
) -> Iterator[list[int | None]]:
    """Continue after `logits` [B, V]: up to `limit` times one id for each row, as it is made.

    A row that has reached one of the ids in `stop` gives None from there on; all rows, the end.
    """
    running, tokens = [True] * len(logits), None
    for _ in range(limit):
        if tokens is not None:
            logits = model.logits(model.hidden(tokens[:, None], cache)[:, -1])
        tokens = sample(logits, **sampling)
        ids = tokens.tolist()
        running = [runs and i not in stop for runs, i in zip(running, ids, strict=True)]
        if not any(running):
            return
        yield [i if runs else None for runs, i in zip(running, ids, strict=True)]


# The saved cache


def fingerprint(model: Llama) -> str:
    """What tells one model from another: a hash of its shapes and of a few weights of each."""
    digest = hashlib.sha256(repr(model.config).encode())
    for parameter in model.state_dict().values():
        digest.update(parameter.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_cache(path: Path, cache: FreqKVCache, kind: str, model: Llama) -> None:
    """Write a cache to a safetensors file, whole or not at all."""
    about = {"cache": kind, "model": fingerprint(model)}
    write_beside(path, lambda to: save_file(cache.state_dict(), to, metadata=about))


def open_saved(path: Path, kind: str, model: Llama) -> dict[str, Tensor]:
    """The state in a file by `save_cache`; ValueError if of another kind or another model."""
    if not path.is_file():
        raise FileNotFoundError(f"--load-cache: was {str(path)!r}, must be a file of --save-cache")
    device = str(model.norm.weight.device)
    try:
        with safe_open(path, framework="pt", device=device) as content:
            about = content.metadata() or {}
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: was not whole ({error}), must be a saved cache") from None
    if about.get("model") != fingerprint(model):
        raise ValueError(f"{path}: was of another model, adapter or dtype, must be of this one")
    if about.get("cache") != kind:
        raise ValueError(f"{path}: was of --cache {about.get('cache')}, must be of {kind}")
    return state


def check_target(path: Path) -> None:
    """OSError or ValueError unless a cache can be saved to `path`, at no other file's cost."""
    if not path.parent.is_dir() or path.is_dir() or not path.name:
        raise ValueError(f"--save-cache: was {str(path)!r}, must be a file in an existing folder")
    if path.exists():
        try:
            with safe_open(path, framework="pt") as content:
                known = "cache" in (content.metadata() or {})
        except (SafetensorError, OSError):
            known = False
        if not known or not path.is_file():
            raise ValueError(f"--save-cache: {path} was there, must be new, or a saved cache")
    check_writable(path)


# The script


@dataclass
class Job:
    """All that a run needs, checked: what comes after this can only run out of memory."""

    model: Llama
    tokenizer: Tokenizer
    tokens: Tensor  # [B, T]
    cache: Cache
    limit: int


def prompts(args: Namespace) -> list[str]:
    """The texts to continue: from --prompt, from a file, or from stdin; none is an empty one."""
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is None and sys.stdin.isatty():
        return [""]
    from_stdin = args.prompt_file in (None, Path("-"))
    name = "stdin" if from_stdin else str(args.prompt_file)
    try:
        content = sys.stdin.buffer.read() if from_stdin else args.prompt_file.read_bytes()
        return [content.decode("utf-8-sig").replace("\r\n", "\n")]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: was not UTF-8 at byte {error.start}, must be UTF-8 text"
        ) from None


def encode(args: Namespace, tokenizer: Tokenizer) -> Tensor:
    """The prompts as tokens [B, T]."""
    rows = []
    given = args.prompt is not None or args.prompt_file is not None
    # With nothing to continue, a model begins where texts begin.
    free = tokenizer.bos_id is not None and not (given or args.chat or args.load_cache)
    for text in prompts(args):
        if not text.strip() and not free:
            raise ValueError("prompt: was empty, must be --prompt, --prompt-file, or on stdin")
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"--prompt: was {text[:20]!r}, must be UTF-8 text")
        # What follows a saved text is not a beginning.
        begins = args.load_cache is None and not args.chat and tokenizer.bos_id is not None
        blocks: Iterable[list[int]] = [[tokenizer.bos_id]] if begins else []
        if args.chat:
            blocks = (ids for ids, _ in chat_tokens(tokenizer, [{"role": "user", "content": text}]))
        else:
            blocks = chain(blocks, tokenizer.encode_blocks(text))
        row = torch.cat([torch.tensor(ids, dtype=torch.long) for ids in blocks])
        if args.load_cache and args.chat and row[0] == tokenizer.bos_id:
            row = row[1:]
        if not len(row):
            raise ValueError(f"prompt: was {text[:20]!r}, must hold a token of the vocabulary")
        rows.append(row)
    if len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows)
        raise ValueError(f"--prompt: a batch was of {lengths} tokens, must be of one length")
    return torch.stack(rows)


def tuned_settings(args: Namespace) -> dict[str, Any]:
    """The settings that train.py has left with a model or an adapter that it tuned."""
    folders = [*map(find_adapter, filter(None, [args.adapter])), find(args.model)]
    places = [folder / "freqkv.json" for folder in folders]
    found = next((place for place in places if place.exists()), None)
    return {name: x for name, x in read_json(found).items() if name in SETTINGS} if found else {}


def schedule(
    args: Namespace, model: LlamaConfig, saved: dict[str, Any] | None = None
) -> FreqKVConfig:
    """The settings of a cache: given, else saved with one, else tuned with, else the paper's."""
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    return fitted((saved or tuned_settings(args)) | given, model)


def fitted(settings: dict[str, Any], model: LlamaConfig) -> FreqKVConfig:
    """Settings, ratios a list as in JSON, for the layers and positions of a model, else ValueError.

    A window that is not given, or None, is the paper's, or the model's positions if fewer.
    """
    most, layers = model.max_position_embeddings, model.num_hidden_layers
    window, ratio = settings.get("window"), settings.get("ratio", FreqKVConfig.ratio)
    ratio = tuple(ratio) if isinstance(ratio, list) else ratio
    window = min(FreqKVConfig.window, most) if window is None else window
    config = FreqKVConfig(**settings | {"window": window, "ratio": ratio})
    if config.window > most:
        raise ValueError(f"--window: was {config.window}, must be at most the model's {most}")
    if isinstance(ratio, tuple) and len(ratio) != layers:
        raise ValueError(f"--ratio: was {len(ratio)} numbers, must be 1 or {layers}")
    return config


def prepare(args: Namespace) -> Job:
    """Load and check everything that can be wrong, before any time is spent."""
    device, dtype = cli.place(args.device, args.dtype)
    if args.save_cache:
        check_target(args.save_cache)
    if args.cache == "full" and (args.save_cache or args.load_cache):
        raise ValueError("--cache: was full, must be freqkv or window to save or load a cache")
    tokenizer = load_tokenizer(args.model)
    tokens = encode(args, tokenizer)
    model = load_model(args.model, dtype, device, args.adapter)
    tokenizer.check_fits(model.config.vocab_size)
    most = model.config.max_position_embeddings
    if args.cache == "full":
        total = tokens.shape[1] + args.max_new_tokens
        if total > most:
            raise ValueError(
                f"--cache full: prompt and new tokens were {total}, must be at most the model's "
                f"{most} positions; --cache freqkv reads texts of any length"
            )
        return Job(model, tokenizer, tokens, FullCache(total), args.max_new_tokens)
    state = open_saved(args.load_cache, args.cache, model) if args.load_cache else None
    saved = None
    if state:
        try:
            window, sinks, ratio, *others, recent = state["config"].tolist()
            whole = {"window": int(window), "sinks": int(sinks), "recent": int(recent)}
            saved = whole | {"ratio": [ratio, *others] if others else ratio}
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(f"{args.load_cache}: was without settings, must be whole") from None
    config = schedule(args, model.config, saved)
    cache = FreqKVCache(config, OPERATORS[args.cache])
    if state:
        try:
            cache.load_state_dict(state)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{args.load_cache}: was not whole ({error})") from None
        if len(tokens) != state["k"].shape[1]:
            was = f"{len(tokens)} for a cache of {state['k'].shape[1]}"
            raise ValueError(f"--prompt: was {was}, must be as many as --load-cache was made of")
    return Job(model, tokenizer, tokens, cache, args.max_new_tokens)


def continue_text(job: Job, logits: Tensor, cache: Cache, args: Namespace, number: int) -> int:
    """Write one sample for each row; the number of tokens made. One row streams."""
    generator = torch.Generator(logits.device).manual_seed(args.seed + number)
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    stop = job.tokenizer.eos_ids
    steps = write(job.model, logits, cache, stop, job.limit, generator=generator, **sampling)
    rows: list[list[int]] = [[] for _ in logits]
    before = job.tokens[:, -8:].tolist()  # a list of a whole text would take 40 bytes a token

    def taken() -> Iterator[int | None]:
        for ids in steps:
            for row, token in zip(rows, ids, strict=True):
                row += [] if token is None else [token]
            yield ids[0]  # what streams, where there is one row

    if len(rows) == 1:
        for piece in job.tokenizer.stream(taken(), before[0]):
            print(piece, end="", flush=True)
        print()
    else:
        for _ in taken():
            pass
        texts = zip(rows, before, strict=True)
        print("\n---\n".join("".join(job.tokenizer.stream(iter(r), c)) for r, c in texts))
    return sum(len(row) for row in rows)


def summary(job: Job, read_seconds: float, made: int, write_seconds: float) -> str:
    """What was done and what it took, in four lines."""
    c, cache = job.model.config, job.cache
    count, held = job.tokens.numel(), job.tokens.shape[0] * cache.tokens_seen
    item = job.model.norm.weight.element_size()
    full = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * item * held
    lines = [
        f"read {count:,} tokens in {read_seconds:.1f} s ({count / read_seconds:.0f} tokens/s), "
        f"wrote {made:,} in {write_seconds:.1f} s ({made / max(write_seconds, 1e-9):.1f} tokens/s)"
    ]
    beside = ""
    if isinstance(cache, FreqKVCache):
        lines.append(
            f"{cli.count(cache.rounds, 'round')} of compression; {cache.slots:,} of "
            f"{cache.config.window:,} slots in use after {cache.tokens_seen:,} tokens"
        )
        beside = f"; a full cache would hold {cli.size(full)}"
    lines.append(f"cache: {cli.size(cache.nbytes)}{beside}")
    peak, whose = cli.peak_memory(job.model.norm.weight.device)
    return "\n".join([*lines, f"peak memory ({whose}): {cli.size(peak)}"])


def add_model_flags(add: Callable[..., object]) -> None:
    """The flags that choose a model and, for `schedule`, the slots of its cache."""
    whole, tuned = cli.number(int, 0), "as tuned; else "
    add("--model", default="tiny", help="a name (tiny, smollm2) or a path [%(default)s]")
    add("--adapter", help=f"{BUILT_IN} (of smollm2), or a folder with a LoRA in PEFT's layout")
    text = f"slots N a layer [{tuned}4096, or fewer positions]"
    add("--window", type=cli.number(int, 1), help=text)
    add("--sinks", type=whole, help=f"first tokens never compressed [{tuned}{FreqKVConfig.sinks}]")
    text = f"share that a round keeps; or one a layer, with commas [{tuned}{FreqKVConfig.ratio}]"
    add("--ratio", type=cli.ratio, help=text)
    text = f"newest tokens left as they are [{tuned}{FreqKVConfig.recent}]"
    add("--recent", type=whole, help=text)
    add("--device", help="cpu, cuda, cuda:1, ... [cuda where there is one]")
    add("--dtype", choices=list(cli.DTYPES), help="[bfloat16 on cuda, float32 elsewhere]")


def parser() -> cli.Parser:
    """The command line."""
    p = cli.Parser(description=__doc__)
    whole, some = cli.number(int, 0), cli.number(int, 1)
    add = p.add_argument
    add_model_flags(add)
    one = p.add_mutually_exclusive_group().add_argument
    one("--prompt", action="append", help="text to continue; several make a batch of one length")
    one("--prompt-file", type=Path, help="UTF-8 text to continue; - or nothing is stdin")
    add("--max-new-tokens", type=whole, default=100, help="tokens to write [%(default)s]")
    add("--temperature", type=cli.number(float, 0), default=0.8, help="0: likeliest [%(default)s]")
    add("--top-k", type=some, help="sample from the k likeliest tokens [all]")
    add("--top-p", type=cli.number(float, 0, 1, above=True), help="... that reach this share [all]")
    add("--seed", type=whole, default=0, help="same seed, same text [%(default)s]")
    add("--num-samples", type=some, default=1, help="continuations of one reading [%(default)s]")
    add("--chat", action="store_true", help="the prompt is a message, in the family's template")
    add("--cache", choices=["freqkv", "full", "window"], default="freqkv",
        help="compressed; everything; or sinks and newest [%(default)s]")  # fmt: skip
    add("--chunk", type=some, default=1024, help="tokens read at a time [%(default)s]")
    add("--save-cache", type=Path, help="write what was read to this file (safetensors)")
    add("--load-cache", type=Path, help="go on from such a file; its settings are the defaults")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    job = prepare(args)
    started = time.perf_counter()
    logits = read(job.model, job.tokens, job.cache, args.chunk, progress=True)
    read_seconds = time.perf_counter() - started
    if args.save_cache:
        save_cache(args.save_cache, job.cache, args.cache, job.model)
    started, made = time.perf_counter(), 0
    for number in range(args.num_samples):
        last = number == args.num_samples - 1
        cache = job.cache if last else copy.deepcopy(job.cache)
        made += continue_text(job, logits, cache, args, number)
        if not last:
            print("---")
    print(summary(job, read_seconds, made, time.perf_counter() - started), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, "generate.py")
