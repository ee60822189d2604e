"""Chat templates, against transformers, Meta's ChatFormat, and Llama 2's rules written out.

Run: pytest tests/test_chat.py
"""

import json
import re
import shutil
from dataclasses import replace

import pytest

from tests.helpers import smollm2_path, train_sentencepiece
from tests.oracles import llama3_ranks, llama_cpp_models, make_dialogs
from weights import Tokenizer, chat_stops, chat_tokens, load_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a sink?"},
    {"role": "assistant", "content": "A first token."},
    {"role": "user", "content": "Why?"},
]
# As checkpoints declare them, in short; bos_token and eos_token are special, of the others not all.
CHATML = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "ChatML that begins with the BOS": "{{bos_token}}" + CHATML,
    "ChatML with a system text of its own": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
        + CHATML
    ),
    "Zephyr": (
        "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
        "{% endfor %}\n{% if add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}"
    ),
    "Llama 3, stripped": (
        "{% for m in messages %}{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
        " + m.content | trim + '<|eot_id|>' %}{% if loop.first %}{% set c = bos_token + c %}"
        "{% endif %}{{ c }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "Llama 2": (
        "{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = messages[0].content %}{% else %}{% set loop_messages = messages %}"
        "{% endif %}{% for m in loop_messages %}{% if loop.first and system is defined %}"
        "{% set c = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}{% else %}"
        "{% set c = m.content %}{% endif %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}{% elif m.role == 'assistant' %}"
        "{{ ' ' + c.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "R1, which cuts thoughts": (
        "{{bos_token}}{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}"
        "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
        "{{ '<\uff5cAssistant\uff5c>' + c + eos_token }}{% else %}"
        "{{ '<\uff5cUser\uff5c>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"
    ),
    "Vicuna, in words": (
        "{% for m in messages %}{{ m.role.upper() ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "marked answers": (
        "{%- for m in messages -%}<|im_start|>{{ m.role }}: {% generation %}{{ m.content }}"
        "<|im_end|>{%- endgeneration %}{%- endfor -%}"
    ),
    "with what Hugging Face's tools offer": (
        "{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{{ m | tojson }}"
        "{{ strftime_now('%Y') }}{{ tools is none }}{{ unk_token }}{% endfor %}"
    ),
}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
NOT_SPECIAL = ["<|im_end|>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>"]


def write_json(path):
    """tokenizer.json with byte-level BPE and the control tokens of the templates."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the assistant, the user and the system\n\n"], trainer)
    added = tokenizers.AddedToken
    bpe.add_special_tokens([added(x, special=True, normalized=False) for x in SPECIAL])
    bpe.add_tokens([added(x, special=False, normalized=False) for x in NOT_SPECIAL])
    bpe.save(str(path))


def declare(folder, name="tokenizer_config.json", **content):
    (folder / name).write_text(json.dumps(content))


def make_folder(folder, kind, **config):
    """A folder with a tokenizer and its tokenizer_config.json."""
    config = {"bos_token": "<s>", "eos_token": "</s>"} | config
    declare(folder, "config.json", model_type="llama")
    if kind == "byte-level":
        write_json(folder / "tokenizer.json")
        declare(folder, tokenizer_class="PreTrainedTokenizerFast", **config)
        return
    train_sentencepiece(folder / "tokenizer.model")
    added = {}
    for token_id, name in enumerate([*SPECIAL[2:], *NOT_SPECIAL], start=400):
        added[token_id] = {"content": name, "special": name in SPECIAL, "normalized": False}
    declare(folder, tokenizer_class="LlamaTokenizer", added_tokens_decoder=added, **config)
    if kind == "saved by transformers":
        theirs = auto_tokenizer(folder)
        (folder / "tokenizer.model").unlink()
        theirs.save_pretrained(folder)


KINDS = {
    "byte-level": {},
    "sentencepiece": {},
    "saved by transformers": {},
    "legacy": {"legacy": True},
}


@pytest.fixture(scope="module", params=KINDS)
def readers(request, tmp_path_factory):
    """This code's tokenizer and transformers', for tokenizers of several kinds."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("kind")
    make_folder(folder, request.param, **KINDS[request.param])
    return load_tokenizer(folder), auto_tokenizer(folder)


