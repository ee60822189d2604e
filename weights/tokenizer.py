"""Text to token ids and back, the same for every family.

Read from files by tokenizer_json.py, tokenizer_model.py and tokenizer_gguf.py. Text is always plain
text: a prompt that spells a control token does not become one. And what is streamed is what is
decoded, for any ids.
"""

import codecs
import functools
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weights.declaration import SIDE_FILES
from weights.files import write_beside, write_json

CUT = re.compile(r"[A-Za-z] (?=[A-Za-z])")
ACROSS = re.compile("[A-Za-z][ \u2581\u0120]")  # a token that goes on behind such a space
# Tokens that end a text or a turn, in all families, for checkpoints that do not say which do.
ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")
# A model may have more rows than there are tokens, for a convenient size, but not by much.
PADDING = 16384
# What a tokenizer is read from: an old one of these must not lie beside a saved tokenizer.
FILES = ("tokenizer.json", "tokenizer.model", *SIDE_FILES)


def no_files() -> dict[str, bytes]:
    """Files to write beside those that a tokenizer was read from: none."""
    return {}


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back."""

    encode_text: Callable[[str], list[int]]  # a text of its own, no control tokens
    token_bytes: Callable[[int], bytes]  # the UTF-8 of a token; b"" where it shows nothing
    vocab_size: int  # one more than the largest id
    control: dict[str, int] = field(repr=False)  # tokens that text never becomes, by name
    bos_id: int | None  # put before every text, where the checkpoint has it so
    # Text behind a control token: some families put a space before a text of its own, not here.
    encode_rest: Callable[[str], list[int]] | None = None
    stops: tuple[int, ...] = ()  # ids that the checkpoint declares to end a text or a turn
    names: dict[str, str] = field(default_factory=dict)  # the token of a part: "bos_token", ...
    chat_template: str | None = field(default=None, repr=False)  # in jinja2's language
    # Control tokens that take the spaces before them, behind them.
    takes_space: dict[str, tuple[bool, bool]] = field(default_factory=dict, repr=False)
    leading_spaces: int = 0  # how many at most are left out at the start of a decoded text
    words: bool = True  # no token reaches over a space between two letters
    longest: int | None = None  # characters after which the family's own code cuts a text
    files: tuple[Path, ...] = ()  # those it was read from, which say all of it but the stops
    make_files: Callable[[], dict[str, bytes]] = field(default=no_files, repr=False)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text or a turn; generation stops at any of them."""
        if self.stops:
            return self.stops
        return tuple(self.control[name] for name in ENDS if name in self.control)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, and stands between documents in training."""
        return self.eos_ids[0] if self.eos_ids else None

    @functools.cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """What finds control tokens in a text, with the spaces that they take."""
        patterns = []
        for name in sorted(self.control, key=len, reverse=True):  # of several, the longest
            before, behind = self.takes_space.get(name, (False, False))
            pattern = re.escape(name)
            if before:
                pattern = r"\s*" + pattern
            if behind:
                pattern += r"\s*"
            patterns.append(pattern)
        return re.compile("|".join(patterns) or "(?!)")  # the latter finds nothing

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, after the checkpoint's beginning-of-text token unless bos is False."""
        ids = []
        if bos and self.bos_id is not None:
            ids.append(self.bos_id)
        for block in self.encode_blocks(text):
            ids += block
        return ids

    def encode_blocks(self, text: str, length: int = 1 << 16) -> Iterator[list[int]]:
        """The ids of `encode_text`, in blocks of about `length` characters, to save memory.

        A text is cut where no token can reach across: at a space between two letters.
        """
        check_text(text)
        # Some families put a space of their own before every text; it stands for the one cut out.
        own_space = self.encode_text("a a") != self.encode_text("a") + self.encode_text(" a")
        longest = self.longest or max(len(text), 1)
        for first in range(0, len(text), longest):
            part = text[first : first + longest]
            start = 0
            while self.words:
                cut = CUT.search(part, start + length)
                if cut is None:
                    break
                space = cut.end() - 1
                yield self.encode_text(part[start:space])
                start = space + 1 if own_space else space
            yield self.encode_text(part[start:])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without control tokens."""
        return "".join(self.stream(iter(ids)))

    def stream(self, ids: Iterator[int], context: Sequence[int] = ()) -> Iterator[str]:
        """Text of ids as they come, each piece as soon as its characters are whole.

        `context` is what came before: a text may begin otherwise, or within a character.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        spaces = self.leading_spaces
        before = b""
        for token in reversed(context):
            before = self.token_bytes(token) + before
            if len(before) >= 4:  # no character is longer
                break
        if before:
            decoder.decode(before)
            spaces = 0
        for token in ids:
            content = self.token_bytes(token)
            while spaces and content.startswith(b" "):
                content = content[1:]
                spaces -= 1
            if content:
                spaces = 0
                text = decoder.decode(content)
                if text:
                    yield text
        text = decoder.decode(b"", final=True)
        if text:
            yield text

    def check_fits(self, rows: int) -> None:
        """ValueError unless a model with that many rows of embeddings can be this tokenizer's.

        A warning for control tokens without a row that nothing writes, as an added [PAD] may be.
        """
        if rows > self.vocab_size + PADDING:
            raise ValueError(
                f"tokenizer: was of {self.vocab_size} tokens, must be that of the model, "
                f"which has {rows} rows"
            )
        names = {token: name for name, token in self.control.items()}
        without_row = range(rows, self.vocab_size)
        labels = ", ".join(f"{token} ({names.get(token, 'text')})" for token in without_row[:8])
        if len(without_row) > 8:
            labels += f", ... {without_row[-1]}"
        for token in without_row:
            name = names.get(token)
            ends_or_begins = token == self.bos_id or token in self.eos_ids
            if name is None or ends_or_begins or name in (self.chat_template or ""):
                raise ValueError(
                    f"tokenizer: was of {self.vocab_size} tokens, must fit the model's {rows} "
                    f"rows: no row for the ids {labels}"
                )
        if without_row:
            warnings.warn(f"tokenizer: the model has no row for the ids {labels}", stacklevel=2)

    def save(self, folder: Path) -> None:
        """Write the files from which this tokenizer can be read again, here and by other tools.

        Its ids, BOS, special tokens and chat template; the ids that end a text are the model's to
        say, in config.json and generation_config.json (`weights.save_model`).
        """
        folder.mkdir(parents=True, exist_ok=True)
        names = set()
        for file in self.files:
            name = file.relative_to(self.files[0].parent)
            (folder / name).parent.mkdir(exist_ok=True)
            write_beside(folder / name, lambda to, file=file: shutil.copyfile(file, to))
            names.add(str(name))
        for name, content in self.make_files().items():
            write_beside(folder / name, lambda to, content=content: to.write_bytes(content))
            names.add(name)
        if "tokenizer_config.json" not in names:
            has_json = "tokenizer.json" in names
            write_json(folder / "tokenizer_config.json", self._config(has_json))
            names.add("tokenizer_config.json")
        for name in FILES:
            if name not in names:
                (folder / name).unlink(missing_ok=True)

    def _config(self, has_json: bool) -> dict[str, Any]:
        """tokenizer_config.json, for a tokenizer that was read from files without one."""
        by_id = {token: name for name, token in self.control.items()}
        config: dict[str, Any] = {}
        if has_json:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config |= self.names
        if self.bos_id is not None:
            config["bos_token"] = by_id[self.bos_id]
        if self.eos_id in by_id and "eos_token" not in config:
            config["eos_token"] = by_id[self.eos_id]
        config["add_bos_token"] = self.bos_id is not None
        config["clean_up_tokenization_spaces"] = False
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
            config["legacy"] = False  # no space behind control tokens
        return config


def check_text(text: str) -> None:
    """ValueError for a text with half of a surrogate pair, which stands for no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: was {text[error.start]!r} at character {error.start}, half of a surrogate "
            "pair, must be whole characters"
        ) from None
