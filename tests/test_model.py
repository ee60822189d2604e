"""model.py: logits against transformers and expected outputs, RoPE, the plain cache, sizes.

Run: pytest tests/test_model.py
"""

import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DATA,
    cuts,
    expected_model,
    load_published,
    plain_rope,
    random_qkv,
    random_tokens,
    read,
    tiny_config,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig, distinct
from levels import LevelsCache, LevelsConfig
from model import FullCache, Llama, LlamaConfig, Rope, RopeScaling, causal_attention

FREQKV = FreqKVConfig(window=16, sinks=2, ratio=0.5)
LEVELS = LevelsConfig(window=24, sinks=2, recent=4, block=2)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_position_embeddings=64)
VARIANTS = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {},
    "one kv head": {"num_key_value_heads": 1},
    "tied output": {"tie_word_embeddings": True},
    "llama3 scaling": {"head_dim": 16, "rope_theta": 1000.0, "rope_scaling": LLAMA3},
    "linear scaling": {"rope_scaling": RopeScaling("linear", 4.0)},
    "wide heads": {"head_dim": 24},
}


def close(actual, expected, atol):
    assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# Against others


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_those_of_transformers(changes):
    transformers = pytest.importorskip("transformers")
    config = tiny_config(rms_norm_eps=1e-2, max_position_embeddings=512, **changes)
    published = asdict(config)
    if scaling := published.pop("rope_scaling"):
        used = 2 if scaling["rope_type"] == "linear" else None
        published["rope_scaling"] = dict(list(scaling.items())[:used])
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**published)).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = random_tokens(2, 300)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
        expected = theirs(tokens).logits
    ours = load_published(config, theirs.state_dict())
    close(read(ours, tokens, causal_attention), expected, 1e-4)


EXPECTED = [
    ("mha", "freqkv_N32_S4_ratio0.5", "full_logits_T32"),
    ("mha", "freqkv_N32_S4_ratio0.5", "full_logits_T200"),
    ("meta/hf", "meta/expected", "logits_T200"),
]


@pytest.mark.parametrize(("folder", "file", "name"), EXPECTED)
def test_expected_logits(folder, file, name):
    expected = load_file(DATA / f"{file}.safetensors")
    tokens = expected["input_ids"][:, : int(name.rpartition("T")[2])]
    model = expected_model(folder)
    close(read(model, tokens, causal_attention), expected[name], 5e-4)
    close(read(model, tokens, FullCache(200), [20, 21]), expected[name], 5e-4)


LLAMA2 = {"vocab_size": 32000, "head_dim": 128, "max_position_embeddings": 4096}
LLAMA3_SHARED = {**LLAMA2, "vocab_size": 128256, "max_position_embeddings": 8192}
TIED = {**LLAMA3_SHARED, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("shared", "hidden", "intermediate", "layers", "heads", "kv_heads", "parameters"),
    [
        pytest.param(LLAMA2, 4096, 11008, 32, 32, 32, 6_738_415_616, id="Llama-2-7B"),
        pytest.param(LLAMA2, 5120, 13824, 40, 40, 40, 13_015_864_320, id="Llama-2-13B"),
        pytest.param(LLAMA2, 8192, 28672, 80, 64, 8, 68_976_648_192, id="Llama-2-70B"),
        pytest.param(LLAMA3_SHARED, 4096, 14336, 32, 32, 8, 8_030_261_248, id="Llama-3-8B"),
        pytest.param(LLAMA3_SHARED, 8192, 28672, 80, 64, 8, 70_553_706_496, id="Llama-3-70B"),
        pytest.param(
            {**TIED, "head_dim": 64}, 2048, 8192, 16, 32, 8, 1_235_814_400, id="Llama-3.2-1B"
        ),
        pytest.param(TIED, 3072, 8192, 28, 24, 8, 3_212_749_824, id="Llama-3.2-3B"),
    ],
)
def test_parameters_of_published_models(
    shared, hidden, intermediate, layers, heads, kv_heads, parameters
):
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **shared,
    )
    with torch.device("meta"):
        assert sum(weight.numel() for weight in Llama(config).parameters()) == parameters


# RoPE


@given(st.integers(0, 3000), st.integers(0, 20))
def test_rope_equals_complex_products(start, time):
    x = random_qkv(time)[0]
    rope = Rope(8, 10000.0)
    close(rope(x, start), plain_rope(x, start), 1e-5)
    close(rope(rope(x, start), start, inverse=True), x, 1e-5)
    close(rope(x, start), rope(torch.cat((x.new_zeros(2, 4, start, 8), x), 2))[:, :, start:], 0)


def test_rope_table_grows_as_later_positions_are_asked():
    rope, x = Rope(8, 10000.0), random_qkv(1100)[0]
    for time in (1, 255, 256, 257, 512, 513, 1100, 7):
        close(rope(x[:, :, :time]), plain_rope(x[:, :, :time]), 1e-5)