def auto_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte-level")
    make_folder(folder, "byte-level")
    return load_tokenizer(folder)


def join(segments):
    """The ids of all segments."""
    return [token for ids, _ in segments for token in ids]


def spell(tokenizer, ids):
    """Text of ids, control tokens by name."""
    names = {token: name for name, token in tokenizer.control.items()}
    text = ""
    plain = []
    for token in [*ids, None]:
        if token is None or token in names:
            text += tokenizer.decode(plain) + names.get(token, "")
            plain = []
        else:
            plain.append(token)
    return text


def mark(tokenizer, segments):
    """Text of segments, control tokens by name, answers in brackets."""
    text = ""
    for ids, is_answer in segments:
        spelled = spell(tokenizer, ids)
        text += f"[{spelled}]" if is_answer else spelled
    return text


def their_ids(theirs, dialog):
    """transformers' ids of a conversation, up to where an answer would begin."""
    prompt = dialog[-1]["role"] != "assistant"
    return theirs.apply_chat_template(dialog, add_generation_prompt=prompt, return_dict=False)


# Templates that a checkpoint declares


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_declared_template_is_obeyed(readers, name):
    ours, theirs = readers
    ours = replace(ours, chat_template=TEMPLATES[name])
    theirs.chat_template = TEMPLATES[name]
    for dialog in make_dialogs(60):
        for message in dialog:  # a text's first space is one that transformers loses
            message["content"] = message["content"].lstrip(" ")
        assert join(chat_tokens(ours, dialog)) == their_ids(theirs, dialog)


