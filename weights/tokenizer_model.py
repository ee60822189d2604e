"""tokenizer.model: sentencepiece's pieces (Llama 2), or tiktoken's ranks (Llama 3)."""

import base64
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from weights import tokenizer_json
from weights.declaration import Declaration
from weights.pieces import (
    ADD_DUMMY_PREFIX,
    BYTE,
    CONTROL,
    NORMALIZER,
    REMOVE_EXTRA_WHITESPACES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    PieceModel,
    change_piece,
    make_piece,
    read_model,
    write_field,
)
from weights.tokenizer import ACROSS, Tokenizer, no_files

SPACE = "\u2581"  # a space, in sentencepiece's vocabularies
# Llama 3's 256 control tokens: these, then reserved ones with numbers from 2.
LLAMA3_CONTROL = (
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    "image",
)
# Meta's code cuts a text after so many characters, and after so many spaces, or others, in a row.
LLAMA3_LONGEST = 400_000
LLAMA3_RUN = 25_000


def read(path: Path, declaration: Declaration) -> Tokenizer:
    """The tokenizer in a tokenizer.model: a message in protobuf, or lines of base64 and a rank."""
    with path.open("rb") as file:
        is_ranks = re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", file.read(4096))
    if is_ranks:
        return _read_ranks(path, declaration)
    try:
        model = read_model(path.read_bytes())
    except (ValueError, LookupError) as error:
        raise ValueError(f"{path}: was not whole ({error}), must be a tokenizer.model") from None
    return make_tokenizer(path, model, declaration, files=(path, *declaration.files))


# sentencepiece's pieces


def make_tokenizer(
    path: Path,
    model: PieceModel,
    declaration: Declaration,
    files: tuple[Path, ...] = (),
    make_files: Callable[[], dict[str, bytes]] = no_files,
) -> Tokenizer:
    """A tokenizer of sentencepiece's, from what a tokenizer.model says, which is changed here.

    sentencepiece finds user-defined pieces in every text, and control pieces in none: what text
    must not become is made one of the latter, and what is declared is added as one or the other.
    """
    hidden = _set_control(model, declaration)
    control = {}
    added_words: tuple[str, ...] = ()  # added tokens that texts have
    table = []  # the UTF-8 of each piece
    for token_id, piece in enumerate(model.pieces):
        if piece.type in (UNKNOWN, CONTROL):
            control[piece.text] = token_id
        elif token_id in declaration.added:
            added_words += (piece.text,)
        table.append(b"" if token_id in hidden else _spell(piece))
    no_prefix = write_field(ADD_DUMMY_PREFIX, 0)
    if not declaration.prefix_space:
        model.normalizer += no_prefix
    has_prefix = model.has_flag(ADD_DUMMY_PREFIX)
    leading_spaces = 1 if has_prefix else 0
    if model.has_flag(REMOVE_EXTRA_WHITESPACES):
        leading_spaces = sys.maxsize
    content = model.to_bytes()
    processor = _load_processor(path, content)
    rest = processor  # of text behind a control token, where it begins with no space of its own
    if has_prefix and not declaration.legacy:
        rest = _load_processor(path, content + write_field(NORMALIZER, no_prefix))

    def encode(text: str) -> list[int]:
        if text.startswith(added_words):  # and there it begins with none, as in transformers
            return rest.encode(text)
        return processor.encode(text)

    parts = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
    }
    names = {part: processor.id_to_piece(i) for part, i in parts.items() if i >= 0}
    names |= declaration.names
    return Tokenizer(
        encode,
        lambda token_id: table[token_id] if 0 <= token_id < len(table) else b"",
        len(table),
        control,
        declaration.find_bos(path, control, control.get(names.get("bos_token", ""))),
        encode_rest=rest.encode,
        stops=declaration.find_stops(control, names.get("eos_token", "")),
        names=names,
        chat_template=declaration.chat_template,
        leading_spaces=leading_spaces,
        words=not ACROSS.search("\n".join(piece.text for piece in model.pieces)),
        files=files,
        make_files=make_files,
    )


def _set_control(model: PieceModel, declaration: Declaration) -> set[int]:
    """Add the pieces that are declared, and have text never become a control token.

    Returns the ids of pieces that are no part of any text, and show nothing.
    """
    for token_id, token in sorted(declaration.added.items()):
        while len(model.pieces) <= token_id:
            model.pieces.append(make_piece(f"<no token {len(model.pieces)}>", UNUSED))
        piece = model.pieces[token_id]
        piece_type = piece.type
        if piece_type == BYTE and piece.text != token.content:
            raise ValueError(f"added token {token.content!r} was number {token_id}, a byte's")
        if piece_type not in (UNKNOWN, CONTROL, BYTE):
            piece_type = CONTROL if token.special else USER_DEFINED
        change_piece(piece, token.content, piece_type)
    hidden = set()
    for token_id, piece in enumerate(model.pieces):
        is_special = piece.text in declaration.special
        if is_special or piece.type in (UNKNOWN, CONTROL, UNUSED):
            hidden.add(token_id)
        is_control = piece.type == USER_DEFINED and declaration.is_control(piece.text)
        if is_control or (is_special and piece.type != UNKNOWN):
            change_piece(piece, piece.text, CONTROL)
    return hidden


