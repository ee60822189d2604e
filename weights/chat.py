"""Conversations as the families' chat templates spell them: Llama 2, Llama 3, and ChatML."""

from collections.abc import Callable

from weights.tokenizer import Tokenizer

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Segments = list[tuple[list[int], bool]]  # ids, and whether they are an answer


def chat_tokens(tokenizer: Tokenizer, messages: list[Message]) -> Segments:
    """A conversation in the template of the tokenizer's family, ready for the model.

    messages: {"role": "system" | "user" | "assistant", "content": text} each. Returns segments of
    ids, each with whether it is an answer (its end of turn included): what instruction tuning puts
    its loss on. Where the last message is not an answer, the ids end where one would begin.
    """
    if not messages:
        raise ValueError("messages: were none, must be one or more")
    for message in messages:
        if message.get("role") not in ("system", "user", "assistant") or "content" not in message:
            raise ValueError(f"message: was {message}, must have a role and content")
    if {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= tokenizer.control.keys():
        return _chat_llama3(tokenizer, messages)
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.control.keys():
        return _chat_chatml(tokenizer, messages)
    if "<s>" in tokenizer.control:
        return _chat_llama2(tokenizer, messages)
    raise ValueError("tokenizer: was of an unknown family, must be Llama 2, Llama 3 or ChatML")


def _chat_llama3(tokenizer: Tokenizer, messages: list[Message]) -> Segments:
    control = tokenizer.control
    start, stop = control["<|start_header_id|>"], control["<|end_header_id|>"]

    def head(role: str) -> list[int]:
        return [start, *tokenizer.encode_text(role), stop]

    stripped = [message | {"content": message["content"].strip()} for message in messages]
    begin = [] if tokenizer.bos_id is None else [([tokenizer.bos_id], False)]
    return begin + _turns(tokenizer, stripped, head, lambda _: "\n\n", control["<|eot_id|>"], "")


def _chat_chatml(tokenizer: Tokenizer, messages: list[Message]) -> Segments:
    start, end = tokenizer.control["<|im_start|>"], tokenizer.control["<|im_end|>"]
    if not messages or messages[0]["role"] != "system":  # the template's own default
        system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        messages = [{"role": "system", "content": system}, *messages]
    return _turns(tokenizer, messages, lambda _: [start], lambda role: f"{role}\n", end, "\n")


def _turns(
    tokenizer: Tokenizer,
    messages: list[Message],
    head: Callable[[str], list[int]],
    lead: Callable[[str], str],
    end: int,
    between: str,
) -> Segments:
    """Turns of the form: head, lead text, content, end token, text between turns."""
    encode, after = tokenizer.encode_text, tokenizer.encode_text(between)
    segments = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            segments.append((head(role) + encode(lead(role)), False))
            segments += [([*encode(content), end], True), (after, False)]
        else:
            segments.append((head(role) + encode(lead(role) + content) + [end] + after, False))
    if messages[-1]["role"] != "assistant":
        segments.append((head("assistant") + encode(lead("assistant")), False))
    return segments


def _chat_llama2(tokenizer: Tokenizer, messages: list[Message]) -> Segments:
    segments, system = [], ""
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] == "system" and i == 0:
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            turn = f"[INST] {system}{content} [/INST]"
            segments.append((tokenizer.encode(turn), False))
            system = ""
        elif message["role"] == "assistant":
            # sentencepiece puts the space before the answer itself.
            end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
            segments.append((tokenizer.encode_text(content + " ") + end, True))
        else:
            raise ValueError("message: was a later system message, must be the first (Llama 2)")
    return segments
