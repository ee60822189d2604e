"""levels.py: both forms against a slow ladder of lists, each other, and the bound on memory.

Run: pytest tests/test_levels.py
"""

from itertools import product

import numpy as np
import pytest
import scipy.fft
import torch
from helpers import (
    DEVICES,
    attend_in_pieces,
    cuts,
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

from freqkv import FreqKVCache, FreqKVConfig, distinct, lowband, newest
from levels import LevelsAttention, LevelsCache, LevelsConfig, compact
from model import causal_attention

CONFIG = LevelsConfig(window=32, sinks=2, recent=3, block=3)
SCHEDULES = [
    CONFIG,
    LevelsConfig(window=64, sinks=4, recent=16, block=4),
    LevelsConfig(window=16, sinks=0, recent=0, block=2),
    LevelsConfig(window=9, sinks=1, recent=0, block=1),
    LevelsConfig(window=23, sinks=3, recent=0, block=5),  # one level
]
over_schedules = pytest.mark.parametrize("config", SCHEDULES, ids=str)
over_operators = pytest.mark.parametrize("operator", [lowband, newest, distinct])


def close(actual, expected, atol):
    assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def model():
    return tiny_model().double()


# A slow ladder of lists


class Ladder:
    """What the slots hold, in lists of tokens: sinks, levels of blocks, and what is newest."""

    def __init__(self, config, merge):
        self.config, self.merge = config, merge
        self.sinks, self.newest = [], []
        self.levels = [[] for _ in range(config.levels)]  # of each level the blocks, oldest first

    def slots(self):
        blocks = [block for level in reversed(self.levels) for block in level]
        return self.sinks + [slot for block in blocks for slot in block] + self.newest

    def add(self, token):
        m = self.config.block
        if len(self.sinks) < self.config.sinks:
            self.sinks.append(token)
            return
        if len(self.newest) == self.config.recent + 2 * m:
            self.arrive(0, self.merge(self.newest[: 2 * m]))
            self.newest = self.newest[2 * m :]
        self.newest.append(token)

    def arrive(self, level, block):
        blocks = self.levels[level]
        blocks.append(block)
        if len(blocks) == 3:
            one = self.merge(blocks[0] + blocks[1])
            del blocks[:2]
            if level + 1 < len(self.levels):
                self.arrive(level + 1, one)
            else:
                blocks.insert(0, one)


def merge_of(operator, m):
    """2m slots, each a pair (key, value), to m of them, by other code than the operators."""

    def merge(slots):
        keys, values = (np.array(x) for x in zip(*slots, strict=True))
        if operator is newest:
            return slots[m:]
        if operator is distinct:
            directions = keys / np.linalg.norm(keys, axis=1, keepdims=True)
            mean = directions.mean(axis=0)
            likeness = directions @ mean / np.linalg.norm(mean)
            order = sorted(
                range(2 * m), key=lambda i: (round(likeness[i], 6), -i)
            )  # of equals the newest
            return [slots[i] for i in sorted(order[:m])]
        low = []
        for x in (keys, values):
            band = scipy.fft.dct(x, norm="ortho", axis=0)[:m]
            low.append(np.sqrt(0.5) * scipy.fft.idct(band, norm="ortho", axis=0))
        return list(zip(*low, strict=True))

    return merge


def turn(x, position):
    half = len(x) // 2
    pairs = (x[:half] + 1j * x[half:]) * np.exp(
        1j * position * 10000.0 ** (-np.arange(half) / half)
    )
    return np.concatenate((pairs.real, pairs.imag))


def slow_levels(q, k, v, config, operator):
    """Outputs [B, H, T, D] of attention a token at a time over a ladder of unrotated slots."""
    out = np.zeros_like(q)
    for b, h in product(range(q.shape[0]), range(q.shape[1])):
        group = h * k.shape[1] // q.shape[1]
        ladder = Ladder(config, merge_of(operator, config.block))
        for t in range(q.shape[2]):
            ladder.add((k[b, group, t], v[b, group, t]))
            slots = ladder.slots()
            query = turn(q[b, h, t], len(slots) - 1)
            scores = [query @ turn(key, place) for place, (key, _) in enumerate(slots)]
            weights = np.exp(np.array(scores) / np.sqrt(q.shape[-1]))
            out[b, h, t] = weights @ np.array([value for _, value in slots]) / weights.sum()
    return out


@over_schedules
@over_operators
def test_both_forms_equal_the_slow_one(config, operator):
    time = 5 * config.window + 3
    qkv = random_qkv(time, batch=1, dtype=torch.float64)
    expected = torch.from_numpy(slow_levels(*(x.numpy() for x in qkv), config, operator))
    close(LevelsAttention(config, operator)(0, *qkv, plain_rope), expected, 1e-9)
    for where in ([], range(1, time), range(5, time, 7)):
        cache = LevelsCache(config, operator)
        close(attend_in_pieces(cache, qkv, where), expected, 1e-9)


@over_schedules
def test_counts_are_those_of_the_slow_ladder(config):
    ladder = Ladder(config, lambda slots: slots[: len(slots) // 2])
    rounds = 0
    for tokens in range(20 * config.window):
        assert config.slots(tokens) == len(ladder.slots()) <= config.window
        assert config.blocks(rounds) == [len(level) for level in ladder.levels]
        assert config.rounds(tokens) == rounds
        if config.room(tokens) == 0:
            rounds += 1
        else:
            assert config.room(tokens) <= 2 * config.block or rounds == 0
        ladder.add(tokens)


def test_the_example_of_64_slots():
    config = LevelsConfig(window=64, sinks=4, recent=16, block=4)
    assert config.levels == 4
    assert max(config.slots(tokens) for tokens in range(3000)) == 60


def test_a_token_is_compressed_once_for_each_doubling_of_its_age():
    """Ages follow 1/resolution: the oldest block of level i spans 2m 2^(i-1) tokens."""
    config = LevelsConfig(window=64, sinks=4, recent=16, block=4)
    ladder = Ladder(
        config, lambda slots: [a + b for a, b in zip(slots[::2], slots[1::2], strict=True)]
    )
    for token in range(4 + 24 + 8 * 100):
        ladder.add([token])
    for level, blocks in enumerate(ladder.levels[:-1]):
        assert {len(slot) for block in blocks for slot in block} == {2 ** (level + 1)}


# Properties


@over_schedules
@over_operators
@settings(max_examples=5)
@given(data=st.data())
def test_parallel_equals_recurrent(model, config, operator, data):
    time = data.draw(st.sampled_from([config.room(0), config.room(0) + 1, 3 * config.window]))
    where = data.draw(cuts(time))
    tokens = random_tokens(2, time, seed=time)
    expected = read(model, tokens, LevelsAttention(config, operator))
    close(read(model, tokens, LevelsCache(config, operator), where), expected, 1e-5)


@over_schedules
def test_equal_to_plain_attention_until_the_first_round(model, config):
    tokens = random_tokens(2, config.room(0) + 1)
    plain = read(model, tokens, causal_attention)
    for form in (LevelsAttention(config), LevelsCache(config)):
        logits = read(model, tokens, form)
        close(logits[:, :-1], plain[:, :-1], 1e-6)
        assert not torch.allclose(logits[:, -1], plain[:, -1], atol=1e-4)


@pytest.mark.parametrize("form", [LevelsAttention, LevelsCache])
@pytest.mark.parametrize("changed", [0, 1, 8, 10, 11, 12, 16, 17, 18, 40, 59])
def test_causal(model, form, changed):
    tokens = random_tokens(2, 60)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 50
    before, after = (read(model, x, form(CONFIG)) for x in (tokens, other))
    close(after[:, :changed], before[:, :changed], 1e-6)
    assert (after[:, changed:] != before[:, changed:]).any(-1).all()


@over_schedules
def test_positions_stay_below_the_window(config):
    time, positions = 5 * config.window, set()

    def spy(x, start=0, inverse=False):
        positions.update(range(start, start + x.shape[-2]))
        return plain_rope(x, start, inverse)

    LevelsAttention(config)(0, *random_qkv(time), spy)
    attend_in_pieces(LevelsCache(config), random_qkv(time), range(3, time, 4), spy)
    assert positions <= set(range(config.window))
    assert max(positions) == max(config.slots(tokens) for tokens in range(time + 1)) - 1


def test_gradients_flow_through_rounds():
    config = LevelsConfig(window=11, sinks=1, recent=1, block=2)
    qkv = random_qkv(23, batch=1, heads=2, kv_heads=1, head_dim=4, dtype=torch.float64)
    attend = LevelsAttention(config)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(0, q, k, v, plain_rope), [x.requires_grad_() for x in qkv]
    )


def test_bfloat16_agrees_roughly(model):
    qkv = random_qkv(200)
    expected = LevelsAttention(CONFIG)(0, *qkv, plain_rope)
    for form in (LevelsAttention(CONFIG), LevelsCache(CONFIG)):
        out = form(0, *(x.bfloat16() for x in qkv), plain_rope)
        assert out.dtype == torch.bfloat16
        close(out.float(), expected, 0.06)


def test_slots_that_do_not_move_are_left_as_they_are():
    """A round without a full level leaves the sinks and all older blocks to the bit."""
    cache = LevelsCache(CONFIG)
    qkv = random_qkv(200, dtype=torch.bfloat16)
    for t in range(200):
        full = CONFIG.full_levels(CONFIG.rounds(t))
        before = cache.state_dict() if t else None
        comes = CONFIG.room(t) == 0
        cache(0, *(x[:, :, t : t + 1] for x in qkv), plain_rope)
        if before is not None:
            same = before["k.0"].shape[2]
            if comes:
                same -= CONFIG.recent + 2 * CONFIG.block * (full + 1)
            after = cache.state_dict()
            assert torch.equal(after["k.0"][:, :, :same], before["k.0"][:, :, :same])


def test_a_round_turns_keys_in_float32():
    """So that a half type is rounded once, at its end."""
    dtypes = set()

    def rope(x, start=0, inverse=False):
        if inverse:
            dtypes.add(x.dtype)
        return plain_rope(x, start, inverse)

    cache = LevelsCache(CONFIG)
    cache(0, *random_qkv(200, dtype=torch.bfloat16), rope)
    assert dtypes == {torch.float32}


def test_compact_halves_pairs_of_blocks_side_by_side():
    keys, values = random_qkv(2 + 3 * 6 + 3)[1:]
    new_keys, new_values = compact(keys, values, CONFIG, full=2)
    for new, old in ((new_keys, keys), (new_values, values)):
        assert new.shape[2] == 2 + 9 + 3
        assert torch.equal(new[:, :, :2], old[:, :, :2])
        assert torch.equal(new[:, :, -3:], old[:, :, -3:])
        for pair in range(3):
            span = old[:, :, 2 + 6 * pair : 8 + 6 * pair]
            expected, _ = lowband(span, span, 3)
            close(new[:, :, 2 + 3 * pair : 5 + 3 * pair], expected, 1e-5)


# The cache


def test_counts_of_a_cache(model):
    cache = LevelsCache(CONFIG)
    for seen, token in enumerate(random_tokens(2, 150).split(1, dim=1), 1):
        read(model, token, cache)
        assert cache.tokens_seen == seen
        assert (cache.slots, cache.rounds) == (CONFIG.slots(seen), CONFIG.rounds(seen))
        assert cache.room == CONFIG.room(seen)
        assert cache.nbytes == 2 * 2 * 2 * 2 * CONFIG.window * 8 * 8
    assert cache.batch == 2


@pytest.mark.parametrize("seen", [5, 11, 12, 100])
def test_saved_cache_goes_on_as_the_original(model, tmp_path, seen):
    tokens, cache = random_tokens(2, 170), LevelsCache(CONFIG)
    read(model, tokens[:, :seen], cache)
    save_file(cache.state_dict(), tmp_path / "cache.safetensors")
    expected = read(model, tokens[:, seen:], cache)
    state = load_file(tmp_path / "cache.safetensors")
    fresh = LevelsCache.from_state(state)
    assert (fresh.config, fresh.tokens_seen) == (CONFIG, seen)
    assert torch.equal(read(model, tokens[:, seen:], fresh), expected)
    with pytest.raises(ValueError, match="saved cache"):
        FreqKVCache.from_state(state)
    other = FreqKVCache(FreqKVConfig(window=32, sinks=2))
    read(model, tokens[:, :seen], other)
    with pytest.raises(ValueError, match="saved cache"):
        LevelsCache.from_state(other.state_dict())


def test_crop_and_reorder(model):
    tokens, cache = random_tokens(3, 80), LevelsCache(CONFIG)
    read(model, tokens[:, :70], cache)
    least = 70
    while CONFIG.rounds(least - 1) == CONFIG.rounds(70):
        least -= 1
    with pytest.raises(ValueError, match=f"must leave {least} or more"):
        cache.crop(least - 1)
    cache.crop(least)
    cache.reorder([2, 0])
    expected = read(model, tokens[[2, 0]], LevelsAttention(CONFIG))[:, least:]
    close(read(model, tokens[[2, 0], least:], cache), expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("window", 16), ("window", 8.0), ("sinks", -1), ("recent", None), ("block", 0), ("block", 9)],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        LevelsConfig(**{"window": 32, "sinks": 2, "recent": 3, "block": 3, name: value})


# On a GPU


@pytest.mark.parametrize("device", DEVICES)
@over_operators
def test_both_forms_on_a_gpu(model, operator, device):
    tokens = random_tokens(2, 90)
    expected = read(model, tokens, LevelsAttention(CONFIG, operator))
    there = tiny_model().double().to(device)
    for attend in (LevelsAttention(CONFIG, operator), LevelsCache(CONFIG, operator)):
        where = [] if isinstance(attend, LevelsAttention) else [7, 33, 34]
        close(read(there, tokens.to(device), attend, where).cpu(), expected, 1e-5)
