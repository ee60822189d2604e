"""What measurements share: operators, losses, texts, windows, the journal, results, pictures.

Run: pytest tests/test_experiments.py
"""

import csv
import json
import math
import re
import shlex
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
from torch.testing import assert_close

import data
import train
from experiments import compare, fading, harness, operators, report, slots
from experiments.harness import Document, Strategy, Window
from freqkv import FreqKVAttention, FreqKVConfig
from model import FullCache, causal_attention
from tests.helpers import ROOT, random_tokens, tiny_checkpoint, tiny_model
from weights import load_tokenizer

SCHEDULE = FreqKVConfig(window=16, sinks=2)
NAMES = ["perplexity", "ablation", "recall", "spectrum", "longbench"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_checkpoint(folder)
    return folder


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# Operators


@pytest.mark.parametrize("n", [12, 10, 7])
@pytest.mark.parametrize("keep", [1, 4, 6])
def test_average_is_a_loop_of_means(n, keep):
    keys = noise(2, 3, n, 4)
    new_keys, new_values = operators.average(keys, -keys, keep)
    for slot in range(keep):
        start = slot * n // keep
        stop = math.ceil((slot + 1) * n / keep)
        assert_close(new_keys[:, :, slot], keys[:, :, start:stop].mean(2))
    assert_close(new_values, -new_keys)


@pytest.mark.parametrize(("n", "keep"), [(12, 6), (13, 5), (8, 1), (9, 8)])
def test_high_band_against_scipy(n, keep):
    keys = noise(2, 3, n, 4)
    band = scipy.fft.dct(keys.double().numpy(), norm="ortho", axis=2)[:, :, n - keep :]
    expected = math.sqrt(keep / n) * scipy.fft.idct(band, norm="ortho", axis=2)
    new_keys, new_values = operators.high(keys, 3 * keys, keep)
    assert_close(new_keys, torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)
    assert_close(new_values, 3 * new_keys, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("operator", [operators.average, operators.high])
def test_operators_keep_nothing_and_round_once(operator):
    x = noise(2, 3, 500, 4)
    assert operator(x, x, 0)[0].shape == operator(x, x, 0)[1].shape == (2, 3, 0, 4)
    low = (x + 3).bfloat16()
    new, _ = operator(low, low, 7)
    assert new.dtype == torch.bfloat16
    assert torch.equal(new, operator(low.float(), low.float(), 7)[0].bfloat16())
    assert operator(x.double(), x.double(), 7)[0].dtype == torch.float64


LAST = {  # logits after 60 tokens, when a ratio for each layer was a part of FreqKVConfig
    (0.25, 0.75): [-1.0231, -0.3802, -1.1529, -0.5652, 0.2359, 1.0672],
    (0.5, 0.0): [-0.8626, -0.8482, -0.8791, -1.1759, 0.1145, 1.2969],
}


@pytest.mark.parametrize("ratios", LAST)
def test_a_ratio_for_each_layer(ratios):
    """Reads as it did, and as the parallel form composed in the same way."""
    schedule = FreqKVConfig(window=16, sinks=2, recent=3)
    model, tokens = tiny_model(), random_tokens(1, 60)
    layers = [FreqKVAttention(FreqKVConfig(16, 2, ratio, 3)) for ratio in ratios]
    cache = operators.by_layer(schedule, ratios)
    with torch.no_grad():
        expected = model(tokens, lambda layer, *rest: layers[layer](layer, *rest))
        parts = [model(part, cache) for part in tokens.split(7, dim=1)]
    assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)
    assert_close(expected[0, -1, :6], torch.tensor(LAST[ratios]), atol=1e-3, rtol=0)


# Strategies and losses


def test_strategies_have_as_many_slots():
    for strategy in harness.make_strategies(harness.STRATEGIES, SCHEDULE):
        cache = strategy.make_cache(70)
        if strategy.name == "full":
            assert isinstance(cache, FullCache)
            assert cache.capacity == 70
            assert strategy.settings() == {}
        else:
            assert cache.config == SCHEDULE
            assert strategy.settings() == SCHEDULE.__dict__
    names = ["full", "freqkv", "distinct", "window", "average", "high"]
    assert names == harness.STRATEGIES
    settings = Strategy("by-layer", SCHEDULE, (0.25, 0.75)).settings()
    assert settings == SCHEDULE.__dict__ | {"ratio": [0.25, 0.75]}


@pytest.mark.parametrize("name", harness.STRATEGIES)
def test_losses_equal_the_parallel_form_and_a_naive_loop(name):
    """Read in parts, all at once, and token by token with plain logarithms."""
    model, tokens = tiny_model(), random_tokens(2, 60)
    [strategy] = harness.make_strategies([name], SCHEDULE)
    losses = harness.token_losses(model, tokens, strategy.make_cache(60), chunk=9)
    assert losses.shape == (2, 59)
    assert losses.dtype == torch.float32

    attend = causal_attention
    if name != "full":
        attend = FreqKVAttention(SCHEDULE, harness.OPERATORS[name])
    with torch.no_grad():
        shares = model(tokens, attend).double().log_softmax(-1)
    expected = -shares[:, :-1].gather(2, tokens[:, 1:, None])[:, :, 0]
    assert_close(losses.double(), expected, atol=1e-4, rtol=1e-4)

    cache = strategy.make_cache(60)
    for t in range(59):
        with torch.no_grad():
            logits = model(tokens[:, t : t + 1], cache)[:, 0].tolist()
        for row, scores in enumerate(logits):
            total = sum(math.exp(score) for score in scores)
            loss = math.log(total) - scores[tokens[row, t + 1]]
            assert losses[row, t].item() == pytest.approx(loss, abs=1e-4)


def test_losses_advance_by_what_was_read():
    seen = []
    harness.token_losses(tiny_model(), random_tokens(2, 30), FullCache(30), 8, seen.append)
    assert seen == [16, 16, 16, 10]


def test_losses_that_are_no_numbers_are_an_error():
    model = tiny_model()
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not numbers in float32, must be; try another --dtype"):
        harness.token_losses(model, random_tokens(1, 9), FullCache(9), 8)


# Intervals


@pytest.mark.parametrize("freedom", [1, 2, 5, 30, 1000, 40_000])
def test_student_t_against_scipy(freedom):
    assert report.student_t(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=2e-3)


def test_interval_by_hand():
    mean, half = report.mean_interval([10.0, 9.0], [4, 6])
    assert mean == 1.9  # and the residuals are 10 - 4 * 1.9 = 2.4 and -2.4
    assert half == pytest.approx(12.706 * math.sqrt(2 * (2.4**2 + 2.4**2)) / 10, rel=1e-3)
    assert report.mean_interval([10.0], [4]) == (2.5, None)
    assert report.mean_interval([2.0, 3.0], [4, 6]) == (0.5, 0.0)


def test_interval_of_equal_texts_is_that_of_a_mean():
    means = [2.0, 2.5, 2.25, 3.0, 1.5]
    mean, half = report.mean_interval([7 * x for x in means], [7] * 5)
    ends = scipy.stats.t.interval(0.95, 4, np.mean(means), scipy.stats.sem(means))
    assert (mean - half, mean + half) == pytest.approx(ends, rel=1e-3)


# Texts


def bytes_tokenizer(bos, eos):
    """A tokenizer of single bytes, in blocks of 9, as far as reading data needs one."""

    def encode_blocks(text):
        content = list(text.encode())
        return [content[:9], content[9:]]

    return SimpleNamespace(bos_id=bos, eos_id=eos, encode_blocks=encode_blocks)


def test_token_files_are_read_as_they_are(tmp_path):
    tokens = np.arange(20, dtype=np.uint32)
    tokens.tofile(tmp_path / "x.bin")
    tokenizer = bytes_tokenizer(256, None)
    [text] = harness.read_documents([str(tmp_path)], "uint32", True, tokenizer, 400)
    assert text.name == "x.bin"
    assert isinstance(text.tokens, np.memmap)
    assert torch.equal(text.cut(7, 5), torch.arange(7, 12))
    [text] = harness.read_documents([str(tmp_path)], "uint16", True, tokenizer, 400)
    assert len(text.tokens) == 40


def test_a_text_begins_as_its_tokenizer_has_it(tmp_path, checkpoint):
    text = "def f(x):\n    return x  # a b c d e\n" * 2500  # more than one block
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.bos_id is not None
    for bos in (True, False):
        [a] = harness.read_documents([str(tmp_path)], None, bos, tokenizer, 400)
        assert a.tokens.tolist() == tokenizer.encode(text, bos=bos)
    assert harness.encode(tmp_path / "a.txt", tokenizer).tolist() == tokenizer.encode(text)
    without = bytes_tokenizer(None, None)
    assert harness.encode(tmp_path / "a.txt", without).tolist() == list(text.encode())


def test_equal_bytes_of_another_width_are_another_text():
    tokens = np.arange(20, dtype=np.uint16)
    digest = Document("", tokens).digest()
    assert digest == Document("other name", tokens.copy()).digest()
    assert digest != Document("", tokens.view(np.uint32)).digest()
    assert digest != Document("", tokens[::-1]).digest()


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """Have a folder stand for Python's source."""
    root = tmp_path / "stdlib"
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(root)})

    def fill(sizes):
        (root / "test").mkdir(parents=True)
        for i, size in enumerate(sizes):
            (root / f"{i}.py").write_text((f"{i} é " + "word " * size)[: size - 1])
        (root / "same.py").write_bytes((root / "0.py").read_bytes())
        (root / "test/left_out.py").write_text("left out" * 99)

    return fill


