"""tokenizer.json, and other vocabularies of merges, through the package `tokenizers`."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from weights.declaration import Declaration
from weights.tokenizer import ACROSS, Tokenizer, no_files

# How Llama 3 splits text before it merges bytes; part of its published tokenizer.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A key, and no text: within a text its quotes would be escaped.
PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"([^"]+)"')


def read(path: Path, declaration: Declaration) -> Tokenizer:
    """The tokenizer in a tokenizer.json."""
    tokenizers = import_tokenizers(path)
    prefix = PREFIX.search(path.read_bytes())
    if prefix:  # the package ends the process where a piece lacks it
        text = prefix[1].decode(errors="replace")
        raise ValueError(f"{path}: continuing_subword_prefix was {text!r}, must be null")
    try:
        merges = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: was not whole ({error}), must be a tokenizer.json") from None
    files = [path]
    if path.with_name("tokenizer.model").exists():
        files.append(path.with_name("tokenizer.model"))
    files += declaration.files
    says_bos, bos_id = _read_post_processor(path, merges.post_processor)
    if says_bos:  # and then transformers, too, asks no flag in tokenizer_config.json
        declaration = replace(declaration, add_bos=None)
    spell, leading_spaces = _read_decoder(path, merges.decoder)
    return make_tokenizer(path, merges, declaration, bos_id, spell, leading_spaces, tuple(files))


def make_tokenizer(
    path: Path,
    merges: Any,
    declaration: Declaration,
    bos_id: int | None,
    spell: Callable[[str], bytes],
    leading_spaces: int = 0,
    files: tuple[Path, ...] = (),
    make_files: Callable[[], dict[str, bytes]] = no_files,
) -> Tokenizer:
    """A tokenizer of the package `tokenizers`.

    bos_id: the BOS unless one is declared. spell: the UTF-8 of a token of the vocabulary.
    """
    hidden = _set_control(path, merges, declaration)
    added = merges.get_added_tokens_decoder()
    control = {}
    takes_space = {}
    for token_id, token in sorted(added.items()):
        if token.special:
            control[token.content] = token_id
            if token.lstrip or token.rstrip:
                takes_space[token.content] = (token.lstrip, token.rstrip)

    def encode(text: str) -> list[int]:
        return merges.encode(text, add_special_tokens=False).ids

    @functools.cache
    def load_rest() -> Any:
        return _load_rest(path, merges, declaration)

    def encode_rest(text: str) -> list[int]:
        return load_rest().encode(text, add_special_tokens=False).ids

    def token_bytes(token_id: int) -> bytes:
        if token_id in hidden or token_id < 0:
            return b""
        if token_id in added:
            return added[token_id].content.encode()
        token = merges.id_to_token(token_id)
        return b"" if token is None else spell(token)

    vocabulary = merges.get_vocab(with_added_tokens=True)
    return Tokenizer(
        encode,
        token_bytes,
        max(vocabulary.values()) + 1,
        control,
        declaration.find_bos(path, control, bos_id),
        encode_rest=encode_rest,
        stops=declaration.find_stops(control),
        names=declaration.names,
        chat_template=declaration.chat_template,
        takes_space=takes_space,
        leading_spaces=leading_spaces,
        words=not ACROSS.search("\n".join(vocabulary)),
        files=files,
        make_files=make_files,
    )


def _set_control(path: Path, merges: Any, declaration: Declaration) -> set[int]:
    """Add the tokens that are declared, and have text never become a control token.

    Returns the ids of special tokens, which show nothing when they are decoded.
    """
    tokenizers = import_tokenizers(path)
    for token_id, token in sorted(declaration.added.items()):
        if merges.token_to_id(token.content) is None:
            merges.add_tokens([tokenizers.AddedToken(**vars(token))])
            got = merges.token_to_id(token.content)
            if got != token_id:
                raise ValueError(
                    f"{path}: added token {token.content!r} was number {got} of the vocabulary, "
                    f"must be {token_id}, as the files beside it say"
                )
    hidden = set()
    for token_id, token in merges.get_added_tokens_decoder().items():
        if token.special or token.content in declaration.special:
            hidden.add(token_id)
        if not token.special and declaration.is_control(token.content):
            token.special = True
            merges.add_special_tokens([token])
    for name in declaration.special:
        token_id = merges.token_to_id(name)
        if token_id is not None and token_id not in hidden:  # a plain word of the vocabulary
            merges.add_special_tokens([tokenizers.AddedToken(name, normalized=False)])
            hidden.add(token_id)
    merges.encode_special_tokens = True  # text that spells a special token stays text
    merges.no_truncation()  # which files from fine-tuning may ask for
    merges.no_padding()
    return hidden


def _read_post_processor(path: Path, post_processor: Any) -> tuple[bool, int | None]:
    """Whether a tokenizer.json says what stands before every text, and the id, None for nothing."""
    first: list[int] = []
    says = False
    for step in _steps(post_processor, "processors"):
        if step["type"] == "TemplateProcessing":
            says = True
            for part in step["single"]:
                if "Sequence" in part:
                    break
                first += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
        elif step["type"] in ("RobertaProcessing", "BertProcessing"):
            says = True
            first.append(step["cls"][1])
    if len(first) > 1:
        raise ValueError(f"{path}: post_processor: put {first} before a text, must put one id")
    return says, first[0] if first else None


def _read_decoder(path: Path, decoder: Any) -> tuple[Callable[[str], bytes], int]:
    """What the decoder of a tokenizer.json does: to a token, and to spaces at the start of a text.

    Returns a function from a token to its UTF-8, and how many leading spaces are left out.
    """
    steps = _steps(decoder, "decoders")
    if not steps:
        return lambda token: f" {token}".encode(), 1  # words, with spaces between them
    if len(steps) == 1 and steps[0]["type"] == "ByteLevel":
        return spell_letters, 0
    replacements = []
    has_bytes = False
    leading_spaces = 0
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            replacements.append((step["replacement"], " "))
            if step.get("prepend_scheme") != "never":
                leading_spaces = 1
        elif step["type"] == "ByteFallback":
            has_bytes = True
        elif step["type"] == "Strip" and step["content"] == " " and step["stop"] == 0:
            leading_spaces = step["start"]
        elif step["type"] != "Fuse":
            raise ValueError(
                f"{path}: decoder was {step['type']}, must be ByteLevel, or consist of "
                "Metaspace, Replace, ByteFallback, Fuse and Strip"
            )

    def spell(token: str) -> bytes:
        if has_bytes and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return spell, leading_spaces


def _load_rest(path: Path, merges: Any, declaration: Declaration) -> Any:
    """The tokenizer for text behind a control token: another one only where it must be.

    Llama 2's family begins a text with a space of its own. Whether it puts one behind every control
    token, too, is `prepend_scheme`, or, for transformers' LlamaTokenizer, `legacy`.
    """
    is_llama = declaration.tokenizer_class.removesuffix("Fast") == "LlamaTokenizer"
    pre_tokenizers = _steps(merges.pre_tokenizer, "pretokenizers")
    normalizers = _steps(merges.normalizer, "normalizers")
    is_other = False
    for step in pre_tokenizers:
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
            is_other = True
    for step in normalizers:
        if step["type"] == "Prepend" and is_llama and not declaration.legacy:
            step["prepend"] = ""
            is_other = True
    if not is_other:
        return merges
    whole = json.loads(merges.to_str())
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizers}
    whole["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    rest = import_tokenizers(path).Tokenizer.from_str(json.dumps(whole))
    _set_control(path, rest, declaration)
    return rest


def _steps(stage: Any, name: str) -> list[dict[str, Any]]:
    """The steps of one stage of a tokenizer.json: none, one, or a sequence, there under `name`."""
    if stage is None:
        return []
    content = json.loads(stage.__getstate__())
    if content["type"] == "Sequence":
        return content[name]
    return [content]


# Byte-level merges, which a GGUF file and tiktoken's ranks hold, too


@functools.cache
def letters() -> dict[str, int]:
    """The letter that stands for a byte in byte-level vocabularies: itself where it can be seen."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in visible}
    for byte in range(256):
        if byte not in visible:
            letters[chr(256 + len(letters) - len(visible))] = byte
    return letters


