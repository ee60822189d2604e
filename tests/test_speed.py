"""experiments/speed.py, peers.py: what is timed is what it says, and every case runs.

Run: pytest tests/test_speed.py

No time is asserted: where one matters, a clock stands still but for what a test adds to it.
"""

import json
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import compile_eagerly, random_tokens, read, tiny_checkpoint, tiny_config, tiny_model
from safetensors.torch import load_file
from torch.testing import assert_close

import cli
import dct as dct_file
import steady
from dct import lowpass
from experiments import peers, speed
from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig
from levels import LevelsCache, LevelsConfig
from model import FullCache, Llama, causal_attention

CPU = torch.device("cpu")
CONFIG = FreqKVConfig(window=16, sinks=2)
SMALL = speed.Sizes(
    model="", big="", windows=(16, 64), lengths=(40, 80), steps=2, bandwidth=1 << 20,
    reads=(40, 80), spans=(60,), heads=(2,), multiples=(2,), texts=(40, 80),
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_checkpoint(folder)
    return str(folder)


@pytest.fixture
def setup(checkpoint):
    sizes = replace(SMALL, model=checkpoint, big=checkpoint)
    return speed.Setup(sizes, checkpoint, CPU, torch.float32)


@pytest.fixture
def in_this_process(monkeypatch):
    """Starting a process takes seconds: one test does, the others call at once."""
    monkeypatch.setattr(speed, "run_apart", lambda call, *arguments: call(*arguments))


class Clock:
    """Stands still until something is said to take a second."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def takes(self, monkeypatch, owner, name, seconds):
        before = getattr(owner, name)

        def call(*arguments):
            self.now += seconds
            return before(*arguments)

        monkeypatch.setattr(owner, name, call)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(cli, "time", clock)
    return clock


# Caches as they are after a text


@pytest.mark.parametrize("tokens", [5, 16, 17, 23, 500])
def test_a_freqkv_cache_is_as_after_a_text(tokens):
    model = tiny_model()
    real = FreqKVCache(CONFIG)
    read(model, random_tokens(1, tokens), real)
    cache = peers.fill_freqkv_cache(model, tokens, CONFIG)
    assert (cache.tokens_seen, cache.slots, cache.rounds) == (tokens, real.slots, real.rounds)
    assert cache.nbytes == real.nbytes
    expected = real.state_dict()
    state = cache.state_dict()
    assert list(state) == list(expected)
    for name, slots in state.items():
        assert (slots.shape, slots.dtype) == (expected[name].shape, expected[name].dtype)
        if name[0] in "kv":
            check_random(slots)
    assert not torch.equal(state["k.0"], state["v.0"])


def check_random(slots):
    """Of standard deviation 1, in each slot: not a number of them is left at zero."""
    assert (slots.abs().amax(dim=-1) > 0.1).all()
    assert slots.std().item() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("tokens", [5, 20])
def test_the_next_token_sees_the_slots_of_a_freqkv_cache(tokens):
    """One token's attention over the slots, and over itself behind them."""
    model = tiny_model()
    cache = peers.fill_freqkv_cache(model, tokens, CONFIG)
    state = cache.state_dict()
    place = CONFIG.slots(tokens)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 1, 8, generator=generator)
    k = torch.randn(1, 2, 1, 8, generator=generator)
    v = torch.randn(1, 2, 1, 8, generator=generator)
    for layer in range(2):
        keys = torch.cat((state[f"k.{layer}"], model.rope(k, place)), dim=2)
        values = torch.cat((state[f"v.{layer}"], v), dim=2)
        expected = F.scaled_dot_product_attention(
            model.rope(q, place), keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
        )
        assert_close(cache(layer, q, k, v, model.rope), expected)


def test_the_other_caches_are_as_after_a_text():
    pytest.importorskip("transformers")
    model = tiny_model()
    cache = peers.fill_full_cache(model, 40, 3)
    assert (cache.tokens_seen, cache.capacity) == (40, 43)
    theirs = peers.fill_their_cache(model, 40)
    assert theirs.get_seq_length() == 40
    with torch.no_grad():
        peers.make_reader(model, cache)(random_tokens(1, 1))
        peers.make_their_reader(peers.make_twin(model), theirs)(random_tokens(1, 1))
    assert cache.tokens_seen == theirs.get_seq_length() == 41


