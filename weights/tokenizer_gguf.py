"""The vocabulary inside a GGUF file: sentencepiece's, or the merges of Llama 3 or SmolLM2.

It is made a tokenizer.model, or a tokenizer of the package `tokenizers`.
"""

from pathlib import Path
from typing import Any

from weights import tokenizer_json, tokenizer_model
from weights.declaration import Declaration, pick_template
from weights.files import damaged
from weights.gguf_file import gguf_fields
from weights.pieces import (
    ADD_DUMMY_PREFIX,
    BOS_PIECE,
    BYTE,
    BYTE_FALLBACK,
    BYTE_PAIRS,
    CONTROL,
    EOS_PIECE,
    MODEL_TYPE,
    REMOVE_EXTRA_WHITESPACES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PieceModel,
    make_piece,
    write_field,
)
from weights.tokenizer import Tokenizer

# How the merges of a GGUF file split a text, by its field tokenizer.ggml.pre.
SPLITS = {
    "smollm": tokenizer_json.split_digits,
    "llama-bpe": tokenizer_json.split_llama3,
    "llama3": tokenizer_json.split_llama3,
    "llama-v3": tokenizer_json.split_llama3,
}
# Where the token of a part is told.
PARTS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def read(path: Path) -> Tokenizer:
    """The tokenizer inside a GGUF file, and what its fields declare."""
    fields = {}
    for name, value in gguf_fields(path).items():
        if name.startswith("tokenizer."):
            fields[name.removeprefix("tokenizer.").removeprefix("ggml.")] = value
    model = fields.get("model")
    split = fields.get("pre")
    must = "a GGUF file with a whole tokenizer"
    if model == "llama":
        with damaged(path, must):
            declaration = _read_declaration(fields)
            pieces = _make_pieces(fields)
            content = pieces.to_bytes()
        return tokenizer_model.make_tokenizer(
            path, pieces, declaration, make_files=lambda: {"tokenizer.model": content}
        )
    if model == "gpt2" and split in SPLITS:
        tokenizers = tokenizer_json.import_tokenizers(path)
        with damaged(path, must):
            declaration = _read_declaration(fields)
            merges = _make_merges(tokenizers, fields, declaration)
        content = merges.to_str().encode()
        return tokenizer_json.make_tokenizer(
            path,
            merges,
            declaration,
            None,
            tokenizer_json.spell_letters,
            make_files=lambda: {"tokenizer.json": content},
        )
    raise ValueError(
        f"{path}: its vocabulary was {model!r}, {split!r}, must be 'llama', or 'gpt2' and one of "
        f"{list(SPLITS)}; or put a tokenizer.model or tokenizer.json beside the file"
    )


def _read_declaration(fields: dict[str, Any]) -> Declaration:
    """What the fields of a GGUF file say about its tokenizer."""
    tokens = fields["tokens"]
    names = {}
    for part, name in PARTS.items():
        if name in fields:
            names[part] = tokens[fields[name]]
    stops = []
    for name in ("eos_token_id", "eot_token_id", "eom_token_id"):
        if name in fields and fields[name] not in stops:
            stops.append(fields[name])
    add_bos = fields.get("add_bos_token", fields.get("pre") != "smollm")
    return Declaration(
        names=names,
        special=frozenset(names.values()),
        add_bos=bool(add_bos) and "bos_token" in names,
        chat_template=pick_template(fields.get("chat_template")),
        stops=tuple(stops),
    )


def _make_pieces(fields: dict[str, Any]) -> PieceModel:
    """What a tokenizer.model with this vocabulary would say."""
    tokens = fields["tokens"]
    pieces = []
    columns = zip(tokens, fields["scores"], fields["token_type"], strict=True)
    for token_id, (token, score, token_type) in enumerate(columns):
        if token_id == fields.get("unknown_token_id", 0):
            token_type = UNKNOWN
        elif token_type == UNKNOWN:  # a row without a token, in files with a padded vocabulary
            token_type = UNUSED
        pieces.append(make_piece(token, token_type, score))
    trainer = write_field(MODEL_TYPE, BYTE_PAIRS)
    trainer += write_field(BYTE_FALLBACK, int(BYTE in fields["token_type"]))
    if "bos_token_id" in fields:
        trainer += write_field(BOS_PIECE, tokens[fields["bos_token_id"]].encode())
    if "eos_token_id" in fields:
        trainer += write_field(EOS_PIECE, tokens[fields["eos_token_id"]].encode())
    prefix = fields.get("add_space_prefix", True)
    extra = fields.get("remove_extra_whitespaces", False)
    normalizer = write_field(ADD_DUMMY_PREFIX, int(prefix))
    normalizer += write_field(REMOVE_EXTRA_WHITESPACES, int(extra))
    return PieceModel(pieces, trainer, normalizer)


def _make_merges(tokenizers: Any, fields: dict[str, Any], declaration: Declaration) -> Any:
    """The tokenizer of the package `tokenizers` with this vocabulary and these merges."""
    tokens = fields["tokens"]
    model = tokenizers.models.BPE(
        vocab={token: token_id for token_id, token in enumerate(tokens)},
        merges=[tuple(pair.split(" ")) for pair in fields["merges"]],
        ignore_merges=fields["pre"] != "smollm",
    )
    control = []
    user_defined = []
    for token, kind in zip(tokens, fields["token_type"], strict=True):
        if kind == CONTROL:
            control.append(tokenizers.AddedToken(token, special=True))
        elif kind == USER_DEFINED:
            user_defined.append(tokenizers.AddedToken(token, normalized=False))
    first = declaration.names["bos_token"] if declaration.add_bos else None
    merges = tokenizer_json.make_byte_level(
        tokenizers, model, SPLITS[fields["pre"]](tokenizers), control, first
    )
    merges.add_tokens(user_defined)
    return merges
