"""freqkv.py: both forms against an independent slow one, each other, and expected outputs.

Run: pytest tests/test_freqkv.py
"""

from itertools import product

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from helpers import (
    DATA,
    attend_in_pieces,
    cuts,
    expected_model,
    plain_rope,
    random_qkv,
    random_tokens,
    read,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import freqkv
from dct import lowpass_matrix
from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig, compress, newest
from model import causal_attention

CONFIG = FreqKVConfig(window=16, sinks=2, ratio=0.5, recent=3)
SCHEDULES = [
    FreqKVConfig(window, sinks, ratio, recent)
    for window, sinks, ratio, recent in [
        (16, 4, 0.5, 0),
        (17, 3, 0.5, 0),
        (16, 0, 0.5, 0),
        (16, 4, 0.0, 0),
        (17, 4, 0.3, 0),
        (16, 4, 0.75, 0),
        (16, 4, 0.99, 0),
        (16, 2, 0.5, 5),
        (15, 0, 0.75, 4),
        (8, 4, 0.5, 3),
    ]
]
over_schedules = pytest.mark.parametrize("config", SCHEDULES, ids=str)
over_operators = pytest.mark.parametrize("operator", [compress, newest])


def close(actual, expected, atol):
    assert_close(actual, expected, rtol=0, atol=atol)


def lengths(config):
    """Texts that end at, just past, and several rounds past the borders of the schedule."""
    n, stride = config.window, config.stride
    return [n, n + 1, n + stride, n + stride + 1, n + 4 * stride + 2]


def both_forms(config, operator=compress):
    return FreqKVAttention(config, operator), FreqKVCache(config, operator)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# The schedule


def test_defaults_are_those_of_the_paper():
    config = FreqKVConfig()
    assert (config.window, config.sinks, config.ratio, config.recent) == (4096, 4, 0.5, 0)
    assert (config.span, config.keep, config.stride) == (4092, 2046, 2046)


@pytest.mark.parametrize(
    ("config", "span", "keep"),
    [
        (FreqKVConfig(window=104, sinks=4, ratio=0.29), 100, 28),  # 0.29 * 100 is 28.999...
        (FreqKVConfig(window=20, sinks=3, ratio=0.5, recent=4), 13, 6),
        (FreqKVConfig(window=20, sinks=0, ratio=0), 20, 0),
        (FreqKVConfig(window=20, sinks=4, ratio=1 - 2**-53), 16, 15),
    ],
    ids=str,
)
def test_derived_sizes(config, span, keep):
    assert (config.span, config.keep, config.stride) == (span, keep, span - keep)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ratio", value) for value in (-0.1, 1, 1.5, float("nan"), "x", None, (), (0.5, 1))),
        *(("window", value) for value in (0, 4, -8, 16.0, "x")),
        *(("sinks", value) for value in (16, 17, -1, 2.5, None)),
        *(("recent", value) for value in (12, -1, 2.5, None)),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        FreqKVConfig(**{"window": 16, "sinks": 4, name: value})


@over_schedules
def test_rounds_and_slots_are_those_of_counting(config):
    slots = rounds = 0
    for tokens in range(10 * config.window):
        assert (config.rounds(tokens), config.slots(tokens)) == (rounds, slots)
        if slots == config.window:
            slots, rounds = slots - config.stride, rounds + 1
        slots += 1


# The operator


@given(st.integers(1, 80), st.data())
def test_compress_is_the_lowpass_matrix(n, data):
    keep = data.draw(st.integers(0, n))
    x = torch.randn(2, 3, n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    close(compress(x, keep), lowpass_matrix(n, keep, torch.float64) @ x, 1e-12)
    constant = torch.full((n, 2), 1.5)
    close(compress(constant, keep), constant[:keep], 1e-5)


@pytest.mark.parametrize("n", [4097, 8188, 131068])
@pytest.mark.parametrize("ratio", [0, 0.3, 0.5])
def test_compress_of_a_long_span_needs_no_matrix(monkeypatch, n, ratio):
    """The window of Llama 3.1, whose matrices would take 17 GB."""
    if ratio:
        monkeypatch.setattr(freqkv, "lowpass_halves", None)
    x, keep = torch.randn(1, n, 2, generator=torch.Generator().manual_seed(0)), int(ratio * n)
    low = scipy.fft.dct(x.double().numpy(), axis=1, norm="ortho")[:, :keep]
    expected = np.sqrt(keep / n) * scipy.fft.idct(low, axis=1, norm="ortho") if keep else low
    close(compress(x, keep), torch.from_numpy(expected).float(), 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compress(x, keep), compress(x.float(), keep))
    low = x.bfloat16()
    assert torch.equal(compress(low, keep), compress(low.float(), keep).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keep", [0, 7, 8])
def test_compress_computes_half_types_in_float32(dtype, keep):
    x = torch.randn(2, 21, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(compress(x, keep), compress(x.float(), keep).to(dtype))


def test_compress_computes_in_float32_under_autocast():
    x = torch.randn(2, 21, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        actual = compress(x, 8)
    close(actual, compress(x, 8), 0)


@pytest.mark.parametrize("n", [60, 5000])  # by matrices, and by the FFT
@pytest.mark.parametrize("keep", [-1, 5001])
def test_compress_refuses_an_impossible_number(n, keep):
    with pytest.raises(ValueError, match=rf"n, keep: were {n}, {keep}, must be"):
        compress(torch.zeros(n, 1), keep)


@pytest.mark.parametrize(("n", "keep"), [(8, 4), (9, 5), (7, 0)])
def test_gradients_of_compress(n, keep):
    x = torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: compress(x, keep), x.requires_grad_())


def test_compress_on_meta():
    assert compress(torch.empty(2, 9, 4, device="meta"), 5).shape == (2, 5, 4)


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_newest(keep):
    x = torch.arange(10.0).view(5, 2)
    assert newest(x, keep).tolist() == x.tolist()[5 - keep :]


# The method


def slow_freqkv(q, k, v, config, operator):
    """The method a token at a time, in lists of unrotated vectors: arrays [B, heads, T, D]."""
    window, sinks, ratio, recent = config.window, config.sinks, config.ratio, config.recent
    half = q.shape[-1] // 2

    def turn(x, position):
        x = (x[:half] + 1j * x[half:]) * np.exp(
            1j * position * 10000.0 ** (-np.arange(half) / half)
        )
        return np.concatenate((x.real, x.imag))

    def shrink(slots):
        first, last = slots[:sinks], slots[len(slots) - recent :]
        middle = np.array(slots[sinks : len(slots) - recent])
        keep = int(len(middle) * ratio)
        if operator is newest or not keep:
            return first + list(middle[len(middle) - keep :]) + last
        low = scipy.fft.dct(middle, type=2, norm="ortho", axis=0)[:keep]
        scale = np.sqrt(keep / len(middle))
        return first + list(scale * scipy.fft.idct(low, type=2, norm="ortho", axis=0)) + last

    out = np.zeros_like(q)
    for b, h in product(range(q.shape[0]), range(q.shape[1])):
        group = h * k.shape[1] // q.shape[1]
        keys, values = [], []
        for t in range(q.shape[2]):
            if len(keys) == window:
                keys, values = shrink(keys), shrink(values)
            keys.append(k[b, group, t])
            values.append(v[b, group, t])
            query = turn(q[b, h, t], len(keys) - 1)
            scores = np.array([query @ turn(key, slot) for slot, key in enumerate(keys)])
            weights = np.exp(scores / np.sqrt(q.shape[-1]))
            out[b, h, t] = weights @ np.array(values) / weights.sum()
    return out


@over_schedules
@over_operators
def test_both_forms_equal_the_slow_one(config, operator):
    time = lengths(config)[-1]
    qkv = random_qkv(time, batch=1, dtype=torch.float64)
    expected = torch.from_numpy(slow_freqkv(*(x.numpy() for x in qkv), config, operator))
    parallel, cache = both_forms(config, operator)
    close(parallel(0, *qkv, plain_rope), expected, 1e-10)
    for where in ([], range(1, time), range(5, time, 7)):
        cache.reset()
        close(attend_in_pieces(cache, qkv, where), expected, 1e-10)


@over_schedules
@over_operators
@settings(max_examples=10)
@given(data=st.data())
def test_parallel_equals_recurrent(model, config, operator, data):
    time = data.draw(st.sampled_from(lengths(config)))
    where = data.draw(cuts(time))
    tokens = random_tokens(2, time, seed=time)
    parallel, cache = both_forms(config, operator)
    with torch.no_grad():
        expected = model(tokens, parallel)
    close(read(model, tokens, cache, where), expected, 1e-4)


@over_schedules
@over_operators
def test_parallel_equals_recurrent_at_once_and_one_by_one(model, config, operator):
    time = lengths(config)[-1]
    tokens = random_tokens(2, time)
    for where in ([], range(1, time)):
        parallel, cache = both_forms(config, operator)
        close(read(model, tokens, cache, where), read(model, tokens, parallel), 1e-4)


def average_pool(x, keep):
    return F.adaptive_avg_pool1d(x.flatten(0, 1).mT, keep).mT.unflatten(0, x.shape[:2])


def test_any_operator_drops_in(model):
    tokens = random_tokens(2, 60)
    parallel, cache = both_forms(CONFIG, average_pool)
    expected = read(model, tokens, parallel)
    close(read(model, tokens, cache, [7, 40, 41]), expected, 1e-4)
    assert not torch.allclose(expected, read(model, tokens, FreqKVAttention(CONFIG)), atol=0.1)


@over_schedules
def test_equal_to_plain_attention_up_to_the_window(model, config):
    tokens = random_tokens(2, config.window + 1)
    plain = read(model, tokens, causal_attention)
    for form in both_forms(config):
        logits = read(model, tokens, form)
        close(logits[:, :-1], plain[:, :-1], 1e-5)
        assert not torch.allclose(logits[:, -1], plain[:, -1], atol=1e-3)


@pytest.mark.parametrize("form", [0, 1], ids=["parallel", "cache"])
@pytest.mark.parametrize("changed", [0, 1, 8, 15, 16, 20, 21, 22, 30, 49])
def test_causal(model, form, changed):
    tokens = random_tokens(2, 50)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 50
    before, after = (read(model, x, both_forms(CONFIG)[form]) for x in (tokens, other))
    close(after[:, :changed], before[:, :changed], 1e-6)
    assert (after[:, changed:] != before[:, changed:]).any(-1).all()


def test_rows_of_a_batch_are_independent(model):
    tokens = random_tokens(3, 50)
    for form in (0, 1):
        together = read(model, tokens, both_forms(CONFIG)[form])
        alone = [read(model, row[None], both_forms(CONFIG)[form]) for row in tokens]
        close(together, torch.cat(alone), 1e-5)


def test_grouped_queries_equal_repeated_kv_heads():
    q, k, v = random_qkv(50)
    repeated = [q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)]
    for grouped, full in zip(both_forms(CONFIG), both_forms(CONFIG), strict=True):
        close(grouped(0, q, k, v, plain_rope), full(0, *repeated, plain_rope), 1e-5)


@over_schedules
def test_positions_stay_below_the_window(config):
    time, positions = lengths(config)[-1], set()

    def spy(x, start=0, inverse=False):
        positions.update(range(start, start + x.shape[-2]))
        return plain_rope(x, start, inverse)

    parallel, cache = both_forms(config)
    parallel(0, *random_qkv(time), spy)
    attend_in_pieces(cache, random_qkv(time), range(3, time, 4), spy)
    assert positions == set(range(config.window))


def test_gradients_flow_through_rounds():
    config = FreqKVConfig(window=6, sinks=1, ratio=0.5, recent=1)
    qkv = random_qkv(13, batch=1, heads=2, kv_heads=1, head_dim=4, dtype=torch.float64)
    assert config.rounds(13) == 4
    attend = FreqKVAttention(config)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(0, q, k, v, plain_rope), [x.requires_grad_() for x in qkv]
    )


def test_bfloat16_agrees_roughly():
    config = FreqKVConfig(window=32)
    qkv = random_qkv(100)
    expected = FreqKVAttention(config)(0, *qkv, plain_rope)
    for form in both_forms(config):
        out = form(0, *(x.bfloat16() for x in qkv), plain_rope)
        assert out.dtype == torch.bfloat16
        close(out.float(), expected, 0.04)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.25), (torch.float16, 0.04)])