def test_rope_sees_distances_only():
    rope, (q, k, _) = Rope(8, 10000.0), random_qkv(1, kv_heads=4, dtype=torch.float64)
    scores = [(rope(q, start + 7) * rope(k, start)).sum(-1) for start in (0, 3, 500)]
    close(torch.stack(scores), scores[0].expand(3, 2, 4, 1), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rope_rounds_half_types_once(dtype):
    rope, x = Rope(8, 10000.0), random_qkv(20, dtype=dtype)[0]
    assert torch.equal(rope(x, 5), rope(x.float(), 5).to(dtype))


def test_llama3_scaling_has_three_regimes():
    plain, scaled = Rope(16, 1000.0).inv_freq, Rope(16, 1000.0, LLAMA3).inv_freq
    share, turns = scaled / plain, 64 * plain / (2 * torch.pi)
    assert torch.equal(share[turns > 4], torch.ones(2, dtype=torch.float64))
    close(share[turns < 1], torch.full((5,), 1 / 8, dtype=torch.float64), 1e-12)
    blend = (turns - 1) / 3
    between = (turns > 1) & (turns < 4)
    close(share[between], (blend + (1 - blend) / 8)[between], 1e-12)
    assert between.sum() == 1


# The plain cache


@settings(max_examples=30)
@given(st.data())
def test_full_cache_equals_causal_attention(model, data):
    tokens, cache = random_tokens(2, 40), FullCache(45)
    expected = read(model, tokens, causal_attention)
    close(read(model, tokens, cache, data.draw(cuts(40))), expected, 1e-5)
    assert (cache.tokens_seen, cache.nbytes) == (40, 2 * 2 * 2 * 2 * 45 * 8 * 4)


def test_full_cache_refuses_what_it_cannot_hold(model):
    cache = FullCache(10)
    read(model, random_tokens(2, 8), cache)
    with pytest.raises(ValueError, match=r"11 tokens.* capacity, 10"):
        read(model, random_tokens(2, 3), cache)
    with pytest.raises(ValueError, match=r"\(1, "):
        read(model, random_tokens(1, 1), cache)
    q = torch.zeros(1, 2, 3, 8)
    for v in (q[:, :, :1], q.bfloat16()):
        with pytest.raises(ValueError, match=r"must fit the cache, \(1, 2, 10, 8\) torch.float32"):
            FullCache(10)(0, q, q, v, lambda x, start=0: x)
    cache.reset()
    assert (cache.tokens_seen, cache.nbytes) == (0, 0)
    close(
        read(model, random_tokens(1, 8), cache), read(model, random_tokens(1, 8), FullCache(8)), 0
    )


def test_full_cache_refuses_inputs_that_need_gradients(model):
    cache = FullCache(10)
    with pytest.raises(ValueError, match="train with causal_attention"):
        model(random_tokens(1, 4), cache)
    assert cache.tokens_seen == 0


@pytest.mark.parametrize("seen", [0, 10])
@torch.no_grad()
def test_full_cache_notices_a_call_that_stopped_between_layers(model, seen):
    cache = FullCache(40)
    if seen > 0:  # else it is the first call of all
        model(random_tokens(1, seen), cache)

    def stops(layer, q, k, v, rope):
        if layer == 1:
            raise KeyboardInterrupt
        return cache(layer, q, k, v, rope)

    with pytest.raises(KeyboardInterrupt):
        model(random_tokens(1, 3), stops)
    with pytest.raises(ValueError, match="half way"):
        model(random_tokens(1, 4), cache)
    cache.reset()
    model(random_tokens(1, 4), cache)
    assert cache.tokens_seen == 4


def test_full_cache_filled_in_inference_mode_goes_on_outside(model):
    tokens, cache = random_tokens(2, 40), FullCache(40)
    with torch.inference_mode():
        model(tokens[:, :20], cache)
    expected = read(model, tokens, causal_attention)[:, 20:]
    close(read(model, tokens[:, 20:], cache), expected, 1e-5)


# The model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_strategy_is_handed_every_layer(checkpointing):
    model, calls = tiny_model(), []
    model.gradient_checkpointing = checkpointing

    def spy(layer, q, k, v, rope):
        calls.append((layer, q.shape, k.shape, v.shape, rope))
        return causal_attention(layer, q, k, v, rope)

    model(random_tokens(3, 5), spy)
    shapes = (3, 4, 5, 8), (3, 2, 5, 8), (3, 2, 5, 8)
    assert calls == [(0, *shapes, model.rope), (1, *shapes, model.rope)]


def test_logits_of_the_last_token_alone(model):
    tokens = random_tokens(2, 9)
    close(model.logits(model.hidden(tokens)[:, -1:]), model(tokens)[:, -1:], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_computes_half_types_in_float32(dtype):
    norm, x = tiny_model().to(dtype).norm, random_qkv(5, head_dim=32, dtype=dtype)[0]
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps)
    assert torch.equal(norm(x), normed.to(dtype) * norm.weight)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.25), (torch.float16, 0.04)])
