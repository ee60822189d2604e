"""What a checkpoint declares of its tokenizer: special tokens, BOS, stop ids, chat template.

The files that do are those of Hugging Face's tools, and none of them has to be there:
tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja (or .json),
generation_config.json and config.json. A GGUF file says the same in its fields.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from weights.files import damaged, read_json, read_text

# The parts that a special token may have, as tokenizer_config.json and chat templates name them.
PARTS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Where a tokenizer's folder says all this; config.json and generation_config.json are the model's.
SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
MOST_TOKENS = 1 << 24  # of any vocabulary, far above what there is: a damaged id may be any number
BRACKETS = re.compile(r"[\s\u2581]*(<.+>|\[.+\])\s*", re.DOTALL)
SIGN = re.compile(r"[^\w\s]")  # a character that is neither of a word nor a space


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary proper, found in a text before anything else is."""

    content: str
    special: bool  # no part of any text: not shown where ids are decoded
    lstrip: bool = False  # takes the spaces before it
    rstrip: bool = False  # takes the spaces behind it
    normalized: bool = True
    single_word: bool = False


@dataclass(frozen=True)
class Declaration:
    """What a checkpoint says about its tokenizer; the fields are empty where it says nothing."""

    names: dict[str, str] = field(default_factory=dict)  # the token of a part: "bos_token", ...
    special: frozenset[str] = frozenset()  # contents of tokens that are no part of any text
    added: dict[int, AddedToken] = field(default_factory=dict)  # by id
    add_bos: bool | None = None  # whether every text begins with the BOS
    chat_template: str | None = None
    stops: tuple[int, ...] = ()  # ids that end a text, for the model
    tokenizer_class: str = ""
    prefix_space: bool = True  # whether a family that begins texts with a space does so
    legacy: bool = False  # whether text behind a control token begins with that space, too
    files: tuple[Path, ...] = ()  # those that say all this, but for the model's own

    def is_control(self, name: str) -> bool:
        """Whether a token that is not marked as special is a control token all the same.

        Text must never become one. Those that look the part are, such as <|im_end|> in many tunes,
        and those that the chat template writes.
        """
        if name in self.special or BRACKETS.fullmatch(name):
            return True
        return len(name) > 1 and bool(SIGN.search(name)) and name in (self.chat_template or "")

    def find_bos(self, path: Path, control: dict[str, int], own: int | None) -> int | None:
        """The id that every text begins with: `own`, the vocabulary's, unless more is declared."""
        if self.add_bos is None:
            return own
        if not self.add_bos:
            return None
        name = self.names.get("bos_token")
        if name is None:
            return own
        if name not in control:
            raise ValueError(f"{path}: bos_token was {name!r}, must be a token of the vocabulary")
        return control[name]

    def find_stops(self, control: dict[str, int], own: str = "") -> tuple[int, ...]:
        """The ids declared to end a text: the model's, and eos_token's, else the vocabulary's."""
        stops = list(self.stops)
        eos_id = control.get(self.names.get("eos_token", own))
        if eos_id is not None and eos_id not in stops:
            stops.append(eos_id)
        return tuple(stops)


def read_declaration(folder: Path, model_folder: Path) -> Declaration:
    """What the files in a tokenizer's folder say, and in the folder of its model (often the same).

    ValueError names a file that does not say it as it must.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    map_path = folder / "special_tokens_map.json"
    special_map = read_json(map_path) if map_path.exists() else {}
    names = {}
    added = _read_added(folder / "added_tokens.json")
    with damaged(path, "as Hugging Face's tools write it"):
        for token_id, entry in (config.get("added_tokens_decoder") or {}).items():
            added[_token_id(token_id)] = _added_token(entry)
        for part in PARTS:
            content = _content(config.get(part, special_map.get(part)))
            if content:
                names[part] = content
        special = set(names.values())
        for more in ("additional_special_tokens", "extra_special_tokens"):
            tokens = config.get(more, special_map.get(more)) or []
            if isinstance(tokens, dict):
                tokens = list(tokens.values())
            special.update(_content(token) for token in tokens)
        tokenizer_class = config.get("tokenizer_class") or ""
        if not isinstance(tokenizer_class, str):
            raise ValueError(f"tokenizer_class was {tokenizer_class!r}")
        add_bos = config.get("add_bos_token")
        if add_bos not in (True, False, None):
            raise ValueError(f"add_bos_token was {add_bos!r}")
    return Declaration(
        names=names,
        special=frozenset(special),
        added=added,
        add_bos=add_bos,
        chat_template=_read_template(folder, config),
        stops=_read_stops(model_folder) or _read_stops(folder),
        tokenizer_class=tokenizer_class,
        prefix_space=config.get("add_prefix_space") is not False,
        legacy=config.get("legacy") is True,
        files=_existing_files(folder),
    )


def pick_template(templates: Any) -> str | None:
    """The chat template: the only one, or the one named "default" among named ones."""
    if templates is None or isinstance(templates, str):
        return templates
    if isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    if "default" not in templates:
        names = ", ".join(templates)
        # Only a conversation needs a template, so only a conversation is refused.
        return "{{ raise_exception('was one of " + names + ", must be one named default') }}"
    return str(templates["default"])


def _content(token: Any) -> str:
    """The text of a token, which files give as it is or in an object; "" for none."""
    if isinstance(token, dict):
        token = token["content"]
    if token is not None and not isinstance(token, str):
        raise ValueError(f"a token was {token!r}")
    return token or ""


def _token_id(value: Any) -> int:
    """The id of an added token, a whole number or its digits."""
    token_id = int(value)
    if not 0 <= token_id < MOST_TOKENS:
        raise ValueError(f"an added token was number {token_id}")
    return token_id


def _added_token(entry: dict[str, Any]) -> AddedToken:
    special = entry.get("special", False)
    token = AddedToken(
        entry["content"],
        special,
        entry.get("lstrip", False),
        entry.get("rstrip", False),
        entry.get("normalized", not special),
        entry.get("single_word", False),
    )
    for part in fields(AddedToken):
        value = getattr(token, part.name)
        if type(value) is not part.type:
            raise ValueError(f"{part.name} of an added token was {value!r}")
    return token


def _read_added(path: Path) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json, an older list of contents and ids; none without one."""
    added = {}
    if path.exists():
        content = read_json(path)
        with damaged(path, "an object of tokens and their ids"):
            for token, token_id in content.items():
                added[_token_id(token_id)] = AddedToken(token, special=False)
    return added


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template, from a file of its own if there is one."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    path = folder / "chat_template.json"
    if path.exists():
        config = read_json(path)
    else:
        path = folder / "tokenizer_config.json"
    with damaged(path, "a template, or a list of names and templates, in chat_template"):
        return pick_template(config.get("chat_template"))


def _read_stops(folder: Path) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's, else config.json's, else none."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.exists():
            continue
        given = read_json(path).get("eos_token_id")
        if given is None or given == []:
            continue
        stops = given if isinstance(given, list) else [given]
        for stop in stops:
            if not isinstance(stop, int) or isinstance(stop, bool):
                raise ValueError(
                    f"{path}: eos_token_id was {given!r}, must be a number or a list of numbers"
                )
        return tuple(stops)
    return ()


def _existing_files(folder: Path) -> tuple[Path, ...]:
    files = [folder / name for name in SIDE_FILES if (folder / name).exists()]
    files += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return tuple(files)
