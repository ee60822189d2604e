"""data.py: text, token files and conversations as rows, and what a step reads.

Run: pytest tests/test_data.py
"""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
from data import IGNORE
from tests.helpers import ROOT
from weights import chat_tokens, load_tokenizer
from weights.files import read_text


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


# Rows


def test_rows_are_packed():
    """Three streams: of four rows and one token too many, of none, and of one row exactly."""
    streams = [np.arange(100, 126, dtype=np.uint32), np.arange(5), np.arange(7)]
    rows = data.Packed(streams, 6)
    assert len(rows) == 5
    for i, first in enumerate([100, 106, 112, 118, 0]):
        tokens, labels = rows[i]
        assert tokens.tolist() == list(range(first, first + 6))
        assert labels.tolist() == list(range(first + 1, first + 7))


def test_a_short_held_out_part_is_one_short_row():
    train, held_out = data.pack([np.arange(50)], [np.arange(7)], 10)
    assert [len(train[0][0]), len(train)] == [10, 4]
    assert [len(held_out[0][0]), len(held_out)] == [6, 1]
    train, held_out = data.pack([np.arange(50)], [np.arange(0)], 10)
    assert len(held_out) == 0
    train, held_out = data.pack([np.arange(11)], [np.arange(30)], 10)
    assert [len(train), len(held_out)] == [1, 2]
    with pytest.raises(ValueError, match="was 10 tokens, must be over --seq-len, 10"):
        data.pack([np.arange(10)], [np.arange(30)], 10)


def test_every_row_once_an_epoch():
    rows = data.Data(list(range(10)), [], "")
    order = []
    for step in range(1, 11):
        order += rows.choose_rows(7, step, 4)
    epochs = [tuple(order[i : i + 10]) for i in range(0, 40, 10)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len(set(epochs)) == 4
    assert rows.choose_rows(7, 3, 4) == order[8:12]  # depends on the seed and the step alone
    assert rows.choose_rows(8, 3, 4) != order[8:12]


def test_rows_of_a_batch_are_padded_at_the_right():
    rows = [
        (torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4])),
        (torch.tensor([5]), torch.tensor([6])),
    ]
    tokens, labels = data.collate(rows, torch.device("cpu"))
    assert tokens.tolist() == [[1, 2, 3], [5, 0, 0]]
    assert labels.tolist() == [[2, 3, 4], [6, IGNORE, IGNORE]]


# Files


def test_files_by_folder_pattern_and_name(tmp_path):
    for name in ("a.txt", "sub/b.txt", "sub/.hidden", ".git/c.txt", "[x].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.txt").touch()  # passed over, unless named
    files = [tmp_path / name for name in ("[x].txt", "a.txt", "sub/b.txt")]
    assert data.data_files([str(tmp_path)]) == files
    assert data.data_files([f"{tmp_path}/*.txt"]) == files[:2]
    assert data.data_files([f"{tmp_path}/**/*.txt", str(files[0])]) == files
    assert data.data_files([str(files[0])]) == files[:1]  # a name, and not a pattern
    for pattern, message in [
        ("", "--data: was '', must be a file, a folder or a pattern"),
        (str(tmp_path / "empty.txt"), "empty.txt: was empty, must hold text or tokens"),
        (str(tmp_path / "no*"), "held no file with content, must hold one"),
    ]:
        with pytest.raises((ValueError, OSError)) as raised:
            data.data_files([str(tmp_path), pattern])
        assert message in str(raised.value)


