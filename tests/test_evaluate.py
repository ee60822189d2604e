"""evaluate.py: operators, losses, intervals, perplexity, the grid, the journal, every bad input.

Run: pytest tests/test_evaluate.py
"""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import corpus
import evaluate
import train
from evaluation import harness, perplexity, report
from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig
from model import causal_attention
from tests.helpers import ROOT, random_tokens, tiny_checkpoint, tiny_model
from weights import load_model, load_tokenizer, save_model
from weights.lora import add_lora, save_adapter

CONFIG = FreqKVConfig(window=16, sinks=2)
SLOTS = ("--window", 16, "--sinks", 2)
GRID = ("--window", 16, "--ratios", "0.25,0.5", "--sink-counts", "0,2", "--recents", "0,4")
SIZES = {"long": 300, "short": 110}  # tokens of the two texts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two texts as token files of uint16."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, size in SIZES.items():
        draw.integers(3, 400, size).astype(np.uint16).tofile(folder / f"{name}.bin")
    return folder


@pytest.fixture
def script(checkpoint, data, tmp_path, outcome):
    """Run evaluate.py in this process; its exit code, stdout and stderr."""

    def run(command, *flags, model=checkpoint):
        defaults = ("--model", model, "--out", tmp_path / "out", "--device", "cpu")
        defaults += () if "--data" in flags else ("--data", data)
        return outcome(evaluate, command, *defaults, *flags)

    return run


@pytest.fixture
def read(monkeypatch):
    """Counts the windows that were read, by what held the past and by their length."""
    counts, losses = Counter(), perplexity.token_losses

    def counted(model, tokens, cache, *more):
        kind = cache.operator.__name__ if isinstance(cache, FreqKVCache) else "full"
        counts[kind, tokens.shape[1]] += len(tokens)
        return losses(model, tokens, cache, *more)

    monkeypatch.setattr(perplexity, "token_losses", counted)
    return counts


def results(folder, name="perplexity"):
    return json.loads((folder / f"{name}.json").read_text())


def tokens_of(file):
    return torch.from_numpy(np.fromfile(file, np.uint16).astype(np.int64))


def attention(strategy, config=CONFIG):
    """The parallel form of a strategy."""
    if strategy == "full":
        return causal_attention
    return FreqKVAttention(config, harness.OPERATORS[strategy])


def reference_losses(model, tokens, strategy, config=CONFIG):
    """The losses of tokens [T] by the parallel form: [T - 1] float64."""
    with torch.no_grad():
        shares = model(tokens[None], attention(strategy, config))[0].double().log_softmax(-1)
    return -shares[:-1].gather(1, tokens[1:, None])[:, 0]


# Operators


@pytest.mark.parametrize("shape", [(12, 3), (2, 3, 12, 4), (2, 10, 4), (1, 2, 7, 3)])
@pytest.mark.parametrize("keep", [1, 4, 6])
def test_average_is_a_loop_of_means(shape, keep):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    n = shape[-2]
    stretches = [(i * n // keep, -(-(i + 1) * n // keep)) for i in range(keep)]
    expected = torch.stack([x[..., a:b, :].mean(-2) for a, b in stretches], dim=-2)
    assert_close(harness.average(x, keep), expected)
    if n % keep == 0:
        assert len({b - a for a, b in stretches}) == 1


@pytest.mark.parametrize(("n", "keep"), [(12, 6), (13, 5), (8, 1), (9, 8)])
def test_high_band_against_scipy(n, keep):
    fft = pytest.importorskip("scipy.fft")
    x = torch.randn(2, 3, n, 4, generator=torch.Generator().manual_seed(0))
    band = fft.dct(x.double().numpy(), norm="ortho", axis=-2)[..., n - keep :, :]
    expected = math.sqrt(keep / n) * fft.idct(band, norm="ortho", axis=-2)
    assert_close(harness.high(x, keep), torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)
    constant = torch.full((n, 4), 3.0)
    assert harness.high(constant, keep).abs().max() < 1e-5
    assert_close(harness.average(constant, keep), constant[:keep])


@pytest.mark.parametrize("operator", [harness.average, harness.high])
def test_operators_keep_nothing_and_sum_in_float32(operator):
    x = torch.randn(2, 3, 500, 4, generator=torch.Generator().manual_seed(0))
    assert operator(x, 0).shape == (2, 3, 0, 4)
    low = (x + 3).bfloat16()
    found = operator(low, 7)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, operator(low.float(), 7).bfloat16())  # rounded once
    assert operator(x.double(), 7).dtype == torch.float64


# Losses a token


@pytest.mark.parametrize("strategy", harness.STRATEGIES)
def test_losses_equal_the_parallel_form_and_a_naive_loop(strategy):
    """Read in blocks, all at once, and token by token with plain logarithms."""
    model, tokens = tiny_model(), random_tokens(2, 60)
    cache = harness.new_cache(strategy, CONFIG, 60)
    found = harness.token_losses(model, tokens, cache, chunk=9)
    assert found.shape == (2, 59)
    assert found.dtype == torch.float32
    expected = torch.stack([reference_losses(model, row, strategy) for row in tokens])
    assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    cache = harness.new_cache(strategy, CONFIG, 60)
    for t in range(59):
        with torch.no_grad():
            logits = model(tokens[:, t : t + 1], cache)[:, 0].tolist()
        for row, scores in enumerate(logits):
            total = sum(math.exp(score) for score in scores)
            loss = math.log(total) - scores[tokens[row, t + 1]]
            assert found[row, t].item() == pytest.approx(loss, abs=1e-4)


def test_losses_advance_by_what_was_read():
    seen = []
    cache = harness.new_cache("full", CONFIG, 30)
    harness.token_losses(tiny_model(), random_tokens(2, 30), cache, 8, seen.append)
    assert seen == [16, 16, 16, 10]


def test_losses_that_are_no_numbers_are_an_error(checkpoint, script, tmp_path):
    model = load_model(checkpoint)
    model.norm.weight.data.fill_(torch.nan)
    save_model(model, tmp_path / "nan", load_tokenizer(checkpoint))
    ran = script("perplexity", *SLOTS, model=tmp_path / "nan")
    assert ran.code == 2
    said = ran.err.strip().split("\n")[-1]
    assert said == (
        "evaluate.py: error: losses: were not numbers in float32, must be; try another --dtype"
    )
    assert not (tmp_path / "out/perplexity.json").exists()


# Intervals


@pytest.mark.parametrize("freedom", [1, 2, 5, 30, 1000, 40_000])
def test_student_t_against_scipy(freedom):
    stats = pytest.importorskip("scipy.stats")
    assert harness.student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)


