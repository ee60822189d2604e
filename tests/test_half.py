"""half.py: the products that it changes, and those that it leaves.

Run: pytest tests/test_half.py
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import half
from freqkv import FreqKVCache, FreqKVConfig
from generate import fingerprint
from half import HalfLinear, use_fastest_products
from steady import Steady
from tests.helpers import compile_eagerly, random_tokens, tiny_config, tiny_model

CONFIG = FreqKVConfig(window=24, sinks=2)
SHAPES = [(20,), (1, 20), (1, 1, 20), (3, 20), (2, 32, 20), (64, 20), (0, 20)]


@pytest.fixture
def changed(monkeypatch):
    """Every matrix is large, four rows are many, and both ways are faster."""
    monkeypatch.setattr(half, "LARGE", 1)
    monkeypatch.setattr(half, "MANY", 4)
    monkeypatch.setattr(half, "vector_is_faster", lambda dtype: True)
    monkeypatch.setattr(half, "wide_is_faster", lambda dtype: True)


def make_model(tied=False):
    return tiny_model(tiny_config(tie_word_embeddings=tied)).bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("as_vector", [False, True])
@torch.no_grad()
def test_a_product_is_that_of_a_linear_layer(monkeypatch, shape, dtype, as_vector, widen):
    monkeypatch.setattr(half, "PIECE", 7)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 20, generator=generator).to(dtype)
    x = torch.randn(shape, generator=generator).to(dtype)
    expected = (x.double() @ weight.double().T).to(dtype)
    found = HalfLinear(nn.Parameter(weight), as_vector, widen)(x)
    assert found.shape == (*shape[:-1], 30)
    tolerance = 2 * torch.finfo(dtype).eps
    assert_close(found, expected, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("rows", [1, 64])
@torch.no_grad()
def test_under_autocast(rows):
    layer = HalfLinear(nn.Parameter(torch.ones(30, 20, dtype=torch.bfloat16)), True, True)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(torch.ones(rows, 20))
    assert_close(found, torch.full((rows, 30), 20.0, dtype=torch.bfloat16))


@torch.no_grad()
def test_which_way_a_product_goes(monkeypatch):
    ways = []
    mv = torch.mv
    linear = half.F.linear

    def note_mv(matrix, vector):
        ways.append("vector")
        return mv(matrix, vector)

    def note_linear(x, weight, bias=None):
        ways.append(str(weight.dtype))
        return linear(x, weight, bias)

    monkeypatch.setattr(half.torch, "mv", note_mv)
    monkeypatch.setattr(half.F, "linear", note_linear)
    weight = nn.Parameter(torch.ones(30, 20, dtype=torch.bfloat16))
    for as_vector in (False, True):
        for widen in (False, True):
            layer = HalfLinear(weight, as_vector, widen)
            for rows in (1, 2, half.MANY - 1, half.MANY):
                layer(torch.ones(1, rows, 20, dtype=torch.bfloat16))
    low, wide = "torch.bfloat16", "torch.float32"
    assert ways[:8] == [low, low, low, low, low, low, low, wide]
    assert ways[8:] == ["vector", low, low, low, "vector", low, low, wide]


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_model_reads_as_before(changed, tied):
    model = make_model(tied)
    plain = make_model(tied)
    weights = list(plain.parameters())
    use_fastest_products(model)
    layers = [layer for layer in model.modules() if isinstance(layer, HalfLinear)]
    assert len(layers) == 2 * 7 + 1
    for layer in layers:
        assert (layer.as_vector, layer.widen) == (True, True)
    assert fingerprint(model) == fingerprint(plain)
    cache = FreqKVCache(CONFIG)
    plain_cache = FreqKVCache(CONFIG)
    for tokens in random_tokens(1, 60).split([10, *[1] * 50], dim=1):
        found = model(tokens, cache)
        assert found.dtype == torch.bfloat16
        assert_close(found, plain(tokens, plain_cache), rtol=0.1, atol=0.1)
    assert cache.rounds == 4
    for weight, other in zip(model.parameters(), weights, strict=True):
        assert torch.equal(weight, other)
    pointers = {weight.data_ptr() for weight in model.parameters()}
    assert len(pointers) == len(weights)  # nothing is there twice


@torch.no_grad()
def test_in_one_graph(changed):
    model = make_model()
    use_fastest_products(model)
    caches = FreqKVCache(CONFIG), FreqKVCache(CONFIG)
    tokens = random_tokens(1, 30)
    for cache in caches:
        model(tokens[:, :10], cache)
    step = Steady(model, caches[0], compile_eagerly)
    for place in range(10, 30):
        found = step(tokens[:, place])
        assert_close(found, model(tokens[:, place : place + 1], caches[1])[:, 0], rtol=0, atol=0.1)


def test_what_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(half, "wide_is_faster", lambda dtype: True)
    monkeypatch.setattr(half, "vector_is_faster", lambda dtype: True)
    model = make_model(tied=True).float()
    use_fastest_products(model)
    assert not any(isinstance(layer, HalfLinear) for layer in model.modules())
    assert model.lm_head is None
    small = half.make_layer(nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16)))
    assert (small.as_vector, small.widen) == (False, True)
    with torch.device("meta"):
        large = nn.Parameter(torch.empty(2048, 2048, dtype=torch.bfloat16))
    assert half.make_layer(large).as_vector


@pytest.mark.parametrize(("one", "other", "faster"), [(2, 3, True), (9, 10, False), (2, 1, False)])
def test_a_way_is_taken_where_it_is_clearly_faster(monkeypatch, one, other, faster):
    """By a clock that stands still but for these calls."""
    now = [0.0]

    def take(seconds):
        now[0] += seconds

    monkeypatch.setattr(half.time, "perf_counter", lambda: now[0])
    assert half.is_faster(lambda: take(one), lambda: take(other)) is faster


def test_both_ways_are_measured():
    assert isinstance(half.vector_is_faster.__wrapped__(torch.bfloat16), bool)
    assert isinstance(half.wide_is_faster.__wrapped__(torch.bfloat16), bool)
