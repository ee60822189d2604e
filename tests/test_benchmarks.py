"""benchmarks/: what is timed is what it says, and every case runs. No time is asserted."""

import json

import pytest
import torch
from helpers import random_tokens, read, tiny_checkpoint, tiny_model
from torch.testing import assert_close

from benchmarks import peers, run
from freqkv import FreqKVCache, FreqKVConfig, compress

CONFIG = FreqKVConfig(window=16, sinks=2)
SMALL = {
    "windows": [16, 64], "lengths": [40, 80], "steps": 2, "reads": [40, 80], "spans": [60],
    "heads": [2], "multiples": [2], "texts": [40, 80],
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_checkpoint(folder)
    return str(folder)


@pytest.mark.parametrize("tokens", [5, 16, 17, 23, 500])
def test_a_filled_cache_goes_on_as_one_that_has_read(tokens):
    model, ids = tiny_model(), random_tokens(1, tokens + 30)
    real, filled = FreqKVCache(CONFIG), peers.after(model, tokens, CONFIG)
    read(model, ids[:, :tokens], real)
    for cache in (real, filled):
        assert (cache.tokens_seen, cache.slots) == (tokens, CONFIG.slots(tokens))
    filled.load_state_dict(real.state_dict())
    assert_close(read(model, ids[:, tokens:], filled), read(model, ids[:, tokens:], real))


@pytest.mark.parametrize("tokens", [1, 40])
def test_peers_agree_on_the_same_keys_and_values(monkeypatch, tokens):
    pytest.importorskip("transformers")
    model, given = tiny_model(), []
    theirs = peers.twin(model)
    assert_close(theirs(random_tokens(1, 9)).logits, model(random_tokens(1, 9)))

    def noise(model, count):
        assert count == tokens
        given.append(torch.randn(1, 2, count, 8, generator=torch.Generator().manual_seed(7)))
        # Of keys, then of values; transformers takes keys as they are, our cache rotates them.
        rotated = len(given) > 4 and len(given) % 2
        return model.rope(given[-1]) if rotated else given[-1]

    monkeypatch.setattr(peers, "noise", noise)
    with torch.no_grad():
        ours, hf = peers.full(model, tokens, 2), peers.of_transformers(theirs, model, tokens)
        for _ in range(2):
            assert_close(hf(random_tokens(1, 1)), ours(random_tokens(1, 1)))
    assert len(given) == 8


def test_random_weights_have_the_shape():
    config = peers.SHAPES["llama-3.2-1b"]
    with torch.device("meta"):
        count = sum(p.numel() for p in peers.Llama(config).parameters())
    assert count == 1_235_814_400  # as published
    with torch.device("meta"):
        count = sum(p.numel() for p in peers.Llama(peers.SHAPES["llama-2-7b"]).parameters())
    assert count == 6_738_415_616


@pytest.mark.parametrize(("n", "keep"), [(508, 254), (62, 31), (61, 20), (12, 1)])
def test_the_fast_transform_computes_the_same(n, keep):
    x = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(0))
    assert_close(run.fft_lowpass(x, keep), compress(x, keep), atol=1e-5, rtol=1e-5)


def test_medians():
    calls = iter([0.0, 10.0, 10.1, 11.0, 11.3, 20.0, 20.2])

    class Clock:
        perf_counter = staticmethod(lambda: next(calls))

    before, run.time = run.time, Clock
    try:
        assert run.timed(lambda: None, 3, torch.device("cpu"), warm=1) == pytest.approx(0.2)
    finally:
        run.time = before


def test_every_case_runs(checkpoint, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "QUICK", SMALL | {"model": checkpoint, "big": checkpoint})
    ended = outcome(run, "--quick", "--plot", "--device", "cpu", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    for name in run.CASES:
        records = json.loads((tmp_path / f"out/{name}.json").read_text())
        assert records
        assert f"\n{name}: " in ended.out
    decode = json.loads((tmp_path / "out/decode.json").read_text())
    assert {(r["peer"], r["tokens"]) for r in decode} >= {
        (peer, n)
        for peer in ("FreqKV, window 16", "FreqKV, window 64", "full cache")
        for n in (40, 80)
    }
    for picture in ("time", "memory", "reading"):
        assert (tmp_path / f"out/{picture}.png").read_bytes()[:4] == b"\x89PNG"


def test_what_does_not_fit_is_left_out(checkpoint, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "QUICK", SMALL | {"model": checkpoint})
    monkeypatch.setattr(peers, "available", lambda device: 16_000)
    ended = outcome(run, "decode", "--quick", "--device", "cpu", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "full cache after 80 tokens: left out, takes" in ended.out
    assert "full cache, after 40 tokens" in ended.out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["decode", "speed"], "CASE: was 'speed', must be of decode, roofline"),
        (["decode", "--model", "no/such"], "no/such"),
        (["decode", "--device", "cuda:99"], "--device: was 'cuda:99'"),
        (["decode", "--dtype", "int8"], "--dtype"),
        (["decode", "--quick", "--out", "/proc"], "/proc"),
    ],
)
def test_bad_input_is_one_line(outcome, tmp_path, argv, says):
    ended = outcome(run, *([] if "--out" in argv else ["--out", tmp_path / "out"]), *argv)
    assert ended.code == 2
    assert "ms a token" not in ended.out  # before anything is measured
    assert says in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.cuda
def test_on_a_gpu(checkpoint, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "QUICK", SMALL | {"model": checkpoint, "big": checkpoint})
    assert outcome(run, "--quick", "--device", "cuda", "--out", tmp_path / "out").code == 0
