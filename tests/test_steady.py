"""steady.py: the numbers of the cache that it decodes with, in one graph.

Run: pytest tests/test_steady.py
"""

import copy

import pytest
import torch
from torch.testing import assert_close

import generate
import steady
from cli import OPERATORS
from freqkv import FreqKVCache, FreqKVConfig
from generate import read_token
from levels import LevelsCache, LevelsConfig
from model import Rope
from steady import Steady
from tests.helpers import compile_eagerly, random_tokens, tiny_checkpoint, tiny_model

CONFIG = FreqKVConfig(window=24, sinks=2, recent=4)
LEVELS = LevelsConfig(window=32, sinks=2, recent=6, block=3)


def make_caches(name):
    if name == "levels":
        return LevelsCache(LEVELS), LevelsCache(LEVELS)
    return FreqKVCache(CONFIG, OPERATORS[name]), FreqKVCache(CONFIG, OPERATORS[name])


def as_it_is(step):
    return step


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("read", [1, 10, 24, 25, 50])
@pytest.mark.parametrize("name", [*OPERATORS, "levels"])
@torch.no_grad()
def test_it_decodes_what_the_cache_does(model, name, read):
    plain, other = make_caches(name)
    tokens = random_tokens(2, 110)
    model(tokens[:, :read], plain)
    model(tokens[:, :read], other)
    step = Steady(model, other, as_it_is)
    for place in range(read, 110):
        assert_close(step(tokens[:, place]), read_token(model, tokens[:, place], plain))
        assert other.tokens_seen == plain.tokens_seen == place + 1
    assert other.rounds == plain.rounds > 5
    # Whoever goes on with the cache, finds it as any other.
    assert_close(model(tokens[:, :40], other), model(tokens[:, :40], plain))


@torch.no_grad()
def test_one_graph_for_all_tokens(model):
    plain, other = make_caches("freqkv")
    tokens = random_tokens(1, 90)
    model(tokens[:, :5], plain)
    model(tokens[:, :5], other)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = Steady(model, other, compile_eagerly)
    for place in range(5, 90):
        assert_close(step(tokens[:, place]), read_token(model, tokens[:, place], plain))
    assert other.rounds > 5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_positions_in_a_tensor_are_those_in_a_number():
    rope = Rope(16, 10000.0)
    x = torch.randn(2, 3, 4, 16)
    rope.table(x.device, 300)
    for start in (0, 7, 290):
        assert torch.equal(rope.at(x, torch.arange(start, start + 4)), rope(x, start))


def test_a_step_that_failed_is_found(model):
    cache = FreqKVCache(CONFIG)
    model.requires_grad_(False)(random_tokens(1, 24), cache)

    def fail(tokens):
        raise KeyboardInterrupt

    step = Steady(model, cache, lambda _: fail)
    with pytest.raises(KeyboardInterrupt):
        step(torch.zeros(1, dtype=torch.long))
    for call in (step, lambda tokens: model(tokens[None], cache)):
        with pytest.raises(ValueError, match="half way"):
            call(torch.zeros(1, dtype=torch.long))


def test_an_empty_cache_is_refused(model):
    with pytest.raises(ValueError, match="cache: was empty"):
        Steady(model, FreqKVCache(CONFIG))


@torch.no_grad()
def test_a_wrong_token_leaves_the_cache_whole(model):
    plain, other = make_caches("freqkv")
    tokens = random_tokens(2, 25)
    model(tokens[:, :24], plain)
    model(tokens[:, :24], other)  # the next token sets off a round
    step = Steady(model, other, as_it_is)
    for wrong in (tokens[0, 0], tokens[:, :1], tokens[:1, 0], tokens[:, 0].to("meta")):
        with pytest.raises(ValueError, match=r"tokens: were .*, must be \[2\] on cpu"):
            step(wrong)
    assert_close(step(tokens[:, 24]), read_token(model, tokens[:, 24], plain))


def test_made_in_inference_mode_it_works_outside(model):
    cache = FreqKVCache(CONFIG)
    with torch.inference_mode():
        model(random_tokens(1, 20), cache)
        step = Steady(model, cache, as_it_is)
    step(torch.zeros(1, dtype=torch.long))
    assert cache.tokens_seen == 21


@torch.no_grad()
def test_the_cache_is_copied_and_not_what_reads_into_it(model):
    cache = FreqKVCache(CONFIG)
    model(random_tokens(1, 20), cache)
    with pytest.raises(TypeError, match="must be made anew"):
        copy.deepcopy(Steady(model, cache, as_it_is))


# generate.py --compile


@pytest.mark.parametrize("schedule", ["paper", "levels"])
def test_the_script_writes_the_same(tmp_path, outcome, monkeypatch, schedule):
    monkeypatch.setattr(steady, "compile_step", compile_eagerly)
    tiny_checkpoint(tmp_path)
    flags = ("--model", tmp_path, "--prompt", "def main(" * 9, "--max-new-tokens", 60)
    flags += ("--window", 32, "--schedule", schedule, "--device", "cpu")
    plain = outcome(generate, *flags)
    compiled = outcome(generate, *flags, "--compile")
    assert plain.code == compiled.code == 0, compiled.err
    assert plain.out == compiled.out
    assert len(plain.out) > 20


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--cache", "full"], "--compile: was given with --cache full"),
        (["--num-samples", "2"], "--compile: was given with --num-samples"),
    ],
)
def test_what_it_cannot_compile(tmp_path, outcome, flags, says):
    tiny_checkpoint(tmp_path)
    few = ("--max-new-tokens", 9)
    ran = outcome(generate, "--model", tmp_path, "--prompt", "x", "--compile", *few, *flags)
    assert ran.code == 2
    assert says in ran.err


def test_a_compiler_that_fails_is_one_line(tmp_path, outcome, monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("No working C++ compiler\nfound")

    def compile_badly(step):
        return torch.compile(step, fullgraph=True, backend=no_compiler)

    monkeypatch.setattr(steady, "compile_step", compile_badly)
    tiny_checkpoint(tmp_path)
    ran = outcome(generate, "--model", tmp_path, "--prompt", "x", "--compile")
    assert ran.code == 2
    assert "torch.compile: failed (" in ran.err
    assert "No working C++ compiler" in ran.err
    assert "or be left out" in ran.err


# On a GPU


@pytest.mark.cuda
@torch.no_grad()
def test_a_cuda_graph_decodes_what_the_cache_does():
    model = tiny_model().cuda()
    plain, other = make_caches("freqkv")
    tokens = random_tokens(1, 90).cuda()
    model(tokens[:, :5], plain)
    model(tokens[:, :5], other)
    step = Steady(model, other)
    for place in range(5, 90):
        expected = read_token(model, tokens[:, place], plain)
        assert_close(step(tokens[:, place]), expected, atol=1e-4, rtol=1e-4)
