"""Conversations as token ids, in the chat template that a checkpoint declares.

A template is a small program in jinja2's language that writes a conversation as text, control
tokens spelled out. It runs in jinja2's sandbox, as in Hugging Face's tools, and the text is cut at
the control tokens that the template itself wrote: what a message spells stays text. To tell them
apart, and to find the answers, messages come to the template with marks in them, characters of
private use that are taken out again.

For checkpoints that declare no template, three families' formats are spelled here as templates.
"""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from weights.tokenizer import Tokenizer, check_text

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Segments = list[tuple[list[int], bool]]  # ids, and whether they are an answer

# As Meta's code writes them; `seam` is where it begins to encode a text of its own.
LLAMA3 = r"""
{{- bos_token }}
{%- for message in messages -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>{{ "\n\n" }}
{{- seam }}{{ message.content }}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>{{ "\n\n" }}
{%- endif %}"""
LLAMA2 = r"""
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- set text = message.content %}
        {%- if loop.index0 == 1 and loop.previtem.role == "system" %}
            {%- set text = "<<SYS>>\n" ~ loop.previtem.content ~ "\n<</SYS>>\n\n" ~ text %}
        {%- endif %}
        {{- bos_token }}{{ seam }}[INST] {{ text | trim }} [/INST]
    {%- elif message.role == "assistant" %}
        {{- " " ~ (message.content | trim) ~ " " }}{{ eos_token }}
    {%- elif not loop.first or loop.last or loop.nextitem.role != "user" %}
        {{- raise_exception("a system message must be the first, before a user's (Llama 2)") }}
    {%- endif %}
{%- endfor %}"""
CHATML = r"""
{{- bos_token }}
{%- for message in messages -%}
<|im_start|>{{ message.role }}{{ "\n" }}
{{- message.content }}<|im_end|>{{ "\n" }}
{%- endfor %}
{%- if add_generation_prompt -%}
<|im_start|>assistant{{ "\n" }}
{%- endif %}"""


@dataclass(frozen=True)
class Chat:
    """A template, and four characters that neither it nor any message holds."""

    tokenizer: Tokenizer
    template: str
    seam: str  # what follows is encoded as a text of its own
    gap: str  # stands within a control token that a message spells
    start: str  # an answer begins
    stop: str  # an answer ends


def chat_tokens(tokenizer: Tokenizer, messages: list[Message]) -> Segments:
    """A conversation in the checkpoint's own template, ready for the model.

    messages: {"role": "system" | "user" | "assistant", "content": text} each. Returns segments of
    ids, each with whether it is an answer (its end of turn included): what instruction tuning puts
    its loss on. Where the last message is not an answer, the ids end where one would begin.
    ValueError for messages that are none, and for what a template refuses or cannot do.
    """
    check_messages(messages)
    chat = _prepare(tokenizer, messages)
    text = _render_marked(chat, messages)
    if any(message["role"] == "assistant" for message in messages):
        # A model writes an answer from where its prompt ends to the end of its turn.
        before, behind = _around_answers(chat, messages)
        text = text.replace(before + chat.start, chat.start + before)
        text = text.replace(chat.stop + behind, behind + chat.stop)
    return _encode_marked(chat, text)


def chat_stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer: those that end a text, and the template's own end of a turn."""
    stops = list(tokenizer.eos_ids)
    dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        segments = chat_tokens(tokenizer, dialog)
    except ValueError:  # a template that writes no answers can still ask for one
        return tokenizer.eos_ids
    for ids, is_answer in segments:
        if is_answer and ids[-1] in tokenizer.control.values() and ids[-1] not in stops:
            stops.append(ids[-1])
    return tuple(stops)


def check_messages(messages: list[Message]) -> None:
    """ValueError unless there are messages, each with a role and a content that are known."""
    if not messages:
        raise ValueError("messages: were none, must be one or more")
    for message in messages:
        known = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not known or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(
                f"message: was {message!r}, must have a role (system, user or assistant) and a "
                "content, which is a text"
            )
        check_text(message["content"])


def find_template(tokenizer: Tokenizer) -> str:
    """The chat template that the checkpoint declares, else that of the tokenizer's family."""
    if tokenizer.chat_template:
        return tokenizer.chat_template
    names = tokenizer.control.keys()
    if {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= names:
        return LLAMA3
    if {"<|im_start|>", "<|im_end|>"} <= names:
        return CHATML
    if "<s>" in names:
        return LLAMA2
    raise ValueError(
        "tokenizer: was without a chat template and of an unknown family, must declare one, or be "
        "of Llama 2, Llama 3 or ChatML"
    )


def _prepare(tokenizer: Tokenizer, messages: list[Message]) -> Chat:
    template = find_template(tokenizer)
    letters = set(template)
    for message in messages:
        letters.update(message["content"])
    free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in letters)
    return Chat(tokenizer, template, next(free), next(free), next(free), next(free))


# From messages to text


def _render(chat: Chat, messages: list[Message]) -> str:
    """The text that a template writes for messages."""
    tokenizer = chat.tokenizer
    names = tokenizer.names
    if not tokenizer.chat_template:  # a family's: a conversation begins and ends as texts do
        by_id = {token_id: name for name, token_id in tokenizer.control.items()}
        names = {
            "bos_token": by_id.get(tokenizer.bos_id, ""),
            "eos_token": by_id.get(tokenizer.eos_id, ""),
        }
    try:
        return _compile(chat.template).render(
            messages=messages,
            add_generation_prompt=messages[-1]["role"] != "assistant",
            tools=None,
            documents=None,
            seam=chat.seam,
            **names,
        )
    except Exception as error:  # a foreign program may raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"chat template: {reason}") from None