def test_a_file_is_named_once_whatever_links_there_are(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("x")
    (tmp_path / "in/again").symlink_to(".")  # a loop
    (tmp_path / "link.txt").symlink_to("in/a.txt")
    patterns = [str(tmp_path / "in"), str(tmp_path / "in/a.txt"), str(tmp_path / "link.txt")]
    assert data.data_files(patterns) == [tmp_path / "in/a.txt"]


def test_the_default_is_the_source_of_python(tmp_path, monkeypatch):
    for name in ("b.py", "a/c.py", "test/d.py", "a/tests/e.py", "site-packages/f.py", "g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert data.data_files(None) == [tmp_path / "a/c.py", tmp_path / "b.py"]


def test_files_by_content(tmp_path):
    for name, text in (("a", "one"), ("b", "two"), ("c", "one"), ("d", "three")):
        (tmp_path / name).write_text(text)
    documents = data.by_content(sorted(tmp_path.iterdir()))
    hashes = [hashlib.sha256(text).hexdigest() for text in (b"one", b"two", b"three")]
    assert list(documents) == sorted(hashes)
    assert {file.read_text() for file in documents.values()} == {"one", "two", "three"}


# Token files


@pytest.mark.parametrize(("dtype", "vocab"), [("uint16", 1 << 16), ("uint32", (1 << 16) + 1)])
def test_token_files(tmp_path, capsys, dtype, vocab):
    for name, count in (("a", 100), ("b", 40)):
        np.arange(1, count + 1, dtype=dtype).tofile(tmp_path / f"{name}.bin")
    files = data.data_files([str(tmp_path)])
    rows = data.read_bins(files, None, vocab, 10, 0.25)
    assert [len(rows.train), len(rows.held_out)] == [7 + 2, 2 + 0]
    assert rows.train[7][0].tolist() == list(range(1, 11))  # the second file
    assert rows.held_out[0][0].tolist() == list(range(76, 86))
    assert isinstance(rows.train.streams[0], np.memmap)
    assert rows.sha256 != data.read_bins(files[:1], None, vocab, 10, 0.25).sha256
    assert rows.tokens_per_byte is None
    assert capsys.readouterr().out == ""
    data.read_bins(files, None, vocab, 40, 0)
    assert "1 of 2 files are too short for a row of 40: left out" in capsys.readouterr().out


def test_blocks_change_nothing(tmp_path, monkeypatch):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "x.bin")
    expected = data.read_bins([tmp_path / "x.bin"], None, 100, 10, 0.1).sha256
    monkeypatch.setattr(data, "BLOCK", 7)
    assert data.read_bins([tmp_path / "x.bin"], None, 100, 10, 0.1).sha256 == expected
    with pytest.raises(ValueError, match="held id"):
        data.map_bin(tmp_path / "x.bin", None, 99)


@pytest.mark.parametrize(
    ("content", "dtype", "message"),
    [
        (
            np.arange(51, dtype=np.uint16),
            None,
            "held id 50 as uint16, must be below the vocabulary",
        ),
        (np.zeros(3, np.uint8), None, "was 3 bytes, must be whole uint16 tokens"),
        (np.zeros(3, np.uint16), "uint32", "was 6 bytes, must be whole uint32 tokens"),
        (
            np.arange(50, dtype=np.uint32),
            None,
            "every second id 0 as uint16; must have --bin-dtype",
        ),
    ],
)
def test_bad_token_files(tmp_path, content, dtype, message):
    content.tofile(tmp_path / "x.bin")
    with pytest.raises(ValueError, match=f"x.bin: .*{message}"):
        data.map_bin(tmp_path / "x.bin", dtype, 50)


def test_token_files_that_look_wider_but_are_named(tmp_path):
    np.arange(50, dtype=np.uint32).tofile(tmp_path / "x.bin")
    assert data.map_bin(tmp_path / "x.bin", "uint32", 50).tolist() == list(range(50))
    assert len(data.map_bin(tmp_path / "x.bin", "uint16", 50)) == 100
    np.zeros(50, np.uint16).tofile(tmp_path / "x.bin")
    assert len(data.map_bin(tmp_path / "x.bin", None, 50)) == 50


def test_text_among_token_files_is_refused(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "a.bin")
    (tmp_path / "b.txt").write_text("words")
    with pytest.raises(ValueError, match=r"b\.txt: was no .bin, must be"):
        data.read_bins(data.data_files([str(tmp_path)]), None, 50, 10, 0.1)


# Text

TEXTS = ["def f(x):\n    return x\n" * 20, "é, 日本\n" * 30, "class A:\n\tpass", "same\n" * 9]


@pytest.fixture
def texts(tmp_path):
    """Files of TEXTS, the last one twice."""
    for i, text in enumerate([*TEXTS, TEXTS[-1]]):
        (tmp_path / f"{i}.txt").write_text(text)
    return data.data_files([f"{tmp_path}/*.txt"])


def test_text_is_packed(texts, tokenizer, tmp_path):
    """The stream is every text once, by hash, between the tokens of a beginning and an end."""
    rows = data.read_texts(texts, tokenizer, 20, 0.25, tmp_path / "tokens", "")
    train, held_out = rows.train.streams[0], rows.held_out.streams[0]
    stream = np.concatenate([train, held_out]).tolist()
    pieces = []
    piece = []
    for token in stream:
        piece.append(token)
        if token == tokenizer.eos_id:
            assert piece[0] == tokenizer.bos_id
            pieces.append(tokenizer.decode(piece))
            piece = []
    assert piece == []
    ordered = sorted(TEXTS, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    assert len(pieces) == len(TEXTS) + 1  # one is cut in two
    assert "".join(pieces) == "".join(ordered)

    size = len("".join(TEXTS).encode())
    sizes = json.loads((tmp_path / "tokens/tokens.json").read_text())
    assert sizes["held_out_bytes"] == pytest.approx(size / 4, abs=4)  # whole characters
    assert rows.tokens_per_byte == len(held_out) / sizes["held_out_bytes"]
    assert train[0] == held_out[0] == tokenizer.bos_id


def test_text_is_tokenized_once(texts, tokenizer, tmp_path, monkeypatch):
    """Then it is read from the file; ValueError if anything changed that the tokens depend on."""
    folder = tmp_path / "tokens"
    calls = []
    write_tokens = data.write_tokens
    monkeypatch.setattr(data, "write_tokens", lambda *x: calls.append(x) or write_tokens(*x))

    def read(files=texts, tokenizer=tokenizer, about=""):
        return data.read_texts(files, tokenizer, 20, 0.25, folder, about)

    first = read()
    again = read()
    assert len(calls) == 1
    assert again.sha256 == first.sha256
    assert again.train[0][0].equal(first.train[0][0])
    (tmp_path / "other").write_text("another tokenizer")
    other = replace(tokenizer, files=(tmp_path / "other",))
    for changes in ({"files": texts[1:]}, {"tokenizer": other}, {"about": "another share"}):
        with pytest.raises(ValueError, match=r"--data: was changed since .*tokens.json"):
            read(**changes)
    assert len(calls) == 1
    assert read().train[0][0].equal(first.train[0][0])


def test_tokens_that_are_not_what_their_record_says(texts, tokenizer, tmp_path):
    folder = tmp_path / "tokens"
    data.read_texts(texts, tokenizer, 20, 0.25, folder, "")
    content = np.fromfile(folder / "tokens.bin", np.uint32)
    content[::-1].tofile(folder / "tokens.bin")
    with pytest.raises(ValueError, match="tokens: was damaged"):
        data.read_texts(texts, tokenizer, 20, 0.25, folder, "")


def test_line_ends_and_marks_of_other_systems_change_no_text(tokenizer, tmp_path):
    text = read_text(ROOT / "dct.py")
    streams = []
    for name, content in (
        ("lf", text.encode()),
        ("crlf", b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()),
    ):
        (tmp_path / name).write_bytes(content)
        rows = data.read_texts([tmp_path / name], tokenizer, 20, 0.0, tmp_path / f"{name}-out", "")
        streams.append(rows.train.streams[0].tolist())
    assert streams[0] == [tokenizer.bos_id, *tokenizer.encode(text, bos=False), tokenizer.eos_id]
    assert streams[1] == streams[0]


def test_a_share_of_files_with_long_line_ends_begins_at_the_same_file(tokenizer, tmp_path):
    """Bytes are counted as they lie on the disk, as whoever counts whole files counts them."""
    files = []
    for i in range(10):
        files.append(tmp_path / str(i))
        files[-1].write_bytes(b"a\r\n" * 100)
    sizes = data.write_tokens(files, 0.2, tokenizer, tmp_path / "tokens.bin")
    assert sizes["held_out_bytes"] == 2 * 200
    tokens = np.fromfile(tmp_path / "tokens.bin", np.uint32)
    assert len(tokens) == sizes["train_tokens"] + sizes["held_out_tokens"]


def test_a_character_is_not_cut_in_two(tokenizer, tmp_path):
    (tmp_path / "x").write_text("日" * 10)  # 30 bytes, 10 of them held out
    sizes = data.write_tokens([tmp_path / "x"], 0.35, tokenizer, tmp_path / "tokens.bin")
    tokens = np.fromfile(tmp_path / "tokens.bin", np.uint32).tolist()
    assert tokenizer.decode(tokens[: sizes["train_tokens"]]) == "日" * 6
    assert tokenizer.decode(tokens[sizes["train_tokens"] :]) == "日" * 4
    assert sizes["held_out_bytes"] == 12


def test_text_that_is_not_utf8(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"words \xff" * 99)
    with pytest.raises(ValueError, match=r"x\.txt: was not UTF-8 at byte 6"):
        data.read_texts([tmp_path / "x.txt"], tokenizer, 20, 0.0, tmp_path / "out", "")


# Conversations

RECORDS = [
    {"instruction": "Say yes.", "output": "yes yes"},
    {"instruction": "Say", "input": "no", "output": "no"},
    {
        "messages": [
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c?"},
            {"role": "assistant", "content": "d e"},
        ]
    },
]
CONVERSATIONS = [
    [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "yes yes"}],
    [{"role": "user", "content": "Say\n\nno"}, {"role": "assistant", "content": "no"}],
    RECORDS[2]["messages"],
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def test_records_are_conversations(monkeypatch):
    monkeypatch.setattr(data, "chat_tokens", lambda tokenizer, messages: messages)
    for record, messages in zip(RECORDS, CONVERSATIONS, strict=True):
        assert data.encode_record(record, None) == messages
    for record in (
        {"instruction": "", "input": "a", "output": "b"},
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "input": None, "output": "b"},
    ):
        question, answer = data.encode_record(record, None)
        assert question == {"role": "user", "content": "a"}
        assert answer == {"role": "assistant", "content": "b"}


def test_parts_of_a_text_are_learnt_or_not(tokenizer):
    record = {"parts": [["She said", False], [" yes", True], [" and no.", False]]}
    segments = data.encode_record(record, tokenizer)
    assert [is_learnt for _, is_learnt in segments] == [False, True, False]
    assert segments[0][0] == tokenizer.encode("She said")
    assert segments[1][0] == tokenizer.encode(" yes", bos=False)
    assert segments[2][0] == tokenizer.encode(" and no.", bos=False)


def test_parts_that_a_tokenizer_changes(tokenizer):
    lossy = replace(tokenizer, encode_text=lambda text: tokenizer.encode_text(text.lower()))
    with pytest.raises(ValueError, match="parts: were changed by the tokenizer, must be"):
        data.encode_record({"parts": [["She", False], [" Said", True]]}, lossy)


@pytest.mark.parametrize(
    "parts", [[], "text", ["text"], [["text"]], [["text", 1]], [[3, True]], [["\ud800", True]]]
)
def test_bad_parts(tokenizer, parts):
    with pytest.raises(ValueError, match=r"parts?: was .*, must be "):
        data.encode_record({"parts": parts}, tokenizer)


def test_labels_are_on_answers_alone(tokenizer, tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps(RECORDS))
    rows = data.read_records(tmp_path / "x.json", tokenizer, 100, 0.4)
    assert [len(rows.train), len(rows.held_out)] == [2, 1]
    answers = []
    for messages, (tokens, labels) in zip(
        CONVERSATIONS, [*rows.train, *rows.held_out], strict=True
    ):
        ids = []
        expected = []
        for segment, is_answer in chat_tokens(tokenizer, messages):
            ids += segment
            expected += segment if is_answer else [IGNORE] * len(segment)
        assert tokens.tolist() == ids[:-1]
        assert labels.tolist() == expected[1:]
        answers.append(tokenizer.decode(labels[labels != IGNORE].tolist()).split())
    assert answers == [["yes", "yes"], ["no"], ["b", "d", "e"]]
    assert rows.train[0][1][-1] == tokenizer.eos_id  # to end is part of the answer
    assert "3 of 3 records have an answer within 100 tokens" in capsys.readouterr().out
    other = replace(tokenizer, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert data.read_records(tmp_path / "x.json", other, 100, 0.4).sha256 != rows.sha256


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.replace("\n", "\n\n"),
        LINES.replace("\n", "\r\n") + "\r\n",
        LINES + "  \n",
        "\ufeff" + LINES,
        "\ufeff\r\n" + json.dumps(RECORDS, indent=1).replace("\n", "\r\n"),
    ],
)
def test_json_as_other_systems_write_it(tokenizer, tmp_path, content):
    rows = []
    for name, text in (("x", json.dumps(RECORDS)), ("y", content)):
        (tmp_path / name).write_bytes(text.encode())
        rows.append(data.read_records(tmp_path / name, tokenizer, 100, 0.0).train)
    for (tokens, labels), (expected_tokens, expected_labels) in zip(rows[1], rows[0], strict=True):
        assert tokens.equal(expected_tokens)
        assert labels.equal(expected_labels)