@pytest.mark.parametrize("ends", [(256, 257), (None, 257), (256, None), (None, None)])
def test_default_data_is_what_training_holds_out(stdlib, tmp_path, ends):
    stdlib(np.random.default_rng(0).integers(50, 400, 100).tolist())
    tokenizer = bytes_tokenizer(*ends)
    [document] = harness.read_documents(None, None, False, tokenizer, 258)
    files = list(data.by_content(data.data_files(None)).values())
    assert len(files) == 100
    path = tmp_path / "tokens.bin"
    sizes = data.write_tokens(files, harness.HELD_OUT, tokenizer, path)
    stream = np.fromfile(path, np.uint32).tolist()
    tokens = document.tokens.tolist()
    assert stream[-len(tokens) :] == tokens
    cut = sizes["held_out_tokens"] - len(tokens)  # of the file that training and this share
    assert 0 <= cut <= 402
    assert len(tokens) > 0.6 * sizes["held_out_tokens"]


def test_the_share_held_out_is_that_of_training():
    assert train.Settings.val_share == harness.HELD_OUT


def test_default_data_where_little_is_held_out(stdlib):
    stdlib([300] * 20)  # of equal size: one file is the share exactly
    assert len(harness.read_held_out(bytes_tokenizer(None, None))) == 300


