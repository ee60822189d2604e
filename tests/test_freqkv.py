"""freqkv.py: both forms against an independent slow one, each other, and expected outputs.

Run: pytest tests/test_freqkv.py
"""

import inspect
from itertools import count, product

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from helpers import (
    DATA,
    DEVICES,
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

import dct
import freqkv
import model as model_file
from dct import lowpass, lowpass_matrix
from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig, compress, distinct, lowband, newest
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
over_operators = pytest.mark.parametrize("operator", [lowband, newest, distinct])


def close(actual, expected, atol):
    assert_close(actual, expected, rtol=0, atol=atol)


def lengths(config):
    """Texts that end at, just past, and several rounds past the borders of the schedule."""
    n, stride = config.window, config.stride
    return [n, n + 1, n + stride, n + stride + 1, n + 4 * stride + 2]


def both_forms(config, operator=lowband):
    return FreqKVAttention(config, operator), FreqKVCache(config, operator)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def exact_model():
    """In float64, where rounding is less likely to change which keys `distinct` chooses."""
    return tiny_model().double()


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
        *(("ratio", value) for value in (-0.1, 1, 1.5, float("nan"), "x", None, (), (0.5, 0.5))),
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


# Operators


def test_lowband_is_the_lowpass_of_keys_and_of_values():
    keys, values = random_qkv(21)[1:]
    low_keys, low_values = lowband(keys, values, 8)
    matrix = lowpass_matrix(21, 8)
    close(low_keys, matrix @ keys, 1e-5)
    close(low_values, matrix @ values, 1e-5)


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_newest(keep):
    keys = torch.arange(10.0).view(1, 1, 5, 2)
    kept_keys, kept_values = newest(keys, -keys, keep)
    assert kept_keys.flatten().tolist() == list(range(10 - 2 * keep, 10))
    assert torch.equal(kept_values, -kept_keys)


def slow_distinct(keys, keep):
    """Places of the keys [n, D] least like the mean of their directions, in order, in float64."""
    directions = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    mean = directions.mean(axis=0)
    likeness = directions @ mean / np.linalg.norm(mean)
    return sorted(np.argsort(likeness, kind="stable")[:keep].tolist())


@pytest.mark.parametrize("keep", [0, 1, 7, 20])
def test_distinct_keeps_the_keys_least_like_the_mean_direction(keep):
    keys, values = random_qkv(20, batch=2, kv_heads=3)[1:]
    keys = keys + 1  # so that there is a mean direction
    kept_keys, kept_values = distinct(keys, values, keep)
    assert kept_keys.shape == kept_values.shape == (2, 3, keep, 8)
    for b, h in product(range(2), range(3)):
        places = slow_distinct(keys[b, h].double().numpy(), keep)
        assert torch.equal(kept_keys[b, h], keys[b, h, places])
        assert torch.equal(kept_values[b, h], values[b, h, places])


def test_of_equal_keys_distinct_keeps_the_newest_whatever_rounding_says():
    keys = random_qkv(6, batch=1, kv_heads=1)[1].repeat(1, 1, 2, 1)  # token i and i + 6 are equal
    keys = keys + 1 + 1e-7 * random_qkv(12, batch=1, kv_heads=1)[2]
    places = torch.arange(12.0).view(1, 1, 12, 1).expand_as(keys)
    kept = distinct(keys, places, 5)[1][0, 0, :, 0].tolist()
    pairs = [place for place in kept if place >= 6 and place - 6 in kept]
    assert len(pairs) == 2
    assert [place for place in kept if place < 6] == [place - 6 for place in pairs]


def test_distinct_tells_the_keys_of_a_long_span_apart():
    """There each is closer to its neighbours than rounding; they must not all be one tie."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 50_000, 8, generator=generator) / 4 + 1
    keep = 25_000
    values = torch.arange(50_000.0).view(1, 1, -1, 1).expand_as(keys)
    kept = distinct(keys, values, keep)[1][0, 0, :, 0].tolist()
    expected = slow_distinct(keys[0, 0].double().numpy(), keep)
    assert len(set(kept) & set(expected)) > 0.99 * keep


def test_gradients_flow_through_what_distinct_keeps():
    keys, values = (x.requires_grad_() for x in random_qkv(20, dtype=torch.float64)[1:])
    kept_keys, kept_values = distinct(keys, values, 5)
    (kept_keys.sum() + 2 * kept_values.sum()).backward()
    assert sorted(set(keys.grad.flatten().tolist())) == [0, 1]
    assert torch.equal(values.grad, 2 * keys.grad)
    assert keys.grad.sum() == kept_keys.numel()


def test_compress_leaves_sinks_and_recent_tokens_as_they_are():
    keys, values = random_qkv(CONFIG.window)[1:]
    new_keys, new_values = compress(keys, values, CONFIG)
    for new, old in ((new_keys, keys), (new_values, values)):
        assert new.shape[2] == CONFIG.window - CONFIG.stride
        assert torch.equal(new[:, :, : CONFIG.sinks], old[:, :, : CONFIG.sinks])
        assert torch.equal(new[:, :, -CONFIG.recent :], old[:, :, -CONFIG.recent :])
        span = old[:, :, CONFIG.sinks : -CONFIG.recent]
        low = lowpass_matrix(CONFIG.span, CONFIG.keep) @ span
        close(new[:, :, CONFIG.sinks : -CONFIG.recent], low, 1e-5)


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

    def places(keys, keep):
        """What of the span's keys stays, for operators that choose."""
        if operator is newest:
            return list(range(len(keys) - keep, len(keys)))
        return slow_distinct(keys, keep)

    def shrink(slots, keys):
        first, last = slots[:sinks], slots[len(slots) - recent :]
        middle = np.array(slots[sinks : len(slots) - recent])
        keep = int(len(middle) * ratio)
        if operator is not lowband:
            span_keys = np.array(keys[sinks : len(keys) - recent])
            return first + list(middle[places(span_keys, keep)]) + last
        if not keep:
            return first + last
        low = scipy.fft.dct(middle, type=2, norm="ortho", axis=0)[:keep]
        scale = np.sqrt(keep / len(middle))
        return first + list(scale * scipy.fft.idct(low, type=2, norm="ortho", axis=0)) + last

    out = np.zeros_like(q)
    for b, h in product(range(q.shape[0]), range(q.shape[1])):
        group = h * k.shape[1] // q.shape[1]
        keys, values = [], []
        for t in range(q.shape[2]):
            if len(keys) == window:
                keys, values = shrink(keys, keys), shrink(values, keys)
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
def test_parallel_equals_recurrent(exact_model, config, operator, data):
    time = data.draw(st.sampled_from(lengths(config)))
    where = data.draw(cuts(time))
    tokens = random_tokens(2, time, seed=time)
    parallel, cache = both_forms(config, operator)
    with torch.no_grad():
        expected = exact_model(tokens, parallel)
    close(read(exact_model, tokens, cache, where), expected, 1e-5)


@over_schedules
@over_operators
def test_parallel_equals_recurrent_at_once_and_one_by_one(exact_model, config, operator):
    time = lengths(config)[-1]
    tokens = random_tokens(2, time)
    for where in ([], range(1, time)):
        parallel, cache = both_forms(config, operator)
        close(read(exact_model, tokens, cache, where), read(exact_model, tokens, parallel), 1e-5)


def average_pool(keys, values, keep):
    def pool(x):
        return F.adaptive_avg_pool1d(x.flatten(0, 1).mT, keep).mT.unflatten(0, x.shape[:2])

    return pool(keys), pool(values)


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
    for layer in range(model.config.num_hidden_layers):
        keys = model.rope(state[f"k.{layer}"], inverse=True)
        close(keys, expected["cache_k_T200"][layer], 5e-4)
        close(state[f"v.{layer}"], expected["cache_v_T200"][layer], 5e-4)


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
        state = cache.state_dict()
        out.extend((state["k.0"], state["v.0"]))
    assert torch.equal(after[0][:, :, :sinks], before[0][:, :, :sinks])
    assert torch.equal(after[1][:, :, :sinks], before[1][:, :, :sinks])
    assert torch.equal(after[1][:, :, kept : kept + recent], before[1][:, :, -recent:])
    assert torch.equal(after[1][:, :, kept + recent :], qkv[2][:, :, -1:])
    moved = plain_rope(after[0][:, :, kept : kept + recent], kept, inverse=True)
    close(moved, qkv[1][:, :, -1 - recent : -1], 1e-5)


def test_round_of_a_half_type_cache_rounds_once():
    cache, qkv = FreqKVCache(CONFIG), random_qkv(CONFIG.window + 1, dtype=torch.bfloat16)
    attend_in_pieces(cache, [x[:, :, :-1] for x in qkv])
    before = cache.state_dict()["k.0"]
    attend_in_pieces(cache, [x[:, :, -1:] for x in qkv])
    span = plain_rope(before.float(), inverse=True)[:, :, CONFIG.sinks :][:, :, : CONFIG.span]
    low = plain_rope(lowpass(span, CONFIG.keep), CONFIG.sinks).bfloat16()
    after = cache.state_dict()["k.0"]
    assert torch.equal(after[:, :, CONFIG.sinks :][:, :, : CONFIG.keep], low)


@pytest.mark.parametrize("more", [(1, 0), (0, 1), (1, 1)])
def test_an_operator_that_gives_another_number_of_slots_is_refused(more):
    def wrong(keys, values, keep):
        return keys[:, :, : keep + more[0]], values[:, :, : keep + more[1]]

    for form in (FreqKVAttention(CONFIG, wrong), FreqKVCache(CONFIG, wrong)):
        with pytest.raises(
            ValueError, match=r"operator: gave \d+ keys and \d+ values, must give 5"
        ):
            form(0, *random_qkv(40), plain_rope)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_cache_refuses_inputs_that_need_gradients(which):
    cache, qkv = FreqKVCache(CONFIG), random_qkv(50)
    qkv[which].requires_grad_()
    with pytest.raises(ValueError, match="FreqKVAttention"):
        cache(0, *qkv, plain_rope)
    assert cache.tokens_seen == 0
    with torch.no_grad():
        assert not cache(0, *qkv, plain_rope).requires_grad
    assert not any(x.requires_grad for x in cache.state_dict().values())


# Calls that fail half way


class StoppedError(Exception):
    pass


def stopping_at(cache, call):
    """`cache`, but that call number `call` from now, from 0, fails before its layer is read."""
    calls = count()

    def attend(*about):
        if next(calls) == call:
            raise StoppedError
        return cache(*about)

    return attend


@pytest.mark.parametrize("seen", [0, 10])
def test_call_that_stopped_between_layers_is_noticed(model, seen):
    cache, tokens = FreqKVCache(CONFIG), random_tokens(2, 40)
    if seen > 0:  # else it is the first call of all
        read(model, tokens[:, :seen], cache)
    with pytest.raises(StoppedError):
        read(model, tokens[:, seen : seen + 5], stopping_at(cache, 1))
    with pytest.raises(ValueError, match="half way"), torch.no_grad():
        model(tokens[:, seen + 5 :], cache)  # the very next call
    with pytest.raises(ValueError, match="half way"):
        read(model, tokens[:, seen + 5 :], cache)
    cache.reset()
    assert torch.equal(read(model, tokens, cache), read(model, tokens, FreqKVCache(CONFIG)))


@pytest.mark.parametrize("layer", [0, 1])
def test_call_that_stopped_within_a_round_is_noticed(model, layer):
    """Keys are compressed already, values are not: no number of tokens tells that."""
    rounds = count()

    def stops(keys, values, keep):
        if next(rounds) == layer:
            raise StoppedError
        return lowband(keys, values, keep)

    cache, tokens = FreqKVCache(CONFIG, stops), random_tokens(2, 40)
    read(model, tokens[:, : CONFIG.window], cache)
    with pytest.raises(StoppedError):
        read(model, tokens[:, CONFIG.window :], cache)
    for use in (
        lambda: read(model, tokens[:, CONFIG.window :], cache),
        cache.state_dict,
        lambda: cache.crop(4),
        lambda: cache.reorder([0]),
    ):
        with pytest.raises(ValueError, match="half way"):
            use()


# Changing what a cache holds


@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 2], [1], [0, 0, 1, 1, 2, 2], torch.tensor([2, 0])])
@pytest.mark.parametrize("seen", [10, 21])
def test_reordered_rows_go_on_from_what_they_are_copies_of(model, rows, seen):
    tokens, more = random_tokens(3, seen), random_tokens(len(rows), 20, seed=1)
    cache = FreqKVCache(CONFIG)
    read(model, tokens, cache)
    cache.reorder(rows)
    assert cache.batch == len(rows)
    whole = torch.cat((tokens[rows], more), dim=1)
    expected = read(model, whole, FreqKVAttention(CONFIG))[:, seen:]
    close(read(model, more, cache), expected, 1e-4)