def spell_letters(token: str) -> bytes:
    """The bytes that a token stands for; those of its own letters, if one stands for none."""
    bytes_of = letters()
    if all(letter in bytes_of for letter in token):
        return bytes(bytes_of[letter] for letter in token)
    return token.encode()


def make_byte_level(
    tokenizers: Any, model: Any, split: Any, control: list[Any], first: str | None
) -> Any:
    """A tokenizer of merges of bytes, as Llama 3 and SmolLM2 have them.

    first: the control token that other tools put before every text; here `Tokenizer` does.
    """
    merges = tokenizers.Tokenizer(model)
    merges.pre_tokenizer = split
    merges.decoder = tokenizers.decoders.ByteLevel()
    merges.add_special_tokens(control)
    if first is not None:
        merges.post_processor = tokenizers.processors.TemplateProcessing(
            single=[first, "$A"], special_tokens=[(first, merges.token_to_id(first))]
        )
    return merges


def split_digits(tokenizers: Any) -> Any:
    """SmolLM2's: every digit alone, then words as GPT-2 splits them."""
    steps = tokenizers.pre_tokenizers
    digits = steps.Digits(individual_digits=True)
    return steps.Sequence([digits, steps.ByteLevel(add_prefix_space=False)])


def split_llama3(tokenizers: Any) -> Any:
    steps = tokenizers.pre_tokenizers
    split = steps.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated")
    return steps.Sequence([split, steps.ByteLevel(add_prefix_space=False, use_regex=False)])


def import_tokenizers(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(f"{path}: needs the package tokenizers: pip install tokenizers") from None
    return tokenizers