@pytest.mark.parametrize("count", [1, 19])
def test_default_data_where_no_file_is_held_out(stdlib, count):
    stdlib([300] * count)
    with pytest.raises(ValueError, match="--data: was not given, must be: no source of Python"):
        harness.read_held_out(bytes_tokenizer(None, None))


# Windows


def texts_of(*sizes):
    return [Document("text", np.arange(size)) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "lengths", "stride", "limit", "expected"),
    [
        ([20], [8], 4, 0, [(0, 0, 8), (0, 4, 8), (0, 8, 8), (0, 12, 8)]),
        ([8], [8], 4, 0, [(0, 0, 8)]),  # exactly as long
        ([7], [8], 4, 0, []),
        ([20], [8, 16], 4, 0, [(0, 0, 16), (0, 4, 16), (0, 8, 8), (0, 12, 8)]),
        ([20], [8, 16], 4, 1, [(0, 0, 16)]),
        ([20], [8, 16], 4, 2, [(0, 0, 16), (0, 4, 16)]),
        ([20], [8, 16], 4, 9, [(0, 0, 16), (0, 4, 16)]),
        ([100], [8], 4, 3, [(0, 0, 8), (0, 48, 8), (0, 92, 8)]),  # evenly spaced
        ([17, 5, 9], [8, 16], 8, 0, [(0, 0, 16), (0, 8, 8), (2, 0, 8)]),
        ([17, 5, 9], [8, 16], 8, 1, [(0, 0, 16), (2, 0, 8)]),  # each text its longest
    ],
)
def test_windows(sizes, lengths, stride, limit, expected):
    windows = harness.cut_windows(texts_of(*sizes), lengths, stride, limit)
    assert windows == [Window(*each) for each in expected]