@pytest.mark.parametrize("rows", [[], [3], [-1], [[0]], [True, False], [0.0]])
def test_rows_that_are_not_there_are_refused(model, rows):
    cache = FreqKVCache(CONFIG)
    read(model, random_tokens(3, 20), cache)
    with pytest.raises(ValueError, match=r"rows: were .*, must be numbers of rows, below 3"):
        cache.reorder(rows)


@over_schedules
def test_cropped_cache_goes_on_as_if_the_newest_had_not_been_read(model, config):
    for seen in lengths(config):
        if config.rounds(seen - 1) < config.rounds(seen):
            continue
        tokens = random_tokens(2, seen + 30)
        cache = FreqKVCache(config)
        read(model, tokens[:, : seen - 1], cache)
        read(model, random_tokens(2, 1, seed=1), cache)
        cache.crop(seen - 1)
        assert (cache.tokens_seen, cache.slots) == (seen - 1, config.slots(seen - 1))
        expected = read(model, tokens, FreqKVAttention(config))[:, seen - 1 :]
        close(read(model, tokens[:, seen - 1 :], cache), expected, 1e-4)


def test_crop_by_a_number_below_0_forgets_so_many(model):
    cache = FreqKVCache(CONFIG)
    read(model, random_tokens(2, 12), cache)
    cache.crop(-5)
    assert cache.tokens_seen == 7


