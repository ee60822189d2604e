"""Text, token files and conversations, as rows to train on.

Three kinds of files make rows to train on, and rows that are held out:

    text files      packed one after another, in the order of a hash of their contents, equal ones
                    once, the token of an end between two; the last share of all is held out
    .bin files      tokens as they are, packed; the last share of each file is held out
    conversations   a row each, with labels on answers alone; the last records are held out

Which rows a step reads depends on the seed and on the number of the step, and on nothing else.
"""

import glob
import hashlib
import io
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from weights import Tokenizer, chat_tokens
from weights.files import damaged, read_json, read_text, write_json
from weights.fingerprint import hash_tokenizer

IGNORE = -100  # a label that takes no part in the loss
BLOCK = 1 << 24  # tokens of a mapped file that are looked at together
TESTS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # not Python's own source
RECORD = "must have instruction and output, or messages, or text, or parts"

Row = tuple[Tensor, Tensor]  # tokens [T], and as labels [T] what follows each of them, or IGNORE


# Rows


class Packed:
    """Rows of `length` tokens, cut one after another from long streams of tokens."""

    def __init__(self, streams: Sequence[np.ndarray], length: int) -> None:
        self.streams = streams
        self.length = length
        counts = [0]
        for stream in streams:
            counts.append(max(len(stream) - 1, 0) // length)  # the last token is only a label
        self.starts = np.cumsum(counts)  # the number of the first row of each stream, and of all

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Row:
        index = int(np.searchsorted(self.starts, i, side="right")) - 1
        start = (i - int(self.starts[index])) * self.length
        ids = self.streams[index][start : start + self.length + 1]
        tokens = torch.from_numpy(ids.astype(np.int64))
        return tokens[:-1], tokens[1:]


@dataclass(frozen=True)
class Data:
    """Rows to train on and rows that are held out, with a hash of what they were made of."""

    train: Packed | list[Row]
    held_out: Packed | list[Row]
    sha256: str
    tokens_per_byte: float | None = None  # of held-out text

    def choose_rows(self, seed: int, step: int, count: int) -> list[Row]:
        """The `count` rows of a step, from 1: every row once an epoch, each epoch in its order."""
        size = len(self.train)
        rows = []
        for place in range((step - 1) * count, step * count):
            order = shuffle(size, seed, place // size)
            rows.append(self.train[int(order[place % size])])
        return rows


@lru_cache(maxsize=2)
def shuffle(size: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers of all rows, shuffled for an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(size)


def collate(rows: Sequence[Row], device: torch.device) -> Row:
    """Tokens and labels [B, T], padded at the right, which no earlier token can see."""
    tokens = pad_sequence([row[0] for row in rows], batch_first=True)
    labels = pad_sequence([row[1] for row in rows], batch_first=True, padding_value=IGNORE)
    return tokens.to(device), labels.to(device)


def pack(
    train: Sequence[np.ndarray], held_out: Sequence[np.ndarray], seq_len: int
) -> tuple[Packed, Packed]:
    """Streams as rows of `seq_len` tokens; ValueError where there is none to train on."""
    longest = max(len(stream) for stream in train)
    if longest <= seq_len:
        raise ValueError(f"--data: was {longest} tokens, must be over --seq-len, {seq_len}")
    # Where less than a row is held out, a shorter one is better than none.
    longest = max(len(stream) for stream in held_out)
    length = min(seq_len, max(longest - 1, 1))
    return Packed(train, seq_len), Packed(held_out, length)


# Files


def data_files(patterns: Sequence[str] | None, flag: str = "--data") -> list[Path]:
    """The files that a flag names, sorted; Python's own source, without its tests, if nothing.

    A pattern is a file, a folder with all that is in it, or names with * and **. Hidden and empty
    files are passed over. OSError or ValueError for a pattern without any file.
    """
    if not patterns:
        return find_python_source()
    files: dict[Path, Path] = {}
    for pattern in patterns:
        for file in sorted(match_files(pattern, flag)):
            files.setdefault(file.resolve(), file)  # once, whatever links there are
    return sorted(files.values())


def match_files(pattern: str, flag: str = "--data") -> set[Path]:
    """The files that one pattern names."""
    path = Path(pattern)
    if not pattern:
        raise ValueError(f"{flag}: was '', must be a file, a folder or a pattern")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path}: was empty, must hold text or tokens")
    if path.is_dir():
        pattern = glob.escape(pattern) + "/**"
    elif path.exists():  # a name, though it may look like a pattern
        pattern = glob.escape(pattern)
    files = set()
    for name in glob.glob(pattern, recursive=True):
        file = Path(name)
        if file.is_file() and file.stat().st_size > 0:
            files.add(file)
    if not files:
        raise FileNotFoundError(f"{flag}: {pattern} held no file with content, must hold one")
    return files


def find_python_source() -> list[Path]:
    """Python's own source without its tests: text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for file in match_files(f"{glob.escape(str(root))}/**/*.py"):
        if TESTS.isdisjoint(file.relative_to(root).parts):
            files.append(file)
    return sorted(files)


def by_content(files: Sequence[Path]) -> dict[str, Path]:
    """The files by a hash of their contents, in the order of these hashes; equal ones once."""
    documents = {}
    for file in files:
        documents[hashlib.sha256(file.read_bytes()).hexdigest()] = file
    return dict(sorted(documents.items()))


# Token files


def read_bins(
    files: Sequence[Path], dtype: str | None, vocab: int, seq_len: int, val_share: float
) -> Data:
    """Rows of .bin files, mapped and not read; of each its last share is held out."""
    train = []
    held_out = []
    digest = hashlib.sha256()
    for file in files:
        if file.suffix != ".bin":
            raise ValueError(f"{file}: was no .bin, must be, as another file is")
        tokens = map_bin(file, dtype, vocab)
        for block in split_blocks(tokens):
            digest.update(block)
        cut = len(tokens) - int(len(tokens) * val_share)
        train.append(tokens[:cut])
        held_out.append(tokens[cut:])
    train_rows, held_out_rows = pack(train, held_out, seq_len)
    short = [stream for stream in train if len(stream) <= seq_len]
    if short:
        print(f"{len(short)} of {len(train)} files are too short for a row of {seq_len}: left out")
    return Data(train_rows, held_out_rows, digest.hexdigest())


def check_bin_dtype(files: Sequence[Path], dtype: str | None) -> None:
    """ValueError where a dtype of .bin files is given, and none of the files is one."""
    if dtype is not None and not any(file.suffix == ".bin" for file in files):
        raise ValueError(f"--bin-dtype: was {dtype}, must be with .bin files alone")


def map_bin(file: Path, dtype: str | None, vocab: int) -> np.ndarray:
    """Tokens [T] mapped from a .bin file; ValueError unless all are below the vocabulary.

    dtype: uint16 or uint32; where it is None, uint16 if the vocabulary fits.
    """
    width = dtype
    if width is None:
        width = "uint16" if vocab <= 1 << 16 else "uint32"
    size = file.stat().st_size
    if size % np.dtype(width).itemsize != 0:
        raise ValueError(f"{file}: was {size} bytes, must be whole {width} tokens")
    tokens = np.memmap(file, width, mode="r")
    for block in split_blocks(tokens):
        top = int(block.max())
        if top >= vocab:
            raise ValueError(
                f"{file}: held id {top} as {width}, must be below the vocabulary, {vocab}"
            )
    if dtype is None and width == "uint16" and looks_wider(tokens):
        raise ValueError(f"{file}: was uint32, every second id 0 as uint16; must have --bin-dtype")
    return tokens


def split_blocks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """A mapped file in blocks, so that not all of it has to be in memory."""
    for start in range(0, len(tokens), BLOCK):
        yield tokens[start : start + BLOCK]


def looks_wider(tokens: np.ndarray) -> bool:
    """Whether tokens of 16 bits look like halves of tokens of 32: every second one is 0."""
    return len(tokens) % 2 == 0 and not tokens[1::2].any() and bool(tokens.any())


# Text


def read_texts(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    seq_len: int,
    val_share: float,
    folder: Path,
    about: str,
) -> Data:
    """Rows of text files, which are tokenized once, into `folder`.

    about: what the tokens depend on beside the texts and the tokenizer's files. ValueError where
    the folder holds the tokens of something else.
    """
    documents = by_content(files)
    digest = hashlib.sha256(about.encode())
    for content in documents:
        digest.update(content.encode())
    for file in tokenizer.files:
        digest.update(file.read_bytes())
    sha256 = digest.hexdigest()
    record = folder / "tokens.json"
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts = list(documents.values())
        sizes = write_tokens(texts, val_share, tokenizer, folder / "tokens.bin")
        written = hash_tokens(folder / "tokens.bin")
        write_json(record, {"sha256": sha256, "tokens_sha256": written} | sizes)
    sizes = read_json(record)
    if sizes.get("sha256") != sha256:
        raise ValueError(f"--data: was changed since {record} was written, must be the same")
    with damaged(folder, "as it was written, or removed"):
        tokens = np.memmap(folder / "tokens.bin", np.uint32, mode="r")
        cut = sizes["train_tokens"]
        written = hash_tokens(folder / "tokens.bin")
        if sizes.get("tokens_sha256", written) != written:  # earlier versions wrote none
            raise ValueError("tokens.bin was changed")
        tokens_per_byte = sizes["held_out_tokens"] / max(sizes["held_out_bytes"], 1)
    train, held_out = pack([tokens[:cut]], [tokens[cut:]], seq_len)
    return Data(train, held_out, sha256, tokens_per_byte)


def hash_tokens(path: Path) -> str:
    """A hash of a file of tokens."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_tokens(
    documents: Sequence[Path], val_share: float, tokenizer: Tokenizer, path: Path
) -> dict[str, int]:
    """Write documents as one stream of uint32, the held-out share last; returns what it holds.

    A document in which the share begins is cut there, into two.
    """
    size = sum(file.stat().st_size for file in documents)
    left = size - int(size * val_share)  # bytes of the files that are still to train on
    sizes = {"train_tokens": 0, "held_out_tokens": 0, "held_out_bytes": 0}
    beside = path.with_suffix(".tmp")
    with beside.open("wb") as out:
        for file in tqdm(documents, "tokenizing", disable=None):
            text = read_text(file)
            train_text = text.encode()[: max(left, 0)].decode(errors="ignore")  # whole characters
            held_out_text = text[len(train_text) :]
            left -= file.stat().st_size
            sizes["train_tokens"] += write_document(train_text, tokenizer, out)
            sizes["held_out_tokens"] += write_document(held_out_text, tokenizer, out)
            sizes["held_out_bytes"] += len(held_out_text.encode())
    beside.replace(path)
    return sizes


def write_document(text: str, tokenizer: Tokenizer, out: BinaryIO) -> int:
    """Write the tokens of a text, unless it is empty, to an open file; returns their number."""
    if not text:
        return 0
    tokens = encode_document(text, tokenizer)
    tokens.tofile(out)
    return len(tokens)


def encode_document(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """A text as tokens [T] of uint32, with those of its beginning and its end, if there are any."""
    blocks = []
    if tokenizer.bos_id is not None:
        blocks.append(np.array([tokenizer.bos_id], np.uint32))
    for ids in tokenizer.encode_blocks(text):  # a list of a whole book would take 40 bytes a token
        blocks.append(np.array(ids, np.uint32))
    if tokenizer.eos_id is not None:
        blocks.append(np.array([tokenizer.eos_id], np.uint32))
    return np.concatenate(blocks)


# Conversations


def read_records(file: Path, tokenizer: Tokenizer, seq_len: int, val_share: float) -> Data:
    """Conversations for instruction tuning, a row each, with labels on answers alone.

    A record without an answer in its first `seq_len` tokens is left out.
    """
    text = read_text(file)
    records = parse_records(text, file)
    rows = []
    for number, record in enumerate(records):
        try:
            segments = encode_record(record, tokenizer)
        except ValueError as error:
            raise ValueError(f"{file}: record {number}: {error}") from None
        tokens, labels = make_row(segments, seq_len)
        if (labels != IGNORE).any():
            rows.append((tokens, labels))
    if not rows:
        raise ValueError(f"{file}: had no answer within --seq-len, {seq_len}, must have one")
    print(f"{len(rows)} of {len(records)} records have an answer within {seq_len} tokens")
    digest = hashlib.sha256((text + hash_tokenizer(tokenizer)).encode())
    cut = len(rows) - int(len(rows) * val_share)
    return Data(rows[:cut], rows[cut:], digest.hexdigest())


def parse_records(text: str, file: Path) -> list[Any]:
    """The records of JSON text: a list of them, or one a line."""
    if text.lstrip().startswith("["):
        return parse_json(text, f"{file}: was not JSON")
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            records.append(parse_json(line, f"{file}: line {number} was not JSON"))
    return records


def parse_json(text: str, complaint: str) -> Any:
    """JSON text as Python has it; else a ValueError that begins with the complaint."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{complaint} ({error}), must be a list of records, or one a line"
        ) from None


def encode_record(record: Any, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """A record as segments of ids, each with whether it is an answer; ValueError if it is wrong.

    A record is a conversation: its messages, or its instruction, with any input, and its output. Or
    it is plain text, all of which is learnt as an answer is; or parts of a text, each of them a
    pair: the text, and whether it is learnt.
    """
    if not isinstance(record, dict):
        raise ValueError(f"was {str(record)[:40]!r}, {RECORD}")
    if "text" in record:
        check_text("text", record["text"])
        return [(tokenizer.encode(record["text"]), True)]
    if "parts" in record:
        return encode_parts(record["parts"], tokenizer)
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list):
            raise ValueError(f"messages: was {str(messages)[:40]!r}, must be a list")
        for message in messages:
            if not isinstance(message, dict):
                raise ValueError(f"message: was {str(message)[:40]!r}, must have role and content")
            check_text("content", message.get("content"))
        return chat_tokens(tokenizer, messages)
    for name in ("instruction", "output"):
        if name not in record:
            raise ValueError(f"was without {name}, {RECORD}")
        check_text(name, record[name])
    question = record["instruction"]
    if record.get("input"):
        check_text("input", record["input"])
        if question:
            question += "\n\n"
        question += record["input"]
    user = {"role": "user", "content": question}
    answer = {"role": "assistant", "content": record["output"]}
    return chat_tokens(tokenizer, [user, answer])


def encode_parts(parts: Any, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """The parts of one text, each a pair of text and whether it is learnt, as segments of ids.

    The text is encoded as the whole that it is read as. A token that reaches from one part into the
    next belongs to the latter. ValueError where the tokenizer does not give the text back.
    """
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"parts: was {str(parts)[:40]!r}, must be a list of pairs")
    whole = ""
    for part in parts:
        if not isinstance(part, list) or len(part) != 2 or not isinstance(part[1], bool):
            raise ValueError(f"part: was {str(part)[:40]!r}, must be a text, and true or false")
        check_text("part", part[0])
        whole += part[0]
    ids = tokenizer.encode(whole)
    pieces = [tokenizer.token_bytes(token) for token in ids]
    content = whole.encode()
    # Some families put a space of their own before a text.
    own_space = sum(len(piece) for piece in pieces) - len(content)
    if b"".join(pieces) != b" " * own_space + content:
        raise ValueError("parts: were changed by the tokenizer, must be text that it keeps")

    ends = np.cumsum([len(piece) for piece in pieces])  # of each token, in bytes of the text
    segments = []
    first = 0  # tokens that are in a segment
    stop = own_space  # bytes of the parts so far
    for text, is_learnt in parts:
        stop += len(text.encode())
        last = int(np.searchsorted(ends, stop, side="right"))  # tokens that end by there
        segments.append((ids[first:last], is_learnt))
        first = last
    return segments


def check_text(name: str, value: Any) -> None:
    """ValueError unless a value of a record is text, with no half of a character in it."""
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name}: was {str(value)[:40]!r}, must be text")


def make_row(segments: Sequence[tuple[list[int], bool]], seq_len: int) -> Row:
    """Segments as a row of at most `seq_len` tokens, with labels where they are an answer."""
    ids: list[int] = []
    labels: list[int] = []
    for segment, is_answer in segments:
        ids += segment
        labels += segment if is_answer else [IGNORE] * len(segment)
    tokens = torch.tensor(ids[:-1][:seq_len], dtype=torch.long)
    return tokens, torch.tensor(labels[1:][:seq_len], dtype=torch.long)


# A tokenizer of one's own


def train_tokenizer(files: Sequence[Path], size: int) -> bytes:
    """A sentencepiece BPE model of `size` tokens; decoding gives every text back as it was.

    But for one character, U+2581: sentencepiece has it stand for a space.
    """
    from sentencepiece import SentencePieceTrainer

    out = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=split_pages(files),
            model_writer=out,
            model_type="bpe",
            vocab_size=size,
            max_sentence_length=10_000,  # bytes; a longer page would be left out
            num_threads=1,
            minloglevel=2,
            # Nothing of a text is lost.
            normalization_rule_name="identity",
            byte_fallback=True,
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # Indentation becomes tokens; none spans two words, so that texts can be cut.
            allow_whitespace_only_pieces=True,
            split_by_whitespace=True,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--tokenizer: was train:{size}, which cannot be: {error}") from None
    return out.getvalue()


def split_pages(files: Sequence[Path]) -> Iterator[str]:
    """The text of files in pages of whole lines, of about 2000 characters; longer lines in parts.

    A page of more than 10,000 bytes would be left out.
    """
    for file in files:
        page = ""
        for line in read_text(file).splitlines(keepends=True):
            if len(page) + len(line) > 2000:
                yield page
                page = ""
            page += line
            while len(page) > 2500:  # of 4 bytes each
                yield page[:2500]
                page = page[2500:]
        yield page