def test_half_type_model_runs_past_the_window(model, dtype, atol):
    half, tokens = tiny_model().to(dtype), random_tokens(2, 50)
    expected = read(model, tokens, FreqKVAttention(CONFIG))
    for form in both_forms(CONFIG):
        logits = read(half, tokens, form)
        assert logits.dtype == dtype
        close(logits.float(), expected, atol)


EXPECTED = [
    *(("mha", "freqkv_N32_S4_ratio0.5", f"logits_T{t}") for t in (29, 32, 33, 46, 47, 200)),
    ("meta/hf", "meta/expected", "freqkv_N32_S4_r05_logits_T200"),
]


@pytest.mark.parametrize(("folder", "file", "name"), EXPECTED)
def test_expected_logits(folder, file, name):
    expected = load_file(DATA / f"{file}.safetensors")
    tokens = expected["input_ids"][:, : int(name.rpartition("T")[2])]
    model = expected_model(folder)
    for form in both_forms(FreqKVConfig(window=32, sinks=4, ratio=0.5)):
        close(read(model, tokens, form), expected[name], 5e-4)


@pytest.mark.parametrize("where", [[], range(1, 200)], ids=["at once", "one by one"])
def test_expected_slots(where):
    expected = load_file(DATA / "freqkv_N32_S4_ratio0.5.safetensors")
    model, cache = expected_model("mha"), FreqKVCache(FreqKVConfig(window=32, sinks=4, ratio=0.5))
    read(model, expected["input_ids"], cache, where)
    state = cache.state_dict()
    keys, values = state["k"], state["v"]
    close(model.rope(keys, inverse=True), expected["cache_k_T200"], 5e-4)
    close(values, expected["cache_v_T200"], 5e-4)