def test_crop_to_0_is_refused(model):
    """It might be all, or nothing: `crop(-rejected)` must not forget a text where none was."""
    cache = FreqKVCache(CONFIG)
    read(model, random_tokens(2, 12), cache)
    with pytest.raises(ValueError, match="tokens: was 0, must be above 0"):
        cache.crop(0)
    assert cache.tokens_seen == 12


def test_crop_never_undoes_a_round(model):
    cache, least = FreqKVCache(CONFIG), CONFIG.window + CONFIG.stride + 1  # after two rounds
    read(model, random_tokens(2, least + 2), cache)
    with pytest.raises(ValueError, match=f"must leave {least} or more"):
        cache.crop(least - 1)
    cache.crop(least)
    assert cache.rounds == 2


@pytest.mark.parametrize("form", [FreqKVCache, FreqKVAttention])
def test_an_operator_gets_keys_and_values_of_one_dtype(form):
    """Also where the cache widens what it compresses."""
    dtypes = set()

    def note(keys, values, keep):
        dtypes.add((keys.dtype, values.dtype))
        return lowband(keys, values, keep)

    model = tiny_model().bfloat16()
    read(model, random_tokens(2, 60), form(CONFIG, note))
    assert len(dtypes) == 1
    assert all(one == other for one, other in dtypes)