@pytest.mark.parametrize(
    ("given", "sizes", "window", "expected"),
    [
        ([40, 10, 40], [99], 8, [10, 40]),
        (None, [300, 110], 20, [20, 40, 80, 160]),  # to eight times
        (None, [300, 110], 50, [50, 100, 200]),  # as far as a text goes
        (None, [9], 1, [2, 4, 8]),  # of one token is no perplexity
        (None, [16], 16, [16]),
    ],
)
def test_lengths(given, sizes, window, expected):
    assert harness.choose_lengths(given, texts_of(*sizes), window) == expected


@pytest.mark.parametrize(("given", "length"), [([4, 16], 16), (None, 20), (None, 2)])
def test_a_length_that_no_text_has(given, length):
    says = f"--lengths: was {length} tokens, but the longest text, text, has 1; must be at most"
    with pytest.raises(ValueError, match=says):
        harness.choose_lengths(given, texts_of(1, 0), 1 if length == 2 else 20)


def test_what_is_left_out_is_said():
    texts = texts_of(30, 9, 30)
    windows = harness.cut_windows(texts, [20], 10)
    said = "4 windows of 2 texts; 1 text too short, left out; 240 tokens in all"
    assert harness.describe_windows(texts, windows, 3) == said
    said = "1 window of 1 text; 20 tokens in all"
    assert harness.describe_windows(texts[:1], windows[:1], 1) == said


def test_windows_are_read_in_batches_of_about_4096_slots():
    windows = [Window(0, start, 300) for start in range(200)]
    windows += [Window(1, start, 20) for start in range(300)]
    # 4096 // 300 and 4096 // 20 windows of full attention, 4096 // 50 of any other, and the rest.
    expected = {"full": [204, 96, *15 * [13], 5], "freqkv": [81, 81, 81, 57, 81, 81, 38]}
    for name, sizes in expected.items():
        [strategy] = harness.make_strategies([name], FreqKVConfig(window=50))
        batches = harness.make_batches(strategy, windows, None)
        assert [len(batch) for batch in batches] == sizes
        order = [window for batch in batches for window in batch]
        assert order == windows[200:] + windows[:200]  # one length after another
        for batch in batches:
            assert len({window.length for window in batch}) == 1
    batches = harness.make_batches(strategy, windows[:8], 3)
    assert [len(batch) for batch in batches] == [3, 3, 2]
    large = Strategy("freqkv", FreqKVConfig(window=8192))
    assert len(harness.make_batches(large, windows[:3], None)) == 3  # never none at a time


def record(windows, losses, length):
    values = [{"sums": {str(length): loss}} for loss in losses]
    return harness.summarize_length(windows, values, length)


