"""experiments/spectrum.py: known spectra, errors by hand, a ratio for each layer, bad input.

Run: pytest tests/test_spectrum.py
"""

import json
import math
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import scipy.fft
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from experiments import spectrum
from experiments.harness import OPERATORS
from freqkv import FreqKVAttention, FreqKVConfig
from model import causal_attention
from tests.helpers import ROOT, plain_rope, random_qkv, random_tokens, tiny_checkpoint, tiny_model

N = 48  # samples of a signal
D = 6  # channels


def cosine(frequency):
    """The DCT's own basis function, in every channel: [N, D]."""
    angles = torch.pi * frequency * (2 * torch.arange(N, dtype=torch.float64) + 1) / (2 * N)
    return angles.cos()[:, None].expand(N, D)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# Known spectra


@pytest.mark.parametrize("frequency", [0, 1, 7, N - 1])
def test_a_cosine_lands_at_its_frequency(frequency):
    energy = spectrum.energies(3 * cosine(frequency))
    assert energy.argmax() == frequency
    assert energy[frequency] / energy.sum() > 1 - 1e-6
    assert_close(energy.sum().item(), 9 * D * N / (1 if frequency == 0 else 2), rtol=1e-5, atol=0)


def test_white_noise_is_flat():
    energy = spectrum.energies(noise(4000, N, D)).mean(0)  # a mean of 24000 squares of variance 2
    assert_close(energy, torch.full((N,), float(D)), rtol=5 * (2 / 24_000) ** 0.5, atol=0)
    assert spectrum.measure_band(energy.numpy(), 90) == pytest.approx(0.9, abs=1.5 / N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energy_is_that_of_scipy(dtype):
    x = noise(2, 3, N, D).to(dtype)
    energy = spectrum.energies(x)
    expected = scipy.fft.dct(x.double().numpy(), type=2, norm="ortho", axis=-2) ** 2
    assert_close(energy.double().numpy(), expected.sum(-1), rtol=1e-4, atol=1e-4)
    assert_close(energy.sum(-1), x.float().square().sum((-2, -1)), rtol=1e-5, atol=0)  # Parseval


# Bands and errors


@pytest.mark.parametrize(
    ("energy", "percent", "expected"),
    [
        ([8, 1, 1, 0], 80, 1 / 4),
        ([8, 1, 1, 0], 81, 2 / 4),
        ([8, 1, 1, 0], 90, 2 / 4),
        ([8, 1, 1, 0], 95, 3 / 4),
        ([0, 0, 0, 5], 90, 4 / 4),
        ([1] * 100, 95, 0.95),
        ([0, 0, 0, 0], 99, 1 / 4),
    ],
)
def test_band(energy, percent, expected):
    assert spectrum.measure_band(np.array(energy, float), percent) == expected


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.3, 0.5, 0.99])
def test_error_is_that_of_leaving_high_frequencies_out(ratio):
    x = noise(N, D).cumsum(0).double().numpy()
    band = scipy.fft.dct(x, type=2, norm="ortho", axis=0)
    band[int(ratio * N) :] = 0
    left = scipy.fft.idct(band, type=2, norm="ortho", axis=0)
    expected = np.linalg.norm(left - x) / np.linalg.norm(x)
    energy = spectrum.energies(torch.from_numpy(x)).double().numpy()
    assert spectrum.measure_loss(energy, ratio) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("energy", [[4, 3, 2, 1], [9, 0, 0, 0], [0, 0, 0, 0]])
def test_records_of_a_head(energy):
    heads = np.array([energy, [1, 1, 1, 1]], float)
    records = spectrum.record_heads(heads[None, None].repeat(2, axis=1))
    assert [(r["kind"], r["head"]) for r in records[:3]] == [("key", h) for h in ("all", 0, 1)]
    total, first = sum(energy), records[1]
    assert first["mean_share"] == (energy[0] / total if total else 0)
    assert first["band_90"] == {10: 0.75, 9: 0.25, 0: 0.25}[total]
    assert first["band_90_without_mean"] == {10: 1.0, 9: 1 / 3, 0: 1 / 3}[total]
    assert records[0]["mean_share"] == (energy[0] + 1) / (total + 4)


