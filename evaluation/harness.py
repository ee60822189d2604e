"""What every measurement shares: strategies side by side, losses a token, texts, a journal.

A strategy is what holds the past: everything (`full`), or N slots with an operator that thins them
out. All of them read through one path, in blocks, so memory does not depend on the text.
"""

import hashlib
import json
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import cli
import generate
from corpus import by_content, data_files, map_bin, read_text
from dct import dct, idct
from evaluation.report import figure_class, open_folder
from freqkv import FreqKVCache, FreqKVConfig
from generate import Cache, fingerprint, parts, schedule
from model import FullCache, Llama
from weights import Tokenizer, load_model, load_tokenizer

HELD_OUT = 0.05  # the share of Python's source that train.py holds out by default


def average(x: Tensor, keep: int) -> Tensor:
    """Means of `keep` stretches of x [..., n, D] along its sequence: pooling, not a low band."""
    if not keep:
        return x[..., :0, :]
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(-1, -2)
    pooled = F.adaptive_avg_pool1d(wide.flatten(0, -2), keep)
    return pooled.view(*wide.shape[:-1], keep).transpose(-1, -2).to(x.dtype)


def high(x: Tensor, keep: int) -> Tensor:
    """As `freqkv.compress`, of the `keep` highest frequencies of x [..., n, D]: the ablation."""
    n = x.shape[-2]
    if not keep:
        return x[..., :0, :]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    band = dct(wide, dim=-2)[..., n - keep :, :]
    return (math.sqrt(keep / n) * idct(band, dim=-2)).to(x.dtype)


OPERATORS = generate.OPERATORS | {"average": average, "high": high}
STRATEGIES = ("full", *OPERATORS)


def slot_settings(strategy: str, config: FreqKVConfig) -> dict[str, Any]:
    """The settings that a record carries; those of slots mean nothing to the full cache."""
    return {} if strategy == "full" else asdict(config)


def new_cache(strategy: str, config: FreqKVConfig, tokens: int) -> Cache:
    """An empty cache of a strategy, for a text of `tokens` tokens."""
    if strategy == "full":
        return FullCache(tokens)
    return FreqKVCache(config, OPERATORS[strategy])


@torch.no_grad()
def token_losses(
    model: Llama, tokens: Tensor, cache: Cache, chunk: int, advance: Callable[[int], Any] = id
) -> Tensor:
    """The loss of each of tokens [B, T] but the first, given those before it: [B, T - 1] float32.

    Read through the cache `chunk` tokens at a time: neither logits nor slots grow with T. Each
    time `advance` gets the number of tokens read. ValueError where a loss is no number.
    """
    device, start = model.norm.weight.device, 0
    losses = torch.empty(len(tokens), tokens.shape[1] - 1)  # at once: parts would scatter the heap
    for part in parts(tokens[:, :-1], cache, chunk):
        logits = model.logits(model.hidden(part.to(device), cache))
        stop = start + part.shape[1]
        target = tokens[:, start + 1 : stop + 1].to(device)
        # One row of logits a token: over a middle dimension the softmax takes five times as long.
        flat = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
        loss = flat.view_as(target)
        if not loss.isfinite().all():
            dtype = str(logits.dtype).removeprefix("torch.")
            raise ValueError(f"losses: were not numbers in {dtype}, must be; try another --dtype")
        losses[:, start:stop] = loss
        start = stop
        advance(part.numel())
    return losses


# Texts


@dataclass
class Document:
    name: str
    tokens: np.ndarray  # [T]; of a .bin, mapped and not read

    def digest(self) -> str:
        """What tells one text from another: a hash of its tokens, and of how wide they are."""
        content = hashlib.sha256(str(self.tokens.dtype).encode())
        content.update(np.ascontiguousarray(self.tokens))
        return content.hexdigest()

    def __getitem__(self, part: slice) -> Tensor:
        return torch.from_numpy(self.tokens[part].astype(np.int64))


def documents(args: Namespace, tokenizer: Tokenizer, vocab: int) -> list[Document]:
    """What --data names, a document a file; without it what train.py holds out, as one stream."""
    if args.data is None:
        return [Document("held-out source of Python", held_out(tokenizer))]
    found = []
    for file in data_files(args.data):
        if file.suffix == ".bin":
            found.append(Document(file.name, map_bin(file, args.bin_dtype, vocab)))
        else:
            found.append(Document(file.name, encode(file, tokenizer)))
    return found