@pytest.mark.parametrize("name", ["freqkv", "full", "theirs"])
def test_a_step_depends_on_what_its_cache_holds(name):
    """Caches of zeros would all give the same logits."""
    model = tiny_model()

    def first_logits(seed):
        torch.manual_seed(seed)
        if name == "freqkv":
            step = peers.make_reader(model, peers.fill_freqkv_cache(model, 40, CONFIG))
        elif name == "full":
            step = peers.make_reader(model, peers.fill_full_cache(model, 40, 1))
        else:
            pytest.importorskip("transformers")
            twin = peers.make_twin(model)
            step = peers.make_their_reader(twin, peers.fill_their_cache(model, 40))
        with torch.no_grad():
            return step(random_tokens(1, 1))

    once = first_logits(0)
    assert_close(once, first_logits(0))
    assert (once - first_logits(1)).abs().max() > 1e-2


@pytest.mark.parametrize("tokens", [1, 5, 1024, 2500])
def test_random_slots(tokens):
    slots = peers.random_slots(tiny_model(), tokens)
    assert slots.shape == (1, 2, tokens, 8)
    check_random(slots)
    assert peers.random_slots(tiny_model().bfloat16(), 3).dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [1, 40])
def test_peers_agree_on_the_same_keys_and_values(monkeypatch, tokens):
    pytest.importorskip("transformers")
    model = tiny_model()
    twin = peers.make_twin(model)
    assert_close(twin(random_tokens(1, 9)).logits, model(random_tokens(1, 9)))
    generator = torch.Generator().manual_seed(7)
    keys = torch.randn(1, 2, tokens, 8, generator=generator)
    values = torch.randn(1, 2, tokens, 8, generator=generator)

    def given(*slots):
        slots = iter(slots)
        monkeypatch.setattr(peers, "random_slots", lambda model, count: next(slots))

    with torch.no_grad():
        given(keys, values)
        ours = peers.make_reader(model, peers.fill_full_cache(model, tokens, 2))
        given(model.rope(keys), values)  # theirs takes keys as they are; our cache rotates them
        theirs = peers.make_their_reader(twin, peers.fill_their_cache(model, tokens))
        for _ in range(2):
            assert_close(theirs(random_tokens(1, 1)), ours(random_tokens(1, 1)))


def test_both_make_the_logits_of_the_last_token_alone():
    pytest.importorskip("transformers")
    model = tiny_model(tiny_config(tie_word_embeddings=False))
    twin = peers.make_twin(model)
    widths = []
    for head in (model.lm_head, twin.lm_head):
        head.register_forward_hook(lambda head, inputs, logits: widths.append(logits.numel()))
    with torch.no_grad():
        peers.make_reader(model, peers.fill_full_cache(model, 9, 5))(random_tokens(1, 5))
        peers.make_their_reader(twin, peers.fill_their_cache(model, 9))(random_tokens(1, 5))
    assert widths == [50, 50]


@pytest.mark.parametrize("tied", [True, False])
def test_the_twin_has_the_same_output_layer(tied):
    pytest.importorskip("transformers")
    model = tiny_model(tiny_config(tie_word_embeddings=tied))
    assert_close(peers.make_twin(model)(random_tokens(1, 9)).logits, model(random_tokens(1, 9)))


# Models


@pytest.mark.parametrize(
    ("name", "count"), [("llama-3.2-1b", 1_235_814_400), ("llama-2-7b", 6_738_415_616)]
)
def test_random_weights_have_the_published_number(name, count):
    model = peers.make_model(name, torch.bfloat16, torch.device("meta"))
    assert sum(weight.numel() for weight in model.parameters()) == count
    assert model.norm.weight.dtype == torch.bfloat16


def test_random_weights_are_all_filled(monkeypatch):
    monkeypatch.setitem(peers.SHAPES, "small", tiny_config(vocab_size=40_000))
    model = peers.make_model("small", torch.float32, CPU)
    assert peers.read_config("small") == model.config
    for weight in model.parameters():
        assert weight.std().item() == pytest.approx(0.02, abs=0.01)
    assert model(random_tokens(1, 5)).isfinite().all()


def test_cache_bytes_are_those_of_a_full_cache():
    model = tiny_model().bfloat16()
    cache = FullCache(40)
    read(model, random_tokens(1, 9), cache)
    assert peers.count_cache_bytes(model, 40) == cache.nbytes


