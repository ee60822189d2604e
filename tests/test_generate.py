"""generate.py: sampling, reading, the saved cache, the command line, and every bad input.

Run: pytest tests/test_generate.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import generate
import steady
from cli import OPERATORS, make_schedule
from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig
from generate import Sampling
from levels import LevelsAttention, LevelsConfig
from model import FullCache, Llama
from tests.helpers import DEVICES, ROOT, random_tokens, tiny_checkpoint, tiny_config, tiny_model
from weights import load_model, load_tokenizer, save_model

CONFIG = FreqKVConfig(window=16, sinks=2)
GREEDY = Sampling(temperature=0)
STORY = "def compress(x, keep):\n    return x  # once upon a time\n" * 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_checkpoint(folder, max_position_embeddings=600)
    return folder


@pytest.fixture
def script(checkpoint, outcome):
    """Run generate.py in this process; its exit code, stdout and stderr."""

    def run(*flags, model=checkpoint):
        defaults = ["--model", model, "--window", "32", "--max-new-tokens", "12", "--device", "cpu"]
        return outcome(generate, *defaults, *flags)

    return run


# Sampling


def test_top_k():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    kept = generate.keep_top_k(logits, 2).isfinite()
    assert kept.tolist() == [[False, True, True, False], [True] * 4]  # ties stay
    assert_close(generate.keep_top_k(logits, 99), logits)


@pytest.mark.parametrize(
    ("p", "kept"), [(0.4, [1]), (0.5, [1]), (0.51, [1, 3]), (0.85, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p(p, kept):
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    assert generate.keep_top_p(logits, p).isfinite().nonzero()[:, 1].tolist() == kept


def test_samples_follow_the_distribution():
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    drawn = generate.sample(logits.expand(20_000, 5), Sampling(0.7), generator)
    shares = torch.bincount(drawn, minlength=5) / 20_000
    assert_close(shares, (logits[0] / 0.7).softmax(-1), atol=0.02, rtol=0)
    assert generate.sample(logits, GREEDY).tolist() == [logits.argmax().item()]


@pytest.mark.parametrize("how", [{"temperature": 1e-300}, {"temperature": 1e30}, {"top_p": 1e-320}])
def test_extreme_settings_still_sample(how):
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    assert generate.sample(logits, Sampling(**how)).item() in (
        (0,) if "top_p" in how else (0, 1, 2)
    )
    assert generate.sample(logits, Sampling(temperature=1e-300)).item() == 0


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(wrong, temperature):
    with pytest.raises(ValueError, match="logits: were not numbers"):
        generate.sample(torch.tensor([[1.0, wrong]]), Sampling(temperature))


def test_a_logit_of_minus_infinity_is_a_token_that_cannot_be():
    logits = torch.tensor([[-torch.inf, 0.0]])
    assert generate.sample(logits, Sampling()).tolist() == [1]


# Reading and writing


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_read_equals_the_parallel_form(chunk):
    model, tokens = tiny_model(), random_tokens(2, 60)
    last = generate.read(model, tokens, FreqKVCache(CONFIG), chunk)
    with torch.no_grad():
        assert_close(last, model(tokens, FreqKVAttention(CONFIG))[:, -1], atol=1e-4, rtol=1e-4)


def test_every_round_reads_the_same_shapes(monkeypatch):
    """Else what libraries keep for each shape of a matrix would grow with the text."""
    model, cache, shapes = tiny_model(), FreqKVCache(CONFIG), []

    def attend(layer, q, k, v, rope):
        out = cache(layer, q, k, v, rope)
        shapes.append((q.shape[2], cache.slots)) if layer == 1 else None
        return out

    # read_parts asks the cache how much room there is, and attends by the spy around it.
    monkeypatch.setattr(model, "hidden", lambda part, _: Llama.hidden(model, part, attend))
    lengths = [x.shape[1] for x in generate.read_parts(model, random_tokens(1, 150), cache, 5)]
    assert sum(lengths) == cache.tokens_seen == 150
    a_round = [(5, 14), (2, 16)]  # 7 tokens move into the slots 9 to 15
    assert shapes == [(5, 5), (5, 10), (5, 15), (1, 16), *a_round * 19, (1, 10)]


def test_greedy_writing_equals_a_naive_loop():
    model, tokens = tiny_model(), random_tokens(1, 20)
    for cache in (FreqKVCache(CONFIG), FullCache(60)):
        logits = generate.read(model, tokens, cache, 8)
        step = partial(generate.read_token, model, cache=cache)
        rows = list(generate.write(step, logits, (), 30, GREEDY))
        text = tokens
        for _ in range(30):
            attend = {} if isinstance(cache, FullCache) else {"attend": FreqKVAttention(CONFIG)}
            with torch.no_grad():
                text = torch.cat((text, model(text, **attend)[:, -1].argmax(-1)[:, None]), dim=1)
        assert [row[0] for row in rows] == text[0, 20:].tolist()


def test_rows_stop_one_by_one():
    model, tokens = tiny_model(), random_tokens(2, 20)

    def written(stop):
        cache = FreqKVCache(CONFIG)
        logits = generate.read(model, tokens, cache, 8)
        step = partial(generate.read_token, model, cache=cache)
        return list(generate.write(step, logits, stop, 10, GREEDY))

    free = written(())
    ends = (free[3][0], free[6][1])
    rows = written(ends)
    for row in (0, 1):
        ids = [step[row] for step in free]
        first = next(i for i, token in enumerate(ids) if token in ends)
        made = [step[row] for step in rows]
        assert made == ids[:first] + [None] * (len(rows) - first)
    assert len(rows) < 10


# The command line


def test_same_seed_same_text(script):
    flags = ("--prompt", STORY, "--top-k", "20", "--top-p", "0.9")
    first, again, other = (script(*flags, "--seed", seed) for seed in (1, 1, 2))
    assert first.code == 0
    assert first.out == again.out != other.out


def test_a_compiler_that_is_missing_is_found_before_the_text_is_read(script, monkeypatch):
    def fail(x):
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nto be found")

    monkeypatch.setattr(steady, "compile_step", lambda step: fail)
    ran = script("--prompt", STORY, "--compile")
    assert (ran.code, "reading" in ran.err) == (2, False)
    assert "torch.compile: failed (no compiler to be found), must work" in ran.err


@pytest.mark.parametrize(
    ("cache", "what"),
    [("freqkv", "compression"), ("distinct", "selection"), ("window", "eviction")],
)
def test_the_summary_says_what_a_round_does(script, cache, what):
    ran = script("--prompt", STORY, "--cache", cache, "--max-new-tokens", 1)
    assert re.search(rf"\d rounds? of {what}; \d+ of 32 slots", ran.err)


def test_summary_and_streams(script):
    ran = script("--prompt", STORY, "--temperature", "0")
    tokens = int(re.search(r"read ([\d,]+) tokens in", ran.err)[1].replace(",", ""))
    assert f"of 32 slots in use after {tokens + 11} tokens" in ran.err  # the last is not read
    assert re.search(r"cache: \S+ kB; a full cache would hold \S+ kB", ran.err)
    assert re.search(r"peak memory \(process\): [\d.]+ [MG]B", ran.err)
    assert "reading: 100%" in ran.err
    assert "tokens" not in ran.out


def continue_both(checkpoint, attend):
    """What the parallel form writes after the story and a question: twelve tokens, or to an end."""
    model = load_model(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    text = tokenizer.encode(STORY) + tokenizer.encode("Q: why?", bos=False)
    made = []
    for _ in range(12):
        with torch.no_grad():
            token = model(torch.tensor([text + made]), attend)[0, -1].argmax().item()
        if token in tokenizer.eos_ids:
            break
        made.append(token)
    return "".join(tokenizer.stream(iter(made), text))


@pytest.mark.parametrize("cache", ["freqkv", "distinct", "window"])
def test_a_saved_cache_continues_the_text(script, checkpoint, tmp_path, cache):
    """What is written after --load-cache is what the parallel form continues both texts with."""
    file, flags = tmp_path / "book.safetensors", ("--cache", cache, "--temperature", "0")
    saved = script("--prompt", STORY, "--save-cache", file, "--max-new-tokens", "0", *flags)
    assert (saved.code, saved.out) == (0, "\n")
    before = file.read_bytes()
    asked = script("--prompt", "Q: why?", "--load-cache", file, *flags)
    assert asked.code == 0
    assert file.read_bytes() == before

    attend = FreqKVAttention(FreqKVConfig(window=32), OPERATORS[cache])
    assert asked.out == continue_both(checkpoint, attend) + "\n"
    assert "of 32 slots" in asked.err


def test_a_text_is_read_and_saved_on_levels(script, checkpoint, tmp_path):
    """What is written after --load-cache is what the parallel form continues both texts with."""
    file = tmp_path / "book.safetensors"
    levels = ("--schedule", "levels", "--recent", 8, "--block", 2)
    flags = ("--cache", "distinct", "--temperature", "0")
    saved = script(
        "--prompt", STORY, "--save-cache", file, "--max-new-tokens", "0", *flags, *levels
    )
    assert saved.code == 0
    asked = script("--prompt", "Q: why?", "--load-cache", file, "--temperature", "0")
    assert asked.code == 0, asked.err

    attend = LevelsAttention(LevelsConfig(32, 4, 8, 2), OPERATORS["distinct"])
    assert asked.out == continue_both(checkpoint, attend) + "\n"
    ask = ("--prompt", "why?", "--load-cache", file)
    fails(script(*ask, "--schedule", "paper"), "--schedule: was paper, must be levels, as the sav")
    fails(script(*ask, "--block", "3"), "--block: was 3, must be 2, as the saved cache has it")
    assert script(*ask, *levels).code == 0


@pytest.mark.parametrize("tuned", [{"window": 4096}, {"window": 0}, {"window": 32, "recent": 30}])
def test_wrong_settings_of_a_tuned_model_name_their_file(checkpoint, tmp_path, outcome, tuned):
    shutil.copytree(checkpoint, tmp_path / "tuned")
    path = tmp_path / "tuned/freqkv.json"
    path.write_text(json.dumps(tuned))
    flags = ("--model", tmp_path / "tuned", "--prompt", "a", "--device", "cpu")
    ran = outcome(generate, *flags)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert ran.err.startswith(f"generate.py: error: {path}: ")
    assert outcome(generate, *flags, "--window", 64, "--max-new-tokens", 1).code == 0


def test_a_ladder_as_wide_as_the_window(checkpoint, capsys):
    flags = ["--model", str(checkpoint), "--prompt", STORY, "--device", "cpu", "--window", "128"]
    generate.main([*flags, "--schedule", "levels", "--max-new-tokens", "1"])
    config = LevelsConfig(128, 4, 32, 2)
    tokens = len(load_tokenizer(checkpoint).encode(STORY))
    assert f"{config.slots(tokens)} of 128 slots" in capsys.readouterr().err


def test_settings_of_one_schedule_are_not_those_of_another():
    model = tiny_config(max_position_embeddings=600)
    rounds = {"window": 64, "sinks": 2, "ratio": 0.25, "recent": 40}
    assert make_schedule({}, model, rounds) == FreqKVConfig(64, 2, 0.25, 40)
    assert make_schedule({"schedule": "levels"}, model, rounds) == LevelsConfig(64, 2, 16, 1)
    levels = {"schedule": "levels", "window": 64, "sinks": 2, "recent": 8, "block": 4}
    assert make_schedule({"block": 2}, model, levels) == LevelsConfig(64, 2, 8, 2)
    assert make_schedule({"schedule": "paper"}, model, levels) == FreqKVConfig(64, 2)
    with pytest.raises(ValueError, match="must be with --schedule paper"):
        make_schedule({"ratio": 0.5}, model, levels)


def test_another_window_leaves_behind_what_was_tuned_for_the_first():
    model = tiny_config(max_position_embeddings=600)
    rounds = {"attention": "distinct", "window": 64, "sinks": 2, "ratio": 0.25, "recent": 40}
    assert make_schedule({"window": 64}, model, rounds) == FreqKVConfig(64, 2, 0.25, 40)
    assert make_schedule({"schedule": "paper"}, model, rounds) == FreqKVConfig(64, 2, 0.25, 40)
    assert make_schedule({"window": 32}, model, rounds) == FreqKVConfig(32, 2, 0.25, 0)
    assert make_schedule({"window": 32, "recent": 8}, model, rounds) == FreqKVConfig(32, 2, 0.25, 8)
    levels = {"schedule": "levels", "window": 64, "sinks": 2, "recent": 8, "block": 4}
    assert make_schedule({"window": 128}, model, levels) == LevelsConfig(128, 2, 32, 2)


def test_the_cache_of_a_tuned_model_is_the_default(checkpoint, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "tuned")
    made = []
    make_cache = generate.cli.make_cache

    def note(name, *rest):
        made.append(name)
        return make_cache(name, *rest)

    monkeypatch.setattr(generate.cli, "make_cache", note)
    for tuned in ("distinct", "window", "full", None):
        settings = {} if tuned is None else {"attention": tuned}
        (tmp_path / "tuned/freqkv.json").write_text(json.dumps(settings))
        flags = ["--model", str(tmp_path / "tuned"), "--prompt", "a", "--max-new-tokens", "1"]
        generate.main([*flags, "--device", "cpu"])
        generate.main([*flags, "--device", "cpu", "--cache", "freqkv"])
    assert made[::2] == ["distinct", "window", "full", "freqkv"]
    assert set(made[1::2]) == {"freqkv"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"attention": "other"},
            "attention was 'other', must be of freqkv, distinct, window, full",
        ),
        ({"attention": ["full"]}, "attention was ['full'], must be of"),
        ({"schedule": 3}, "schedule was 3, must be of paper, levels"),
        ({"window": "many"}, "window was 'many', must be a whole number"),
        ({"schedule": "levels", "window": 64.0}, "window was 64.0, must be a whole number"),
        ({"recent": True}, "recent was True, must be a whole number"),
        ({"ratio": "half"}, "ratio was 'half', must be a number"),
        ({"ratio": 5}, "ratio was 5, must be a number, 0 or more, below 1"),
        ({"sinks": -1}, "sinks was -1, must be a whole number, 0 or more"),
        ({"schedule": None}, "schedule was None, must be of paper, levels"),
    ],
)
def test_tuned_settings_that_cannot_be(checkpoint, tmp_path, outcome, settings, message):
    shutil.copytree(checkpoint, tmp_path / "tuned")
    (tmp_path / "tuned/freqkv.json").write_text(json.dumps(settings))
    flags = ["--model", tmp_path / "tuned", "--prompt", "a", "--device", "cpu"]
    ended = outcome(generate, *flags)
    assert ended.code == 2
    assert f"freqkv.json: {message}" in ended.err


def test_a_model_tuned_with_everything_is_not_compiled_or_saved(checkpoint, tmp_path, outcome):
    shutil.copytree(checkpoint, tmp_path / "tuned")
    (tmp_path / "tuned/freqkv.json").write_text('{"attention": "full"}')
    flags = ["--model", tmp_path / "tuned", "--prompt", "a", "--device", "cpu"]
    assert "--cache full" in outcome(generate, *flags, "--compile").err
    assert "--cache: was full" in outcome(generate, *flags, "--save-cache", tmp_path / "x").err


def test_settings_of_a_tuned_model_are_the_defaults(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "tuned")
    (tmp_path / "tuned/freqkv.json").write_text('{"window": 20, "sinks": 1, "attention": "freqkv"}')
    generate.main(["--model", str(tmp_path / "tuned"), "--prompt", STORY, "--device", "cpu"])
    assert "of 20 slots" in capsys.readouterr().err


@pytest.mark.parametrize("chat", [False, True])
def test_a_saved_text_is_continued_without_a_beginning(checkpoint, chat):
    tokenizer = load_tokenizer(checkpoint)
    for continues in (False, True):
        tokens = generate.encode_prompts(["why?"], tokenizer, chat, continues, free=False)
        row = tokens[0].tolist()
        assert (row[0] == tokenizer.bos_id) == (not continues)
        assert tokenizer.bos_id not in row[1:]


def test_many_samples_of_one_reading(script):
    ran = script("--prompt", STORY, "--num-samples", "3", "--seed", "5")
    texts = ran.out.split("\n---\n")
    assert len(texts) == 3
    assert len(set(texts)) == 3
    assert ran.err.count("reading: 100%") >= 1
    for number in (0, 1, 2):  # each as if it were the only one, with a seed of its own
        single = script("--prompt", STORY, "--seed", 5 + number)
        assert texts[number].removesuffix("\n") == single.out.removesuffix("\n")


def test_a_batch_of_prompts(script):
    one, two = "def a(x):", "def b(y):"
    both = script("--prompt", one, "--prompt", two, "--temperature", "0")
    assert both.code == 0
    single = [script("--prompt", p, "--temperature", "0").out for p in (one, two)]
    assert both.out.split("\n---\n") == [single[0].removesuffix("\n"), single[1]]


def test_out_of_memory_is_one_line(outcome, monkeypatch):
    monkeypatch.setattr(generate, "load_tokenizer", lambda name: torch.empty(1 << 60))
    ran = outcome(generate, "--prompt", "x", "--device", "cpu")
    assert (ran.code, ran.err) == (2, "generate.py: error: out of memory\n")


def test_no_text_is_no_token(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    assert generate.encode_text("", tokenizer, continues=True).tolist() == []


def in_a_process(checkpoint, *flags, stdin=""):
    """Run generate.py as a user does; one thread, which tiny tensors like best."""
    command = [sys.executable, "generate.py", "--model", checkpoint, "--device", "cpu"]
    command += ["--window", "32", *flags]
    return subprocess.run(
        command,
        input=stdin.encode(),
        capture_output=True,
        cwd=ROOT,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_row_that_ends_at_once(script, monkeypatch):
    ends = lambda logits, *_: torch.tensor([2, 300][: len(logits)])  # noqa: E731 (2 is </s>)
    monkeypatch.setattr(generate, "sample", ends)
    ran = script("--prompt", "def a(x):", "--prompt", "def b(y):", "--max-new-tokens", "3")
    first, second = ran.out.split("\n---\n")
    assert (ran.code, first) == (0, "")
    assert second.strip()


def test_stdin_and_prompt_file(checkpoint, tmp_path):
    story = tmp_path / "story.txt"
    story.write_bytes(b"\xef\xbb\xbf" + STORY.replace("\n", "\r\n").encode())
    texts = [
        in_a_process(checkpoint, "--prompt-file", story).stdout,
        in_a_process(checkpoint, stdin=STORY).stdout,
        in_a_process(checkpoint, "--prompt-file", "-", stdin=STORY).stdout,
    ]
    assert texts[0]
    assert len(set(texts)) == 1


def test_a_closed_pipe_ends_quietly(checkpoint):
    command = f"{sys.executable} generate.py --model {checkpoint} --prompt 'def a' | head -c 1"
    ran = subprocess.run(command, shell=True, capture_output=True, cwd=ROOT)
    assert b"Traceback" not in ran.stderr


def test_chat_stops_at_the_end_of_the_turn(script, monkeypatch):
    """After two tokens the model says </s>, id 2: that ends the answer, and is not shown."""
    said = []

    def says(logits, *_):
        said.append([300, 301, 2, 302][len(said) % 4])
        return torch.full((len(logits),), said[-1])

    monkeypatch.setattr(generate, "sample", says)
    for flags in (("--chat",), ()):
        said.clear()
        ran = script("--prompt", "hello", *flags)
        assert ran.code == 0
        assert len(said) == 3
        assert "wrote 2 in" in ran.err


def test_help_names_every_flag(script):
    ran = script("--help")
    assert ran.code == 0
    flags = """model prompt prompt-file max-new-tokens temperature top-k top-p seed num-samples chat
        cache schedule window sinks ratio recent block chunk save-cache load-cache adapter device
        dtype"""
    for flag in flags.split():
        assert re.search(rf"(?m)^  --{flag}(?![-\w])", ran.out), flag


def test_peak_memory_does_not_depend_on_the_text(checkpoint):
    """The process that reads 30 times the text peaks within 5 % of the other."""
    peaks = []
    for times in (20, 600):
        ran = in_a_process(checkpoint, "--window", "512", stdin=STORY * times)
        peaks.append(float(re.search(rb"peak memory \(process\): (\S+) MB", ran.stderr)[1]))
    assert abs(peaks[1] / peaks[0] - 1) < 0.05


# Bad input


def fails(ran, says):
    assert ran.code == 2
    assert re.search(says, ran.err), ran.err
    lines = [line for line in ran.err.split("\n") if line and "reading" not in line]
    assert len(lines) == 1
    assert ran.out == ""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "nowhere"], "model: was 'nowhere'"),
        (["--prompt", ""], "prompt: was empty"),
        (["--prompt", " \n"], "prompt: was empty"),
        (["--prompt", "def a", "--prompt", "def a(x, y, z)"], r"--prompt: a batch was of \d+, \d+"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--ratio", "1"], "--ratio: was '1', must be a number, 0 or more, below 1"),
        (["--ratio=-0.5"], "--ratio: was '-0.5', must be a number, 0 or more"),
        (["--ratio", "nan"], "--ratio: was 'nan'"),
        (["--ratio", "half"], "--ratio"),
        (["--sinks", "20", "--recent", "12"], "sinks . recent: was 32, must be below window, 32"),
        (["--window", "601"], "--window: was 601, must be at most the model's 600"),
        (["--window", "0"], "--window: was '0'"),
        (["--temperature", "-1"], "--temperature: was '-1'"),
        (["--temperature", "nan"], "--temperature: was 'nan'"),
        (["--top-p", "0"], "--top-p: was '0'"),
        (["--top-k", "0"], "--top-k: was '0'"),
        (["--chunk", "0"], "--chunk: was '0'"),
        (["--block", "2"], "--block: was 2, must be with --schedule levels"),
        (
            ["--schedule", "levels", "--ratio", "0.25"],
            "--ratio: was 0.25, must be with --schedule p",
        ),
        (["--schedule", "levels", "--block", "16"], "window: was 32, must be at least .* 76"),
        (
            ["--cache", "full", "--prompt", STORY * 3],
            r"--cache full: .* were \d+, .* 600 positions",
        ),
        (["--cache", "full", "--save-cache", "x"], "--cache: was full"),
        (["--cache", "half"], "--cache"),
        (["--device", "cuda:99"], "--device: was 'cuda:99'"),
        (["--device", "toaster"], "--device: was 'toaster'"),
        (["--device", "meta"], "--device: was 'meta'"),
        (["--dtype", "int4"], "--dtype"),
        (["--load-cache", "nowhere"], "--load-cache: was 'nowhere'"),
        (["--save-cache", "no/such/folder/file"], "--save-cache: was 'no/such/folder/file'"),
        (["--save-cache", "tests"], "--save-cache: was 'tests'"),
        (["--save-cache", "README.md"], "--save-cache: README.md was there"),
        (["--save-cache", "x" * 250], "x: cannot be written"),
        (["--prompt", "a", "--prompt-file", "README.md"], "not allowed with argument --prompt"),
        (["--prompt", "\udcffabc"], "--prompt: was .*, must be UTF-8"),
        (["--seed", "18446744073709551616"], "--seed: was '18446744073709551616'"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_bad_flags(script, flags, says):
    prompt = [] if "--prompt" in flags or "--prompt-file" in flags else ["--prompt", "def a"]
    fails(script(*prompt, *flags), says)


def test_a_folder_without_a_checkpoint(script, tmp_path):
    fails(script("--prompt", "a", model=tmp_path), "was a folder without a checkpoint")
    (tmp_path / "config.json").write_text("{}")
    fails(script("--prompt", "a", model=tmp_path), "was without a tokenizer")


def test_bad_prompt_bytes(script, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    fails(script("--prompt-file", tmp_path / "latin.txt"), r"latin\.txt: was not UTF-8 at byte 3")
    fails(script("--prompt-file", tmp_path), "directory")


def test_a_tokenizer_that_does_not_fit(script, checkpoint, tmp_path):
    save_model(tiny_model(tiny_config(vocab_size=300)), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((checkpoint / "tokenizer.model").read_bytes())
    fails(script("--prompt", "a", model=tmp_path), "tokenizer: was of 400 tokens.* 300")


def test_bad_saved_caches(script, checkpoint, tmp_path):
    file = tmp_path / "book"
    assert script("--prompt", STORY, "--save-cache", file).code == 0
    ask = ("--prompt", "why?", "--load-cache", file)
    assert script(*ask, "--ratio", "0.5").code == 0
    fails(
        script(*ask, "--ratio", "0.25"), "--ratio: was 0.25, must be 0.5, as the saved cache has it"
    )
    fails(script(*ask, "--cache", "window"), "was of --cache freqkv, must be of window")
    fails(script(*ask, "--prompt", "why?"), "--prompt: was 2 for a cache of 1")
    with safe_open(file, framework="pt") as content:
        about = content.metadata()
    state = load_file(file)
    for name, value in (("config", torch.ones(3)), ("layers", torch.ones(2)), ("tokens", None)):
        spoilt = {k: v for k, v in state.items() if k != name}
        save_file(spoilt | ({} if value is None else {name: value}), file, metadata=about)
        fails(script(*ask), "book: saved cache: ")
    save_file(state | {"k.0": state["k.0"].double()}, file, metadata=about)
    fails(script(*ask), "book: k.0 was not there in torch.float32, must be")
    save_file({k: v for k, v in state.items() if k not in ("k.1", "v.1")}, file, metadata=about)
    fails(script(*ask), "book: k.1 was not there in torch.float32, must be")
    save_file(state, file, metadata=about)
    save_model(tiny_model(tiny_config(vocab_size=400), seed=7), tmp_path / "other")
    (tmp_path / "other/tokenizer.model").write_bytes((checkpoint / "tokenizer.model").read_bytes())
    fails(script(*ask, model=tmp_path / "other"), "book: was of another model")
    file.write_bytes(file.read_bytes()[:-9])
    fails(script(*ask), "book: was not whole")


def test_a_failed_save_leaves_the_old_cache(script, tmp_path, monkeypatch):
    file = tmp_path / "book"
    script("--prompt", STORY, "--save-cache", file)
    before = file.read_bytes()

    def fail(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generate, "save_file", fail)
    ran = script("--prompt", STORY, "--save-cache", file)
    assert ran.code == 2
    assert "No space left" in ran.err
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    assert file.stat().st_mode & 0o044  # others may read it


def test_closed_and_narrow_streams(checkpoint):
    command = f"{sys.executable} generate.py --model {checkpoint} --window 32 --prompt 'def a'"
    for how in ("<&-", ">&-", "2>&-", "| PYTHONIOENCODING=ascii cat"):
        ran = subprocess.run(f"{command} {how}", shell=True, capture_output=True, cwd=ROOT)
        assert ran.returncode == 0, how
        assert b"Traceback" not in ran.stderr


# The real model, and a GPU


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_saved_on_a_gpu(checkpoint, tmp_path, outcome, device):
    """Read in two calls of the script, on one device and on another."""
    flags = ["--model", checkpoint, "--window", 32, "--temperature", 0, "--dtype", "float32"]
    file = tmp_path / "x.safetensors"
    ran = outcome(generate, *flags, "--prompt", STORY, "--device", device, "--save-cache", file)
    assert ran.code == 0, ran.err
    ran = outcome(
        generate, *flags, "--prompt", "then", "--device", "cpu", "--load-cache", file,
    )  # fmt: skip
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_generation_past_the_window(checkpoint, device):
    model = load_model(checkpoint, torch.bfloat16, device)
    cache = FreqKVCache(CONFIG)
    logits = generate.read(model, random_tokens(1, 100, vocab_size=400), cache, 33)
    step = partial(generate.read_token, model, cache=cache)
    rows = list(generate.write(step, logits, (), 40, Sampling(0.8)))
    assert len(rows) == 40
    assert cache.rounds > 5


def test_a_fingerprint_tells_models_apart():
    """The same weights with another rotation, or of another dtype, are another model."""
    model = tiny_model()
    assert generate.fingerprint(model) == generate.fingerprint(tiny_model())
    assert generate.fingerprint(model) != generate.fingerprint(tiny_model(seed=1))
    turned = tiny_model(tiny_config(rope_theta=500.0))
    assert generate.fingerprint(model) != generate.fingerprint(turned)
    with torch.no_grad():
        for value in (1.0, 0.0):
            model.layers[1].mlp.up_proj.weight[17, 5] = value  # one, anywhere
            assert generate.fingerprint(model) != generate.fingerprint(tiny_model())
    half = generate.fingerprint(model.bfloat16())
    assert half != generate.fingerprint(model.float())  # of equal weights