@pytest.mark.slow
def test_templates_of_many_models_are_obeyed(tmp_path):
    folder = llama_cpp_models()
    make_folder(tmp_path, "byte-level")
    ours = load_tokenizer(tmp_path)
    theirs = auto_tokenizer(tmp_path)
    obeyed = 0
    for file in sorted(folder.glob("*.jinja")):
        ours = replace(ours, chat_template=file.read_text())
        theirs.chat_template = file.read_text()
        for dialog in make_dialogs(20):
            try:
                expected = their_ids(theirs, dialog)
            except Exception:  # a template that refuses, or needs more than messages
                with pytest.raises(ValueError, match="chat template: "):
                    chat_tokens(ours, dialog)
                continue
            assert join(chat_tokens(ours, dialog)) == expected
            obeyed += 1
    assert obeyed > 1000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"chat_template": CHATML}),
        (
            "tokenizer_config.json",
            {
                "chat_template": [
                    {"name": "tool_use", "template": "no"},
                    {"name": "default", "template": CHATML},
                ]
            },
        ),
        ("chat_template.json", {"chat_template": CHATML}),
        ("chat_template.jinja", CHATML),
    ],
)
def test_a_template_is_found_wherever_it_is_declared(tmp_path, name, content):
    make_folder(tmp_path, "byte-level", chat_template="an older one")
    if name == "chat_template.jinja":
        (tmp_path / name).write_text(content)
    else:
        declare(tmp_path, name, **content)
    ours = load_tokenizer(tmp_path)
    assert spell(ours, join(chat_tokens(ours, TURNS[1:2]))) == (
        "<|im_start|>user\nWhat is a sink?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_of_named_templates_one_must_be_the_default(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}]
    make_folder(tmp_path, "byte-level", chat_template=named)
    ours = load_tokenizer(tmp_path)
    assert ours.encode("text")  # which needs none
    with pytest.raises(ValueError, match="chat template: was one of tool_use, rag, must be one na"):
        chat_tokens(ours, TURNS)


@pytest.mark.slow
def test_only_smollm2_is_told_that_it_is(byte_level):
    transformers, path = pytest.importorskip("transformers"), smollm2_path()
    ours = load_tokenizer("smollm2")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for turns in (TURNS, TURNS[1:2], TURNS[1:3]):
        text = theirs.apply_chat_template(
            turns, add_generation_prompt=turns[-1]["role"] == "user", tokenize=False
        )
        assert spell(ours, join(chat_tokens(ours, turns))) == text
    assert "named SmolLM" in spell(ours, join(chat_tokens(ours, TURNS[1:2])))
    assert "SmolLM" not in spell(byte_level, join(chat_tokens(byte_level, TURNS[1:2])))


# Families, for checkpoints that declare no template


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    ranks = llama3_ranks()
    folder = tmp_path_factory.mktemp("llama3")
    shutil.copy(ranks, folder)
    return load_tokenizer(folder), ranks


def test_llama3_is_metas_format(llama3):
    ours, ranks = llama3
    chat_format = pytest.importorskip("llama_models.llama3.chat_format")
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    theirs = chat_format.ChatFormat(MetaTokenizer(ranks))
    for dialog in make_dialogs(300):
        if dialog[-1]["role"] == "assistant":
            dialog.append({"role": "user", "content": "\n\n and then?"})
        messages = [RawMessage(**message) for message in dialog]
        expected = theirs.encode_dialog_prompt(messages).tokens
        assert join(chat_tokens(ours, dialog)) == expected


def test_llama3_marks_answers(llama3):
    ours, _ = llama3
    assert mark(ours, chat_tokens(ours, TURNS)) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is a sink?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[A first token.<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("llama2") / "tokenizer.model"
    train_sentencepiece(path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return load_tokenizer(path.parent), theirs


def llama2_ids(pieces, dialog):
    """Llama 2's format as Meta's code has it: a text for each user's turn and its answer."""
    if dialog[0]["role"] == "system":
        first = f"<<SYS>>\n{dialog[0]['content']}\n<</SYS>>\n\n{dialog[1]['content']}"
        dialog = [{"role": "user", "content": first}, *dialog[2:]]
    ids = []
    for i in range(0, len(dialog), 2):
        text = f"[INST] {dialog[i]['content'].strip()} [/INST]"
        if i + 1 < len(dialog):
            text += f" {dialog[i + 1]['content'].strip()} "
            ids += pieces.encode(text, add_bos=True, add_eos=True)
        else:
            ids += pieces.encode(text, add_bos=True)
    return ids


def test_llama2_is_metas_format(llama2):
    ours, theirs = llama2
    for dialog in make_dialogs(300):
        assert join(chat_tokens(ours, dialog)) == llama2_ids(theirs, dialog)


def test_llama2_marks_answers(llama2):
    ours, _ = llama2
    assert mark(ours, chat_tokens(ours, TURNS)) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is a sink? [/INST][A first token. </s>]"
        "<s>[INST] Why? [/INST]"
    )


def test_llama2_strips_system_and_user_joined(llama2):
    ours, _ = llama2
    turns = [{"role": "system", "content": " s "}, {"role": "user", "content": " u "}]
    text = mark(ours, chat_tokens(ours, turns))
    assert text == "<s>[INST] <<SYS>>\n s \n<</SYS>>\n\n u [/INST]"
    assert mark(ours, chat_tokens(ours, turns[1:])) == "<s>[INST] u [/INST]"


@pytest.mark.parametrize("turns", [TURNS[:1], TURNS[:1] * 2, TURNS[1:3] + TURNS[:2], TURNS[:3:2]])
def test_llama2_has_no_other_place_for_a_system_message(llama2, turns):
    with pytest.raises(ValueError, match="chat template: a system message must be the first, befo"):
        chat_tokens(llama2[0], turns)


def test_an_empty_turn_is_a_turn(llama2, byte_level):
    empty = [{"role": "user", "content": ""}]
    assert mark(llama2[0], chat_tokens(llama2[0], empty)) == "<s>[INST]  [/INST]"
    answered = [*empty, {"role": "assistant", "content": ""}]
    ours = replace(byte_level, chat_template=CHATML)
    assert mark(ours, chat_tokens(ours, answered)) == (
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    )


def test_chatml_without_a_template_has_no_system_text(byte_level):
    without = {name: i for name, i in byte_level.control.items() if "header" not in name}
    ours = replace(byte_level, control=without, bos_id=without["<s>"])
    assert mark(ours, chat_tokens(ours, TURNS[1:4])) == (
        "<s><|im_start|>user\nWhat is a sink?<|im_end|>\n"
        "<|im_start|>assistant\n[A first token.<|im_end|>]\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    ours = replace(ours, bos_id=None)
    assert mark(ours, chat_tokens(ours, TURNS[1:2])).startswith("<|im_start|>user")


def test_an_unknown_family_is_refused():
    unknown = Tokenizer(lambda text: [], lambda token: b"", 9, {"<bos>": 0}, 0)
    with pytest.raises(ValueError, match="tokenizer: was without a chat template and of an unknow"):
        chat_tokens(unknown, TURNS)


# Answers


@pytest.mark.parametrize(
    ("name", "before", "behind"),
    [
        ("ChatML", "", "<|im_end|>"),
        ("Zephyr", "", "</s>"),
        ("Llama 3, stripped", "", "<|eot_id|>"),
        ("Llama 2", " ", " </s>"),  # the prompt for an answer ends without the space
        ("R1, which cuts thoughts", "", "</s>"),
        ("Vicuna, in words", " ", ""),  # no control token ends a turn
        ("marked answers", "", "<|im_end|>"),
    ],
)
def test_answers_are_marked_with_the_end_of_their_turn(byte_level, name, before, behind):
    ours = replace(byte_level, chat_template=TEMPLATES[name])
    for dialog in make_dialogs(60):
        expected = []
        for message in dialog:
            if message["role"] == "assistant" and message["content"].strip():
                content = message["content"]
                if name.startswith("Llama"):
                    content = content.strip()
                expected.append(before + content + behind)
        segments = chat_tokens(ours, dialog)
        answers = [spell(ours, ids) for ids, is_answer in segments if is_answer]
        answers = [answer for answer in answers if answer not in (before + behind, behind)]
        assert all(answer.startswith(before) for answer in answers)
        # A token of spaces and more may begin before an answer, and is a part of it.
        assert [answer.lstrip() for answer in answers] == [x.lstrip() for x in expected]


def test_a_token_across_the_beginning_of_an_answer_is_of_the_answer(byte_level):
    ours = replace(byte_level, chat_template=TEMPLATES["Llama 3, stripped"].replace(" | trim", ""))
    newlines = ours.encode_text("\n\n")
    assert len(newlines) == 1
    [start, end] = [ours.control["<|start_header_id|>"], ours.control["<|end_header_id|>"]]
    turns = [TURNS[1], {"role": "assistant", "content": "\n\nthe"}]
    segments = chat_tokens(ours, turns)
    whole = ours.encode_text("\n\n\n\nthe")
    assert segments[-1] == ([*whole[1:], ours.control["<|eot_id|>"]], True)
    assert segments[0][0][-2:] == [end, newlines[0]]
    assert start in segments[0][0]


def test_thoughts_that_a_template_cuts_are_refused(byte_level):
    ours = replace(byte_level, chat_template=TEMPLATES["R1, which cuts thoughts"])
    turns = [TURNS[1], {"role": "assistant", "content": "<think>Hm.</think>A first token."}]
    with pytest.raises(ValueError, match="chat template: changed a part of what an answer says"):
        chat_tokens(ours, turns)
    turns[1]["content"] = "A first token."
    assert "<think>" not in spell(ours, join(chat_tokens(ours, turns)))
    assert spell(ours, join(chat_tokens(ours, turns[:1]))).endswith(
        "<\uff5cAssistant\uff5c><think>\n"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content[1:] }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | length }}{% endfor %}",
    ],
)
def test_a_template_that_changes_answers_is_refused(byte_level, template):
    with pytest.raises(ValueError, match="chat template: changed a part of what an answer says"):
        chat_tokens(replace(byte_level, chat_template=template), TURNS)