# The cache


@over_schedules
def test_cache_counts_and_keeps_its_size(model, config):
    cache, nbytes = FreqKVCache(config), 2 * 2 * 2 * 2 * config.window * 8 * 4
    assert (cache.tokens_seen, cache.slots, cache.rounds, cache.nbytes) == (0, 0, 0, 0)
    for seen, token in enumerate(random_tokens(2, lengths(config)[-1]).split(1, dim=1), 1):
        read(model, token, cache)
        assert cache.tokens_seen == seen
        assert cache.slots == config.slots(seen) <= config.window
        assert cache.rounds == config.rounds(seen)
        assert cache.nbytes == nbytes


def test_reset_forgets(model):
    cache = FreqKVCache(CONFIG)
    first = read(model, random_tokens(2, 40), cache)
    cache.reset()
    assert (cache.tokens_seen, cache.slots, cache.rounds, cache.nbytes) == (0, 0, 0, 0)
    assert torch.equal(read(model, random_tokens(2, 40), cache), first)
    cache.reset()
    other = read(tiny_model().double(), random_tokens(1, 40), cache)
    assert (other.shape, other.dtype) == ((1, 40, 50), torch.float64)


def test_rounds_leave_sinks_and_recent_untouched():
    cache, qkv = FreqKVCache(CONFIG), random_qkv(CONFIG.window + 1)
    sinks, recent, kept = CONFIG.sinks, CONFIG.recent, CONFIG.sinks + CONFIG.keep
    before, after = [], []
    for piece, out in ((slice(0, -1), before), (slice(-1, None), after)):
        cache(0, *(x[:, :, piece] for x in qkv), plain_rope)
        out.extend(cache.state_dict()[x][0] for x in "kv")
    assert torch.equal(after[0][:, :, :sinks], before[0][:, :, :sinks])
    assert torch.equal(after[1][:, :, :sinks], before[1][:, :, :sinks])
    assert torch.equal(after[1][:, :, kept : kept + recent], before[1][:, :, -recent:])
    assert torch.equal(after[1][:, :, kept + recent :], qkv[2][:, :, -1:])
    moved = plain_rope(after[0][:, :, kept : kept + recent], kept, inverse=True)
    close(moved, qkv[1][:, :, -1 - recent : -1], 1e-5)


