"""The file format of sentencepiece's tokenizer.model: pieces and options, a message in protobuf.

Read and written here, in the few lines that it takes, since the package `sentencepiece` changes no
model: tokens that a checkpoint adds must become pieces, and a GGUF file must become a model. The
numbers are those of sentencepiece_model.proto. A field that is written once more, behind the first,
replaces it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

# The types of a piece; GGUF has the same numbers.
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
# Fields of a model.
PIECES = 1
TRAINER = 2
NORMALIZER = 3
# Fields of a piece.
TEXT = 1
SCORE = 2
TYPE = 3
# Options in the message TRAINER.
MODEL_TYPE = 3
BYTE_FALLBACK = 35
BOS_PIECE = 46
EOS_PIECE = 47
BYTE_PAIRS = 2  # the model type of merges
# Options in the message NORMALIZER.
ADD_DUMMY_PREFIX = 3
REMOVE_EXTRA_WHITESPACES = 4


@dataclass
class Piece:
    """One entry of the vocabulary; its score says when it is merged."""

    text: str
    type: int
    content: bytes  # the message


@dataclass
class PieceModel:
    """What a tokenizer.model says."""

    pieces: list[Piece]
    trainer: bytes  # options, a message
    normalizer: bytes  # options of how a text is prepared, a message
    others: bytes = b""  # fields that matter to nobody here

    def has_flag(self, number: int) -> bool:
        """Whether an option of the normalizer is on, which it is unless said to be off."""
        return bool(dict(read_fields(self.normalizer)).get(number, 1))

    def to_bytes(self) -> bytes:
        """The content of a tokenizer.model."""
        fields = [write_field(PIECES, piece.content) for piece in self.pieces]
        fields.append(write_field(TRAINER, self.trainer))
        fields.append(write_field(NORMALIZER, self.normalizer))
        return b"".join(fields) + self.others


def read_model(content: bytes) -> PieceModel:
    """A tokenizer.model, from its content; ValueError or LookupError for what is none."""
    model = PieceModel([], b"", b"")
    for number, value in read_fields(content):
        if number == PIECES:
            fields = dict(read_fields(value))
            model.pieces.append(Piece(fields[TEXT].decode(), fields.get(TYPE, NORMAL), value))
        elif number == TRAINER:
            model.trainer += value
        elif number == NORMALIZER:
            model.normalizer += value
        else:
            model.others += write_field(number, value)
    return model


def make_piece(text: str, piece_type: int, score: float = 0.0) -> Piece:
    """A new piece."""
    content = write_field(TEXT, text.encode()) + write_field(SCORE, float(score))
    return Piece(text, piece_type, content + write_field(TYPE, piece_type))


def change_piece(piece: Piece, text: str, piece_type: int) -> None:
    """Give a piece another text and type; its score stays."""
    piece.text = text
    piece.type = piece_type
    piece.content += write_field(TEXT, text.encode()) + write_field(TYPE, piece_type)


def read_fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: their numbers, and their values, whole numbers or bytes."""
    start = 0
    while start < len(content):
        tag, start = _read_number(content, start)
        wire_type = tag & 7
        if wire_type == 0:
            value, start = _read_number(content, start)
            yield tag >> 3, value
            continue
        if wire_type == 2:
            size, start = _read_number(content, start)
        elif wire_type == 5:
            size = 4
        else:
            raise ValueError(f"no field begins before byte {start}")
        if start + size > len(content):
            raise ValueError(f"it ends within the field at byte {start}")
        yield tag >> 3, content[start : start + size]
        start += size


def write_field(number: int, value: int | float | bytes) -> bytes:
    """A field of a message: a whole number, a float of 4 bytes, or bytes."""
    if isinstance(value, int):
        return _write_number(number << 3) + _write_number(value)
    if isinstance(value, float):
        return _write_number(number << 3 | 5) + struct.pack("<f", value)
    return _write_number(number << 3 | 2) + _write_number(len(value)) + value


def _read_number(content: bytes, start: int) -> tuple[int, int]:
    """A number in groups of 7 bits, the lowest first, and where the next field begins."""
    byte = content[start]
    number = byte & 127
    shift = 7
    while byte >= 128:
        start += 1
        byte = content[start]
        number |= (byte & 127) << shift
        shift += 7
    return number, start + 1


def _write_number(number: int) -> bytes:
    groups = []
    while number >= 128:
        groups.append(number & 127 | 128)
        number >>= 7
    groups.append(number)
    return bytes(groups)