@functools.lru_cache(maxsize=4)
def _compile(template: str) -> Any:
    """A template, ready to be rendered with what Hugging Face's tools offer to it."""
    import jinja2
    import jinja2.sandbox

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    # A block that marks answers in newer templates; here they are found without.
    template = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", template)
    template = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", template)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _render_marked(chat: Chat, messages: list[Message]) -> str:
    """The text that a template writes, with marks around answers, and gaps in spelled tokens.

    The marks must change nothing else, and none may be lost; else a template looks at what a
    message says in a way that cannot be followed, and that is a ValueError.
    """
    without_marks = _render(chat, messages)
    # Some templates strip messages of outer spaces: there the marks must stand within those.
    for within_spaces in (False, True):
        copies = []
        answers = 0
        for message in messages:
            content = _put_gaps(chat, message["content"])
            if message["role"] == "assistant" and (content.strip() or not within_spaces):
                content = _mark_answer(chat, content, within_spaces)
                answers += 1
            copies.append(message | {"content": content})
        text = _render(chat, copies)
        plain = re.sub(f"[{chat.gap}{chat.start}{chat.stop}]", "", text)
        starts_and_stops = re.sub(f"[^{chat.start}{chat.stop}]", "", text)
        if plain == without_marks and starts_and_stops == (chat.start + chat.stop) * answers:
            return text
    raise ValueError(
        "chat template: changed a part of what an answer says, or left it out; must write answers "
        "as they are"
    )


def _put_gaps(chat: Chat, content: str) -> str:
    """A message in which every control token that it spells is in two parts."""

    def part(match: re.Match[str]) -> str:
        middle = len(match[0]) // 2
        return match[0][:middle] + chat.gap + match[0][middle:]

    return chat.tokenizer.control_pattern.sub(part, content)


def _mark_answer(chat: Chat, content: str, within_spaces: bool) -> str:
    """An answer between two marks, with its outer spaces or without."""
    if not within_spaces:
        return chat.start + content + chat.stop
    text = content.lstrip()
    before = content[: len(content) - len(text)]
    text = text.rstrip()
    behind = content[len(before) + len(text) :]
    return before + chat.start + text + chat.stop + behind


def _around_answers(chat: Chat, messages: list[Message]) -> tuple[str, str]:
    """What a template writes of an answer beside its content: spaces before, the end of its turn.

    The spaces are those that a prompt for an answer does not end with. The end of a turn is all up
    to the first control token behind a last answer, "" where there is none.
    """
    count = 0  # messages up to the first answer that says something
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and message["content"].strip():
            count = number
            break
    if count == 0:
        return "", ""
    text = _render_marked(chat, messages[:count])
    start = text.rindex(chat.start)
    before = ""
    if count > 1:
        prompt = _render_marked(chat, messages[: count - 1])
        if text.startswith(prompt) and text[len(prompt) : start].isspace():
            before = text[len(prompt) : start]
    behind = text.rpartition(chat.stop)[2]
    end = chat.tokenizer.control_pattern.search(behind)
    return before, behind[: end.end()] if end else ""


# From text to ids


def _encode_marked(chat: Chat, text: str) -> Segments:
    """The ids of a text with marks: of control tokens, and of the plain texts between them."""
    tokenizer = chat.tokenizer
    segments: Segments = []
    is_answer = False

    def add(ids: list[int]) -> None:
        if segments and segments[-1][1] == is_answer:
            segments[-1][0].extend(ids)
        elif ids:
            segments.append((ids, is_answer))

    encode = tokenizer.encode_text  # of what begins a text
    for plain, name in _cut_at_control(chat, text):
        for number, part in enumerate(plain.split(chat.seam)):
            if number > 0:
                encode = tokenizer.encode_text
            part = part.replace(chat.gap, "")
            ids = encode(part.replace(chat.start, "").replace(chat.stop, ""))
            done = 0  # ids that are in a segment
            before = ""
            for fragment in re.split(f"([{chat.start}{chat.stop}])", part):
                if fragment in (chat.start, chat.stop):
                    # Before and behind a mark is one text: a token across it goes behind.
                    count = _count_equal(ids, encode(before))
                    add(ids[done:count])
                    done = max(done, count)
                    is_answer = fragment == chat.start
                else:
                    before += fragment
            add(ids[done:])
        if name:
            add([tokenizer.control[name]])
        encode = tokenizer.encode_rest or tokenizer.encode_text
    return segments


def _cut_at_control(chat: Chat, text: str) -> Iterator[tuple[str, str]]:
    """A text as pairs: plain text, and the control token behind it, or "" at the end."""
    start = 0
    for match in chat.tokenizer.control_pattern.finditer(text):
        name = match[0]
        if name not in chat.tokenizer.control:
            name = name.strip()  # of the spaces that it takes
        yield text[start : match.start()], name
        start = match.end()
    yield text[start:], ""


def _count_equal(ids: list[int], others: list[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    for count, (one, other) in enumerate(zip(ids, others, strict=False)):
        if one != other:
            return count
    return min(len(ids), len(others))