def _spell(piece: Piece) -> bytes:
    """The UTF-8 that a piece stands for."""
    if piece.type == BYTE:
        return bytes([int(piece.text[3:5], 16)])
    return piece.text.replace(SPACE, " ").encode()


def _load_processor(path: Path, content: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=content)
    except Exception as error:  # whatever sentencepiece meets
        raise ValueError(f"{path}: was not whole ({error}), must be a tokenizer.model") from None


# tiktoken's ranks


def _read_ranks(path: Path, declaration: Declaration) -> Tokenizer:
    try:
        import tiktoken
    except ImportError:
        raise ImportError(f"{path}: needs the package tiktoken: pip install tiktoken") from None
    ranks = _load_ranks(path)
    names = _name_control(path, len(ranks), declaration)
    control = {name: token_id for token_id, name in names.items()}
    pairs = tiktoken.Encoding(
        path.name,
        pat_str=tokenizer_json.LLAMA3_SPLIT,
        mergeable_ranks=ranks,
        special_tokens=control,
    )
    table = sorted(ranks, key=ranks.__getitem__)
    bos_id = len(ranks)

    def encode(text: str) -> list[int]:
        ids = []
        for start in range(0, len(text), LLAMA3_LONGEST):
            for part in _cut_runs(text[start : start + LLAMA3_LONGEST]):
                ids += pairs.encode_ordinary(part)
        return ids

    return Tokenizer(
        encode,
        lambda token_id: table[token_id] if 0 <= token_id < len(table) else b"",
        len(ranks) + 256,
        control,
        declaration.find_bos(path, control, bos_id),
        stops=declaration.find_stops(control),
        names={"bos_token": names[bos_id], "eos_token": names[bos_id + 1]} | declaration.names,
        chat_template=declaration.chat_template,
        longest=LLAMA3_LONGEST,
        files=(path, *declaration.files),
        make_files=lambda: _json_of_ranks(path, ranks, names),
    )


def _load_ranks(path: Path) -> dict[bytes, int]:
    """The bytes of every token, and their rank, which is its id."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token)] = int(rank)
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("a rank is missing or there twice")
        for byte in range(256):
            if bytes([byte]) not in ranks:
                raise ValueError(f"byte {byte} is missing")
    except ValueError as error:
        raise ValueError(f"{path}: was not whole ({error}), must be tiktoken ranks") from None
    return ranks


def _name_control(path: Path, first: int, declaration: Declaration) -> dict[int, str]:
    """The names of the control tokens, by id: Llama 3's, or what is declared in their place."""
    names = {}
    for number in range(256):
        if number < len(LLAMA3_CONTROL):
            name = LLAMA3_CONTROL[number]
        else:
            name = f"reserved_special_token_{number - len(LLAMA3_CONTROL) + 2}"
        names[first + number] = f"<|{name}|>"
    for token_id, token in declaration.added.items():
        if token_id not in names:
            raise ValueError(
                f"{path}: added token {token.content!r} was number {token_id}, must be one of the "
                f"256 from {first}"
            )
        names[token_id] = token.content
    return names


def _cut_runs(text: str) -> Iterator[str]:
    """The parts of a text in which no run of spaces, or of other characters, is too long."""
    start = 0
    for run in re.finditer(r"\s+|\S+", text):
        for cut in range(run.start() + LLAMA3_RUN, run.end(), LLAMA3_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _json_of_ranks(path: Path, ranks: dict[bytes, int], names: dict[int, str]) -> dict[str, bytes]:
    """The tokenizer.json that says what tiktoken's ranks say, for tools that read no ranks."""
    try:
        tokenizers = tokenizer_json.import_tokenizers(path)
    except ImportError:
        warnings.warn(
            f"{path}: saved without a tokenizer.json, which other tools need: that needs the "
            "package tokenizers",
            stacklevel=3,
        )
        return {}
    letters = {byte: letter for letter, byte in tokenizer_json.letters().items()}
    vocabulary = {}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        vocabulary["".join(letters[byte] for byte in token)] = rank
        pairs = []
        for cut in range(1, len(token)):
            left = ranks.get(token[:cut])
            right = ranks.get(token[cut:])
            if left is not None and right is not None:
                pairs.append((left, right))
        merges += sorted(pairs)
    tokens = list(vocabulary)
    model = tokenizers.models.BPE(
        vocab=vocabulary,
        merges=[(tokens[left], tokens[right]) for left, right in merges],
        ignore_merges=True,
    )
    control = [tokenizers.AddedToken(names[token_id], special=True) for token_id in sorted(names)]
    whole = tokenizer_json.make_byte_level(
        tokenizers, model, tokenizer_json.split_llama3(tokenizers), control, names[len(ranks)]
    )
    return {"tokenizer.json": whole.to_str().encode()}