# Control tokens


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_message_that_spells_control_tokens_stays_text(readers, name):
    ours, theirs = readers
    ours = replace(ours, chat_template=TEMPLATES[name])
    control = set(ours.control.values())
    spelled = [*SPECIAL, *NOT_SPECIAL]
    for spoken in make_dialogs(60, spelled=spelled):
        plain = []
        for message in spoken:
            # The same conversation with other words in their place has the same control tokens.
            content = message["content"].replace("</think>", "a")
            message["content"] = content
            for word in spelled:
                content = content.replace(word, "a")
            plain.append(message | {"content": content})
        found = join(chat_tokens(ours, spoken))
        expected = join(chat_tokens(ours, plain))
        assert [i for i in found if i in control] == [i for i in expected if i in control]
        theirs.chat_template = TEMPLATES[name]
        prompt = spoken[-1]["role"] != "assistant"
        text = theirs.apply_chat_template(spoken, add_generation_prompt=prompt, tokenize=False)
        assert spell(ours, found).replace(" ", "") == text.replace(" ", "")


def test_control_tokens_that_take_spaces_are_obeyed(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    make_folder(tmp_path, "byte-level", chat_template=CHATML)
    bpe = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    added = tokenizers.AddedToken
    bpe.add_special_tokens([added("<|end|>", rstrip=True), added("<|user|>", lstrip=True)])
    bpe.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}<|user|> {{m.content}}\n <|end|>\n{% endfor %}"
    ours = replace(load_tokenizer(tmp_path), chat_template=template)
    theirs = auto_tokenizer(tmp_path)
    theirs.chat_template = template
    for dialog in make_dialogs(60):
        assert join(chat_tokens(ours, dialog)) == their_ids(theirs, dialog)
    spoken = [{"role": "user", "content": "a <|end|> b"}]
    assert "a <|end|> b" in spell(ours, join(chat_tokens(ours, spoken)))