def test_plain_text_among_records_is_learnt_whole(tokenizer, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"text": "Once upon a time"}]))
    [(tokens, labels)] = data.read_records(tmp_path / "x.json", tokenizer, 100, 0.0).train
    ids = tokenizer.encode("Once upon a time")
    assert tokens.tolist() == ids[:-1]
    assert labels.tolist() == ids[1:]


def test_long_records_are_cut_or_left_out(tokenizer, tmp_path, capsys):
    long = "long " * 50
    records = [{"instruction": long, "output": "a"}, {"instruction": "b", "output": long}]
    (tmp_path / "x.json").write_text(json.dumps(records))
    [(tokens, labels)] = data.read_records(tmp_path / "x.json", tokenizer, 40, 0.0).train
    assert len(tokens) == len(labels) == 40
    assert labels[-1] != IGNORE
    assert "1 of 2 records" in capsys.readouterr().out
    (tmp_path / "x.json").write_text(json.dumps(records[:1]))
    with pytest.raises(ValueError, match="had no answer within --seq-len, 40, must have one"):
        data.read_records(tmp_path / "x.json", tokenizer, 40, 0.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "x.json: line 1 was not JSON"),
        (LINES + "\n{", "x.json: line 5 was not JSON"),
        ("[" * 100_000, "x.json: was not JSON"),
        ("[]", "had no answer"),
        ("[3]", "record 0: was '3', must have instruction and output, or messages, or text"),
        ('[{"instruction": "a"}]', "record 0: was without output, must have"),
        ('[{"output": "a"}]', "record 0: was without instruction, must have"),
        (
            LINES + '{"instruction": 3, "output": "a"}',
            "record 3: instruction: was '3', must be text",
        ),
        ('[{"instruction": "a", "output": null}]', "record 0: output: was 'None', must be text"),
        ('[{"instruction": "a", "input": 3, "output": "a"}]', "input: was '3', must be text"),
        ('[{"text": 3}]', "record 0: text: was '3', must be text"),
        ('[{"messages": "a"}]', "record 0: messages: was 'a', must be a list"),
        ('[{"messages": ["a"]}]', "record 0: message: was 'a', must have role and content"),
        ('[{"messages": [{"role": "user", "content": 3}]}]', "content: was '3', must be text"),
        ('[{"messages": [{"role": "x", "content": "a"}]}]', "record 0: "),
        ('[{"messages": []}]', "record 0: "),
        ('[{"instruction": "\\ud800", "output": "a"}]', "record 0: instruction: was '\\ud800'"),
    ],
)
def test_bad_records_are_named(tokenizer, tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json: ") as raised:
        data.read_records(tmp_path / "x.json", tokenizer, 40, 0.0)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


# A tokenizer of one's own


def test_a_trained_tokenizer_gives_text_back_exactly(tmp_path):
    files = [ROOT / name for name in ("dct.py", "freqkv.py", "model.py")]
    (tmp_path / "tokenizer.model").write_bytes(data.train_tokenizer(files, 400))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 400
    odd = "  two\n\n\n\tspaces  \r\n if  x :\n        return 'é日本\U0001f600'  \n "
    for text in [odd, *(file.read_text() for file in files)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" " * 8 + "return")) < 8  # indentation in one piece
    with pytest.raises(ValueError, match="--tokenizer: was train:10, which cannot be"):
        data.train_tokenizer(files, 10)


def test_pages_hold_all_lines(tmp_path):
    text = "".join(f"{i} " + "x" * (i % 90) + "\n" for i in range(300)) + "y" * 3000 + "\nend"
    (tmp_path / "a").write_text(text)
    (tmp_path / "b").write_text("another")
    pages = list(data.split_pages([tmp_path / "a", tmp_path / "b"]))
    assert "".join(pages) == text + "another"
    assert pages[-1] == "another"
    assert max(len(page) for page in pages if "y" not in page) <= 2000
    assert len(pages) < 15
    assert max(len(page) for page in pages) <= 2500