@pytest.mark.parametrize("tokens", [21, -21])
def test_crop_to_more_than_was_read_is_refused(model, tokens):
    cache = FreqKVCache(CONFIG)
    read(model, random_tokens(2, 20), cache)
    with pytest.raises(ValueError, match="within the 20"):
        cache.crop(tokens)


def test_room_is_what_fits_before_the_next_round(model):
    cache = FreqKVCache(CONFIG)
    assert (cache.room, cache.batch) == (CONFIG.window, 0)
    for token in random_tokens(2, 60).split(1, dim=1):
        room, rounds = cache.room, cache.rounds
        read(model, token, cache)
        assert (cache.rounds > rounds) == (room == 0)
        assert cache.room == CONFIG.window - cache.slots
    assert cache.batch == 2


# Saving


@pytest.mark.parametrize("seen", [5, 16, 17, 40])
@pytest.mark.parametrize("operator", [lowband, newest])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_saved_cache_goes_on_as_the_original(model, tmp_path, seen, operator, mode):
    tokens, cache = random_tokens(2, 70), FreqKVCache(CONFIG, operator)
    with mode():
        model(tokens[:, :seen], cache)
        save_file(cache.state_dict(), tmp_path / "cache.safetensors")
        expected = model(tokens[:, seen:], cache)
        fresh = FreqKVCache.from_state(load_file(tmp_path / "cache.safetensors"), operator)
        assert fresh.config == CONFIG
        assert (fresh.tokens_seen, fresh.nbytes) == (seen, cache.nbytes)
        assert torch.equal(model(tokens[:, seen:], fresh), expected)


