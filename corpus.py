"""What train.py reads: text, token files and conversations, packed into rows.

Text (a file is a document) is packed into sequences with the end of text between documents. The
documents are put in the order of a hash of their contents, equal ones once, and the last
--val-share of the stream is held out; of a .bin its own tail; of the records of --sft the last.
What a step reads is a function of the seed and the step alone.
"""

import argparse
import glob
import hashlib
import io
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from weights import Tokenizer, chat_tokens, load_tokenizer
from weights.files import damaged, read_json, write_beside, write_json

IGNORE = -100  # a label that takes no part in the loss
Args = argparse.Namespace
Row = tuple[Tensor, Tensor]  # tokens [T], and the token that follows each, or IGNORE


class Packed:
    """Rows of `length` tokens, cut one after another from long streams of tokens."""

    def __init__(self, streams: Sequence[np.ndarray], length: int) -> None:
        self.streams, self.length = streams, length
        self.ends = np.cumsum([max(len(stream) - 1, 0) // length for stream in streams])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> Row:
        which = int(np.searchsorted(self.ends, i, side="right"))
        start = (i - int(self.ends[which - 1] if which else 0)) * self.length
        ids = self.streams[which][start : start + self.length + 1].astype(np.int64)
        return torch.from_numpy(ids[:-1]), torch.from_numpy(ids[1:])


@dataclass
class Data:
    """Rows to train on and rows held out, with a hash of what they were made of."""

    train: Packed | list[Row]
    held: Packed | list[Row]
    sha256: str
    tokens_per_byte: float | None = None  # of held-out text

    def rows(self, seed: int, step: int, count: int) -> list[Row]:
        """The `count` rows of a step, from 1: every row once an epoch, each epoch in its order."""
        size = len(self.train)
        places = (divmod(i, size) for i in range((step - 1) * count, step * count))
        return [self.train[int(_shuffled(size, seed, epoch)[i])] for epoch, i in places]


@lru_cache(maxsize=2)
def _shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def read_data(args: Args, tokenizer: Tokenizer | None, vocab: int) -> Data:
    """What --sft or --data names, in rows of at most --seq-len tokens."""
    files, density = [] if args.sft else data_files(args.data), None
    if any(file.suffix == ".bin" for file in files):
        train, held, sha256 = read_bins(files, args, vocab)
    elif tokenizer is None:
        raise ValueError("--tokenizer: was not given with --init, must be a path or train:SIZE")
    elif args.sft:
        return read_records(Path(args.sft), args, tokenizer)
    else:
        train, held, sha256, density = read_texts(files, args, tokenizer)
    longest, held_out = (max(map(len, streams)) for streams in (train, held))
    if longest <= args.seq_len:
        raise ValueError(f"--data: was {longest} tokens, must be over --seq-len, {args.seq_len}")
    short = min(args.seq_len, max(held_out - 1, 1))  # better short rows than none
    return Data(Packed(train, args.seq_len), Packed(held, short), sha256, density)


def data_files(patterns: Sequence[str] | None) -> list[Path]:
    """The files that --data names, sorted; by default Python's own source without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    found: set[Path] = set()
    for pattern in patterns or [f"{glob.escape(str(root))}/**/*.py"]:
        path = Path(pattern)
        if not pattern:
            raise ValueError("--data: was '', must be a file, a folder or a pattern")
        if path.is_file() and not path.stat().st_size:
            raise ValueError(f"{path}: was empty, must hold text or tokens")
        if path.exists():
            pattern = glob.escape(pattern) + ("/**" if path.is_dir() else "")
        names = map(Path, glob.glob(pattern, recursive=True))  # which passes over hidden ones
        files = {file for file in names if file.is_file() and file.stat().st_size}
        if not files:
            raise FileNotFoundError(f"--data: {pattern} held no file with content, must hold one")
        found |= files
    return sorted(f for f in found if patterns or not skip & set(f.relative_to(root).parts))


def by_content(files: Sequence[Path]) -> dict[str, Path]:
    """The files by a hash of their contents, in the order of these hashes; equal ones once."""
    found = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in files}
    return dict(sorted(found.items()))


def read_bins(files: list[Path], args: Args, vocab: int) -> tuple[list[Any], list[Any], str]:
    """Streams to train on and held out, mapped from .bin files, and a hash of their contents."""
    train, held, content = [], [], hashlib.sha256()
    for file in files:
        if file.suffix != ".bin":
            raise ValueError(f"{file}: was no .bin, must be, as another file is")
        tokens = map_bin(file, args.bin_dtype, vocab)
        for part in np.split(tokens, range(1 << 24, len(tokens), 1 << 24)):
            content.update(part)
        cut = len(tokens) - int(len(tokens) * args.val_share)
        train.append(tokens[:cut])
        held.append(tokens[cut:])
    return train, held, content.hexdigest()


def map_bin(file: Path, kind: str | None, vocab: int) -> np.ndarray:
    """Tokens [T] mapped from a .bin of uint16 or uint32; ValueError unless below the vocabulary."""
    dtype = np.dtype(kind or ("uint16" if vocab <= 1 << 16 else "uint32"))
    if file.stat().st_size % dtype.itemsize:
        raise ValueError(f"{file}: was {file.stat().st_size} bytes, must be whole {dtype} tokens")
    tokens = np.memmap(file, dtype, mode="r")
    for part in np.split(tokens, range(1 << 24, len(tokens), 1 << 24)):
        if (top := int(part.max())) >= vocab:
            raise ValueError(
                f"{file}: held id {top} as {dtype}, must be below the vocabulary, {vocab}"
            )
    padded = dtype == np.uint16 and len(tokens) % 2 == 0 and not tokens[1::2].any()
    if kind is None and padded and tokens.any():
        raise ValueError(f"{file}: was uint32, every second id 0 as uint16; must have --bin-dtype")
    return tokens


def read_texts(
    files: list[Path], args: Args, tokenizer: Tokenizer
) -> tuple[list[Any], list[Any], str, float]:
    """As `read_bins`, of text that is tokenized once, into data/; and held-out tokens a byte."""
    documents = by_content(files)
    content = hashlib.sha256(repr((args.tokenizer, args.model, args.val_share)).encode())
    for part in [*map(str.encode, documents), *(f.read_bytes() for f in tokenizer.files)]:
        content.update(part)
    folder, sha256 = Path(args.out) / "data", content.hexdigest()
    record = folder / "tokens.json"
    if not record.exists() or read_json(record).get("sha256") != sha256:
        folder.mkdir(parents=True, exist_ok=True)
        texts = list(documents.values())
        sizes = write_tokens(texts, args.val_share, tokenizer, folder / "tokens.bin")
        write_json(record, {"sha256": sha256} | sizes)
    with damaged(folder, "as it was written, or removed"):
        sizes = read_json(record)
        tokens = np.memmap(folder / "tokens.bin", np.uint32, mode="r")
        if len(tokens) != sizes["train_tokens"] + sizes["held_out_tokens"]:
            raise ValueError(f"tokens.bin holds {len(tokens)} tokens")
        train, held = np.split(tokens, [sizes["train_tokens"]])
        return [train], [held], sha256, len(held) / max(sizes["held_out_bytes"], 1)


def write_tokens(
    documents: list[Path], share: float, tokenizer: Tokenizer, path: Path
) -> dict[str, int]:
    """Write documents as one stream of uint32, the held-out share last; returns what it holds."""
    begin, end = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
    size = sum(file.stat().st_size for file in documents)
    left = size - int(size * share)  # bytes to train on
    sizes = {"train_tokens": 0, "held_out_tokens": 0, "held_out_bytes": 0}
    with path.with_suffix(".tmp").open("wb") as out:
        for file in tqdm(documents, "tokenizing", disable=None):
            text = read_text(file).encode()
            cut = len(text[: max(left, 0)].decode("utf-8", "ignore").encode())
            left -= len(text)
            sizes["held_out_bytes"] += len(text) - cut
            for part, name in ((text[:cut], "train_tokens"), (text[cut:], "held_out_tokens")):
                blocks = chain([begin], tokenizer.encode_blocks(part.decode()), [end])
                for ids in blocks if part else ():
                    np.array(ids, np.uint32).tofile(out)
                    sizes[name] += len(ids)
    path.with_suffix(".tmp").replace(path)
    return sizes


def read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: was not UTF-8 at byte {error.start}, must be text") from None


def read_records(file: Path, args: Args, tokenizer: Tokenizer) -> Data:
    """Conversations for instruction tuning, a row each, with the loss on answers alone."""
    text = read_text(file)
    try:
        whole = text.lstrip().startswith("[")
        records = json.loads(text) if whole else [json.loads(x) for x in text.split("\n") if x]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: was not JSON ({error}), must be a list of records") from None
    rows: list[Row] = []
    for i, record in enumerate(records):
        try:
            segments = chat_tokens(tokenizer, messages_of(record))
        # RuntimeError: sentencepiece, of what is no UTF-8
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            must = "must have instruction and output, or messages"
            raise ValueError(f"{file}: record {i}: was wrong ({error!r}), {must}") from None
        ids = [token for segment, _ in segments for token in segment][: args.seq_len + 1]
        answers = [answer for segment, answer in segments for _ in segment][: args.seq_len + 1]
        labels = torch.tensor([t if a else IGNORE for t, a in zip(ids, answers, strict=True)][1:])
        if (labels != IGNORE).any():
            rows.append((torch.tensor(ids[:-1]), labels))
    if not rows:
        raise ValueError(f"{file}: had no answer within --seq-len, {args.seq_len}, must have one")
    print(f"{len(rows)} of {len(records)} records have an answer within {args.seq_len} tokens")
    cut = len(rows) - int(len(rows) * args.val_share)
    return Data(rows[:cut], rows[cut:], hashlib.sha256(text.encode()).hexdigest())


def messages_of(record: Any) -> list[dict[str, str]]:
    """A record's conversation: its messages, or its instruction, with any input, and output."""
    if "messages" in record:
        return record["messages"]
    asked = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
    answer = {"role": "assistant", "content": record["output"]}
    return [{"role": "user", "content": asked}, answer]


def read_tokenizer(args: Args) -> Tokenizer | None:
    """The tokenizer that --tokenizer names or has trained, else the model's own."""
    if not (args.tokenizer or "").startswith("train:"):
        named = args.tokenizer or (None if args.init else args.model)
        return load_tokenizer(named) if named else None
    path = Path(args.out) / "tokenizer" / "tokenizer.model"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = train_tokenizer(data_files(args.data), args.tokenizer.removeprefix("train:"))
        write_beside(path, lambda to: to.write_bytes(content))
    return load_tokenizer(path.parent)


def train_tokenizer(files: Sequence[Path], size: str) -> bytes:
    """A sentencepiece BPE model of that size; decoding gives every text back as it was."""
    from sentencepiece import SentencePieceTrainer

    def pages() -> Iterator[str]:  # whole lines; sentencepiece leaves out what is much longer
        for file in files:
            page = ""
            for line in read_text(file).splitlines(keepends=True):
                if len(page) + len(line) > 2000:
                    yield page
                    page = ""
                page += line
            yield page

    exact = {"normalization_rule_name": "identity", "byte_fallback": True}
    exact |= {"remove_extra_whitespaces": False, "add_dummy_prefix": False}
    # Indentation becomes pieces of its own; no piece spans two words, so that texts can be cut.
    spaces = {"allow_whitespace_only_pieces": True, "split_by_whitespace": True}
    how = {"model_type": "bpe", "max_sentence_length": 10_000, "minloglevel": 2} | exact | spaces
    out = io.BytesIO()
    try:
        size_of = {"vocab_size": int(size), "num_threads": 1}
        SentencePieceTrainer.train(sentence_iterator=pages(), model_writer=out, **size_of, **how)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--tokenizer: was train:{size}, which cannot be: {error}") from None
    return out.getvalue()


def collate(rows: Sequence[Row], device: str) -> Row:
    """Tokens and labels [B, T], padded at the right, which no earlier token can see."""
    tokens = pad_sequence([row[0] for row in rows], batch_first=True)
    labels = pad_sequence([row[1] for row in rows], batch_first=True, padding_value=IGNORE)
    return tokens.to(device), labels.to(device)