@pytest.mark.parametrize("n", [2, 40, 65, 200])
def test_bands_cover_all_frequencies_once(n):
    energy = np.random.default_rng(0).random((1, 2, 1, n))
    records = [r for r in spectrum.record_bands(energy) if (r["kind"], r["head"]) == ("value", 0)]
    assert (records[0]["from"], records[0]["to"], records[-1]["to"]) == (0, 1 / n, 1)
    assert all(a["to"] == b["from"] for a, b in pairwise(records))
    assert len(records) == min(n, 65)
    share = energy[0, 1, 0] / energy.sum(-1)[0, 1, 0]
    for r in records:
        start, stop = round(r["from"] * n), round(r["to"] * n)
        assert r["share"] == pytest.approx(share[start:stop].sum())


# A ratio for each layer


def decay(*rates, n=200):
    """Energy [layers, 2, n] that falls off at each rate; 0 is flat."""
    return np.exp(-np.outer(rates, np.arange(n) / n))[:, None].repeat(2, axis=1)


@pytest.mark.parametrize("mean", [0.05, 0.25, 0.5, 0.77, 0.95])
@pytest.mark.parametrize("n", [2, 30, 200, 1001])
def test_suggested_ratios_have_the_mean(mean, n):
    ratios, _ = spectrum.suggest(decay(0, 1, 3, 9, 30, n=n), mean)
    assert np.mean(ratios) == pytest.approx(mean, abs=0.5 / 500)
    assert all(0.05 <= ratio <= 0.95 for ratio in ratios)
    assert ratios == sorted(ratios, reverse=True)  # the flatter, the more


@pytest.mark.parametrize("rate", [0, 3])
def test_equal_layers_get_equal_ratios(rate):
    ratios, held = spectrum.suggest(decay(rate, rate, rate, rate), 0.4)
    assert ratios == [0.4] * 4
    assert np.ptp(held) == 0


def test_suggested_layers_hold_the_same_share():
    energy = decay(0, 2, 5)
    energy[:, :, 0] = [[1e6], [1], [0]]  # the mean does not count
    ratios, held = spectrum.suggest(energy, 0.5)
    assert ratios[0] > 0.6 > ratios[1] > ratios[2] > 0.2
    for layer, ratio, share in zip(energy, ratios, held, strict=True):
        direct = layer[0, 1 : round(ratio * 200)].sum() / layer[0, 1:].sum()
        assert share == pytest.approx(direct, abs=0.01)
    assert np.ptp(held) < 0.03


def test_keys_and_values_count_alike():
    flat, steep = decay(0)[0, 0], decay(9)[0, 0]
    ratios, _ = spectrum.suggest(np.array([[flat, 1e6 * steep], [steep, 1e6 * flat]]), 0.5)
    assert ratios == [0.5, 0.5]


# What is measured in a model


SCHEDULE = FreqKVConfig(window=40, sinks=3, recent=5)


def probe_of(schedule, ratios, names=("freqkv", "window", "distinct")):
    return spectrum.Probe(tiny_model().config, schedule, names, ratios)


def test_probe_is_plain_attention():
    model, tokens = tiny_model(), random_tokens(1, SCHEDULE.window)
    probe = probe_of(SCHEDULE, [0.5])
    with torch.no_grad():
        assert torch.equal(model(tokens, probe), model(tokens, causal_attention))


def test_probe_sees_keys_before_rope_and_values_of_the_span():
    probe = probe_of(SCHEDULE, [0.5])
    expected = np.zeros((2, 2, 32))
    for seed in (0, 1):
        q, k, v = random_qkv(40, batch=1, seed=seed)
        probe(1, q, k, v, plain_rope)
        for kind, x in enumerate((k, v)):
            span = x[0, :, 3:35].double().numpy()
            expected[kind] += (scipy.fft.dct(span, norm="ortho", axis=1) ** 2).sum(-1)
    assert_close(probe.energy[1], expected, rtol=1e-4, atol=1e-4)
    assert not probe.energy[0].any()


@pytest.mark.parametrize("ratios", [[0.25, 0.75], [0.0], [0.9]])
@pytest.mark.parametrize("window", [16, 40])
def test_errors_of_the_output_are_those_of_the_parallel_form(ratios, window):
    probe = probe_of(FreqKVConfig(window, sinks=2, ratio=0.1), ratios)
    differences = {name: np.zeros(len(ratios)) for name in probe.names}
    total = 0.0
    for seed in (0, 1):
        qkv = random_qkv(window, batch=1, seed=seed)
        probe(0, *qkv, plain_rope)
        plain = causal_attention(0, *qkv, plain_rope)[:, :, probe.first :]
        total += plain.square().sum().item()
        for name in probe.names:
            for j, ratio in enumerate(ratios):
                small = FreqKVConfig(probe.first, 2, ratio)
                assert (small.rounds(probe.first), small.rounds(window)) == (0, 1)
                attend = FreqKVAttention(small, OPERATORS[name])
                out = attend(0, *qkv, plain_rope)[:, :, probe.first :]
                differences[name][j] += (out - plain).square().sum().item()
    errors = spectrum.measure_errors(probe)
    assert [*errors] == ["key", "value", *(f"output, {name}" for name in probe.names)]
    for name in probe.names:
        expected = np.sqrt(differences[name] / total)
        assert_close(errors[f"output, {name}"][0], expected, rtol=1e-4, atol=1e-6)
    kept = [spectrum.measure_loss(probe.energy[0, 1].sum(0), ratio) for ratio in ratios]
    assert errors["value"][0].tolist() == kept


