"""Tokenizers, each against another reader of the same file, and what a checkpoint declares of them.

Run: pytest tests/test_tokenizer.py
"""

import base64
import importlib.util
import json
import re
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import encode_parts
from tests.helpers import ROOT, smollm2_path, tiny_model, train_sentencepiece
from tests.oracles import llama3_ranks, llama_cpp_models, make_texts, read_vectors
from weights import Tokenizer, chat_tokens, load_tokenizer, pieces, save_model

TEXT = "The cache holds 2048 slots: naïve, 漢字, 🙂👍🏽!\n\n    indented\ttoo  "
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]


def write_ranks(path):
    """tiktoken ranks: 256 bytes and a few merges."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b" th", b"the", b" the", b"in", b" c"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))


def byte_level(special=SPECIAL, plain=()):
    """A tokenizer of `tokenizers` with byte-level BPE, with special tokens and with plain ones."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 3, trainer)
    bpe.add_tokens([tokenizers.AddedToken(x, special=False, normalized=False) for x in plain])
    return bpe


def begin_with(bpe, name):
    """Have a tokenizer of `tokenizers` put a token before every text."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, bpe.token_to_id(name))]
    )


def write_byte_level(path):
    """tokenizer.json with byte-level BPE, which begins every text with a control token."""
    bpe = byte_level()
    begin_with(bpe, SPECIAL[0])
    bpe.save(str(path))


def write_byte_fallback(path):
    """tokenizer.json as Llama 2's: letters, and bytes for all others; no BOS."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for letter in "▁abcdefghijklmnopqrstuvwxyz":
        vocab[letter] = len(vocab)
    model = tokenizers.models.BPE(
        vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    bpe = tokenizers.Tokenizer(model)
    prepend, spaces = (
        tokenizers.normalizers.Prepend("▁"),
        tokenizers.normalizers.Replace(" ", "▁"),
    )
    bpe.normalizer = tokenizers.normalizers.Sequence([prepend, spaces])
    parts = tokenizers.decoders
    bpe.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    bpe.add_special_tokens(
        [tokenizers.AddedToken(x, special=True, normalized=False) for x in special]
    )
    bpe.save(str(path))


WRITERS = {
    "sentencepiece": ("tokenizer.model", train_sentencepiece),
    "tiktoken": ("tokenizer.model", write_ranks),
    "byte-level": ("tokenizer.json", write_byte_level),
    "byte-fallback": ("tokenizer.json", write_byte_fallback),
}


@pytest.fixture(scope="module", params=WRITERS)
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    name, write = WRITERS[request.param]
    if request.param == "tiktoken":
        pytest.importorskip("tiktoken")
    write(folder / name)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """Llama 3's own vocabulary: this code's tokenizer, and Meta's."""
    ranks = llama3_ranks()
    theirs = pytest.importorskip("llama_models.llama3.tokenizer")
    folder = tmp_path_factory.mktemp("llama3")
    shutil.copy(ranks, folder)
    return load_tokenizer(folder), theirs.Tokenizer(ranks)


def declare(folder, name="tokenizer_config.json", **content):
    """Write JSON beside a tokenizer."""
    (folder / name).write_text(json.dumps(content))


def auto_tokenizer(folder):
    """transformers' reader of a folder, which must hold a config.json."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    if not (folder / "config.json").exists():
        declare(folder, "config.json", model_type="llama")
    return transformers.AutoTokenizer.from_pretrained(folder)


# Text to ids and back


def test_bos_and_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT)
    if tokenizer.bos_id is not None:
        assert ids.pop(0) == tokenizer.bos_id
    assert ids == tokenizer.encode(TEXT, bos=False)
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.eos_id in tokenizer.eos_ids


def test_texts_of_all_scripts_come_back(tokenizer):
    for text in make_texts(300, spelled=list(tokenizer.control)):
        assert tokenizer.decode(tokenizer.encode(text)) == text


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


def test_parts_of_a_text_are_encoded_as_the_whole(tokenizer):
    """Some families put a space before every text: here it comes once, and not for each part."""
    parts = [["She said", False], [" yes", True], ["", True], ["terday.\n", False], ["\nÉ 𝄞", True]]
    segments = encode_parts(parts, tokenizer)
    ids = [token for segment, _ in segments for token in segment]
    assert ids == tokenizer.encode("".join(text for text, _ in parts))
    assert [is_learnt for _, is_learnt in segments] == [is_learnt for _, is_learnt in parts]
    # What reaches over the end of a part ("yesterday" may be one token) is of the part behind.
    texts = [b"".join(map(tokenizer.token_bytes, segment)) for segment, _ in segments]
    assert texts[0].strip() == b"She said"
    assert b" yes".startswith(texts[1])
    assert texts[-1].endswith("É 𝄞".encode())


def test_text_that_spells_a_control_token_stays_text(tokenizer):
    spelled = "".join(tokenizer.control)[:200]
    ids = tokenizer.encode(spelled, bos=False)
    assert not set(ids) & set(tokenizer.control.values())
    assert tokenizer.decode(ids) == spelled


@pytest.mark.parametrize("text", ["\ud800", "a \udc80 b"])
def test_half_a_surrogate_pair_is_one_line(tokenizer, text):
    with pytest.raises(ValueError, match=r"text: was '\\ud[8c][80]0' at character \d, half of"):
        tokenizer.encode(text)


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


def test_stream_is_decode_of_any_ids(tokenizer):
    known = st.integers(0, tokenizer.vocab_size - 1)
    unknown = st.sampled_from([-1, tokenizer.vocab_size, tokenizer.vocab_size + 5000])
    ids = st.lists(st.one_of(known, known, known, unknown), max_size=20)

    @given(ids, ids)
    def check(context, ids):
        assert "".join(tokenizer.stream(iter(ids))) == tokenizer.decode(ids)
        before = tokenizer.decode(context)
        if not before.endswith("\ufffd"):
            joined = before + "".join(tokenizer.stream(iter(ids), context))
            assert joined == tokenizer.decode([*context, *ids])

    check()


def test_characters_of_several_tokens_come_whole_and_at_once(tokenizer):
    ids = tokenizer.encode("x日本語 ሰላም ក្រុម 🙂", bos=False)
    seen = [len(list(tokenizer.stream(iter(ids[: n + 1])))) for n in range(len(ids))]
    pieces = list(tokenizer.stream(iter(ids)))
    assert "".join(pieces) == "x日本語 ሰላም ក្រុម 🙂"
    assert len(pieces) >= 12  # no run of characters is held back
    assert seen == sorted(seen)


def test_an_id_without_a_token_is_no_text(tokenizer):
    ids = tokenizer.encode("the cat", bos=False)
    for unknown in (tokenizer.vocab_size, tokenizer.vocab_size + 64, -1):
        assert tokenizer.decode([unknown]) == ""
        assert tokenizer.decode([*ids, unknown, unknown]) == "the cat"


def test_sentencepiece_equals_its_library(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    train_sentencepiece(tmp_path / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer(tmp_path)
    for text in [TEXT, *make_texts(300, spelled=["</s>"])]:
        assert ours.encode(text) == theirs.encode(text, add_bos=True)
    assert [ours.decode([i]) for i in range(400) if not theirs.is_byte(i) and i] == [
        theirs.decode([i]) for i in range(400) if not theirs.is_byte(i) and i
    ]


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_tokenizer_json_equals_its_library(tmp_path, kind):
    tokenizers = pytest.importorskip("tokenizers")
    WRITERS[kind][1](tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    for text in [TEXT, *make_texts(300)]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_tiktoken_merges_by_rank(tmp_path):
    pytest.importorskip("tiktoken")
    write_ranks(tmp_path / "tokenizer.model")
    ours = load_tokenizer(tmp_path)
    assert ours.encode("in the cat", bos=False) == [260, 259, 261, ord("a"), ord("t")]
    assert (ours.bos_id, ours.control["<|eot_id|>"]) == (262, 271)
    assert ours.vocab_size == 262 + 256
    long = "the cache in the " * 50_000  # beyond one call of the splitter
    assert ours.decode(ours.encode(long, bos=False)) == long


def test_words_without_a_decoder_are_joined_by_spaces(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.encode("b a b") == [1, 0, 1]
    assert ours.decode([1, 0, 1]) == words.decode([1, 0, 1]) == "b a b"


def test_an_unknown_decoder_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = byte_level()
    bpe.decoder = tokenizers.decoders.WordPiece()
    bpe.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="decoder was WordPiece, must be ByteLevel, or consist of"):
        load_tokenizer(tmp_path)


# Real vocabularies


def test_llama3_equals_metas(llama3):
    ours, theirs = llama3
    assert ours.control == theirs.special_tokens
    assert sorted(ours.eos_ids) == sorted(theirs.stop_tokens)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id, theirs.eos_id)
    for text in [TEXT, *make_texts(400, spelled=["<|eot_id|>"])]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, bos=True, eos=False)
        assert ours.decode(ids) == text
        assert "".join(ours.stream(iter(ids))) == text


@pytest.mark.parametrize(
    "text",
    [
        "a" * 60_000,
        " " * 60_000,
        "\n" * 25_001 + "x",
        "x" * 25_000 + " y",
        "漢字" * 30_000,
        ("ab" * 30_000 + " ") * 8,  # longer than Meta's code encodes at once
        "wor ds" * 70_000,
    ],
)
def test_llama3_cuts_runs_as_meta_does(llama3, text):
    ours, theirs = llama3
    assert ours.encode(text) == theirs.encode(text, bos=True, eos=False)
    assert ours.encode_text(text) == theirs.encode(text, bos=False, eos=False)


@pytest.mark.slow
def test_llama3_is_the_same_for_others_when_saved(llama3, tmp_path):
    ours, theirs = llama3
    ours.save(tmp_path)
    assert (tmp_path / "tokenizer.model").exists()
    again = load_tokenizer(tmp_path)  # from a tokenizer.json
    transformers = auto_tokenizer(tmp_path)
    assert (again.control, again.bos_id, again.names) == (ours.control, ours.bos_id, ours.names)
    assert transformers.bos_token_id == theirs.bos_id
    assert transformers.eos_token_id == theirs.eos_id
    for text in make_texts(300, spelled=["<|eot_id|>"]):
        expected = theirs.encode(text, bos=True, eos=False)
        assert again.encode(text) == expected
        assert transformers(text, split_special_tokens=True).input_ids == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe"])
def test_vocabularies_in_gguf_equal_llama_cpps(tmp_path, name):
    pytest.importorskip("gguf")
    path = llama_cpp_models() / f"ggml-vocab-{name}.gguf"
    ours = load_tokenizer(path)
    vectors = read_vectors(path)
    assert len(vectors) > 40
    for text, expected in vectors:
        assert ours.encode(text, bos=False) == expected
        assert ours.decode(expected) == text
    assert ours.encode("")[0] == ours.bos_id
    ours.save(tmp_path)
    transformers = auto_tokenizer(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.control, again.bos_id, again.eos_ids) == (ours.control, ours.bos_id, ours.eos_ids)
    for text in make_texts(300):
        assert again.encode(text) == ours.encode(text)
        assert transformers(text).input_ids == ours.encode(text)


@pytest.mark.slow
def test_smollm2_equals_transformers(tmp_path):
    transformers, path = pytest.importorskip("transformers"), smollm2_path()
    ours = load_tokenizer("smollm2")
    assert (ours.bos_id, ours.eos_ids) == (None, (2,))
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    save_model(tiny_model(), tmp_path, ours)  # which writes a tokenizer.json
    again = load_tokenizer(tmp_path)
    assert (again.control, again.bos_id) == (ours.control, ours.bos_id)
    assert (again.chat_template, again.names) == (ours.chat_template, ours.names)
    saved = auto_tokenizer(tmp_path)
    assert saved.chat_template == ours.chat_template
    book = (ROOT / "LICENSE").read_text() * 9
    for text in [TEXT, book, *make_texts(300)]:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert again.encode(text) == ids
        assert saved(text, split_special_tokens=True).input_ids == ids
    # transformers reads GGUF without the rule that digits stand alone.
    plain = re.sub(r"\d", "", book)
    assert ours.encode(plain) == theirs.encode(plain, add_special_tokens=False)
    if importlib.util.find_spec("llama_cpp"):
        import llama_cpp

        full = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        assert ours.encode(book) == full.tokenize(book.encode(), add_bos=False, special=False)


# What a checkpoint declares: ids that end a text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, [1]),  # by its name
        ({"config.json": {"eos_token_id": 3}}, [3]),
        ({"config.json": {"eos_token_id": None}}, [1]),
        ({"config.json": {"eos_token_id": [3, 2]}}, [3, 2]),
        (
            {"config.json": {"eos_token_id": 3}, "generation_config.json": {"eos_token_id": [2]}},
            [2],
        ),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 3}}, [3]),
        ({"tokenizer_config.json": {"eos_token": SPECIAL[2]}}, [2]),
        ({"tokenizer_config.json": {"eos_token": {"content": SPECIAL[2], "lstrip": False}}}, [2]),
        ({"special_tokens_map.json": {"eos_token": SPECIAL[2]}}, [2]),
        (
            {
                "config.json": {"eos_token_id": [3]},
                "tokenizer_config.json": {"eos_token": SPECIAL[2]},
            },
            [3, 2],
        ),
        ({"tokenizer_config.json": {"eos_token": "not there"}}, [1]),
        ({"tokenizer_config.json": {"eos_token": ""}}, [1]),
    ],
)
def test_declared_ends_are_obeyed(tmp_path, files, expected):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    declare(tmp_path, "config.json")
    for name, content in files.items():
        declare(tmp_path, name, **content)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == tuple(expected)
    assert tokenizer.eos_id == expected[0]


@pytest.mark.parametrize("value", ["2", True, [1, "2"], {"a": 1}, 2.0])
def test_an_end_that_is_no_number_is_refused(tmp_path, value):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    declare(tmp_path, "config.json", eos_token_id=value)
    with pytest.raises(ValueError, match=r"config.json: eos_token_id was .*, must be a number or"):
        load_tokenizer(tmp_path)


def test_sentencepiece_declares_its_own_end(tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model", eos_piece="<end>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == (tokenizer.control["<end>"],)


# BOS


@pytest.mark.parametrize("declared", [True, False])
def test_the_flag_rules_the_bos_of_sentencepiece(tmp_path, declared):
    train_sentencepiece(tmp_path / "tokenizer.model")
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": declared}
    declare(tmp_path, **config, tokenizer_class="LlamaTokenizer")
    ours = load_tokenizer(tmp_path)
    assert ours.encode("def") == auto_tokenizer(tmp_path)("def").input_ids
    assert (ours.bos_id == 1) == declared


@pytest.mark.parametrize("begins", [True, False])
def test_the_post_processor_rules_the_bos_of_tokenizer_json(tmp_path, begins):
    bpe = byte_level()
    if begins:
        begin_with(bpe, SPECIAL[1])
    bpe.save(str(tmp_path / "tokenizer.json"))
    declare(tmp_path, tokenizer_class="PreTrainedTokenizerFast", bos_token=SPECIAL[1])
    ours = load_tokenizer(tmp_path)
    assert ours.encode("the") == auto_tokenizer(tmp_path)("the").input_ids
    assert (ours.bos_id == 1) == begins


def test_the_flag_rules_where_no_post_processor_does(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    declare(tmp_path, bos_token=SPECIAL[0], add_bos_token=True)
    assert load_tokenizer(tmp_path).bos_id == 0
    declare(tmp_path, bos_token="not there", add_bos_token=True)
    with pytest.raises(ValueError, match="bos_token was 'not there', must be a token of"):
        load_tokenizer(tmp_path)
    declare(tmp_path, bos_token=SPECIAL[0], add_bos_token="yes")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: was damaged .*add_bos_token was"):
        load_tokenizer(tmp_path)


# Added tokens


def test_tokens_added_to_a_tokenizer_json_beside_a_tokenizer_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    train_sentencepiece(tmp_path / "tokenizer.model")
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    theirs.add_tokens(["newword", "<think>"])
    theirs.eos_token = "<|im_end|>"
    theirs.save_pretrained(tmp_path)
    theirs = auto_tokenizer(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == len(theirs) == 405
    assert theirs.eos_token_id in ours.eos_ids
    for text in make_texts(300, spelled=["newword"]):
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids)
    for name in ("[PAD]", "<|im_start|>", "<|im_end|>", "<think>"):
        assert ours.control[name] == theirs.convert_tokens_to_ids(name)
        assert ours.control[name] not in ours.encode(f"a{name}b")
        assert ours.decode(ours.encode(f"a{name}b")) == f"a{name}b"
    # What is special is no text; what only looks so is.
    assert ours.decode([402, 404]) == theirs.decode([402, 404], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_added_beside_a_tokenizer_model(tmp_path, name):
    train_sentencepiece(tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>", "bos_token": "<s>"}
    config |= {"additional_special_tokens": ["<|im_start|>"], "add_bos_token": True}
    if name == "added_tokens.json":
        declare(tmp_path, name, **{"<|im_start|>": 400, "<|im_end|>": 401, "newword": 402})
    else:
        special = {"special": True, "normalized": False}
        added = {
            "1": {"content": "<s>", **special},
            "400": {"content": "<|im_start|>", **special},
            "401": {"content": "<|im_end|>", **special},
            "402": {"content": "newword", "special": False},
        }
        config["added_tokens_decoder"] = added
    declare(tmp_path, **config)
    ours = load_tokenizer(tmp_path)
    theirs = auto_tokenizer(tmp_path)
    assert ours.vocab_size == len(theirs) == 403
    assert ours.eos_ids == (401,)
    for text in make_texts(300, spelled=["newword"]):
        if not text.startswith(" "):  # where transformers' LlamaTokenizer loses a space
            ids = ours.encode(text)
            assert ids == theirs(text).input_ids
            assert ours.decode(ids) == text
    assert ours.decode([400, 350, 401]) == theirs.decode([400, 350, 401], skip_special_tokens=True)
    assert 401 not in ours.encode("<|im_end|>")


def test_tokens_added_only_beside_a_tokenizer_json(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    size = load_tokenizer(tmp_path).vocab_size
    added = {"content": "<|new|>", "special": True, "normalized": False}
    declare(tmp_path, added_tokens_decoder={str(size): added})
    assert load_tokenizer(tmp_path).control["<|new|>"] == size
    declare(tmp_path, added_tokens_decoder={str(size + 7): added})
    with pytest.raises(ValueError, match=rf"'<\|new\|>' was number {size} .*, must be {size + 7}"):
        load_tokenizer(tmp_path)


def test_a_hole_between_added_tokens_is_no_text(tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model")
    declare(tmp_path, "added_tokens.json", **{"<|im_end|>": 403})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.control["<|im_end|>"] == 403
    assert tokenizer.vocab_size == 404
    assert tokenizer.decode([401, 402]) == ""


def test_reserved_tokens_of_llama3_are_renamed(tmp_path):
    pytest.importorskip("tiktoken")
    write_ranks(tmp_path / "tokenizer.model")
    declare(tmp_path, added_tokens_decoder={"264": {"content": "<|im_end|>", "special": True}})
    assert load_tokenizer(tmp_path).control["<|im_end|>"] == 264
    declare(tmp_path, added_tokens_decoder={"9999": {"content": "<|im_end|>", "special": True}})
    with pytest.raises(ValueError, match="was number 9999, must be one of the 256 from 262"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["<|im_end|>", "<think>", "[INST]", "### User:"])
@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_text_that_spells_an_added_token_stays_text(tmp_path, kind, name):
    if kind == "tokenizer.json":
        byte_level(plain=[name]).save(str(tmp_path / kind))
    else:
        train_sentencepiece(tmp_path / kind, user_defined_symbols=[name])
    # What does not look like a control token is one where the template writes it.
    declare(tmp_path, chat_template="{% for m in messages %}### User: {{ m.content }}{% endfor %}")
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(f"a {name} b", bos=False)
    assert tokenizer.control[name] not in ids
    assert tokenizer.decode(ids) == f"a {name} b"
    assert tokenizer.decode([tokenizer.control[name]]) == name  # it is not special


@pytest.mark.parametrize("name", ["ø", "newword", "  ", "!", "### User:"])
def test_other_added_tokens_are_found_in_text(tmp_path, name):
    byte_level(plain=[name]).save(str(tmp_path / "tokenizer.json"))
    declare(tmp_path, chat_template="{{ 'ø!  newword' }}")  # which are words in it
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(f"a{name}b", bos=False)
    assert len(ids) == 3
    assert tokenizer.decode(ids) == f"a{name}b"
    assert ids == auto_tokenizer(tmp_path)(f"a{name}b").input_ids


# A tokenizer and the rows of a model


def test_fits(tokenizer):
    size = tokenizer.vocab_size
    for rows in (size, size + 64, size + 5000):
        tokenizer.check_fits(rows)
    with pytest.raises(ValueError, match=f"tokenizer: was of {size} tokens, must be that of the"):
        tokenizer.check_fits(size + 100_000)
    with pytest.raises(
        ValueError, match=rf"was of {size} tokens.* no row for the ids 100 \(text\)"
    ):
        tokenizer.check_fits(100)


@pytest.mark.parametrize(
    ("tokens", "rows"), [(100_015, 102_400), (32_022, 32_256), (32_000, 32_768)]
)
def test_a_padded_vocabulary_fits(tokens, rows):
    Tokenizer(lambda text: [], lambda token: b"", tokens, {}, None).check_fits(rows)


def test_ids_without_a_row_are_named(tmp_path):
    byte_level(special=[*SPECIAL]).save(str(tmp_path / "tokenizer.json"))
    size = load_tokenizer(tmp_path).vocab_size
    added = {str(size): {"content": "[PAD]", "special": True}}
    declare(tmp_path, added_tokens_decoder=added)
    padded = load_tokenizer(tmp_path)
    with pytest.warns(UserWarning, match=rf"the model has no row for the ids {size} \(\[PAD\]\)"):
        padded.check_fits(size)
    for written in (
        replace(padded, chat_template="{{ '[PAD]' }}"),
        replace(padded, stops=(size,)),
        replace(padded, bos_id=size),
    ):
        with pytest.raises(ValueError, match=rf"no row for the ids {size} \(\[PAD\]\)"):
            written.check_fits(size)


# sentencepiece's file format


def test_the_format_of_pieces_is_protobufs(tmp_path):
    protobuf = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    train_sentencepiece(tmp_path / "tokenizer.model", user_defined_symbols=["<a>", "x" * 200])
    content = (tmp_path / "tokenizer.model").read_bytes()
    model = pieces.read_model(content)
    theirs = protobuf.ModelProto.FromString(content)
    assert protobuf.ModelProto.FromString(model.to_bytes()) == theirs
    assert [(p.text, p.type) for p in model.pieces] == [(p.piece, p.type) for p in theirs.pieces]
    assert model.has_flag(pieces.ADD_DUMMY_PREFIX) == theirs.normalizer_spec.add_dummy_prefix
    model.pieces.append(pieces.make_piece("<|im_end|>", pieces.CONTROL, -0.5))
    theirs.pieces.add(piece="<|im_end|>", type=3, score=-0.5)
    pieces.change_piece(model.pieces[300], "ø", pieces.USER_DEFINED)
    theirs.pieces[300].piece = "ø"
    theirs.pieces[300].type = 4
    assert protobuf.ModelProto.FromString(model.to_bytes()) == theirs


# Broken files, and none


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b"junk"),
        ("tokenizer.model", b""),
        ("tokenizer.model", b"\x0a\x05\x0a"),  # ends within a piece
        ("tokenizer.model", b"\x0a\x02\x15\x00"),  # ends within a score
        ("tokenizer.model", b"\x0a\x02\x18\x01"),  # a piece without a text
        ("tokenizer.model", b"\x0a\x80"),  # ends within a number
        ("tokenizer.model", b"YQ== 0\nbroken\n"),
        ("tokenizer.model", b"YQ== 0\nYg== 0\n"),
        ("tokenizer.json", b"{}"),
    ],
)
def test_broken_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: was not whole"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("place", range(0, 2000, 23))
def test_a_changed_byte_is_read_or_named(tmp_path, place):
    content = bytearray((ROOT / "weights/tiny/tokenizer.model").read_bytes())
    content[place] ^= 2
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    said = f"{path}: was "
    try:
        load_tokenizer(tmp_path).encode("def main():")
    except ValueError as error:
        said = str(error)
    assert said.startswith(f"{path}: was ")


def test_a_prefix_of_subwords_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_level().save(str(path))
    content = json.loads(path.read_text())
    content["model"]["continuing_subword_prefix"] = "x"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"continuing_subword_prefix was 'x', must be null"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": "<s>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<s>"}}}),
        ("tokenizer_config.json", {"eos_token": 2}),
        ("tokenizer_config.json", {"chat_template": 5}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"0": {"content": "<s>", "lstrip": "no"}}},
        ),
        ("added_tokens.json", {"<s>": "one"}),
        ("added_tokens.json", {"<s>": -1}),
        ("added_tokens.json", {"<s>": 10**11}),
        ("chat_template.json", {"chat_template": [{"name": "a"}]}),
    ],
)
def test_broken_declarations(tmp_path, name, content):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    declare(tmp_path, name, **content)
    with pytest.raises(ValueError, match=rf"/{name}: was damaged"):
        load_tokenizer(tmp_path)


def test_the_folder_above_is_asked_for_a_tokenizer_by_metas_models_alone(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for name in ("theirs/consolidated.00.pth", "theirs/params.json", "ours/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "ours/config.json").touch()
    load_tokenizer(tmp_path / "theirs")
    with pytest.raises(FileNotFoundError, match="ours: was without a tokenizer"):
        load_tokenizer(tmp_path / "ours")


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="was a folder without a checkpoint"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="was without a tokenizer"):
        load_tokenizer(tmp_path)


# What is saved


@pytest.mark.parametrize("kind", WRITERS)
def test_saved_files_say_the_same_again(tmp_path, kind):
    if kind == "tiktoken":
        pytest.importorskip("tiktoken")
    name, write = WRITERS[kind]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / name)
    before = load_tokenizer(tmp_path / "in")
    before.save(tmp_path / "out")
    after = load_tokenizer(tmp_path / "out")
    theirs = auto_tokenizer(tmp_path / "out")
    assert (after.control, after.bos_id) == (before.control, before.bos_id)
    assert theirs.eos_token_id == after.eos_id == before.eos_id
    for text in make_texts(100, spelled=["</s>"]):
        ids = before.encode(text)
        assert after.encode(text) == ids
        assert theirs(text, split_special_tokens=True).input_ids == ids


def test_saved_files_are_all_that_a_folder_declared(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    byte_level().save(str(source / "tokenizer.json"))
    declare(source, eos_token=SPECIAL[1], chat_template="from the config", more="kept")
    declare(source, "special_tokens_map.json", eos_token=SPECIAL[1])
    declare(source, "added_tokens.json", **{SPECIAL[1]: 1})
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (source / "unknown.txt").write_text("not of the tokenizer")
    load_tokenizer(source).save(tmp_path / "out")
    for file in source.rglob("*.json*"):
        assert (tmp_path / "out" / file.relative_to(source)).read_bytes() == file.read_bytes()
    for file in source.rglob("*.jinja"):
        assert (tmp_path / "out" / file.relative_to(source)).read_bytes() == file.read_bytes()
    assert not (tmp_path / "out" / "unknown.txt").exists()
    assert load_tokenizer(tmp_path / "out").chat_template == "{{ messages[0].content }}"


def test_nothing_old_lies_beside_what_is_saved(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    declare(tmp_path, eos_token=SPECIAL[2])
    (tmp_path / "chat_template.jinja").write_text("old")
    (tmp_path / "in").mkdir()
    train_sentencepiece(tmp_path / "in" / "tokenizer.model")
    ours = load_tokenizer(tmp_path / "in")
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXT) == ours.encode(TEXT)
    assert (again.eos_ids, again.chat_template) == (ours.eos_ids, None)
    again.save(tmp_path)  # into its own folder
    assert load_tokenizer(tmp_path).encode(TEXT) == ours.encode(TEXT)


def write_gguf(path, model, tokens, types, **fields):
    """A GGUF file with a vocabulary and no tensors."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_merges(path, **fields):
    """A GGUF file with merges, as Llama 3's, and a chat template."""
    pytest.importorskip("tokenizers")
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, "ab", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<think>", "ø"]
    given = {"tokenizer_pre": "llama-bpe", "token_merges": ["a b"], "bos_token_id": 257}
    given |= {"eos_token_id": 258, "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    write_gguf(path, "gpt2", tokens, [1] * 257 + [3] * 3 + [4] * 2, **(given | fields))
    return load_tokenizer(path)


def test_gguf_of_merges_is_the_same_when_saved(tmp_path):
    before = gguf_merges(tmp_path / "m.gguf", add_bos_token=True, eot_token_id=259)
    assert before.encode("abø<think>") == [257, 256, 261, *before.encode("<think>", bos=False)]
    assert before.control["<think>"] == 260
    assert before.eos_ids == (258, 259)
    before.save(tmp_path / "out")
    after = load_tokenizer(tmp_path / "out")
    theirs = auto_tokenizer(tmp_path / "out")
    assert (after.control, after.names, after.bos_id) == (before.control, before.names, 257)
    assert theirs.chat_template == after.chat_template == before.chat_template
    assert theirs.eos_token_id == 258
    for text in make_texts(100, spelled=["ab", "ø", "<|eot_id|>"]):
        ids = before.encode(text)
        assert after.encode(text) == ids
        assert theirs(text, split_special_tokens=True).input_ids == ids
        assert before.decode(ids) == text


@pytest.mark.parametrize(
    ("fields", "bos_id", "eos_ids"),
    [
        ({}, 257, (258,)),
        ({"add_bos_token": False}, None, (258,)),
        ({"tokenizer_pre": "smollm"}, None, (258,)),
        ({"tokenizer_pre": "smollm", "add_bos_token": True}, 257, (258,)),
        ({"eos_token_id": 259, "eot_token_id": 259}, 257, (259,)),
        ({"eot_token_id": 259}, 257, (258, 259)),
    ],
)
def test_gguf_fields_are_obeyed(tmp_path, fields, bos_id, eos_ids):
    tokenizer = gguf_merges(tmp_path / "m.gguf", **fields)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (bos_id, eos_ids)


def gguf_pieces(folder, **fields):
    """A GGUF file with the pieces of a tokenizer.model, and sentencepiece's reader of these."""
    sentencepiece = pytest.importorskip("sentencepiece")
    train_sentencepiece(folder / "sp.model", pad_id=3)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))
    tokens = [theirs.id_to_piece(i) for i in range(400)]
    types = [6 if theirs.is_byte(i) else 1 for i in range(400)]
    types[:4] = [2, 3, 3, 3]
    scores = [theirs.get_score(i) for i in range(400)]
    tokens += ["<|im_end|>", "[PAD401]"]
    given = {"token_scores": [*scores, 0.0, 0.0], "bos_token_id": 1, "eos_token_id": 2}
    write_gguf(folder / "m.gguf", "llama", tokens, [*types, 4, 2], **(given | fields))
    return load_tokenizer(folder / "m.gguf"), theirs