def test_round_of_a_half_type_cache_rounds_once():
    cache, qkv = FreqKVCache(CONFIG), random_qkv(CONFIG.window + 1, dtype=torch.bfloat16)
    attend_in_pieces(cache, [x[:, :, :-1] for x in qkv])
    before = cache.state_dict()["k"][0]
    attend_in_pieces(cache, [x[:, :, -1:] for x in qkv])
    span = plain_rope(before.float(), inverse=True)[:, :, CONFIG.sinks :][:, :, : CONFIG.span]
    low = plain_rope(compress(span, CONFIG.keep), CONFIG.sinks).bfloat16()
    after = cache.state_dict()["k"][0]
    assert torch.equal(after[:, :, CONFIG.sinks :][:, :, : CONFIG.keep], low)


def test_cache_is_out_of_the_graph():
    cache, qkv = FreqKVCache(CONFIG), [x.requires_grad_() for x in random_qkv(50)]
    assert not cache(0, *qkv, plain_rope).requires_grad
    assert not any(x.requires_grad for x in cache.state_dict().values())


@pytest.mark.parametrize("seen", [5, 16, 17, 40])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_saved_cache_goes_on_as_the_original(model, tmp_path, seen, mode):
    tokens, cache, fresh = random_tokens(2, 70), FreqKVCache(CONFIG), FreqKVCache(CONFIG)
    with mode():
        model(tokens[:, :seen], cache)
        save_file(cache.state_dict(), tmp_path / "cache.safetensors")
        expected = model(tokens[:, seen:], cache)
        fresh.load_state_dict(load_file(tmp_path / "cache.safetensors"))
        assert fresh.tokens_seen == seen
        assert torch.equal(model(tokens[:, seen:], fresh), expected)