def test_interval_by_hand():
    mean, half = harness.interval([10.0, 9.0], [4, 6])
    assert mean == 1.9  # and the residuals are 10 - 4 * 1.9 = 2.4 and -2.4
    assert half == pytest.approx(12.706 * math.sqrt(2 * (2.4**2 + 2.4**2)) / 10, rel=1e-3)
    assert harness.interval([10.0], [4]) == (2.5, None)
    assert harness.interval([2.0, 3.0], [4, 6]) == (0.5, 0.0)


def test_interval_of_equal_texts_is_that_of_a_mean():
    stats = pytest.importorskip("scipy.stats")
    means = [2.0, 2.5, 2.25, 3.0, 1.5]
    mean, half = harness.interval([7 * x for x in means], [7] * 5)
    low, high = stats.t.interval(0.95, 4, np.mean(means), stats.sem(means))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)


def test_windows_that_share_tokens_are_one_unit():
    """Of one text: four windows within 8 tokens of another count as one draw, and not as four."""
    [text] = documents_of(24)
    found = perplexity.windows([text], [8], 2)
    starts = [window.start for window in found]
    values = [{"sums": {"8": 10.0 + math.sin(start)}} for start in starts]
    units = [[v["sums"]["8"] for v, x in zip(values, starts, strict=True) if x // 8 == i]
             for i in range(3)]  # fmt: skip
    assert [len(unit) for unit in units] == [4, 4, 1]
    mean, half = harness.interval([sum(x) for x in units], [7 * len(x) for x in units])
    record = perplexity.by_length(found, values, 8)
    assert record["ci95"] == [math.exp(mean - half), math.exp(mean + half)]
    assert perplexity.by_length(found[:4], values[:4], 8)["ci95"] is None


def test_a_perplexity_beyond_floats_is_still_a_number():
    [window] = perplexity.windows(documents_of(8), [8], 1)
    record = perplexity.by_length([window], [{"sums": {"8": 1e6}}], 8)
    assert 1e300 < record["perplexity"] < math.inf
    assert record["ci95"] is None


# Texts


def documents_of(*sizes):
    return [harness.Document("text", np.arange(size)) for size in sizes]


def data_args(*paths, **changes):
    return Namespace(data=[str(path) for path in paths] or None, **{"bin_dtype": None} | changes)


def test_a_token_file_is_read_as_it_is(data, checkpoint):
    long, short = harness.documents(data_args(data), load_tokenizer(checkpoint), 400)
    assert (long.name, short.name) == ("long.bin", "short.bin")
    assert isinstance(long.tokens, np.memmap)
    assert torch.equal(short[7:20], tokens_of(data / "short.bin")[7:20])
    assert short[7:20].dtype == torch.int64


def test_text_is_read_without_a_beginning(checkpoint, tmp_path):
    text = "def f(x):\n    return x  # a b c d e\n" * 2500  # more than one block
    (tmp_path / "a.txt").write_text(text)
    tokenizer = load_tokenizer(checkpoint)
    [document] = harness.documents(data_args(tmp_path / "a.txt"), tokenizer, 400)
    assert document.tokens.tolist() == tokenizer.encode(text, bos=False)


def test_equal_bytes_of_another_width_are_another_text(tmp_path):
    tokens = np.arange(20, dtype=np.uint16)
    narrow, wide = (harness.Document("", x) for x in (tokens, tokens.view(np.uint32)))
    assert narrow.digest() != wide.digest()
    assert narrow.digest() == harness.Document("other name", tokens.copy()).digest()
    assert narrow.digest() != harness.Document("", tokens[::-1]).digest()


def bytes_tokenizer(bos, eos):
    """A tokenizer of single bytes, as far as reading data needs one."""
    return SimpleNamespace(
        bos_id=bos, eos_id=eos, encode_blocks=lambda text: [list(text[:9].encode())] + (
            [list(text[9:].encode())] if text[9:] else [])
    )  # fmt: skip


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """Have a folder stand for Python's source."""
    root = tmp_path / "stdlib"
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(root)})

    def fill(sizes):
        (root / "test").mkdir(parents=True)
        for i, size in enumerate(sizes):
            (root / f"{i}.py").write_text((f"{i} é " + "word " * size)[: size - 1])
        (root / "same.py").write_bytes((root / "0.py").read_bytes())
        (root / "test/left_out.py").write_text("left out" * 99)

    return fill


@pytest.mark.parametrize("ends", [(256, 257), (None, 257), (256, None), (None, None)])
def test_default_data_is_what_training_holds_out(stdlib, tmp_path, ends):
    sizes = np.random.default_rng(0).integers(50, 400, 100).tolist()
    stdlib(sizes)
    tokenizer = bytes_tokenizer(*ends)
    [document] = harness.documents(data_args(), tokenizer, 258)
    files = list(corpus.by_content(corpus.data_files(None)).values())
    assert len(files) == 100
    path = tmp_path / "tokens.bin"
    sizes = corpus.write_tokens(files, harness.HELD_OUT, tokenizer, path)
    stream, found = np.fromfile(path, np.uint32).tolist(), document.tokens.tolist()
    assert stream[-len(found) :] == found
    cut = sizes["held_out_tokens"] - len(found)  # of the file that training and this share
    assert 0 <= cut <= 402
    assert len(found) > 0.6 * sizes["held_out_tokens"]