def test_half_types_agree_roughly(model, dtype, atol):
    tokens = random_tokens(2, 40)
    logits = read(tiny_model().to(dtype), tokens, causal_attention)
    assert logits.dtype == dtype
    close(logits.float(), read(model, tokens, causal_attention), atol)


def gradients(model, tokens, attend):
    model.zero_grad()
    model(tokens, attend).logsumexp(-1).sum().backward()
    return [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("attend", [causal_attention, FreqKVAttention(FREQKV)])
def test_gradient_checkpointing_changes_no_gradient(attend):
    tokens, model = random_tokens(2, 40), tiny_model()
    expected = gradients(model, tokens, attend)
    model.gradient_checkpointing = True
    assert_close(gradients(model, tokens, attend), expected)


@pytest.mark.parametrize("attend", [causal_attention, FreqKVAttention(FREQKV)])
def test_trains_after_a_run_in_inference_mode(attend):
    tokens, model = random_tokens(2, 40), tiny_model()
    with torch.inference_mode():
        model(tokens, attend)
    assert_close(gradients(model, tokens, attend), gradients(tiny_model(), tokens, attend))


class OnlyMeta(TorchFunctionMode):
    """Fails at the first call that takes or gives a tensor of another device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        # A CausalBias is a tensor by name only: it stands for a mask.
        assert all(x.is_meta or isinstance(x, CausalBias) for x in tensors), func
        return out


STRATEGIES = {
    "causal_attention": lambda: causal_attention,
    "FullCache": lambda: FullCache(60),
    "FreqKVAttention": lambda: FreqKVAttention(FREQKV),
    "FreqKVCache": lambda: FreqKVCache(FREQKV),
    "distinct": lambda: FreqKVCache(FREQKV, distinct),
    "LevelsCache": lambda: LevelsCache(LEVELS),
}


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_nothing_leaves_the_device(make):
    with torch.device("meta"):
        model, tokens = Llama(tiny_config()), torch.zeros(2, 50, dtype=torch.long)
    attend = make()
    with torch.no_grad():
        model(tokens, make())  # makes the tables, on the CPU first
    with OnlyMeta(), torch.no_grad():
        assert model(tokens, attend).shape == (2, 50, 50)
        assert model(tokens[:, :1], attend).is_meta


# Weights to train from


@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_model_knows_nothing_yet(tied):
    """Its loss is that of guessing, ln V, and every part of it learns at once."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=1000, hidden_size=64, head_dim=16, tie_word_embeddings=tied)
    model = Llama(config)
    tokens = random_tokens(4, 33, vocab_size=1000)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(1000), rel=0.02)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_weights_begin_as_wide_as_they_should():
    torch.manual_seed(0)
    model = Llama(tiny_config(hidden_size=128, head_dim=32, num_hidden_layers=3))
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
            width = 0.02 / math.sqrt(6) if narrow else 0.02
            assert weight.std().item() == pytest.approx(width, rel=0.1)
            assert abs(weight.mean().item()) < 0.1 * width


# What is refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in list(LlamaConfig.__dataclass_fields__)[:8]),
        ("vocab_size", 50.0),
        ("hidden_size", True),
        ("num_hidden_layers", None),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", -1.0),
        ("rope_theta", "x"),
    ],
)
def test_bad_config_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        tiny_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_type", "yarn"),
        ("rope_type", None),
        *(("factor", value) for value in (0, -1.0, float("nan"), "x")),
        *(("low_freq_factor", value) for value in (0, 4.0, 5.0)),
        ("high_freq_factor", 1.0),
        *(("original_max_position_embeddings", value) for value in (0, -1)),
    ],
)
def test_bad_rope_scaling_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        RopeScaling(**{**asdict(LLAMA3), name: value})


@pytest.mark.parametrize(
    "tokens", [torch.zeros(5), torch.zeros(1, 5), random_tokens(1, 5)[0], random_tokens(1, 5)[None]]
)
def test_bad_tokens_are_refused(model, tokens):
    with pytest.raises(ValueError, match="tokens: were"):
        model(tokens)


# On a GPU


@pytest.mark.cuda
def test_gpu_equals_cpu(model):
    tokens, on_gpu = random_tokens(2, 60), tiny_model().cuda()
    expected = read(model, tokens, causal_attention)
    close(read(on_gpu, tokens.cuda(), causal_attention).cpu(), expected, 1e-3)
    close(read(on_gpu, tokens.cuda(), FullCache(60), [20, 21]).cpu(), expected, 1e-3)