def test_cache_filled_in_inference_mode_goes_on_outside(model):
    tokens, cache = random_tokens(2, 40), FreqKVCache(CONFIG)
    with torch.inference_mode():
        model(tokens[:, :20], cache)
    whole = read(model, tokens, FreqKVCache(CONFIG), [20])
    assert torch.equal(read(model, tokens[:, 20:], cache), whole[:, 20:])


def test_saved_cache_is_a_copy(model):
    cache, fresh = FreqKVCache(CONFIG), FreqKVCache(CONFIG)
    read(model, random_tokens(2, 20), cache)
    state = cache.state_dict()
    saved = {name: tensor.clone() for name, tensor in state.items()}
    fresh.load_state_dict(state)
    for used in (cache, fresh):
        read(model, random_tokens(2, 20), used)
        assert all(torch.equal(saved[name], state[name]) for name in saved)


CHANGED_SETTINGS = [(24, 2, 0.5, 3), (16, 3, 0.5, 2), (16, 2, 0.6, 3), (16, 2, 0.5, 4)]


@pytest.mark.parametrize("changes", CHANGED_SETTINGS)
def test_saved_cache_of_other_settings_is_refused(model, changes):
    cache = FreqKVCache(FreqKVConfig(*changes))
    read(model, random_tokens(2, 20), cache)
    with pytest.raises(ValueError, match="saved cache"):
        FreqKVCache(CONFIG).load_state_dict(cache.state_dict())


SPOILT = [
    *((name, None) for name in ("config", "layers", "k", "v")),
    *((name, lambda x: x[..., 1:, :]) for name in "kv"),
    *((name, lambda x: x[:, :1]) for name in "kv"),
    *((name, lambda x: x[:1]) for name in ("layers", "k", "v")),
    *((name, lambda x: x[0]) for name in "kv"),
    ("layers", lambda x: x + 1),
    ("config", lambda x: x[:3]),
    ("config", lambda x: x[0]),
]


@pytest.mark.parametrize(("name", "change"), SPOILT)
def test_spoilt_saved_cache_is_refused_and_changes_nothing(model, name, change):
    cache, tokens = FreqKVCache(CONFIG), random_tokens(2, 60)
    read(model, tokens[:, :20], cache)
    state = cache.state_dict()
    spoilt = state.pop(name)
    if change:
        state[name] = change(spoilt)
    with pytest.raises(ValueError, match="saved cache"):
        cache.load_state_dict(state)
    whole = read(model, tokens, FreqKVCache(CONFIG), [20])
    assert torch.equal(read(model, tokens[:, 20:], cache), whole[:, 20:])


@pytest.mark.parametrize(
    "changes", [{"batch": 1}, {"batch": 3}, {"dtype": torch.float64}, {"kv_heads": 1}]
)
def test_used_cache_refuses_another_batch_or_type(changes):
    cache = FreqKVCache(CONFIG)
    cache(0, *random_qkv(20), plain_rope)
    before = cache.state_dict()
    with pytest.raises(ValueError, match="k: was"):
        cache(0, *random_qkv(1, **changes), plain_rope)
    after = cache.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "mismatch",
    [
        lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]),
        lambda q, k, v: (q, k, v[:, :, 1:]),
        lambda q, k, v: (q, k, v[:, :1]),
        lambda q, k, v: (q[:, :3], k, v),
        lambda q, k, v: (q[:1], k, v),
        lambda q, k, v: (q[..., :4], k, v),
    ],
)
def test_mismatched_projections_are_refused(mismatch):
    for form in both_forms(CONFIG):
        with pytest.raises(ValueError, match="q, k, v: were"):
            form(0, *mismatch(*random_qkv(5)), plain_rope)


# On a GPU