def held_out(tokenizer: Tokenizer) -> np.ndarray:
    """The whole files at the end of Python's source that train.py holds out, as it packs them."""
    files = list(by_content(data_files(None)).values())
    room = int(HELD_OUT * sum(file.stat().st_size for file in files))
    begin, end = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
    texts: list[np.ndarray] = []
    while files and files[-1].stat().st_size <= room:
        room -= files[-1].stat().st_size
        texts.insert(0, np.array([*begin, *encode(files.pop(), tokenizer), *end], np.uint32))
    if not texts:
        raise ValueError("--data: was not given, must be: no source of Python is held out here")
    return np.concatenate(texts)


def encode(file: Path, tokenizer: Tokenizer) -> np.ndarray:
    """A text file as tokens, with no token of a beginning."""
    blocks = tokenizer.encode_blocks(read_text(file))
    return np.concatenate([np.array(ids, np.uint32) for ids in blocks])


# A run


class Journal:
    """What has been measured so far, a JSON line each, so that a stopped run goes on from there.

    A key holds all that its value depends on. What a kill cut short is measured again.
    """

    def __init__(self, path: Path, about: object) -> None:
        self.path, self.about = path, hashlib.sha256(repr(about).encode()).hexdigest()[:16]
        self.known: dict[str, Any] = {}
        with path.open("ab+") as file:  # so that one that cannot be written is told now
            file.seek(0)
            *lines, cut = file.read().split(b"\n")
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    self.known[record["key"]] = record["value"]
                except (ValueError, KeyError, TypeError):
                    was = f"{path}: line {number} was {line[:20]!r}"
                    raise ValueError(f"{was}, must be a record; move the file away") from None
            if cut:
                file.truncate(file.tell() - len(cut))

    def _key(self, what: object) -> str:
        return f"{self.about} {what}"

    def __contains__(self, what: object) -> bool:
        return self._key(what) in self.known

    def __getitem__(self, what: object) -> Any:
        return self.known[self._key(what)]

    def __setitem__(self, what: object, value: Any) -> None:
        self.known[self._key(what)] = value
        with self.path.open("a") as file:
            file.write(json.dumps({"key": self._key(what), "value": value}) + "\n")


@dataclass
class Bench:
    """A model ready to be measured, the schedule of its slots, and the folder for results."""

    model: Llama
    tokenizer: Tokenizer
    config: FreqKVConfig
    strategies: tuple[str, ...]
    out: Path
    args: Namespace

    def documents(self) -> list[Document]:
        return documents(self.args, self.tokenizer, self.model.config.vocab_size)

    def journal(self, name: str, *about: object) -> Journal:
        """The journal OUT/name.journal.jsonl, for this model, schedule and `about`."""
        about = (fingerprint(self.model), str(self.model.norm.weight.dtype), *about)
        return Journal(self.out / f"{name}.journal.jsonl", (*astuple(self.config), *about))


def prepare(args: Namespace) -> Bench:
    """Load the model and check what all measurements take; ValueError or OSError if wrong."""
    strategies = tuple(name.strip() for name in args.strategies.split(","))
    for name in strategies:
        if name not in STRATEGIES:
            raise ValueError(f"--strategies: was {name!r}, must be of {', '.join(STRATEGIES)}")
        if strategies.count(name) > 1:
            raise ValueError(f"--strategies: was {name} twice, must be once")
    if args.plot:
        figure_class()
    device, dtype = cli.place(args.device, args.dtype)
    args.device, args.dtype = str(device), str(dtype).removeprefix("torch.")
    tokenizer = load_tokenizer(args.model)
    stem = Path(args.model).resolve().name.removesuffix(".gguf")
    args.out = args.out or Path("runs") / f"evaluate-{stem}"
    open_folder(args.out)
    model = load_model(args.model, dtype, device, args.adapter)
    tokenizer.check_fits(model.config.vocab_size)
    config = schedule(args, model.config)
    return Bench(model, tokenizer, config, strategies, args.out, args)


# Statistics


def interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Mean loss a token of texts (sum, count), and half its 95 % interval over the texts.

    The ratio estimator with Student's t: texts are drawn at random, and the tokens within one are
    alike. A single text has no interval: None.
    """
    total, n = sum(counts), len(sums)
    mean = sum(sums) / total
    if n == 1:
        return mean, None
    spread = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return mean, student_t(n - 1) * math.sqrt(n / (n - 1) * spread) / total


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: with t = sqrt(f) tan(u), the density is cos(u)^(f-1)."""
    u = (np.arange(200_000) + 0.5) / 200_000 * math.pi - math.pi / 2
    share = np.cumsum(np.cos(u) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(u[np.searchsorted(share, 0.975 * share[-1])])