@pytest.mark.parametrize("tied", [True, False])
def test_token_bytes_are_the_matrices_and_the_slots(tied):
    model = tiny_model(tiny_config(tie_word_embeddings=tied))
    head = 50 * 32
    attention = 2 * 32 * 32 + 2 * 16 * 32
    feed_forward = 3 * 32 * 48
    norms = 5 * 32
    slots = 2 * 2 * 2 * 8 * 100  # keys and values of two layers, two heads of 8 channels
    expected = 4 * (head + 2 * (attention + feed_forward) + norms + slots)
    assert speed.count_token_bytes(model, 100) == expected


# Times


def test_calls_are_timed_one_by_one_after_warming_up(clock):
    seconds = iter([100, 10, 1, 3, 2])

    def call():
        clock.now += next(seconds)

    assert speed.time_calls(call, 3, CPU, warm=2) == [1, 3, 2]


def test_the_clock_waits_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    speed.time_calls(lambda: None, 1, torch.device("cuda", 1), warm=0)
    assert waited == 2 * [torch.device("cuda", 1)]  # before the start is read, and the end


def test_the_longest_token_of_decoding_meets_a_round(setup, clock, monkeypatch):
    clock.takes(monkeypatch, Llama, "hidden", 1)
    clock.takes(monkeypatch, FreqKVCache, "_compress", 10)
    monkeypatch.setattr(peers, "other_readers", lambda *arguments: iter(()))
    for record in speed.decode(setup):
        assert record["ms"] == 1000
        assert record["longest_ms"] == 21_000  # two layers
        window = int(record["peer"].removeprefix("FreqKV, window "))
        assert record["share_of_rounds"] == pytest.approx(20 / FreqKVConfig(window).stride)
    record = speed.decode_once(setup.model, torch.float32, CPU)
    weights = load_file(f"{setup.model}/model.safetensors")
    assert record["weights_bytes"] == sum(weight.nbytes for weight in weights.values())
    assert (record["ms"], record["round_ms"]) == (1000, 21_000)


def test_all_slots_are_in_use_at_the_end_of_a_text(monkeypatch):
    seen = []
    watch_steps(monkeypatch, lambda cache, count: seen.append((cache.tokens_seen, cache.slots)))
    schedule = FreqKVConfig(16)  # a round of it frees 6 slots
    with torch.no_grad():
        speed.time_freqkv(tiny_model(), schedule, 43, 2)
    between = [(36, 12), (37, 13), (38, 14), (39, 15), (40, 16)]
    assert seen == between + (1 + speed.ROUNDS) * [(41, 11)]


def test_decoding_by_a_compiled_graph(setup, monkeypatch):
    monkeypatch.setattr(steady, "compile_step", compile_eagerly)
    monkeypatch.setattr(peers, "other_readers", lambda *arguments: iter(()))
    records = speed.decode(replace(setup, compiled=True))
    windows = setup.sizes.windows
    compiled = [record for record in records if record["peer"].endswith(", compiled")]
    assert [record["tokens"] for record in compiled] == [setup.sizes.lengths[-1]] * len(windows)
    for record in compiled:
        assert record["longest_ms"] >= record["ms"] > 0


def watch_steps(monkeypatch, note):
    """Have `note(cache, tokens)` called after each step of ours."""
    make_step = peers.make_reader

    def make_watched(model, cache):
        step = make_step(model, cache)

        def watched(tokens):
            logits = step(tokens)
            note(cache, tokens.shape[1])
            return logits

        return watched

    monkeypatch.setattr(peers, "make_reader", make_watched)


def test_the_round_that_makes_the_matrices_does_not_count(clock, monkeypatch):
    seconds = iter([50, 50, 1, 1, 1, 1, 1, 1])  # of two layers
    compress = FreqKVCache._compress

    def compress_slowly(*arguments):
        clock.now += next(seconds)
        compress(*arguments)

    monkeypatch.setattr(FreqKVCache, "_compress", compress_slowly)
    with torch.no_grad():
        assert speed.time_rounds(tiny_model(), CONFIG, 16) == [2, 2, 2]


def test_the_longest_token_of_the_others_is_the_longest(setup, clock, monkeypatch):
    seconds = iter([9, 9, 9, 1, 3])
    sizes = replace(setup.sizes, windows=(), steps=2)

    def step(tokens):
        clock.now += next(seconds)
        return torch.zeros(1, 50)

    monkeypatch.setattr(peers, "other_readers", lambda *arguments: iter([("it", 40, step)]))
    [record] = speed.decode(replace(setup, sizes=sizes))
    assert (record["peer"], record["ms"], record["longest_ms"]) == ("it", 2000, 3000)


