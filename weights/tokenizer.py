"""Tokenizers as the families publish them, behind one small interface.

sentencepiece `tokenizer.model` (Llama 2), tiktoken ranks `tokenizer.model` (Llama 3, extra
`llama3`), `tokenizer.json` (through `tokenizers`), and the vocabulary inside a GGUF file. Text is
always plain text: a prompt that spells a control token does not become one.
"""

import base64
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from weights.gguf_file import open_gguf

CUT = re.compile(r"[A-Za-z] (?=[A-Za-z])")
ACROSS = re.compile("[A-Za-z][ \u2581\u0120]")  # a token that goes on behind such a space
# Tokens that end a text or a turn, in all families.
ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")
# How Llama 3 splits text before it merges bytes; part of its published tokenizer.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back."""

    encode_text: Callable[[str], list[int]]  # plain text, no control tokens
    decode_ids: Callable[[list[int]], str]
    vocab_size: int  # one more than the largest id
    control: dict[str, int] = field(repr=False)  # control tokens by name
    bos_id: int | None  # put before every text, where the family has it so
    files: tuple[Path, ...] = ()  # what to copy to have it elsewhere
    words: bool = True  # no token reaches over a space between two letters
    made: str | None = field(default=None, repr=False)  # a tokenizer.json, where no file is one

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text or a turn; generation stops at any of them."""
        return tuple(self.control[name] for name in ENDS if name in self.control)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, and stands between documents in training."""
        return next(iter(self.eos_ids), None)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, after the family's beginning-of-text token unless bos is False."""
        start = [self.bos_id] if bos and self.bos_id is not None else []
        return [*start, *chain.from_iterable(self.encode_blocks(text))]

    def encode_blocks(self, text: str, length: int = 1 << 16) -> Iterator[list[int]]:
        """The ids of `encode_text`, in blocks of about `length` characters, to save memory.

        A text is cut where no token can reach across: at a space between two letters.
        """
        # Some families begin every text with a space of their own; there it stands for the cut.
        spaced = self.encode_text("a a") == self.encode_text("a") + self.encode_text(" a")
        start = 0
        while self.words and (cut := CUT.search(text, start + length)):
            yield self.encode_text(text[start : cut.start() + 1])
            start = cut.end() - spaced
        yield self.encode_text(text[start:])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without control tokens."""
        hidden = set(self.control.values())
        return self.decode_ids([i for i in ids if i not in hidden])

    def check_fits(self, vocab_size: int) -> None:
        """ValueError unless a model of that vocabulary can be this tokenizer's."""
        # A model may round its vocabulary up to a convenient size, but not by much.
        if not self.vocab_size <= vocab_size <= self.vocab_size + 256:
            raise ValueError(
                f"tokenizer: was of {self.vocab_size} tokens, must fit the model's {vocab_size}"
            )

    def stream(self, ids: Iterator[int], context: Sequence[int] = ()) -> Iterator[str]:
        """Text of ids as they come, each piece as soon as its characters are whole.

        `context` is what came before: a tokenizer may spell a token otherwise at the start.
        """
        known = list(context)[-8:]
        shown = self.decode(known)
        for token in ids:
            known.append(token)
            text = self.decode(known)
            if not text.endswith("\ufffd"):  # else a character is still incomplete
                yield text[len(shown) :]
                known = known[-8:]
                shown = self.decode(known)
        yield self.decode(known)[len(shown) :]


def tokenizer_from_file(path: Path) -> Tokenizer:
    """tokenizer.json, or tokenizer.model: sentencepiece's protobuf, or base64 and rank a line."""
    if path.suffix == ".json":
        return _from_json(path)
    with path.open("rb") as file:
        is_ranks = re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", file.read(4096))
    return _from_ranks(path) if is_ranks else _from_sentencepiece(path)