def test_gguf_of_pieces_is_the_same_when_saved(tmp_path):
    template = "{{ bos_token }}{{ messages[0].content }}<|im_end|>"
    before, theirs = gguf_pieces(tmp_path, chat_template=template, eot_token_id=400)
    assert before.vocab_size == 402
    assert before.eos_ids == (2, 400)
    assert before.decode([401]) == ""  # a row without a token
    before.save(tmp_path / "out")
    after = load_tokenizer(tmp_path / "out")
    other = auto_tokenizer(tmp_path / "out")
    assert (after.control, after.bos_id) == (before.control, before.bos_id)
    assert other.chat_template == after.chat_template == template
    turns = [{"role": "user", "content": "def"}]
    expected = other.apply_chat_template(turns, return_dict=False)
    for tokenizer in (before, after):
        assert chat_tokens(tokenizer, turns) == [(expected, False)]
    for text in make_texts(300, spelled=["<|im_end|>", "</s>"]):
        ids = before.encode(text)
        assert ids == theirs.encode(text, add_bos=True)
        assert after.encode(text) == ids
        if not text.startswith(" ") and "<|im_end|>" not in text:
            assert other(text, split_special_tokens=True).input_ids == ids


@pytest.mark.parametrize("flag", [True, False])
def test_gguf_says_whether_texts_begin_with_a_space(tmp_path, flag):
    tokenizer, theirs = gguf_pieces(tmp_path, add_space_prefix=flag, add_bos_token=False)
    assert (tokenizer.encode("def") == theirs.encode("def")) == flag
    assert tokenizer.decode(tokenizer.encode("def")) == "def"


def test_other_vocabularies_in_gguf_are_refused(tmp_path):
    with pytest.raises(ValueError, match="its vocabulary was 'gpt2', 'qwen2', must be 'llama', or"):
        gguf_merges(tmp_path / "m.gguf", tokenizer_pre="qwen2")
    with pytest.raises(ValueError, match=r"was damaged .*, must be a GGUF file with a whole"):
        gguf_merges(tmp_path / "m.gguf", bos_token_id=9999)