def test_reading_is_of_the_whole_text(clock, monkeypatch):
    clock.takes(monkeypatch, Llama, "hidden", 1)
    clock.takes(monkeypatch, FreqKVCache, "_compress", 10)
    total, rounds = speed.time_reading(tiny_model(), CONFIG, 38)
    count = CONFIG.rounds(38)
    assert count == 4 == CONFIG.rounds(37) + 1  # the last token sets off a round
    assert rounds == [2 * 10] * count  # two layers
    assert total == sum(rounds) + 1 + count  # one part fills the window, one follows each round


def test_rounds_on_a_ladder_are_timed(clock, monkeypatch):
    clock.takes(monkeypatch, LevelsCache, "_make_room", 10)  # calls that make no room too
    schedule = LevelsConfig(window=16, sinks=1, recent=3, block=2)
    _, rounds = speed.time_reading(tiny_model(), schedule, 38)
    assert rounds == [2 * 10] * schedule.rounds(38)


def test_the_next_tokens_are_read_at_the_place_that_is_told(setup, monkeypatch):
    seen = []
    watch_steps(monkeypatch, lambda cache, count: seen.append((cache.tokens_seen - count, count)))
    monkeypatch.setattr(peers, "make_twin", raise_import_error)
    texts = []

    def time_reading(model, schedule, tokens):
        texts.append((type(schedule).__name__, tokens))
        return 2.0, [0.25, 0.75]

    monkeypatch.setattr(speed, "time_reading", time_reading)
    records = speed.prefill(setup)
    paper = [("FreqKVConfig", n) for n in (17, 40, 80)]  # the first warms up
    assert texts == [*paper, ("LevelsConfig", 17), ("LevelsConfig", 40)]
    assert [r["rate"] for r in records[:3]] == [20, 40, 20]
    assert [r["rounds"] for r in records[:3]] == [0.5] * 3
    assert [r["longest_round_ms"] for r in records[:3]] == [750] * 3
    assert [r["tokens"] for r in records if r["peer"] == "full cache"] == [40, 80]
    assert seen == [(20, 20), (40, 20), (60, 20), (80, 20)]


def raise_import_error(model):
    raise ImportError