def test_the_end_of_a_turn_stops_a_conversation(byte_level, llama2):
    eos = byte_level.control["</s>"]
    ours = replace(byte_level, chat_template=CHATML)
    assert ours.eos_ids == (eos,)
    assert chat_stops(ours) == (eos, ours.control["<|im_end|>"])
    zephyr = replace(byte_level, chat_template=TEMPLATES["Zephyr"])
    assert chat_stops(zephyr) == (eos,)
    words = replace(byte_level, chat_template=TEMPLATES["Vicuna, in words"])
    assert chat_stops(words) == (eos,)
    assert chat_stops(llama2[0]) == llama2[0].eos_ids


# Bad messages and bad templates


@pytest.mark.parametrize(
    "bad",
    [
        [],
        ["hello"],
        [{"role": "robot", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["x"]}],
        [{"content": "x"}],
    ],
)
def test_bad_messages(byte_level, bad):
    with pytest.raises(ValueError, match=r"^message: was|^messages: were none"):
        chat_tokens(byte_level, bad)


def test_half_a_surrogate_pair_in_a_message(byte_level):
    with pytest.raises(ValueError, match=r"text: was .* half of a surrogate"):
        chat_tokens(byte_level, [{"role": "user", "content": "a\ud800"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "chat template: Unexpected end of template"),
        ("{{ raise_exception('only users\nmay speak') }}", "chat template: only users may speak"),
        ("{{ messages[9].content.x }}", "chat template: .* has no element 9"),
        ("{{ 1 / 0 }}", "chat template: division by zero"),
        ("{{ messages.__class__.__mro__ }}", "chat template: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "chat template: access to attribute 'append'"),
    ],
)
def test_a_template_that_fails_is_one_line(byte_level, template, message):
    with pytest.raises(ValueError, match=message) as caught:
        chat_tokens(replace(byte_level, chat_template=template), TURNS)
    assert "\n" not in str(caught.value)


def test_a_message_may_hold_any_character(byte_level):
    ours = replace(byte_level, chat_template=CHATML)
    private = "".join(chr(code) for code in range(0xE000, 0xE010))
    for content in (private, "\0", "{{ messages }}", "{% endfor %}", "\U0010ffff"):
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        assert spell(ours, join(chat_tokens(ours, turns))) == (
            f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{content}<|im_end|>\n"
        )
        assert re.sub("[^\ue000-\uf8ff]", "", ours.decode(ours.encode(private))) == private