@pytest.mark.parametrize("ratio", [0, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("window", [8, 50, 2048])
@pytest.mark.parametrize("recent", [0, 0.5])
def test_the_queries_follow_just_one_round(ratio, window, recent):
    config = FreqKVConfig(window, sinks=1, recent=int(recent * window))
    try:
        new = spectrum.count_compared(config, ratio)
    except ValueError:
        assert (1 - ratio) * config.span < 2 - ratio
    else:
        small = FreqKVConfig(window - new, 1, ratio, config.recent)
        assert 1 <= new <= max(window // 8, 1)
        assert small.rounds(window) == 1


# The script


NAMES = ["spectrum", "spectrum_bands", "spectrum_errors"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_checkpoint(folder, num_hidden_layers=3)
    return folder


@pytest.fixture
def script(checkpoint, tmp_path, outcome):
    """Run it in this process; its exit code, stdout and stderr."""
    random_tokens(1, 300, vocab_size=400).numpy().astype(np.uint16).tofile(tmp_path / "text.bin")

    def run(*flags):
        where = ["--model", checkpoint, "--data", tmp_path / "text.bin", "--device", "cpu"]
        return outcome(spectrum, *where, "--out", tmp_path / "out", *flags)

    return run


def test_it_writes_what_it_prints(script, tmp_path):
    ran = script("--window", 32, "--limit", 3, "--suggest", 0.4, "--ratios", "0.5,0.25")
    assert ran.code == 0
    assert "3 windows of 32 tokens, of 1 text" in ran.out
    assert "9/9" in ran.err  # a layer of a window at a time
    heads, bands, errors = (json.loads((tmp_path / f"out/{x}.json").read_text()) for x in NAMES)
    assert len(heads) == 3 * 2 * 3  # layers, keys and values, both heads and all
    assert {record["ratio"] for record in errors} == {0.25, 0.5}
    assert len(errors) == 4 * 3 * 2
    for record in heads:
        about = {name: record[name] for name in ("layer", "kind", "head")}
        shares = [band["share"] for band in bands if about.items() <= band.items()]
        assert sum(shares) == pytest.approx(1)
        assert shares[0] == pytest.approx(record["mean_share"])
    rows = [line.split() for line in ran.out.splitlines()]
    expected = []
    for record in heads:
        if (record["layer"], record["head"]) == (1, "all"):
            expected += [f"{100 * x:.1f}" for x in [*record.values()][3:]]
    assert next(row for row in rows if row[:1] == ["1"])[1:] == expected
    half = []
    for record in errors:
        if (record["of"], record["ratio"]) == ("output, window", 0.5):
            half.append(record["error"])
    assert [row for row in rows if row[:1] == ["all"]][-1][-1] == f"{np.mean(half):.2f}"
    [line] = re.findall(r"^--layer-ratios (\S+)$", ran.out, re.M)
    ratios = [float(ratio) for ratio in line.split(",")]
    assert len(ratios) == 3
    assert np.mean(ratios) == pytest.approx(0.4)


def test_windows_are_spread_over_the_text(script, monkeypatch):
    seen = []
    plain = spectrum.Probe.__call__

    def spy(probe, layer, q, k, v, rope):
        if layer == 0:
            seen.append(k[0, 0, 0, 0].item())
        return plain(probe, layer, q, k, v, rope)

    monkeypatch.setattr(spectrum.Probe, "__call__", spy)
    assert script("--window", 32).code == 0
    every = seen.copy()
    assert len(set(every)) == 8  # of 9 that fit
    seen.clear()
    assert script("--window", 32, "--limit", 2).code == 0
    assert seen == [every[0], every[-1]]


def test_without_a_strategy_of_slots_there_is_no_error_of_the_output(script, tmp_path):
    assert script("--window", 32, "--limit", 1, "--strategies", "full").code == 0
    errors = json.loads((tmp_path / "out/spectrum_errors.json").read_text())
    assert {record["of"] for record in errors} == {"key", "value"}


def test_a_bfloat16_model(script, tmp_path):
    figures = []
    for dtype in ("float32", "bfloat16"):
        ran = script("--window", 32, "--dtype", dtype)
        assert ran.code == 0
        energies = ran.out.split("relative")[0]
        figures.append(np.array(re.findall(r"\d+\.\d+", energies), float))
    assert_close(*figures, atol=4, rtol=0)


# Pictures


def test_pictures(script, tmp_path):
    pytest.importorskip("matplotlib")
    ran = script("--window", 32, "--limit", 1, "--plot", "--strategies", "window,average,high")
    assert ran.code == 0, ran.err
    for name in ("bands", "held", "errors"):
        assert (tmp_path / f"out/spectrum_{name}.png").read_bytes()[1:4] == b"PNG"


@pytest.fixture
def figure():
    return pytest.importorskip("matplotlib.figure").Figure(layout="constrained")


def test_pictures_show_the_energy(figure):
    energy = np.ones((3, 2, 2, 30))
    energy[2, 1, 1, 7] = 8
    spectrum.draw_bands(figure, energy)
    keys, values = figure.axes[:2]
    assert [axes.get_title() for axes in (keys, values)] == ["keys", "values"]
    assert np.ptp(keys.images[0].get_array()) == 0
    row, column = np.unravel_index(values.images[0].get_array().argmax(), (6, 30))
    assert (row, column) == (5, 7)  # the second head of the third layer
    figure.clear()
    spectrum.draw_held(figure, energy)
    keys, values = figure.axes
    assert [line.get_label() for line in keys.lines] == ["layer 0", "layer 1", "layer 2"]
    assert_close(keys.lines[0].get_ydata(), keys.lines[0].get_xdata())  # of flat energy
    share = values.lines[2].get_ydata()[-3]
    assert share > values.lines[2].get_xdata()[-3]
    assert values.lines[2].get_ydata()[-1] == 1
    figure.clear()
    errors = {"key": np.array([[1.0, 2.0], [3.0, 6.0]]), "output, high": np.zeros((2, 2))}
    spectrum.draw_errors(figure, errors, [0.25, 0.5])
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert [*lines] == [*errors]
    assert list(lines["key"].get_xdata()) == [0.25, 0.5]
    assert list(lines["key"].get_ydata()) == [2, 4]


def test_constant_keys_can_be_drawn(figure, tmp_path):
    energy = np.zeros((2, 2, 1, 30))
    energy[0, 0, 0, 0] = 1
    for draw in (spectrum.draw_bands, spectrum.draw_held):
        draw(figure, energy)
        figure.savefig(tmp_path / "x.png")
        figure.clear()
    assert spectrum.suggest(energy.sum(2), 0.5)[0] == [0.5, 0.5]


# Bad input


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--window", 65], "--window: was 65, must be at most the model's 64"),
        (["--ratios", "0.5,2"], "--ratios: was '2', must be a number"),
        (["--ratios", "1"], "--ratios: was '1', must be a number, 0 or more, below 1"),
        (["--ratios", ""], "--ratios: was ''"),
        (["--window", 5], "--ratios: was 0.75 with a span of 1 slots, must be lower"),
        (["--suggest", "0.99"], "--suggest: was '0.99', must be a number"),
        (["--suggest", "0.04"], "--suggest: was '0.04', must be a number"),
        (["--data", "nowhere"], "--data: nowhere held no file"),
        (["--ratio", "0.25"], "--ratio: was given, must be --ratios here"),
        (
            ["--data", ROOT / "LICENSE", "--bin-dtype", "uint32"],
            "--bin-dtype: was uint32, must be with .bin files alone",
        ),
    ],
)
def test_bad_flags(script, flags, says):
    ran = script(*flags)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err
    assert len(ran.err.strip().split("\n")) == 1


def test_a_text_shorter_than_the_window(script, tmp_path):
    random_tokens(1, 30, vocab_size=400).numpy().astype(np.uint16).tofile(tmp_path / "text.bin")
    ran = script("--window", 31)
    assert ran.code == 2
    assert "--window: was 31, must be at most the longest text's 30" in ran.err


def test_a_weight_that_is_no_number(script, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(tensors, path)
    ran = script("--model", tmp_path / "model")
    assert ran.code == 2
    last = ran.err.strip().split("\n")[-1]
    assert "keys and values: were not numbers, must be; a weight may be damaged" in last
