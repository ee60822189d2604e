"""Tokenizers and chat templates, each against another reader of the same file.

Run: pytest tests/test_tokenizer.py
"""

import base64
import importlib.util
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import ROOT, smollm2_path, tiny_model, train_sentencepiece
from weights import chat_tokens, load_tokenizer, save_model

TEXT = "The cache holds 2048 slots: naïve, 漢字, 🙂👍🏽!\n\n    indented\ttoo  "
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a sink?"},
    {"role": "assistant", "content": "A first token."},
    {"role": "user", "content": "Why?"},
]
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]


def write_ranks(path):
    """tiktoken ranks: 256 bytes and a few merges."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b" th", b"the", b" the", b"in", b" c"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))


def write_json(path):
    """tokenizer.json with byte-level BPE, which begins every text with a control token."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 3, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    bpe.save(str(path))


WRITERS = {
    "sentencepiece": ("tokenizer.model", train_sentencepiece),
    "tiktoken": ("tokenizer.model", write_ranks),
    "json": ("tokenizer.json", write_json),
}


@pytest.fixture(scope="module", params=WRITERS)
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    name, write = WRITERS[request.param]
    if request.param == "tiktoken":
        pytest.importorskip("tiktoken")
    write(folder / name)
    return load_tokenizer(folder)


def test_bos_and_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids[0] == tokenizer.bos_id
    assert ids[1:] == tokenizer.encode(TEXT, bos=False)
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.eos_id in tokenizer.eos_ids


def test_blocks_are_the_whole(tokenizer):
    text = "I've seen the cat's 3  of  them, and THE cat  has it. " * 20 + TEXT
    for length in (1, 50, 333):
        blocks = list(tokenizer.encode_blocks(text, length))
        assert len(blocks) > 3
        assert [i for block in blocks for i in block] == tokenizer.encode_text(text)


def test_tokens_across_words_forbid_blocks(tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model", 800, split_by_whitespace=False)
    tokenizer = load_tokenizer(tmp_path)
    text = "    def size(self, text: str) -> None:\n" * 20
    assert list(tokenizer.encode_blocks(text, 10)) == [tokenizer.encode_text(text)]


def test_text_that_spells_a_control_token_stays_text(tokenizer):
    spelled = "".join(tokenizer.control)[:200]
    ids = tokenizer.encode(spelled, bos=False)
    assert not set(ids) & set(tokenizer.control.values())
    assert tokenizer.decode(ids) == spelled


def test_stream_is_decode_in_pieces(tokenizer):
    @given(st.text(min_size=1, max_size=20), st.text(max_size=20))
    def check(before, after):
        ids = tokenizer.encode(before + after, bos=False)
        for cut in (0, len(ids) // 2):
            pieces = list(tokenizer.stream(iter(ids[cut:]), ids[:cut]))
            assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])
            joined = tokenizer.decode(ids[:cut]) + "".join(pieces)
            if "\ufffd" not in tokenizer.decode(ids[:cut]):  # cut between characters
                assert joined == tokenizer.decode(ids)

    check()


def test_fits(tokenizer):
    size = tokenizer.vocab_size
    tokenizer.check_fits(size)
    tokenizer.check_fits(size + 64)
    for wrong in (size - 1, size * 4):
        with pytest.raises(ValueError, match=f"tokenizer: was of {size} tokens"):
            tokenizer.check_fits(wrong)


def test_sentencepiece_adds_the_bos(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    train_sentencepiece(tmp_path / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert load_tokenizer(tmp_path).encode(TEXT) == theirs.encode(TEXT, add_bos=True)


def test_tiktoken_merges_by_rank(tmp_path):
    pytest.importorskip("tiktoken")
    write_ranks(tmp_path / "tokenizer.model")
    ours = load_tokenizer(tmp_path)
    assert ours.encode("in the cat", bos=False) == [260, 259, 261, ord("a"), ord("t")]
    assert (ours.bos_id, ours.control["<|eot_id|>"]) == (262, 271)
    assert ours.vocab_size == 262 + 256
    long = "the cache in the " * 50_000  # beyond one call of the splitter
    assert ours.decode(ours.encode(long, bos=False)) == long


def test_chat_llama3(tmp_path):
    pytest.importorskip("tiktoken")
    write_ranks(tmp_path / "tokenizer.model")
    ours = load_tokenizer(tmp_path)
    spelled = spell(ours, chat_tokens(ours, TURNS))
    assert spelled == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is a sink?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[A first token.<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chat_llama2(tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model")
    ours = load_tokenizer(tmp_path)
    spelled = spell(ours, chat_tokens(ours, TURNS))
    assert spelled == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is a sink? [/INST][A first token. </s>]"
        "<s>[INST] Why? [/INST]"
    )


def spell(tokenizer, segments):
    """Segments as text, control tokens by name, answers in brackets."""
    names, out = {i: name for name, i in tokenizer.control.items()}, ""
    for ids, answer in segments:
        parts, plain = "", []
        for token in [*ids, None]:
            if token is None or token in names:
                parts, plain = parts + tokenizer.decode(plain) + names.get(token, ""), []
            else:
                plain.append(token)
        out += f"[{parts}]" if answer else parts
    return out


@pytest.mark.parametrize("bad", [[], [{"role": "robot", "content": "x"}], [{"role": "user"}]])
def test_bad_messages(tmp_path, bad):
    train_sentencepiece(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="message"):
        chat_tokens(load_tokenizer(tmp_path), bad)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b"junk"),
        ("tokenizer.model", b"YQ== 0\nbroken\n"),
        ("tokenizer.model", b"YQ== 0\nYg== 0\n"),
        ("tokenizer.json", b"{}"),
    ],
)
def test_broken_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="was not whole"):
        load_tokenizer(tmp_path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="was a folder without a checkpoint"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="was without a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_smollm2_equals_transformers_and_its_own_template(tmp_path):
    transformers, path = pytest.importorskip("transformers"), smollm2_path()
    jinja2 = pytest.importorskip("jinja2")
    from weights.gguf_file import open_gguf

    ours = load_tokenizer("smollm2")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert ours.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert ours.decode(ours.encode(TEXT)) == TEXT
    save_model(tiny_model(), tmp_path, ours)  # which writes a tokenizer.json
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXT) == ours.encode(TEXT)
    assert (again.control, again.bos_id) == (ours.control, ours.bos_id)
    # transformers reads GGUF without the rule that digits stand alone.
    book = re.sub(r"\d", "", (ROOT / "LICENSE").read_text() * 9)
    assert ours.encode(book) == theirs.encode(book, add_special_tokens=False)
    if importlib.util.find_spec("llama_cpp"):
        import llama_cpp

        full = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        book = (ROOT / "LICENSE").read_text() * 9 + TEXT
        assert ours.encode(book) == full.tokenize(book.encode(), add_bos=False, special=False)
    template = open_gguf(path).fields["tokenizer.chat_template"].contents()
    for turns in (TURNS, TURNS[1:2]):
        text = jinja2.Template(template).render(messages=turns, add_generation_prompt=True)
        ids = [i for segment, _ in chat_tokens(ours, turns) for i in segment]
        assert ids == theirs.encode(text, add_special_tokens=False)