@pytest.mark.parametrize("length", [2, 100, 110, 256, 300])
def test_the_window_count_of_the_protocol(length):
    """Each text of T tokens has (T - length) / stride + 1 windows, whatever else is measured."""
    windows = harness.cut_windows(texts_of(300, 110), [2, length], 7)
    values = [{"sums": {"2": 1.0, str(length): 1.0}} for _ in windows]
    made = harness.summarize_length(windows, values, length)
    counts = [max((size - length) // 7 + 1, 0) for size in (300, 110)]
    assert made["windows"] == sum(counts)
    assert made["tokens"] == sum(counts) * (length - 1)
    assert made["documents"] == sum(count > 0 for count in counts)


def test_perplexity_over_texts_and_over_stretches_of_one():
    """Windows of one text that share tokens are one draw, and those of one of many texts too."""
    starts = [0, 2, 4, 6, 8, 10, 12, 14, 16]
    losses = [10.0 + math.sin(start) for start in starts]
    windows = [Window(0, start, 8) for start in starts]
    units = [losses[0:4], losses[4:8], losses[8:9]]
    counts = [7 * len(unit) for unit in units]
    mean, half = report.mean_interval([sum(unit) for unit in units], counts)
    made = record(windows, losses, 8)
    assert made["perplexity"] == pytest.approx(math.exp(mean))
    assert made["ci95"] == pytest.approx([math.exp(mean - half), math.exp(mean + half)])
    assert record(windows[:4], losses[:4], 8)["ci95"] is None
    apart = [Window(number // 4, window.start, 8) for number, window in enumerate(windows)]
    assert record(apart, losses, 8)["ci95"] == made["ci95"]


def test_a_perplexity_beyond_floats_is_still_a_number():
    made = record([Window(0, 0, 8)], [1e6], 8)
    assert 1e300 < made["perplexity"] < math.inf


# The journal


def test_a_journal_knows_what_was_written(tmp_path):
    path = tmp_path / "x.jsonl"
    journal = report.Journal(path, ("model", 1))
    key = Strategy("full", None), Window(0, 3, 8)
    assert key not in journal
    journal[key] = {"loss": [1.5]}
    again = report.Journal(path, ("model", 1))
    assert key in again
    assert again[Strategy("full", None), Window(0, 3, 8)] == {"loss": [1.5]}
    assert (key[0], Window(0, 4, 8)) not in again
    assert (Strategy("freqkv", SCHEDULE), key[1]) not in again
    assert key not in report.Journal(path, ("model", 2))


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    path = tmp_path / "x.jsonl"
    journal = report.Journal(path, 0)
    journal["a"] = 1
    whole = path.read_bytes()
    for cut in (whole[:-1], b'{"key": "ha'):
        path.write_bytes(whole + cut)
        again = report.Journal(path, 0)
        assert again["a"] == 1
        assert path.read_bytes() == whole
        again["b"] = 2
        assert report.Journal(path, 0)["b"] == 2


@pytest.mark.parametrize("line", [b"words", b"{}", b"[1]", b"\0\0\0", b"\xff"])
def test_a_journal_of_something_else_is_refused(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"key": "a", "value": 1}\n' + line + b"\n")
    says = f"x.jsonl: line 2 was {line!r}, must be a record; move the file away"
    with pytest.raises(ValueError, match=re.escape(says)):
        report.Journal(path, 0)
    assert path.read_bytes().endswith(line + b"\n")


def test_what_changes_values_changes_the_journal(tmp_path):
    """The model's weights, its dtype, and whatever else the values depend on."""
    path = tmp_path / "x.jsonl"
    model = tiny_model()
    model.layers[1].mlp.down_proj.weight.data[0, 0] = 0.5
    harness.open_journal(path, model, "about")["key"] = 1
    assert "key" in harness.open_journal(path, model, "about")
    assert "key" not in harness.open_journal(path, model, "other")
    model.layers[1].mlp.down_proj.weight.data[0, 0] = 0.25
    assert "key" not in harness.open_journal(path, model, "about")
    model.layers[1].mlp.down_proj.weight.data[0, 0] = 0.5
    assert "key" in harness.open_journal(path, model, "about")
    low = model.bfloat16()
    harness.open_journal(path, low, "about")["key"] = 2
    assert "key" not in harness.open_journal(path, low.float(), "about")  # the same numbers


# Results


def test_results_are_records_and_what_made_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/x/experiments/recall.py", "--data", "a b"])
    records = [
        {"strategy": "full", "ci95": None, "loss": 1.5},
        {"strategy": "freqkv", "ci95": [1.0, 2.0], "loss": 2.5, "window": 16},
    ]
    report.write_results(tmp_path, "x", records, {"out": tmp_path, "bos": True})
    assert json.loads((tmp_path / "x.json").read_text()) == records
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = {"strategy": "full", "loss": "1.5", "ci95_low": "", "ci95_high": "", "window": ""}
    second = {"strategy": "freqkv", "loss": "2.5", "ci95_low": "1.0", "ci95_high": "2.0"}
    assert rows == [first, second | {"window": "16"}]
    made = json.loads((tmp_path / "x.settings.json").read_text())
    assert made["command"] == "python -m experiments.recall --data 'a b'"
    assert made["versions"]["torch"] == torch.__version__
    assert made["settings"] == {"out": str(tmp_path), "bos": True}
    assert made.keys() == {"command", "date", "versions", "machine", "settings"}
    assert f"{tmp_path / 'x'}.json, .csv and .settings.json" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


def test_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/Llama-3.2-1B").mkdir(parents=True)
    for model, name in {"models/Llama-3.2-1B": "Llama-3.2-1B", "a.b.gguf": "a.b"}.items():
        folder = report.open_folder(None, "recall", model)
        assert folder.resolve() == tmp_path / f"runs/recall-{name}"
        assert folder.is_dir()
    assert report.open_folder(tmp_path / "a/b", "recall", "tiny") == tmp_path / "a/b"
    # What train.py has written is called by the name of its run.
    made = report.open_folder(None, "recall", "runs/x/model", "runs/y/adapter")
    assert made.resolve() == tmp_path / "runs/recall-x-y"
    (tmp_path / "file").write_text("mine")
    for path, why in (("file", ".*"), ("file/below", "Not a directory")):
        with pytest.raises(OSError, match=f"--out: .*{path}: {why}, must be a folder, or new"):
            report.open_folder(tmp_path / path, "recall", "tiny")
    assert (tmp_path / "file").read_text() == "mine"


def test_results_of_another_model_stay(tmp_path):
    report.write_results(tmp_path, "recall", [{"a": 1}], {"model": "x", "adapter": None})
    report.open_folder(tmp_path, "recall", "x")  # the same again
    report.open_folder(tmp_path, "recall", "./x")
    report.open_folder(tmp_path, "perplexity", "y")  # another measurement
    for model, adapter, must in (("y", None, "of y"), ("x", "z", "of x with z")):
        with pytest.raises(ValueError, match=f"held recall of x, must be {must}, or new"):
            report.open_folder(tmp_path, "recall", model, adapter)
    (tmp_path / "perplexity.settings.json").write_text('{"settings": {"model": 3}}')
    with pytest.raises(ValueError, match=r"perplexity.settings.json: was damaged"):
        report.open_folder(tmp_path, "perplexity", "x")
    (tmp_path / "spectrum.json").write_text("mine")
    with pytest.raises(ValueError, match=r"spectrum.json was no result of this"):
        report.open_folder(tmp_path, "spectrum", "x")


def test_a_table_has_columns():
    text = report.format_table(["a", "long"], [["b", "1"], ["cc", "12345"]])
    assert text.split("\n") == ["a    long", "b       1", "cc  12345"]


# Pictures


@pytest.fixture
def figure():
    return pytest.importorskip("matplotlib.figure").Figure(layout="constrained")


def test_curves_are_told_apart_in_black_and_white(figure):
    axes = figure.subplots()
    report.draw_curves(axes, {str(i): ([1, 2], [i, i]) for i in range(14)})
    assert [line.get_label() for line in axes.lines] == [str(i) for i in range(14)]
    looks = [(x.get_linestyle(), x.get_marker(), x.get_fillstyle()) for x in axes.lines]
    assert len(set(looks)) == 12
    assert len({x.get_marker() for x in axes.lines[:6]}) == 6
    for line in axes.lines:
        assert 0 <= float(line.get_color()) <= 0.6  # grey, and not too pale
    report.add_legend(figure)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [str(i) for i in range(14)]


def test_what_is_far_above_is_cut_off(figure):
    axes = figure.subplots()
    assert report.cut_high(axes, [2.0, 3.0, 4.0]) == ""
    assert report.cut_high(axes, [2.0, 3.0, 700.0]) == "cut off at 6; the highest is 700"
    assert axes.get_ylim() == (1.8, 6)


def test_a_picture_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report.draw_picture(tmp_path / "x.png", lambda figure, x: figure.text(0, 0, x), "words")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"drawn: {tmp_path / 'x.png'}\n"


def test_without_matplotlib_a_picture_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ImportError, match="pictures: matplotlib was not found: pip install matplot"
    ):
        report.check_plots()


def test_what_the_slots_hold(tmp_path, outcome):
    """Each slot's weights sum to 1, of sinks and the newest they are one token's."""
    for length, newest in zip(slots.LENGTHS, (60, 30, 30), strict=True):
        weights = slots.read_weights(length)
        assert weights.shape == (64, length)
        assert_close(weights.sum(1), torch.ones(64))
        assert torch.equal(weights[:4, :4], torch.eye(4))
        assert torch.equal(weights[-newest:, -newest:], torch.eye(newest))
    pytest.importorskip("matplotlib")
    assert outcome(slots, "--out", tmp_path / "x.png").code == 0
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("script", [fading, slots])
def test_a_picture_is_not_drawn_over_another_file(outcome, tmp_path, script):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    for path in (notes, tmp_path, tmp_path / "no/x.png"):
        ran = outcome(script, "--out", path)
        assert ran.code == 2
        assert ran.err.startswith("experiments")
        assert "--out: " in ran.err
        assert ran.out == ""  # before any work
    assert notes.read_text() == "mine"


RUN = {"strategy": "freqkv"}


def write_run(path, records):
    """Records as a measurement writes them, of one strategy."""
    path.write_text(json.dumps([RUN | record for record in records]))


def test_runs_are_compared(tmp_path, figure, outcome):
    """The points of a frontier, and curves above the first run's."""
    for name, height in (("a", 20.0), ("b", 30.0)):
        folder = tmp_path / name
        folder.mkdir()
        lengths = [{"length": 2048, "perplexity": 1.0}, {"length": 8192, "perplexity": height}]
        recalls = [
            {"distance": x, "loss": x / 1000, "loss_absent": height} for x in (256, 1000, 2048)
        ]
        points = [{"tokens_from": i, "tokens_to": i + 2, "loss": height / i} for i in (1, 3)]
        write_run(folder / "perplexity.json", lengths)
        write_run(folder / "recall.json", recalls)
        write_run(folder / "perplexity_by_position.json", points)
    folders = {"one": tmp_path / "a", "two": tmp_path / "b"}
    compare.draw_frontier(figure, folders)
    for axes, losses in zip(figure.axes, (0.628, 2.048), strict=True):
        for line, height in zip(axes.lines, (20.0, 30.0), strict=True):
            assert line.get_xdata() == pytest.approx([height - losses])
            assert line.get_ydata() == [height]
    figure.clear()
    compare.draw_positions(figure, folders)
    [axes] = figure.axes
    assert [line.get_label() for line in axes.lines] == ["two"]
    assert axes.lines[0].get_xdata().tolist() == [2, 4]
    assert axes.lines[0].get_ydata() == pytest.approx([10, 10 / 3])
    assert "above one" in axes.get_ylabel()
    runs = [f"{name}={folder}" for name, folder in folders.items()]
    for what in ("frontier", "by-position"):
        assert outcome(compare, what, tmp_path / "x.png", *runs).code == 0
    (tmp_path / "mine.txt").write_text("mine")
    ran = outcome(compare, "by-position", tmp_path / "mine.txt", f"one={tmp_path / 'a'}")
    assert (ran.code, "must be new, or a picture in PNG" in ran.err) == (2, True)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    ran = outcome(compare, "frontier", tmp_path / "x.png", "one=nowhere")
    assert (ran.code, "was 'one=nowhere', must be NAME=FOLDER" in ran.err) == (2, True)
    ran = outcome(compare, "frontier", tmp_path / "x.png", runs[0], runs[0])
    assert (ran.code, "NAME=FOLDER: had a name twice" in ran.err) == (2, True)
    ran = outcome(compare, "by-position", tmp_path / "x.png", runs[0])
    assert (ran.code, "NAME=FOLDER: was one, must be two or more" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("what", "name", "content", "message"),
    [
        (
            "frontier",
            "perplexity",
            [RUN | {"length": 4096, "perplexity": 1.0}],
            "without --lengths 8192",
        ),
        ("frontier", "perplexity", [5], "a: "),
        ("frontier", "recall", [RUN | {"distance": 1, "loss": 1.0, "loss_absent": 2.0}], "below"),
        (
            "frontier",
            "recall",
            [RUN | {"distance": 1, "loss": 1.0}],
            "a: 'loss_absent' was missing",
        ),
        ("frontier", "recall", None, "recall.json: cannot be read (No such file or directory)"),
        ("by-position", "perplexity_by_position", [], "a: was of other lengths"),
        ("by-position", "perplexity_by_position", [RUN | {"loss": 1}], "a: 'tokens_from' was miss"),
        ("frontier", "recall", [RUN, {"strategy": "window"}], "a: held freqkv, window, must be of"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, outcome, what, name, content, message):
    whole = {
        "perplexity": [{"length": 8192, "perplexity": 1.0}],
        "recall": [{"distance": x, "loss": 1.0, "loss_absent": 2.0} for x in (1, 9999)],
        "perplexity_by_position": [{"tokens_from": 1, "tokens_to": 3, "loss": 1.0}],
    }
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for measured, records in whole.items():
            write_run(tmp_path / folder / f"{measured}.json", records)
    file = tmp_path / "a" / f"{name}.json"
    file.unlink()
    if content is not None:
        file.write_text(json.dumps(content))
    ran = outcome(compare, what, tmp_path / "x.png", f"b={tmp_path / 'b'}", f"a={tmp_path / 'a'}")
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


# The command line


COMMON = ["model", "adapter", "device", "dtype", "window", "sinks", "ratio", "recent"]
COMMON += ["data", "bin-dtype", "bos", "no-bos", "strategies", "out", "plot", "limit", "chunk"]
OWN = {
    "perplexity": ["lengths", "stride", "batch-size", "layer-ratios"],
    "ablation": ["lengths", "stride", "batch-size", "ratios", "sink-counts", "recents"],
    "recall": ["tasks", "distances", "trials", "seed"],
    "spectrum": ["ratios", "suggest"],
    "longbench": ["tasks", "chat", "no-chat"],
}


@pytest.mark.parametrize("name", NAMES)
def test_help_names_every_flag(name, outcome):
    module = import_module(f"experiments.{name}")
    ran = outcome(module, "--help")
    assert ran.code == 0
    named = set(re.findall(r"--([a-z-]+)", ran.out))
    assert {*COMMON, *OWN[name]} <= named
    assert module.__doc__.split("\n")[0] in ran.out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "was '', must be of full, freqkv, distinct, window, average, high"),
        ("full,half", "was 'half', must be of full, freqkv, distinct, window, average, high"),
        ("full, freqkv,full", "was full twice, must be once"),
    ],
)
def test_bad_strategies(text, says, outcome):
    ran = outcome(import_module("experiments.recall"), "--strategies", text)
    assert ran.code == 2
    assert ran.err == f"experiments.recall.py: error: argument --strategies: {says}\n"


def test_commands_of_the_pages_parse():
    pages = ["experiments/README.md", *(f"experiments/{name}.py" for name in NAMES)]
    text = "\n".join((ROOT / page).read_text() for page in pages).replace("\\\n", " ")
    counts = dict.fromkeys(NAMES, 0)
    for name, flags in re.findall(r"^ *python -m experiments\.(\w+)(.*)$", text, re.MULTILINE):
        if name in counts:
            counts[name] += 1
            parser = import_module(f"experiments.{name}").make_parser()
            parser.parse_args(shlex.split(flags, comments=True))
    assert min(counts.values()) >= 1
    assert counts["perplexity"] >= 6
