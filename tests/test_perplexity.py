"""experiments/perplexity.py and ablation.py: figures, tables, pictures, going on, every bad input.

Run: pytest tests/test_perplexity.py
"""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from experiments import ablation, harness, perplexity
from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig
from model import causal_attention
from tests.helpers import ROOT, tiny_checkpoint
from weights import load_model, load_tokenizer

SCHEDULE = FreqKVConfig(window=16, sinks=2)
SLOTS = ("--window", 16, "--sinks", 2)
GRID = ("--window", 16, "--ratios", "0.25,0.5", "--sink-counts", "0,2", "--recents", "0,4")
SIZES = {"long": 300, "short": 110}  # tokens of the two texts
ALL = ",".join(harness.STRATEGIES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two texts as token files of uint16."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for name, size in SIZES.items():
        draw.integers(3, 400, size).astype(np.uint16).tofile(folder / f"{name}.bin")
    return folder


@pytest.fixture
def script(checkpoint, data, tmp_path, outcome):
    """Run a measurement in this process; its exit code, stdout and stderr."""

    def run(*flags, module=perplexity):
        where = ["--model", checkpoint, "--data", data, "--out", tmp_path / "out"]
        return outcome(module, *where, "--device", "cpu", *flags)

    return run


@pytest.fixture
def read(monkeypatch):
    """Counts the windows that were read, by what held the past and by their length."""
    counts = Counter()
    losses = harness.token_losses

    def count(model, tokens, cache, *more):
        name = cache.operator.__name__ if isinstance(cache, FreqKVCache) else "full"
        counts[name, tokens.shape[1]] += len(tokens)
        return losses(model, tokens, cache, *more)

    monkeypatch.setattr(harness, "token_losses", count)
    return counts


def results(folder, name="perplexity"):
    return json.loads((folder / f"{name}.json").read_text())


def tokens_of(file):
    return torch.from_numpy(np.fromfile(file, np.uint16).astype(np.int64))


def attention(name, schedule=SCHEDULE):
    """The parallel form of a strategy."""
    if name == "full":
        return causal_attention
    return FreqKVAttention(schedule, harness.OPERATORS[name])


def expected_losses(model, tokens, attend):
    """The losses of tokens [T] by the parallel form: [T - 1] float64."""
    with torch.no_grad():
        shares = model(tokens[None], attend)[0].double().log_softmax(-1)
    return -shares[:-1].gather(1, tokens[1:, None])[:, 0]


def expected_windows(model, data, attend, length, stride):
    """The losses of all windows of a length: [windows, length - 1]."""
    rows = []
    for name in SIZES:
        tokens = tokens_of(data / f"{name}.bin")
        for start in range(0, len(tokens) - length + 1, stride):
            rows.append(expected_losses(model, tokens[start : start + length], attend))
    return torch.stack(rows)


# Perplexity


def test_perplexity_equals_that_of_the_parallel_form(script, model, data, tmp_path):
    """Of every strategy, at lengths within and beyond the slots and the model's 64 positions."""
    flags = ("--lengths", "40,200,110,10", "--stride", 90, "--strategies", ALL)
    ran = script(*SLOTS, *flags, "--layer-ratios", "0.25,0.75")
    assert ran.code == 0, ran.err
    records = results(tmp_path / "out")
    names = [*harness.STRATEGIES, "by-layer"]
    order = [(name, length) for name in names for length in (10, 40, 110, 200)]
    assert [(record["strategy"], record["length"]) for record in records] == order
    layers = [attention("freqkv", FreqKVConfig(16, 2, ratio)) for ratio in (0.25, 0.75)]
    values = {}
    for record in records:
        name, length = record["strategy"], record["length"]
        if name == "by-layer":
            attend = lambda layer, *rest: layers[layer](layer, *rest)  # noqa: E731
            settings = SCHEDULE.__dict__ | {"ratio": [0.25, 0.75]}
        else:
            attend = attention(name)
            settings = {} if name == "full" else SCHEDULE.__dict__
        losses = expected_windows(model, data, attend, length, 90)
        perplexity = losses.mean().exp().item()
        assert record["perplexity"] == pytest.approx(perplexity, rel=1e-5)
        assert record["windows"] == len(losses)
        assert {x: record[x] for x in SCHEDULE.__dict__ if x in record} == settings
        if record["ci95"] is None:
            assert (record["documents"], length) == (1, 200)
        else:
            assert record["ci95"][0] < perplexity < record["ci95"][1]
        values[name, length] = record["perplexity"]
        assert values[name, 10] == pytest.approx(values["full", 10], rel=1e-4)  # within the slots
    beyond = {round(values[name, 110], 3) for name in names}
    assert len(beyond) == len(names)  # all differ


def test_the_paper_has_a_window_every_256_tokens():
    args = perplexity.make_parser().parse_args([])
    assert (args.stride, args.limit, args.bos) == (256, 0, True)


def test_the_table(script):
    ran = script(*SLOTS, "--lengths", "16,200", "--strategies", "freqkv,window", "--limit", 1)
    said, head, one, two = ran.out.split("\n")[:4]
    assert said == "2 windows of 2 texts; 432 tokens in all"
    assert head.split() == ["perplexity", "±95%", "16", "200"]
    assert re.fullmatch(r"freqkv +[\d.]+ ±[\d.]+ +[\d.]+", one)
    assert re.fullmatch(r"window +[\d.]+ ±[\d.]+ +[\d.]+", two)


@pytest.mark.parametrize("more", [("--batch-size", 1), ("--batch-size", 7), ("--chunk", 3)])
def test_batches_and_chunks_change_nothing(script, tmp_path, more):
    flags = (*SLOTS, "--lengths", "10,70", "--stride", 40)
    assert script(*flags, "--out", tmp_path / "a").code == 0
    assert script(*flags, "--out", tmp_path / "b", *more).code == 0
    for one, two in zip(results(tmp_path / "a"), results(tmp_path / "b"), strict=True):
        assert one.pop("perplexity") == pytest.approx(two.pop("perplexity"), rel=1e-4)
        assert one.pop("ci95") == pytest.approx(two.pop("ci95"), rel=1e-3)
        assert one == two


def test_perplexity_by_position(script, model, data, tmp_path):
    """Against the losses of the longest windows, token by token; and in 64 stretches."""
    assert script(*SLOTS, "--lengths", "10,50", "--stride", 60).code == 0
    points = results(tmp_path / "out", "perplexity_by_position")
    for name in ("full", "freqkv", "window"):
        own = [point for point in points if point["strategy"] == name]
        assert [(p["tokens_from"], p["tokens_to"]) for p in own] == [(i, i) for i in range(1, 50)]
        expected = expected_windows(model, data, attention(name), 50, 60).mean(0)
        losses = torch.tensor([point["loss"] for point in own]).double()
        assert_close(losses, expected, rtol=1e-4, atol=0)
    assert script(*SLOTS, "--lengths", 300, "--strategies", "freqkv").code == 0
    own = results(tmp_path / "out", "perplexity_by_position")
    assert [p["tokens_from"] for p in own] == [1, *(p["tokens_to"] + 1 for p in own[:-1])]
    assert (len(own), own[-1]["tokens_to"]) == (64, 299)
    assert {p["tokens_to"] - p["tokens_from"] + 1 for p in own} == {4, 5}


@pytest.mark.parametrize("flag", [None, "--bos", "--no-bos"])
def test_a_text_begins_with_the_token_of_a_beginning(script, checkpoint, model, tmp_path, flag):
    """Once, before the first window; unless --no-bos."""
    text = "def compress(x, keep):\n    return x  # once upon a time\n" * 5
    (tmp_path / "text.txt").write_text(text)
    ids = load_tokenizer(checkpoint).encode(text, bos=flag != "--no-bos")
    flags = [*SLOTS, "--data", tmp_path / "text.txt", "--lengths", 20, "--stride", 20]
    assert script(*flags, *([] if flag is None else [flag]), "--strategies", "freqkv").code == 0
    [record] = results(tmp_path / "out")
    losses = []
    for start in range(0, len(ids) - 19, 20):
        window = torch.tensor(ids[start : start + 20])
        losses.append(expected_losses(model, window, attention("freqkv")))
    assert record["perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-5)
    settings = results(tmp_path / "out", "perplexity.settings")["settings"]
    assert settings["bos"] == (flag != "--no-bos")
    assert (settings["device"], settings["dtype"]) == ("cpu", "float32")  # as they were resolved


# The grid


def test_the_grid(script, model, data, tmp_path):
    flags = (*GRID, "--strategies", "full,freqkv,high", "--stride", 100)
    ran = script(*flags, module=ablation)
    assert ran.code == 0, ran.err
    records = results(tmp_path / "out", "ablation")
    grid = set()
    for record in records:
        assert record["length"] == 64  # four windows
        settings = {name: record.get(name) for name in ("ratio", "sinks", "recent")}
        grid.add((record["strategy"], *settings.values()))
        attend = causal_attention
        if record["strategy"] != "full":
            attend = attention(record["strategy"], FreqKVConfig(16, **settings))
        expected = expected_windows(model, data, attend, 64, 100).mean().exp().item()
        assert record["perplexity"] == pytest.approx(expected, rel=1e-5)
        row = [record["strategy"], *(str(x) for x in settings.values() if x is not None)]
        assert re.search(rf"^{' +'.join(row)} +{record['perplexity']:.2f} ±", ran.out, re.M)
    assert len(records) == len(grid) == 1 + 2 * 8
    assert ("full", None, None, None) in grid


def test_the_grid_by_default(script, tmp_path):
    flags = ("--window", 16, "--strategies", "window", "--lengths", 20, "--limit", 1)
    assert script(*flags, module=ablation).code == 0
    grid = {(r["ratio"], r["sinks"], r["recent"]) for r in results(tmp_path / "out", "ablation")}
    assert grid == {(a, b, c) for a in (0.25, 0.5, 0.75) for b in (0, 4) for c in (0, 2, 4, 8)}


# Pictures


@pytest.fixture
def figure():
    return pytest.importorskip("matplotlib.figure").Figure(layout="constrained")


def test_pictures(script, tmp_path):
    pytest.importorskip("matplotlib")
    assert script(*SLOTS, "--lengths", "16,64,200", "--limit", 1, "--plot").code == 0
    assert script(*GRID, "--limit", 1, "--plot", module=ablation).code == 0
    for name in ("perplexity", "perplexity_by_position", "ablation"):
        assert (tmp_path / f"out/{name}.png").stat().st_size > 10_000


def test_perplexity_by_length_is_drawn(figure):
    heights = {"full": [5.0, 9.0, 90.0], "freqkv": [5.0, 5.5, 5.6]}
    records = []
    for name, values in heights.items():
        for length, value in zip((16, 32, 64), values, strict=True):
            records.append({"strategy": name, "length": length, "perplexity": value})
    perplexity.draw_lengths(figure, records)
    [axes] = figure.axes
    for line, (name, values) in zip(axes.lines, heights.items(), strict=True):
        assert line.get_label() == name
        assert list(line.get_xdata()) == [16, 32, 64]
        assert list(line.get_ydata()) == values
    assert axes.get_title() == "cut off at 11.1; the highest is 90"
    assert axes.get_xlabel() == "length of text (tokens)"
    assert list(axes.get_xticks()) == [16, 32, 64]


def test_the_curve_by_place_shows_the_gap_to_the_best(figure):
    losses = {
        "full": [2, 3, 3, 90],
        "freqkv": [2, 3, 3.5, 3.25],
        "window": [2, 3, 3.25, 3.0],
    }
    points = []
    for name, values in losses.items():
        for i, y in enumerate(values):
            ends = {"tokens_from": 1 + 4 * i, "tokens_to": 4 + 4 * i}
            points.append({"strategy": name, "loss": y} | ends)
    perplexity.draw_positions(figure, points)
    upper, lower = figure.axes
    assert [line.get_ydata().tolist() for line in upper.lines] == [*losses.values()]
    gaps = [[0, 0, -0.25, 87], [0, 0, 0.25, 0.25], [0, 0, 0, 0]]
    assert [line.get_ydata().tolist() for line in lower.lines] == gaps
    assert list(lower.lines[0].get_xdata()) == [2.5, 6.5, 10.5, 14.5]
    assert lower.get_ylabel() == "above window (nats a token)"
    assert lower.get_ylim() == (-0.25, 1)  # of the gaps that there are, 4 times the median
    figure.clear()
    perplexity.draw_positions(figure, points[:4])
    [axes] = figure.axes
    assert axes.get_xlabel() == "place in the text (tokens)"
    assert axes.get_ylabel() == "loss (nats a token)"


def test_panels_of_the_grid(figure):
    records = [{"strategy": "full", "perplexity": 900.0}]
    for name in ("window", "freqkv"):
        for ratio in (0.5, 0.25):
            for recent in (8, 0):
                settings = {"ratio": ratio, "sinks": 4, "recent": recent}
                record = {"strategy": name, "perplexity": 5 + ratio + recent}
                records.append(record | settings)
    ablation.draw_grid(figure, records)
    assert [x.get_title() for x in figure.axes] == ["freqkv, 4 sinks", "window, 4 sinks"]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["ratio 0.25", "ratio 0.5"]
        assert list(axes.lines[0].get_xdata()) == [0, 8]
        assert list(axes.lines[0].get_ydata()) == [5.25, 13.25]
    assert figure.axes[0].get_ylabel() == "perplexity a token (full: 900)"
    figure.clear()
    records[0]["perplexity"] = 12.0  # near enough for a line across
    ablation.draw_grid(figure, records)
    assert list(figure.axes[0].lines[2].get_ydata()) == [12, 12]


# Stopped and resumed

RUN = (*SLOTS, "--lengths", "10,40,200", "--stride", 20, "--batch-size", 4)
WINDOWS = {10: 1 + 2, 40: 8 + 4, 200: 6 + 0}  # to be read, by their longest length
COUNT = 3 * sum(WINDOWS.values())  # by three strategies


@pytest.fixture(scope="module")
def whole(checkpoint, data, tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    flags = ["--model", checkpoint, "--data", data, "--out", out, "--device", "cpu", *RUN]
    perplexity.main([str(flag) for flag in flags])
    return out


def assert_same_results(out, whole):
    for name in ("perplexity.json", "perplexity_by_position.json", "perplexity.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_what_is_known_is_not_read_again(script, tmp_path, whole, read):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "perplexity.json").unlink()
    assert script(*RUN).code == 0
    assert not read
    assert_same_results(out, whole)
    assert script(*RUN, "--strategies", "window,average").code == 0
    assert read == {("average", length): count for length, count in WINDOWS.items()}
    read.clear()
    assert script(*RUN, "--stride", 40, "--strategies", "full").code == 0
    assert script(*RUN, "--chunk", 99).code == 0
    assert not read  # some of the same windows; and no more than the last digits differ


@pytest.mark.parametrize(
    "change", [("--window", 20), ("--sinks", 3), ("--ratio", 0.25), ("--recent", 1)]
)
def test_another_schedule_is_read_anew(script, tmp_path, whole, read, change):
    """But full attention, which has none."""
    shutil.copytree(whole, tmp_path / "out")
    assert script(*RUN, *change).code == 0
    names = ("lowband", "newest")
    assert read == {(name, length): n for name in names for length, n in WINDOWS.items()}


def test_other_texts_are_read_anew(script, data, tmp_path, whole, read):
    shutil.copytree(whole, tmp_path / "out")
    shutil.copytree(data, tmp_path / "data")
    tokens = np.fromfile(data / "long.bin", np.uint16)
    tokens[30] ^= 1
    tokens.tofile(tmp_path / "data/long.bin")
    assert script(*RUN, "--data", tmp_path / "data").code == 0
    assert sum(read.values()) == COUNT


def test_half_a_line_is_measured_again(script, tmp_path, whole, read):
    """A journal cut off within a line, within a batch: the same to the bit."""
    lines = (whole / "perplexity.journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == COUNT
    out = tmp_path / "out"
    for count in (2, COUNT - 10, COUNT - 1):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        content = b"".join(lines[:count]) + lines[count][:30]
        (out / "perplexity.journal.jsonl").write_bytes(content)
        read.clear()
        assert script(*RUN).code == 0
        left = COUNT - count  # and what shares a batch with these
        assert left <= sum(read.values()) <= left + 3
        assert_same_results(out, whole)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)  # as in the tests
from experiments import perplexity
from experiments.report import Journal
write, left = Journal.__setitem__, [30]

def write_or_die(self, key, value):
    left[0] -= 1
    if left[0] == 0:
        with self.path.open("a") as file:
            file.write('{"key": "ha')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    write(self, key, value)

Journal.__setitem__ = write_or_die
perplexity.main(sys.argv[1:])
"""


def test_killed(script, checkpoint, data, tmp_path, whole, read):
    out = tmp_path / "out"
    flags = ["--model", checkpoint, "--data", data, "--out", out, "--device", "cpu", *RUN]
    command = [sys.executable, "-c", KILLED, *(str(flag) for flag in flags)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    journal = out / "perplexity.journal.jsonl"
    assert journal.read_text().count("\n") == 29
    assert script(*RUN).code == 0
    assert COUNT - 29 <= sum(read.values()) <= COUNT - 29 + 3
    assert_same_results(out, whole)


# Bad input

BAD = {
    ("--lengths", "20,301"): "--lengths: was 301 tokens, but the longest text, long.bin, has 300",
    ("--lengths", ""): "--lengths: was '', must be a whole number, 2 or more",
    ("--limit", "-1"): "--limit: was '-1'",
    ("--stride", "0"): "--stride: was '0'",
    ("--batch-size", "0"): "--batch-size: was '0'",
    ("--chunk", "0"): "--chunk: was '0'",
    ("--window", "65"): "--window: was 65, must be at most the model's 64",
    ("--model", "no/such"): "no/such",
    ("--data", "no/such"): "no/such held no file with content",
    ("--layer-ratios", "0.5"): "--layer-ratios: were 1, must be 2, as many as layers",
    ("--layer-ratios", "0.5,1"): "--layer-ratios: was '1', must be a number",
    ("--out", "FILE"): "--out: .*: File exists, must be a folder, or new",
    ("--data", "FILE"): "file: was not UTF-8 at byte 6, must be text",
}
BAD_GRID = {
    ("--ratio", "0.5"): "--ratio: was given, must be --ratios here",
    ("--sinks", "0"): "--sinks: was given, must be --sink-counts here",
    ("--recent", "0"): "--recent: was given, must be --recents here",
    ("--ratios", "0.5,1"): "--ratios: was '1', must be a number, 0 or more, below 1",
    ("--sink-counts", "0,16"): "must be below window, 16",
    ("--lengths", "40,60"): r"--lengths: was \[40, 60\], must be one",
    ("--strategies", "full"): "--strategies: was full alone, must have one with slots",
}


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_fails(ran, says):
    assert ran.code == 2
    assert re.fullmatch(r"\S+: error: .*\n", ran.err), ran.err  # one line
    assert re.search(says, ran.err), ran.err


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(script, tmp_path, whole, read, flags):
    """Told before anything is read, at no cost to the results of another run."""
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "file").write_bytes(b"words \xff")
    before = snapshot(tmp_path)
    given = [tmp_path / "file" if flag == "FILE" else flag for flag in flags]
    assert_fails(script(*SLOTS, *given), BAD[flags])
    assert snapshot(tmp_path) == before
    assert not read


@pytest.mark.parametrize("flags", BAD_GRID)
def test_bad_input_to_the_grid_is_one_line(script, read, flags):
    assert_fails(script("--window", 16, *flags, module=ablation), BAD_GRID[flags])
    assert not read


def test_without_matplotlib_a_picture_is_refused_at_once(script, tmp_path, monkeypatch, read):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_fails(script(*SLOTS, "--plot"), "pictures: matplotlib was not found: pip install")
    assert_fails(script(*GRID, "--plot", module=ablation), "pictures: matplotlib was not found")
    assert not (tmp_path / "out").exists()
    assert script(*SLOTS, "--lengths", 20, "--limit", 1).code == 0


# Constant memory

MEASURED = """
import sys
import torch
torch.set_num_threads(1)
import cli
from experiments import perplexity
perplexity.main(sys.argv[1:])
print("peak", cli.peak_memory(torch.device("cpu"))[0])
"""


@pytest.mark.slow
def test_peak_memory_does_not_depend_on_the_text(tmp_path):
    """The process that reads 8 times the text, 65,536 tokens, peaks within 5 % of the other."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 512}
    tiny_checkpoint(tmp_path / "model", **sizes)
    tokens = np.arange(1 << 16) % 397 + 3
    tokens.astype(np.uint16).tofile(tmp_path / "x.bin")
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "x.bin", "--device", "cpu"]
    flags += ["--window", 512, "--strategies", "freqkv", "--limit", 1]
    peaks = []
    for length in (1 << 13, 1 << 16):
        more = ["--lengths", length, "--out", tmp_path / str(length)]
        command = [sys.executable, "-c", MEASURED, *(str(flag) for flag in [*flags, *more])]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
        peaks.append(int(re.search(r"peak (\d+)", ran.stdout)[1]))
        assert [r["tokens"] for r in results(tmp_path / str(length))] == [length - 1]
    assert abs(peaks[1] / peaks[0] - 1) < 0.05