def _from_sentencepiece(path: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # whatever the protobuf reader meets
        raise ValueError(f"{path}: was not whole ({error}), must be a tokenizer.model") from None
    size = pieces.vocab_size()
    control = {pieces.id_to_piece(i): i for i in range(size) if pieces.is_control(i)}
    bos = pieces.bos_id() if pieces.bos_id() >= 0 else None
    words = not any(ACROSS.search(pieces.id_to_piece(i)) for i in range(size))
    return Tokenizer(pieces.encode, pieces.decode, size, control, bos, (path,), words)


def _from_ranks(path: Path) -> Tokenizer:
    try:
        import tiktoken
    except ImportError:
        raise ImportError(f"{path}: needs the package tiktoken: pip install tiktoken") from None
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        whole = {bytes([i]) for i in range(256)} <= ranks.keys()
        if not whole or sorted(ranks.values()) != list(range(len(lines))):
            raise ValueError("a byte or a rank is missing or there twice")
    except ValueError as error:
        raise ValueError(f"{path}: was not whole ({error}), must be tiktoken ranks") from None
    # 256 control tokens follow the ranks; these are the ones with a use, at their places.
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
    named |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    control = {
        f"<|{named.get(i, f'reserved_special_token_{i}')}|>": len(ranks) + i for i in range(256)
    }
    bytes_pairs = tiktoken.Encoding(
        path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=control
    )

    def encode(text: str) -> list[int]:
        # Meta's own cut: the splitter's stack does not bear a longer text.
        parts = (text[i : i + 400_000] for i in range(0, len(text), 400_000))
        return [token for part in parts for token in bytes_pairs.encode_ordinary(part)]

    size, bos = bytes_pairs.n_vocab, control["<|begin_of_text|>"]
    return Tokenizer(encode, bytes_pairs.decode, size, control, bos, (path,))


def _from_json(path: Path) -> Tokenizer:
    tokenizers = _import_tokenizers(path)
    try:
        merges = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: was not whole ({error}), must be a tokenizer.json") from None
    control = {t.content: i for i, t in merges.get_added_tokens_decoder().items() if t.special}
    # The family's post-processor says whether a text begins with a control token.
    begins = merges.encode("a").ids[:1]
    bos = begins[0] if begins and begins[0] in control.values() else None
    extra = [path.with_name(name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    return _from_tokenizers(merges, control, bos, (path, *(x for x in extra if x.exists())))


def tokenizer_from_gguf(path: Path) -> Tokenizer:
    """The byte-pair vocabulary inside a GGUF file, as Llama 3 and SmolLM2 have it."""
    tokenizers = _import_tokenizers(path)
    prefix = "tokenizer.ggml."
    fields: dict[str, Any] = {
        name.removeprefix(prefix): value.contents()
        for name, value in open_gguf(path).fields.items()
        if name.startswith(prefix)
    }
    splits = {"smollm": _split_digits, "llama-bpe": _split_llama3, "llama3": _split_llama3}
    kind, split = fields.get("model"), fields.get("pre")
    if kind != "gpt2" or split not in splits:
        raise ValueError(
            f"{path}: its vocabulary was {kind!r}, {split!r}, must be 'gpt2' and one of "
            f"{list(splits)}; or put a tokenizer.model or tokenizer.json beside the file"
        )
    try:
        tokens, types = fields["tokens"], fields["token_type"]
        merges = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab={token: i for i, token in enumerate(tokens)},
                merges=[tuple(pair.split(" ")) for pair in fields["merges"]],
                ignore_merges=split != "smollm",
            )
        )
        control = {token: i for i, token in enumerate(tokens) if types[i] == 3}  # 3: control
        begins = fields.get("add_bos_token", split != "smollm")
        bos = range(len(tokens))[fields["bos_token_id"]] if begins else None
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: its tokenizer was not whole ({error!r}), must be") from None
    merges.pre_tokenizer = splits[split](tokenizers)
    merges.decoder = tokenizers.decoders.ByteLevel()
    merges.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in control])
    return replace(_from_tokenizers(merges, control, bos, ()), made=merges.to_str())


def _split_digits(tokenizers: Any) -> Any:
    parts = tokenizers.pre_tokenizers
    return parts.Sequence(
        [parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)]
    )


def _split_llama3(tokenizers: Any) -> Any:
    parts = tokenizers.pre_tokenizers
    split = parts.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated")
    return parts.Sequence([split, parts.ByteLevel(add_prefix_space=False, use_regex=False)])


def _import_tokenizers(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(f"{path}: needs the package tokenizers: pip install tokenizers") from None
    return tokenizers


def _from_tokenizers(
    merges: Any, control: dict[str, int], bos: int | None, files: tuple[Path, ...]
) -> Tokenizer:
    merges.encode_special_tokens = True  # text that spells a control token stays text
    merges.no_truncation()  # which files from fine-tuning may ask for
    merges.no_padding()
    vocabulary = merges.get_vocab(with_added_tokens=True)
    return Tokenizer(
        lambda text: merges.encode(text, add_special_tokens=False).ids,
        lambda ids: merges.decode(ids, skip_special_tokens=False),
        max(vocabulary.values()) + 1,
        control,
        bos,
        files,
        not any(ACROSS.search(token) for token in vocabulary),
    )