@pytest.mark.parametrize("span", [60, 1020, 4098])
def test_the_ways_to_compress_are_equal_and_count_their_bytes(span, monkeypatch):
    def make_no_matrix(n, keep, dtype, device):
        return torch.zeros(keep, n, dtype=dtype)

    monkeypatch.setattr(speed, "time_calls", lambda *arguments: [1.0])
    if span > 4096:  # a real one takes seconds
        monkeypatch.setattr(speed, "lowpass_matrix", make_no_matrix)
    used = {}

    def watch(build, n, keep, dtype, device):
        used[build, n] = make(build, n, keep, dtype, device)
        return used[build, n]

    make = dct_file._matrix
    x = torch.zeros(span, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dct_file, "_matrix", watch)
        lowpass(x, span // 2)
    halves = sum(matrix.nbytes for matrix in used.values())
    records = speed.compare_ways(span, 1, torch.float32, CPU)
    slots = 4 * 128 * span * 3 // 2
    matrix = 4 * span * (span // 2)
    assert [r["bytes"] for r in records] == [slots + halves, slots + matrix, slots]
    if span <= 4096:
        assert max(r["error"] for r in records) < 1e-5


def test_training_takes_all_gradients():
    taken = []

    def attend(layer, q, k, v, rope):
        for x in (q, k, v):
            x.register_hook(taken.append)
        return causal_attention(layer, q, k, v, rope)

    record = speed.train_once(tiny_config(), attend, 9, torch.bfloat16, CPU)
    assert list(record) == ["ms", "peak_bytes"]
    # A warm call and three; a hook stays, so each call adds the hooks of those before it.
    assert len(taken) == 3 * (1 + 2 + 3 + 4)
    assert {gradient.shape[1] for gradient in taken} == {4, 2}
    assert all(gradient.abs().max() > 0 for gradient in taken)


# All of it


def test_a_process_of_its_own():
    config = tiny_config()
    arguments = (config, FreqKVAttention(CONFIG), 40, torch.float32, CPU)
    record = speed.run_apart(speed.train_once, *arguments)
    assert record["ms"] > 0
    with pytest.raises(MemoryError, match="_exit: its process was killed"):
        speed.run_apart(os._exit, 1)


def test_every_case_runs(checkpoint, in_this_process, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "QUICK", replace(SMALL, model=checkpoint, big=checkpoint))
    ended = outcome(speed, "--quick", "--plot", "--device", "cpu", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    fields = {
        "decode": ["peer", "tokens", "ms", "longest_ms", "cache_bytes", "share_of_rounds"],
        "roofline": ["dtype", "bytes", "ms", "bandwidth", "share"],
        "prefill": ["peer", "tokens", "rate", "rounds", "longest_round_ms"],
        "compression": ["way", "span", "heads", "ms", "dtype", "error", "bytes"],
        "training": ["peer", "window", "tokens", "ms", "peak_bytes"],
        "memory": ["model", "tokens", "peak_bytes", "cache_bytes"],
        "big": ["model", "window", "weights_bytes", "cache_bytes", "peak_bytes", "round_ms", "ms"],
    }
    assert list(fields) == list(speed.CASES)
    for name, expected in fields.items():
        records = json.loads((tmp_path / f"out/{name}.json").read_text())
        assert list(records[0]) == expected
        assert f"\n{name}: " in ended.out
    decode = json.loads((tmp_path / "out/decode.json").read_text())
    assert {(r["peer"], r["tokens"]) for r in decode} >= {
        (peer, n)
        for peer in ("FreqKV, window 16", "FreqKV, window 64", "full cache")
        for n in (40, 80)
    }
    assert "longest ms" in ended.out
    settings = json.loads((tmp_path / "out/decode.settings.json").read_text())["settings"]
    assert (settings["model"], settings["dtype"]) == (checkpoint, "float32")
    for picture in ("time", "memory", "reading"):
        assert (tmp_path / f"out/{picture}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", speed.CASES)
def test_every_case_stays_on_its_device(name, in_this_process, monkeypatch):
    """On meta, a tensor that was made on another device is an error, as it is on a GPU."""
    monkeypatch.setitem(peers.SHAPES, "small", tiny_config())
    monkeypatch.setattr(torch.Tensor, "item", lambda x: 0.0)  # there are no numbers
    hidden = Llama.hidden

    def check_tokens(model, tokens, attend):  # an embedding on meta takes them from anywhere
        assert tokens.device == model.norm.weight.device
        return hidden(model, tokens, attend)

    monkeypatch.setattr(Llama, "hidden", check_tokens)
    sizes = replace(SMALL, big="small")
    setup = speed.Setup(sizes, "small", torch.device("meta"), torch.bfloat16)
    assert speed.CASES[name](setup)


def test_what_cannot_be_compared_is_left_out(checkpoint, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "QUICK", replace(SMALL, model=checkpoint))
    monkeypatch.setattr(peers, "count_free_bytes", lambda device: 16_000)
    monkeypatch.setattr(peers, "make_twin", raise_import_error)
    ended = outcome(speed, "decode", "--quick", "--device", "cpu", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "full cache after 80 tokens: left out, takes" in ended.out
    assert "full cache, after 40 tokens" in ended.out
    assert "transformers: left out, not installed" in ended.out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["decode", "speed"], "CASE: was 'speed', must be of decode, roofline"),
        (["compression", "--quick", "--model", "no/such"], "no/such"),
        (["decode", "--device", "cuda:99"], "--device: was 'cuda:99'"),
        (["roofline", "--quick", "--compile"], "--compile: was given with roofline, must be with"),
        (["decode", "--dtype", "int8"], "--dtype"),
        (["decode", "--quick", "--out", "/proc"], "/proc"),
    ],
)
def test_bad_input_is_one_line(outcome, tmp_path, argv, says):
    ended = outcome(speed, *([] if "--out" in argv else ["--out", tmp_path / "out"]), *argv)
    assert ended.code == 2
    assert ended.out == ""  # before anything is measured
    assert says in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.cuda
def test_on_a_gpu(checkpoint, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "QUICK", replace(SMALL, model=checkpoint, big=checkpoint))
    assert outcome(speed, "--quick", "--device", "cuda", "--out", tmp_path / "out").code == 0