# A ratio for each layer

BY_LAYER = FreqKVConfig(window=16, sinks=2, ratio=(0.25, 0.75), recent=1)


def test_layers_have_ratios_of_their_own():
    one, two = (FreqKVConfig(16, 2, ratio, 1) for ratio in (0.25, 0.75))
    assert (BY_LAYER.at(0), BY_LAYER.at(1), one.at(7)) == (one, two, one)
    with pytest.raises(IndexError):
        BY_LAYER.at(2)
    qkv = random_qkv(time=60)
    for attend in both_forms(BY_LAYER):
        for layer, config in enumerate((one, two)):
            expected = FreqKVAttention(config)(0, *qkv, plain_rope)
            close(attend(layer, *qkv, plain_rope), expected, 1e-5)


def test_parallel_equals_recurrent_with_ratios_by_layer(model):
    tokens, cache = random_tokens(2, 60), FreqKVCache(BY_LAYER)
    expected = model(tokens, FreqKVAttention(BY_LAYER))
    close(read(model, tokens, cache, (1, 17, 18, 40)), expected, 1e-5)
    assert cache.slots == max(BY_LAYER.at(i).slots(60) for i in (0, 1))
    assert cache.rounds == max(BY_LAYER.at(i).rounds(60) for i in (0, 1))


@pytest.mark.parametrize("seen", [10, 21, 60])
def test_saved_cache_with_ratios_by_layer_goes_on(model, seen):
    tokens, cache, loaded = random_tokens(2, 90), FreqKVCache(BY_LAYER), FreqKVCache(BY_LAYER)
    read(model, tokens[:, :seen], cache)
    loaded.load_state_dict(cache.state_dict())
    rest = tokens[:, seen:]
    assert torch.equal(read(model, rest, loaded), read(model, rest, cache))
    other = FreqKVCache(FreqKVConfig(16, 2, (0.25, 0.5), 1))
    with pytest.raises(ValueError, match=r"was of .*0\.25, 0\.75.* must be of .*0\.25, 0\.5"):
        other.load_state_dict(cache.state_dict())


@pytest.mark.cuda
@pytest.mark.parametrize("form", [0, 1], ids=["parallel", "cache"])
def test_gpu_equals_cpu(model, form):
    tokens = random_tokens(2, 70)
    expected = read(model, tokens, both_forms(CONFIG)[form], [40, 41])
    on_gpu = tiny_model().cuda()
    close(read(on_gpu, tokens.cuda(), both_forms(CONFIG)[form], [40, 41]).cpu(), expected, 1e-3)


@pytest.mark.cuda
def test_gpu_decodes_in_bfloat16_past_the_window(model):
    tokens, half = random_tokens(2, 70), tiny_model().bfloat16().cuda()
    logits = read(half, tokens.cuda(), FreqKVCache(CONFIG), range(30, 70))
    assert logits.dtype == torch.bfloat16
    close(logits.cpu().float(), read(model, tokens, FreqKVAttention(CONFIG)), 0.4)


@pytest.mark.cuda
def test_gpu_trains():
    grads = []
    for device in ("cpu", "cuda"):
        trained = tiny_model().to(device)
        trained(random_tokens(2, 50).to(device), FreqKVAttention(CONFIG)).logsumexp(
            -1
        ).mean().backward()
        grads.append(trained.embed_tokens.weight.grad.cpu())
    close(grads[1], grads[0], 1e-3)


class Kernels(TorchDispatchMode):
    """Notes the kernels of attention that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in str(func):
            self.names.add(str(func).removeprefix("aten._scaled_dot_product_").split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("form", [0, 1], ids=["trains", "reads"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_attention_runs(device, form, kv_heads):
    """Rounds cut chunks whose causal mask ends at the lower right: without a mask on CUDA, too."""
    config = FreqKVConfig(window=256, sinks=4, recent=32)
    like = {"device": device, "dtype": torch.bfloat16, "requires_grad": form == 0}
    q, k, v = (torch.randn(1, heads, 700, 64, **like) for heads in (4, kv_heads, kv_heads))
    with Kernels() as kernels:
        out = both_forms(config)[form](0, q, k, v, plain_rope)
        if form == 0:
            out.float().square().sum().backward()
    # cuDNN's kernel is of the same kind, and newer cards prefer it where no mask is needed.
    assert kernels.names
    assert all(name.startswith(("flash_attention", "cudnn_attention")) for name in kernels.names)