def test_the_share_held_out_is_that_of_training():
    assert train.settings([]).val_share == harness.HELD_OUT


def test_default_data_where_little_is_held_out(stdlib):
    stdlib([300] * 20)  # of equal size: one file is the share exactly
    [document] = harness.documents(data_args(), bytes_tokenizer(None, None), 256)
    assert len(document.tokens) == 300


@pytest.mark.parametrize("count", [0, 1, 19])
def test_default_data_where_no_file_is_held_out(stdlib, count):
    stdlib([300] * count or [2])
    with pytest.raises(ValueError, match="--data: was not given, must be: no source of Python"):
        harness.documents(data_args(), bytes_tokenizer(None, None), 256)


def test_the_real_default_data(checkpoint):
    [document] = harness.documents(data_args(), load_tokenizer(checkpoint), 400)
    assert len(document.tokens) > 100_000


# Windows


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
    found = perplexity.windows(documents_of(*sizes), lengths, stride, limit)
    assert [(x.document, x.start, x.length) for x in found] == expected


@pytest.mark.parametrize("length", [2, 100, 110, 256, 300])
def test_the_window_count_of_the_protocol(script, tmp_path, length):
    """Each text of T tokens has (T - length) / stride + 1 windows, whatever else is measured."""
    assert script("perplexity", *SLOTS, "--lengths", f"2,{length}", "--stride", 7).code == 0
    for record in results(tmp_path / "out"):
        if record["length"] == length:
            counts = [max((size - length) // 7 + 1, 0) for size in SIZES.values()]
            assert record["windows"] == sum(counts)
            assert record["tokens"] == sum(counts) * (length - 1)
            assert record["documents"] == sum(count > 0 for count in counts)


# Perplexity


def expected_perplexity(model, data, strategy, length, stride, config=CONFIG):
    losses = []
    for name in SIZES:
        tokens = tokens_of(data / f"{name}.bin")
        for start in range(0, len(tokens) - length + 1, stride):
            losses.append(reference_losses(model, tokens[start : start + length], strategy, config))
    return math.exp(torch.cat(losses).mean().item())


def test_perplexity_equals_that_of_the_parallel_form(script, checkpoint, data, tmp_path):
    """Of every strategy, at lengths within and beyond the slots and the model's 64 positions."""
    lengths, names = (10, 40, 110, 200), ",".join(harness.STRATEGIES)
    flags = "--lengths", "40,200,110,10,40", "--stride", 90, "--strategies", names
    ran = script("perplexity", *SLOTS, *flags)
    assert ran.code == 0, ran.err
    records, model = results(tmp_path / "out"), load_model(checkpoint)
    assert [(r["strategy"], r["length"]) for r in records] == [
        (strategy, length) for strategy in harness.STRATEGIES for length in lengths
    ]
    for record in records:
        wanted = expected_perplexity(model, data, record["strategy"], record["length"], 90)
        assert record["perplexity"] == pytest.approx(wanted, rel=1e-5)
        low, high = record["ci95"] or (None, None)
        assert (low is None) == (record["documents"] == 1 and record["length"] == 200)
        assert low is None or low < wanted < high
        slots = {name: record.get(name) for name in ("window", "sinks", "ratio", "recent")}
        none = dict.fromkeys(slots)
        assert slots == (none if record["strategy"] == "full" else CONFIG.__dict__)


def test_strategies_are_one_within_the_window(script, tmp_path):
    flags = "--lengths", "8,16", "--strategies", ",".join(harness.STRATEGIES)
    assert script("perplexity", *SLOTS, *flags, "--stride", 30).code == 0
    for length in (8, 16):
        values = [r["perplexity"] for r in results(tmp_path / "out") if r["length"] == length]
        assert len(values) == 5
        assert values == pytest.approx([values[0]] * 5, rel=1e-4)


@pytest.mark.parametrize("more", [("--batch-size", 1), ("--batch-size", 7), ("--chunk", 3)])
def test_batches_and_chunks_change_nothing(script, tmp_path, more):
    flags = *SLOTS, "--lengths", "10,70", "--stride", 40
    assert script("perplexity", *flags, "--out", tmp_path / "a").code == 0
    assert script("perplexity", *flags, "--out", tmp_path / "b", *more).code == 0
    for one, two in zip(*(results(tmp_path / name) for name in "ab"), strict=True):
        assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-4)
        assert {**one, **two} | {"perplexity": 0, "ci95": 0} == two | {"perplexity": 0, "ci95": 0}


def test_a_batch_fills_as_many_slots_as_one_cache_of_4096():
    bench = SimpleNamespace(args=Namespace(batch_size=None))
    group = perplexity.windows(documents_of(400), [300], 1)
    sizes = {"full": 4096 // 300, "freqkv": 4096 // 50}
    for strategy, size in sizes.items():
        setup = strategy, FreqKVConfig(window=50)
        found = perplexity.batches(bench, setup, group)
        assert [x for batch in found for x in batch] == group
        assert len(found[0]) == size


def test_perplexity_by_position(script, checkpoint, data, tmp_path):
    """Against the losses of the longest windows, token by token; and in 64 stretches."""
    assert script("perplexity", *SLOTS, "--lengths", "10,50", "--stride", 60).code == 0
    points, model = results(tmp_path / "out", "perplexity_by_position"), load_model(checkpoint)
    for strategy in ("full", "freqkv", "window"):
        losses = [
            reference_losses(model, tokens[start : start + 50], strategy)
            for tokens in (tokens_of(data / f"{name}.bin") for name in SIZES)
            for start in range(0, len(tokens) - 49, 60)
        ]
        own = [point for point in points if point["strategy"] == strategy]
        assert [(p["tokens_from"], p["tokens_to"]) for p in own] == [(i, i) for i in range(1, 50)]
        expected = torch.stack(losses).mean(0)
        assert_close(torch.tensor([p["loss"] for p in own]).double(), expected, rtol=1e-4, atol=0)
    assert script("perplexity", *SLOTS, "--lengths", 300, "--strategies", "freqkv").code == 0
    own = results(tmp_path / "out", "perplexity_by_position")
    assert [p["tokens_from"] for p in own] == [1, *(p["tokens_to"] + 1 for p in own[:-1])]
    assert (len(own), own[-1]["tokens_to"]) == (64, 299)
    assert {p["tokens_to"] - p["tokens_from"] + 1 for p in own} == {4, 5}


def test_default_lengths_are_the_window_and_its_doubles(script, tmp_path):
    assert script("perplexity", "--window", 20, "--strategies", "freqkv", "--limit", 1).code == 0
    records = results(tmp_path / "out")
    assert [r["length"] for r in records] == [20, 40, 80, 160]
    assert [r["windows"] for r in records] == [2, 2, 2, 1]  # as far as a text goes
    more = "--window", 1, "--sinks", 0, "--ratio", 0, "--strategies", "freqkv"
    assert script("perplexity", *more, "--limit", 1).code == 0
    assert [r["length"] for r in results(tmp_path / "out")] == [2, 4, 8]  # of 1 is no perplexity
    assert script("perplexity", "--window", 50, "--strategies", "freqkv", "--limit", 1).code == 0
    assert [r["length"] for r in results(tmp_path / "out")] == [50, 100, 200]


def test_settings_of_a_tuned_model_or_adapter_are_the_defaults(script, checkpoint, tmp_path):
    model = load_model(checkpoint)
    add_lora(model, 2, 4)
    for _, weight in model.named_parameters():
        if weight.shape[-1] == 2 or weight.shape[0] == 2:
            torch.nn.init.normal_(weight, std=0.3)
    save_adapter(model, tmp_path / "adapter", freqkv={"window": 24, "sinks": 1, "ratio": 0.25})
    shutil.copytree(checkpoint, tmp_path / "tuned")
    (tmp_path / "tuned/freqkv.json").write_text('{"window": 20, "recent": 3, "seq_len": 40}')
    flags = "--lengths", "60", "--strategies", "freqkv", "--limit", 1
    cases = [
        ((), {"window": 20, "sinks": 4, "ratio": 0.5, "recent": 3}),
        (
            ("--adapter", tmp_path / "adapter"),
            {"window": 24, "sinks": 1, "ratio": 0.25, "recent": 0},
        ),
        (("--window", 30, "--recent", 1), {"window": 30, "sinks": 4, "ratio": 0.5, "recent": 1}),
    ]
    values = set()
    for more, settings in cases:
        ran = script("perplexity", *flags, *more, model=tmp_path / "tuned")
        assert ran.code == 0, ran.err
        [record] = results(tmp_path / "out")
        assert settings.items() <= record.items()
        adapter = tmp_path / "adapter" if "--adapter" in more else None
        config = FreqKVConfig(**settings)
        tuned = load_model(checkpoint, adapter=adapter)
        losses = []
        data = results(tmp_path / "out", "perplexity.settings")["settings"]["data"][0]
        for name in SIZES:
            tokens = np.fromfile(f"{data}/{name}.bin", np.uint16)[:60].astype(np.int64)
            losses.append(reference_losses(tuned, torch.from_numpy(tokens), "freqkv", config))
        assert record["perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item())
        values.add(record["perplexity"])
    assert len(values) == 3


# The grid


def test_the_grid(script, checkpoint, data, tmp_path):
    flags = *GRID, "--strategies", "full,freqkv,high", "--stride", 100
    ran = script("ablate", *flags)
    assert ran.code == 0, ran.err
    records, model = results(tmp_path / "out", "ablate"), load_model(checkpoint)
    assert len(records) == 1 + 2 * 8
    assert "ratio" not in records[0]
    seen = set()
    for record in records:
        assert record["length"] == 64  # four windows
        names = ("ratio", "sinks", "recent")
        config = FreqKVConfig(16, **{x: record[x] for x in names}) if "ratio" in record else CONFIG
        wanted = expected_perplexity(model, data, record["strategy"], 64, 100, config)
        assert record["perplexity"] == pytest.approx(wanted, rel=1e-5)
        seen.add((record["strategy"], *(record.get(x) for x in names)))
        row = f"{record['perplexity']:.2f}"
        assert row in ran.out
    assert len(seen) == 17
    # The numbers are those of `perplexity` with the same settings.
    more = "--ratio", 0.25, "--sinks", 2, "--recent", 4, "--lengths", 64, "--stride", 100
    assert script("perplexity", "--window", 16, *more).code == 0
    alone = {r["strategy"]: r["perplexity"] for r in results(tmp_path / "out")}
    again = [r for r in records if (r.get("ratio"), r.get("sinks"), r.get("recent")) in (
        (0.25, 2, 4), (None, None, None))]  # fmt: skip
    for record in again:
        if record["strategy"] in alone:
            assert record["perplexity"] == pytest.approx(alone[record["strategy"]], rel=1e-6)
    assert len(again) == 3


def test_the_grid_by_default(script, tmp_path):
    ran = script("ablate", "--window", 16, "--strategies", "window", "--lengths", 20, "--limit", 1)
    assert ran.code == 0, ran.err
    names = ("ratio", "sinks", "recent")
    grid = {tuple(r[name] for name in names) for r in results(tmp_path / "out", "ablate")}
    ratios, sinks, recents = (0.25, 0.5, 0.75), (0, 4), (0, 2, 4, 8)
    assert grid == {(a, b, c) for a in ratios for b in sinks for c in recents}


# What is left


@pytest.mark.parametrize("command", ["perplexity", "ablate"])
def test_results(script, tmp_path, command):
    flags = (
        (*SLOTS, "--lengths", "64,200")
        if command == "perplexity"
        else (*GRID, "--lengths", 99, "--limit", 1)
    )
    ran = script(command, *flags, "--strategies", "freqkv,full")
    assert ran.code == 0, ran.err
    out = tmp_path / "out"
    records = results(out, command)
    with (out / f"{command}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        assert {"strategy", "length", "perplexity", "ci95", "tokens"} <= record.keys()
        ends = record.pop("ci95") or ("", "")
        record |= dict(zip(("ci95_low", "ci95_high"), ends, strict=True))
        assert row == {name: str(record.get(name, "")) for name in row}
    made = json.loads((out / f"{command}.settings.json").read_text())
    assert made["versions"]["torch"] == torch.__version__
    assert made["settings"]["dtype"] == "float32"  # as it was resolved
    assert made["settings"]["device"] == "cpu"
    assert made["settings"]["out"] == str(out)
    assert made["settings"]["measurement"] == command
    assert made.keys() >= {"command", "date", "machine"}
    assert f"{out / command}.json, .csv and .settings.json" in ran.out
    assert not list(out.glob(".*"))


def test_the_table(script):
    ran = script("perplexity", *SLOTS, "--lengths", "16,200", "--strategies", "freqkv,window")
    head, one, two = ran.out.split("\n")[1:4]
    assert head.split() == ["perplexity", "±95%", "16", "200"]
    assert re.fullmatch(r"freqkv +[\d.]+ ±[\d.]+ +[\d.]+", one)
    assert re.fullmatch(r"window +[\d.]+ ±[\d.]+ +[\d.]+", two)
    assert len({len(head), len(one), len(two)}) == 1


def test_what_is_left_out_is_said(script):
    ran = script("perplexity", *SLOTS, "--lengths", 200, "--limit", 1)
    assert ran.out.startswith("1 window of 1 text; 1 text too short, left out; 600 tokens in all")
    assert script("perplexity", *SLOTS, "--lengths", 100).out.startswith(
        "2 windows of 2 texts; 600"
    )


def test_pictures(script, tmp_path):
    pytest.importorskip("matplotlib")
    ran = script("perplexity", *SLOTS, "--lengths", "16,64,200", "--plot")
    assert ran.code == 0, ran.err
    assert script("ablate", *GRID, "--plot").code == 0
    for name in ("perplexity", "perplexity_by_position", "ablate"):
        content = (tmp_path / f"out/{name}.png").read_bytes()
        assert content[:4] == b"\x89PNG"
        assert len(content) > 10_000


def test_every_curve_is_drawn_and_high_ones_are_cut_off():
    pytest.importorskip("matplotlib")
    axes = report.figure_class()().subplots()
    report.lines(axes, {str(i): ([1, 2], [i, i]) for i in range(14)})
    assert [line.get_label() for line in axes.lines] == [str(i) for i in range(14)]
    looks = [(x.get_linestyle(), x.get_marker(), x.get_fillstyle()) for x in axes.lines]
    assert len(set(looks)) == 12
    assert len({x.get_marker() for x in axes.lines[:6]}) == 6
    assert perplexity.clip(axes, [2.0, 3.0, 4.0]) == ""
    assert perplexity.clip(axes, [2.0, 3.0, 700.0]) == "cut off at 6; the highest is 700"
    assert axes.get_ylim() == (1.8, 6)


def test_the_curve_by_place_shows_the_gap_to_the_best():
    pytest.importorskip("matplotlib")
    losses = {"full": [3, 3, 90], "freqkv": [3, 3.5, 3.25], "window": [3, 3.25, 3.0]}
    curves = [
        {"strategy": name, "tokens_from": 1 + 4 * i, "tokens_to": 4 + 4 * i, "loss": y}
        for name, values in losses.items()
        for i, y in enumerate(values)
    ]
    figure = report.figure_class()()
    perplexity.draw_curve(figure, curves)
    above, below = figure.axes
    assert [line.get_ydata().tolist() for line in above.lines] == [*losses.values()]
    gaps = [[0, -0.25, 87], [0, 0.25, 0.25], [0, 0, 0]]
    assert [line.get_ydata().tolist() for line in below.lines] == gaps
    assert below.lines[0].get_xdata().tolist() == [2.5, 6.5, 10.5]
    assert below.get_ylabel() == "above window (nats)"
    assert below.get_ylim() == (-0.25, 1)  # of the gaps, 4 times the median
    figure = report.figure_class()()
    perplexity.draw_curve(figure, curves[:3])
    assert len(figure.axes) == 1
    assert figure.axes[0].get_xlabel() == "place in the text (tokens)"


def test_panels_of_the_grid_keep_their_titles():
    pytest.importorskip("matplotlib")
    grid = [
        {"strategy": name, "ratio": ratio, "sinks": 4, "recent": recent, "perplexity": 5 + ratio}
        for name, ratio, recent in product(("freqkv", "window"), (0.25, 0.5), (0, 8))
    ]
    figure = report.figure_class()()
    perplexity.draw_grid(figure, [*grid, {"strategy": "full", "perplexity": 900.0}])
    one, two = figure.axes
    assert [x.get_title() for x in (one, two)] == ["freqkv, 4 sinks", "window, 4 sinks"]
    assert one.get_ylabel() == "perplexity a token (full: 900)"
    assert one.get_ylim()[1] < 7


def test_the_default_folder(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "Llama-3.2-1B")
    argv = ["perplexity", "--model", "Llama-3.2-1B", "--data", str(data), "--limit", "1"]
    evaluate.main([*argv, "--window", "16"])
    assert (tmp_path / "runs/evaluate-Llama-3.2-1B/perplexity.json").exists()


@pytest.mark.parametrize("command", evaluate.MEASUREMENTS)
def test_help_names_every_flag(script, command):
    shown = script(command, "--help")
    assert shown.code == 0
    flags = """model adapter data bin-dtype strategies window sinks ratio recent out plot limit
        chunk device dtype """
    flags += {
        "perplexity": "lengths stride batch-size",
        "ablate": "lengths stride batch-size ratios sink-counts recents",
        "recall": "tasks distances trials seed",
        "spectrum": "ratios suggest",
        "longbench": "tasks chat",
    }[command]
    assert all(f"--{flag}" in shown.out for flag in flags.split())
    assert evaluate.MEASUREMENTS[command][0] in " ".join(shown.out.split())


# Stopped and resumed


RUN = (*SLOTS, "--lengths", "10,40,200", "--stride", 20, "--batch-size", 4)


@pytest.fixture(scope="module")
def whole(checkpoint, data, tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    argv = ("perplexity", "--model", checkpoint, "--data", data, "--out", out, "--device", "cpu")
    evaluate.main([str(x) for x in (*argv, *RUN)])
    return out


def assert_same_results(out, whole):
    for name in ("perplexity.json", "perplexity_by_position.json", "perplexity.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


WINDOWS = {10: 1 + 2, 40: 8 + 4, 200: 6 + 0}  # to be read, by their longest length


def test_what_is_known_is_not_read_again(script, tmp_path, whole, read):
    assert script("perplexity", *RUN).code == 0
    kinds = ("full", "compress", "newest")
    assert read == {(kind, length): n for kind in kinds for length, n in WINDOWS.items()}
    assert_same_results(tmp_path / "out", whole)
    read.clear()
    assert script("perplexity", *RUN).code == 0
    assert not read
    assert_same_results(tmp_path / "out", whole)
    assert script("perplexity", *RUN, "--strategies", "window,average").code == 0
    assert read == {("average", length): n for length, n in WINDOWS.items()}
    read.clear()
    assert script("perplexity", *RUN, "--stride", 40, "--strategies", "full").code == 0
    assert not read  # the windows are some of those
    assert script("perplexity", *RUN, "--chunk", 99).code == 0
    assert not read  # which changes no more than the last digits


def test_stopped_in_the_middle(script, tmp_path, whole, read, monkeypatch):
    """By what Ctrl-C raises, again and again, while it reads."""
    ends, advance = [], []

    def losses(*args):
        *args, count = args

        def interrupted(tokens):
            advance.append(tokens)
            if len(advance) % 40 == 0:
                raise KeyboardInterrupt
            count(tokens)

        return harness.token_losses(*args, interrupted)

    monkeypatch.setattr(perplexity, "token_losses", losses)
    while not ends or ends[-1]:
        ends.append(script("perplexity", *RUN).code)
        assert ends[-1] in (0, 130)
    assert len(ends) > 3
    assert_same_results(tmp_path / "out", whole)


def test_half_a_line_is_measured_again(script, tmp_path, whole, read):
    """A journal cut off within a line, at its end, within a batch: the same to the bit."""
    content = (whole / "perplexity.journal.jsonl").read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", content)]
    assert len(ends) == 3 * sum(WINDOWS.values())
    out = tmp_path / "out"
    last = len(ends) - 1
    for cut in (ends[2] - 1, ends[last - 9], ends[last - 5] + 30, ends[last] - 1, ends[last]):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "perplexity.journal.jsonl").write_bytes(content[:cut])
        read.clear()
        assert script("perplexity", *RUN).code == 0
        left = sum(end > cut for end in ends)  # and what shares a batch with these
        assert left <= sum(read.values()) <= left + 3
        assert_same_results(out, whole)
        for line in (out / "perplexity.journal.jsonl").read_bytes().split(b"\n")[:-1]:
            assert {"key", "value"} == json.loads(line).keys()


KILLED = """
import os, signal, sys
import evaluate
from evaluation.harness import Journal
write, left = Journal.__setitem__, [int(sys.argv[1])]

def counted(self, what, value):
    left[0] -= 1
    if not left[0]:
        with self.path.open("a") as file:
            file.write('{"key": "ha')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    write(self, what, value)

Journal.__setitem__ = counted
evaluate.main(sys.argv[2:])
"""


def test_killed(script, checkpoint, data, tmp_path, whole, read):
    argv = ("--model", checkpoint, "--data", data, "--out", tmp_path / "out", "--device", "cpu")
    command = [sys.executable, "-c", KILLED, "30", "perplexity", *map(str, (*argv, *RUN))]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    journal = tmp_path / "out/perplexity.journal.jsonl"
    assert journal.read_text().count("\n") == 29
    assert script("perplexity", *RUN).code == 0
    left = 3 * sum(WINDOWS.values()) - 29
    assert left <= sum(read.values()) <= left + 3
    assert_same_results(tmp_path / "out", whole)


def rewritten(data, folder):
    folder.mkdir()
    for name in SIZES:
        tokens = np.fromfile(data / f"{name}.bin", np.uint16)
        tokens[30] ^= 1
        tokens.tofile(folder / f"{name}.bin")
    return ("--data", folder)


CHANGES = {
    "window": ("--window", 20),
    "sinks": ("--sinks", 3),
    "ratio": ("--ratio", 0.25),
    "recent": ("--recent", 1),
    "dtype": ("--dtype", "bfloat16"),
    "lengths": ("--lengths", "40,60"),
    "model": (),
    "data": (),
}


@pytest.mark.parametrize("what", CHANGES)
def test_nothing_stale_is_reused(script, checkpoint, data, tmp_path, read, what):
    """What changes a value changes its key; and what was known before still is."""
    flags, more = (*SLOTS, "--lengths", 60, "--limit", 1), CHANGES[what]
    models = [tmp_path / "low", tmp_path / ("other" if what == "model" else "low")]
    weights = load_model(checkpoint, torch.bfloat16)  # the same numbers in every dtype
    save_model(weights, models[0], load_tokenizer(checkpoint))
    if what == "model":
        weights.layers[1].mlp.down_proj.weight.data[0, 0] += 0.5
        save_model(weights, models[1], load_tokenizer(checkpoint))
    if what == "data":
        more = rewritten(data, tmp_path / "data")
    assert script("perplexity", *flags, model=models[0]).code == 0
    first, before = results(tmp_path / "out"), sum(read.values())
    assert script("perplexity", *flags, *more, model=models[1]).code == 0
    assert sum(read.values()) == 2 * before == 12
    changed = results(tmp_path / "out")
    for one, two in zip(first, changed, strict=False):
        assert one["strategy"] != "freqkv" or one["perplexity"] != two["perplexity"]
    assert script("perplexity", *flags, model=models[0]).code == 0
    assert sum(read.values()) == 12
    assert results(tmp_path / "out") == first


def test_token_files_read_at_another_width_are_other_texts(script, tmp_path, read):
    draw = np.random.default_rng(0)
    draw.integers(3, 400, 200).astype(np.uint32).tofile(tmp_path / "x.bin")
    flags = *SLOTS, "--data", tmp_path / "x.bin", "--lengths", 60, "--limit", 1
    values = set()
    for width in ("uint16", "uint32"):
        assert script("perplexity", *flags, "--bin-dtype", width).code == 0
        values.add(results(tmp_path / "out")[0]["perplexity"])
    assert (len(values), sum(read.values())) == (2, 6)


# Bad input


def file(name, content, *more):
    """A bad data file: made in the test's folder, given as --data."""

    def make(folder):
        (folder / name).write_bytes(content)
        return ("--data", folder / name, *more)

    return make


def flags(*given):
    return lambda folder: given


def tokens(count, dtype=np.uint16, most=400):
    return (np.arange(count) % (most - 3) + 3).astype(dtype).tobytes()


def folder_of_nothing(folder):
    (folder / "empty").mkdir()
    return "--data", folder / "empty"


def out_is_a_file(folder):
    (folder / "file").write_text("mine")
    return "--out", folder / "file"


def out_below_a_file(folder):
    (folder / "file").write_text("mine")
    return "--out", folder / "file/below"


def journal(content):
    def make(folder):
        (folder / "other").mkdir()
        (folder / "other/perplexity.journal.jsonl").write_bytes(content)
        return "--out", folder / "other"

    return make


BAD = {
    "empty": (file("x.txt", b""), "x.txt: was empty, must hold text or tokens"),
    "no tokens": (file("x.txt", "\ufeff".encode()), "has"),
    "short text": (
        file("x.txt", b"a few words"),
        r"--lengths: was 16 tokens, but the longest text, x.txt, has \d+; must be at most that",
    ),
    "short tokens": (
        file("x.bin", tokens(15)),
        "--lengths: was 16 tokens, but the longest text, x.bin, has 15",
    ),
    "beyond the text": (
        flags("--lengths", "20,301"),
        "--lengths: was 301 tokens, but the longest text, long.bin, has 300; must be at most that",
    ),
    "far beyond": (flags("--lengths", "1000000000"), "--lengths: was 1000000000 tokens"),
    "not UTF-8": (file("x.txt", b"words \xff" * 99), "x.txt: was not UTF-8 at byte 6"),
    "binary": (file("x.png", b"\x89PNG\r\n\x1a\n" * 99), "x.png: was not UTF-8 at byte 0"),
    "no file": (flags("--data", "no/such"), "no/such held no file with content"),
    "no name": (flags("--data", ""), "--data: was '', must be"),
    "folder of nothing": (folder_of_nothing, "empty/.* held no file with content"),
    "half a token": (
        file("x.bin", tokens(99) + b"x"),
        "x.bin: was 199 bytes, must be whole uint16",
    ),
    "beyond the vocabulary": (
        file("x.bin", tokens(999, most=500)),
        "x.bin: held id 499 as uint16, must be below the vocabulary, 400",
    ),
    "one token": (file("x.bin", b"\3\0"), "the longest text, x.bin, has 1"),
    "uint32 as uint16": (
        file("x.bin", tokens(99, np.uint32)),
        "x.bin: was uint32, every second id 0 as uint16; must have --bin-dtype",
    ),
    "uint16 as uint32": (
        file("x.bin", tokens(100), "--bin-dtype", "uint32"),
        r"x.bin: held id \d+ as uint32, must be below the vocabulary, 400",
    ),
    "half a wide token": (
        file("x.bin", tokens(101), "--bin-dtype", "uint32"),
        "x.bin: was 202 bytes, must be whole uint32 tokens",
    ),
    "width": (flags("--bin-dtype", "int8"), "--bin-dtype"),
    "no length": (flags("--lengths", ""), "--lengths: was '', must be a whole number, 2 or more"),
    "length of one": (flags("--lengths", "1"), "--lengths: was '1', must be a whole number, 2"),
    "one length of one": (flags("--lengths", "64,1"), "--lengths: was '1'"),
    "length in words": (flags("--lengths", "a,b"), "--lengths: was 'a'"),
    "length as a float": (flags("--lengths", "1e3"), "--lengths: was '1e3'"),
    "half a list": (flags("--lengths", "64,"), "--lengths: was ''"),
    "no strategy": (flags("--strategies", ""), "--strategies: was '', must be of full, freqkv"),
    "unknown strategy": (flags("--strategies", "full,half"), "--strategies: was 'half', must be"),
    "a strategy twice": (
        flags("--strategies", "full,freqkv,full"),
        "--strategies: was full twice, must be once",
    ),
    "limit": (flags("--limit", "-1"), "--limit: was '-1'"),
    "stride": (flags("--stride", "0"), "--stride: was '0'"),
    "batch": (flags("--batch-size", "0"), "--batch-size: was '0'"),
    "chunk": (flags("--chunk", "0"), "--chunk: was '0'"),
    "ratio": (flags("--ratio", "1"), r"ratio: was 1.0, must be a number in \[0, 1\)"),
    "ratio in words": (flags("--ratio", "half"), "--ratio"),
    "ratio that is none": (flags("--ratio", "nan"), "--ratio: was 'nan', must be a number"),
    "narrow window": (flags("--window", "2"), "sinks . recent: was 2, must be below window, 2"),
    "wide window": (flags("--window", "65"), "--window: was 65, must be at most the model's 64"),
    "no span": (flags("--recent", "14"), "sinks . recent: was 16, must be below window, 16"),
    "no model": (flags("--model", "no/such"), "no/such"),
    "no adapter": (flags("--adapter", "no/such"), "no/such"),
    "no device": (flags("--device", "cuda:99"), "--device: was 'cuda:99'"),
    "no dtype": (flags("--dtype", "int4"), "--dtype"),
    "no such flag": (flags("--no-such-flag"), "--no-such-flag"),
    "out is a file": (out_is_a_file, "--out: .*file: .* must be a folder, or new"),
    "out below a file": (out_below_a_file, "--out: .*below: Not a directory, must be a folder"),
    "journal of words": (
        journal(b"words\n"),
        "journal.jsonl: line 1 was b'words', must be a record; move the file away",
    ),
    "journal of bytes": (journal(b"{}\n\xff\n"), "journal.jsonl: line 1 was b'{}', must be"),
    "journal of lists": (journal(b"[1]\n"), r"journal.jsonl: line 1 was b'\[1\]', must be"),
    "journal of zeros": (journal(b"\0\0\0\n"), "journal.jsonl: line 1 was"),
}
BAD_GRID = {
    "ratio": (flags("--ratio", "0.5"), "--ratio: was given, must be --ratios for ablate"),
    "sinks": (flags("--sinks", "2"), "--sinks: was given, must be --sink-counts for ablate"),
    "recent": (flags("--recent", "0"), "--recent: was given, must be --recents for ablate"),
    "ratios": (flags("--ratios", "0.5,1"), r"ratio: was 1.0, must be a number in \[0, 1\)"),
    "ratios beyond": (flags("--ratios", "0.5,2"), "--ratios: was '2'"),
    "no ratios": (flags("--ratios", ""), "--ratios: was ''"),
    "sink counts": (flags("--sink-counts", "0,16"), "must be below window, 16"),
    "recents": (flags("--recents", "0,99"), "must be below window, 16"),
    "recents in words": (flags("--recents", "a"), "--recents: was 'a'"),
    "two lengths": (flags("--lengths", "40,60"), r"--lengths: was \[40, 60\], must be one for"),
    "short text": (
        file("x.bin", tokens(63)),
        "--lengths: was 64 tokens, but the longest text, x.bin, has 63",
    ),
    "full alone": (flags("--strategies", "full"), "--strategies: was full alone, must have"),
}


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(ran, says):
    assert ran.code == 2
    assert re.fullmatch(r"evaluate\.py( \w+)?: error: .*\n", ran.err), ran.err  # one line
    assert re.search(says, ran.err), ran.err


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(script, tmp_path, whole, read, name):
    """Told before anything is read, at no cost to the results of another run."""
    make, says = BAD[name]
    shutil.copytree(whole, tmp_path / "out")
    wrong = make(tmp_path)
    before = snapshot(tmp_path)
    fails(script("perplexity", *SLOTS, *wrong), says)
    assert snapshot(tmp_path) == before
    assert not read


@pytest.mark.parametrize("name", BAD_GRID)
def test_bad_input_to_the_grid_is_one_line(script, tmp_path, read, name):
    make, says = BAD_GRID[name]
    fails(script("ablate", "--window", 16, *make(tmp_path)), says)
    assert not read


def test_no_measurement_or_an_unknown_one(script):
    fails(script("perplexities"), "invalid choice: 'perplexities'")
    with pytest.raises(SystemExit):
        evaluate.main([])


def test_without_matplotlib_a_picture_is_refused_at_once(script, tmp_path, monkeypatch, read):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    says = "--plot: matplotlib was not found: pip install matplotlib"
    fails(script("perplexity", *SLOTS, "--plot"), says)
    assert not read
    assert not (tmp_path / "out").exists()
    assert script("perplexity", *SLOTS, "--lengths", 20).code == 0


def test_a_folder_that_cannot_be_written(script, tmp_path, read):
    (tmp_path / "out").mkdir(mode=0o555)
    if os.access(tmp_path / "out", os.W_OK):
        pytest.skip("root may write anywhere")
    fails(script("perplexity", *SLOTS), "cannot be written")
    (tmp_path / "out").chmod(0o755)
    (tmp_path / "out/perplexity.journal.jsonl").touch(mode=0o444)
    fails(script("perplexity", *SLOTS), "Permission denied")
    assert not read


def test_a_full_disk_costs_nothing(script, tmp_path, whole, read, monkeypatch):
    """A journal that cannot grow, and a line of it that is half there: one line, and it goes on."""
    write, left = harness.Journal.__setitem__, [9]

    def full(self, what, value):
        left[0] -= 1
        if left[0] == 0:
            with self.path.open("a") as out:
                out.write('{"key": "')
            raise OSError(28, "No space left on device")
        write(self, what, value)

    monkeypatch.setattr(harness.Journal, "__setitem__", full)
    ran = script("perplexity", *RUN)
    assert (ran.code, "No space left on device" in ran.err.split("\n")[-2]) == (2, True)
    assert "Traceback" not in ran.err
    assert script("perplexity", *RUN).code == 0
    assert_same_results(tmp_path / "out", whole)
    assert sum(read.values()) <= 3 * sum(WINDOWS.values()) + 4


# Constant memory


MEASURED = """
import sys
import torch
torch.set_num_threads(1)
import cli, evaluate
evaluate.main(sys.argv[1:])
print("peak", cli.peak_memory(torch.device("cpu"))[0])
"""


@pytest.mark.slow
def test_peak_memory_does_not_depend_on_the_text(tmp_path):
    """The process that reads 8 times the text, 131,072 tokens, peaks within 5 % of the other."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 512}
    tiny_checkpoint(tmp_path / "model", **sizes)
    np.frombuffer(tokens(1 << 17), np.uint16).tofile(tmp_path / "x.bin")
    argv = ["perplexity", "--model", tmp_path / "model", "--data", tmp_path / "x.bin"]
    argv += ["--window", 512, "--strategies", "freqkv,window", "--limit", 1]
    peaks = []
    for length in (1 << 14, 1 << 17):
        more = "--lengths", length, "--out", tmp_path / str(length)
        command = [sys.executable, "-c", MEASURED, *map(str, (*argv, *more))]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
        peaks.append(int(re.search(r"peak (\d+)", ran.stdout)[1]))
        assert [r["tokens"] for r in results(tmp_path / str(length))] == [length - 1] * 2
    assert abs(peaks[1] / peaks[0] - 1) < 0.05