def test_cache_filled_in_inference_mode_goes_on_outside(model):
    tokens, cache = random_tokens(2, 40), FreqKVCache(CONFIG)
    with torch.inference_mode():
        model(tokens[:, :20], cache)
    whole = read(model, tokens, FreqKVCache(CONFIG), [20])
    assert torch.equal(read(model, tokens[:, 20:], cache), whole[:, 20:])


def test_saved_cache_is_a_copy(model):
    cache = FreqKVCache(CONFIG)
    read(model, random_tokens(2, 20), cache)
    state = cache.state_dict()
    saved = {name: tensor.clone() for name, tensor in state.items()}
    fresh = FreqKVCache.from_state(state)
    for used in (cache, fresh):
        read(model, random_tokens(2, 20), used)
        assert all(torch.equal(saved[name], state[name]) for name in saved)


def test_empty_cache_cannot_be_saved():
    with pytest.raises(ValueError, match="was empty"):
        FreqKVCache(CONFIG).state_dict()


SPOILT = [
    *((name, None) for name in ("config", "tokens", "k.0", "v.1")),
    *((name, lambda x: x[..., 1:, :]) for name in ("k.0", "v.1")),
    *((name, lambda x: x[:, :1]) for name in ("k.0", "v.0")),
    ("v.0", lambda x: x[0]),
    ("k.0", lambda x: x[0]),
    ("tokens", lambda x: x + 1),
    ("tokens", lambda x: 0 * x),
    ("tokens", lambda x: torch.tensor([3, 4])),
    ("config", lambda x: x[:3]),
    ("config", lambda x: x[0]),
    ("config", lambda x: -x),
    ("config", lambda x: x * torch.nan),
    ("layers", lambda x: torch.tensor([[0, 20], [1, 20]])),
]


@pytest.mark.parametrize(("name", "change"), SPOILT)
def test_spoilt_saved_cache_is_refused(model, name, change):
    cache = FreqKVCache(CONFIG)
    read(model, random_tokens(2, 20), cache)
    state = cache.state_dict()
    spoilt = state.pop(name, None)
    if change:
        state[name] = change(spoilt)
    with pytest.raises(ValueError, match="saved cache"):
        FreqKVCache.from_state(state)


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


# A compiler


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_model_decodes_past_rounds_with_few_graphs(model):
    """A token at a time through several rounds, in one graph each, with the matrices made once."""
    tokens, cache = random_tokens(1, 80), FreqKVCache(CONFIG)
    expected = read(model, tokens, FreqKVCache(CONFIG), range(5, 80))
    builds = []

    def spy(n, keep):
        builds.append((n, keep))
        return odd_half(n, keep)

    odd_half = dct._odd_half
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dct, "_odd_half", spy)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        logits = read(compiled, tokens, cache, range(5, 80))
    close(logits, expected, 1e-5)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert cache.rounds == CONFIG.rounds(80) > 8
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8
    assert len(builds) <= 1


# Each file can be copied alone


def test_both_copies_of_attention_are_the_same():
    assert inspect.getsource(freqkv.masked_attention) == inspect.getsource(
        model_file.masked_attention
    )


# On a GPU


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operator", [lowband, newest, distinct])
def test_a_cache_moves_between_devices(exact_model, operator, device):
    """Read there, saved, and read on here: what one call of the other form gives."""
    tokens = random_tokens(2, 90)
    expected = read(exact_model, tokens, FreqKVAttention(CONFIG, operator))
    there = FreqKVCache(CONFIG, operator)
    first = read(tiny_model().double().to(device), tokens[:, :60].to(device), there, [7, 33])
    state = {name: tensor.cpu() for name, tensor in there.state_dict().items()}
    here = FreqKVCache.from_state(state, operator)
    rest = read(exact_model, tokens[:, 60:], here, [1, 11])
    close(torch.cat((first.cpu(), rest), dim=1), expected, 1e-5)


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


@pytest.mark.parametrize("device", DEVICES)
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
