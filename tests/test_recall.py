"""evaluation/recall.py: the trials, what is measured of them, and `evaluate.py recall`.

Run: pytest tests/test_recall.py
"""

import copy
import json
import random
import re
from argparse import Namespace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import evaluate
from evaluation.harness import OPERATORS, STRATEGIES, Document, new_cache
from evaluation.recall import GAP, TASKS, draw, new_trial, recall
from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig
from generate import read
from model import causal_attention
from tests.helpers import tiny_checkpoint, tiny_config, tiny_model
from weights import load_tokenizer

CONFIG = FreqKVConfig(window=256)
DISTANCES = (20, 60, 150, 400)
WORDS = "alder birch cedar elder hazel larch maple olive poplar rowan spruce willow".split()  # noqa: SIM905
HAYSTACK = " ".join(random.Random(0).choices(WORDS, k=2500))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall")
    tiny_checkpoint(folder, max_position_embeddings=600)
    (folder / "haystack.txt").write_text(HAYSTACK)
    return folder


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def texts(tokenizer):
    ids = np.array(tokenizer.encode(HAYSTACK, bos=False), np.uint16)
    return [Document("few", ids[:300]), Document("many", ids)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config(vocab_size=400, max_position_embeddings=1000))


def bench_of(tokenizer, config=CONFIG, seed=0):
    return Namespace(tokenizer=tokenizer, config=config, args=Namespace(seed=seed))


@pytest.fixture
def trial(tokenizer, texts):
    """Make a trial by task, number, schedule and seed."""
    return lambda task="passkey", number=0, config=CONFIG, seed=0: new_trial(
        bench_of(tokenizer, config, seed), texts, task, number, DISTANCES[-1]
    )


@pytest.fixture
def script(checkpoint, outcome, tmp_path):
    """Run evaluate.py recall in this process; its exit code, stdout and stderr."""

    def run(*flags, out=tmp_path / "out", window=64):
        argv = ["--model", checkpoint, "--data", checkpoint / "haystack.txt", "--out", out]
        argv += ["--window", window, "--device", "cpu", "--trials", 2, *flags]
        return outcome(evaluate, "recall", *argv)

    return run


# The trials


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("task", TASKS)
def test_the_layout(task, number, trial, tokenizer, texts):
    made = trial(task, number)
    facts, question, answer = TASKS[task](np.random.default_rng((0, number)))
    planted, without = made.text.tolist()
    assert len(planted) == len(without) == made.end + DISTANCES[-1]
    stop = made.end
    for fact in reversed(facts):  # from the last, each GAP tokens after another
        ids = tokenizer.encode(f"\n{fact}\n", bos=False)
        assert planted[stop - len(ids) : stop] == ids
        planted[stop - len(ids) : stop] = without[stop - len(ids) : stop]
        stop -= len(ids) + GAP
    assert planted == without
    assert stop + GAP > CONFIG.sinks
    assert without[0] == tokenizer.bos_id
    assert tokenizer.decode(without).strip() in HAYSTACK
    assert tokenizer.decode(made.ask.tolist()).strip() == question + answer
    assert tokenizer.decode(made.ask[-made.answer :].tolist()).strip() == answer


def follow(facts, name):
    """The value of a variable, after the lines that are its program."""
    known = {}
    for fact in facts:
        a, b = re.fullmatch("VAR (.) = (?:VAR )?(.+)", fact).groups()
        known[a] = known.get(b, b)
    return known[name]


@pytest.mark.parametrize("number", range(10))
def test_the_facts_tell_the_answer(number):
    for task, make in TASKS.items():
        facts, question, answer = make(np.random.default_rng((7, number)))
        assert question.endswith(" ")  # a space that some tokenizers keep apart is no answer
        told = re.findall(r"\d{5}", " ".join(facts))
        if task == "tracking":
            assert follow(facts, re.search("VAR (.) is", question)[1]) == answer
            assert len(set(told)) == 2
        elif task == "multikey":
            name = re.search("of the (.+)[?]", question)[1]
            assert [fact for fact in facts if name in fact] == [
                f"{question.split('? ')[1]}{answer}."
            ]
            assert len(set(told)) == len(facts) == 4
        else:
            assert list(dict.fromkeys(told)) == answer.split(", ")
    asked = {TASKS["multikey"](np.random.default_rng((7, i)))[1] for i in range(20)}
    assert len(asked) > 4


@pytest.mark.parametrize("config", [CONFIG, FreqKVConfig(256, ratio=0.75, recent=32)])
def test_facts_end_evenly_over_a_round(config, trial):
    ends = sorted(trial(number=i, config=config).end for i in range(16))
    first = config.window - config.stride
    assert first < ends[0] and ends[-1] <= config.window  # noqa: PT018
    gaps = np.diff([first, *ends, config.window])
    assert gaps.max() < 3 * config.stride / 16


def test_a_small_window_and_no_ratio(trial):
    for config in (FreqKVConfig(32), FreqKVConfig(64, ratio=0), FreqKVConfig(16, sinks=0)):
        made = trial("multikey", config=config)
        changed = (made.text[0] != made.text[1]).nonzero()
        assert changed.min() > config.sinks
        assert changed.max() < made.end


def test_the_seed(trial):
    same, other, later = trial(seed=3), trial(seed=4), trial(seed=3, number=1)
    assert trial(seed=3).text.equal(same.text)
    for made in (other, later):
        assert not made.ask.equal(same.ask)
        assert not made.text[1, 1:100].equal(same.text[1, 1:100])


def test_all_long_enough_texts_are_drawn_from(tokenizer):
    texts = [Document(str(i), np.full(n, 10 + i)) for i, n in enumerate((400, 900, 10, 800))]
    drawn = [new_trial(bench_of(tokenizer), texts, "passkey", i, 400).text[1] for i in range(30)]
    assert {row[-1].item() for row in drawn} == {11, 13}
    assert all((row[1:] == row[-1]).all() for row in drawn)


def test_a_text_that_just_fits(tokenizer):
    bench, long = bench_of(tokenizer), Document("long", np.arange(900) % 400)
    need = new_trial(bench, [long], "passkey", 0, 400).text.shape[1] - 1  # beside its beginning
    exact, short = (Document("text", long.tokens[:n]) for n in (need, need - 1))
    made = new_trial(bench, [short, exact], "passkey", 0, 400)
    assert made.text[1, 1:].equal(torch.arange(need) % 400)
    says = f"--distances: was 400, which takes {need} .* text, has {need - 1} tokens; must be less"
    with pytest.raises(ValueError, match=says):
        new_trial(bench, [short], "passkey", 0, 400)


def test_a_tokenizer_that_joins_question_and_answer():
    def encode(text, bos):  # two bytes a token
        return [int.from_bytes(text[i : i + 2].encode()) for i in range(0, len(text), 2)]

    texts, joined = [Document("text", np.ones(1000, np.int64))], set()
    for task in TASKS:
        made = new_trial(bench_of(Namespace(bos_id=None, encode=encode)), texts, task, 0, 400)
        _, question, answer = TASKS[task](np.random.default_rng((0, 0)))
        assert made.ask.tolist() == encode(f"\n{question}{answer}", bos=False)
        spelled = b"".join(i.to_bytes(2).strip(b"\0") for i in made.ask[-made.answer :].tolist())
        assert spelled.decode().removeprefix(" ") == answer
        joined.add(spelled.decode()[0])
        assert made.text[1].eq(1).all()
    assert len(joined) == 2  # in some the last space of the question, in some not


@pytest.mark.parametrize("config", [CONFIG, FreqKVConfig(64, ratio=0.75)])
@pytest.mark.parametrize("number", range(3))
def test_rounds_are_those_of_the_cache(number, config, trial, model):
    made = trial("multikey", number, config)
    for distance in DISTANCES:
        cache, stop = FreqKVCache(config), made.end + distance
        read(model, made.text[:1, : made.end], cache, 512)
        before = cache.rounds
        read(model, made.text[:1, made.end : stop], cache, 512)
        read(model, made.ask[None, : -made.answer], cache, 512)
        assert made.rounds(config, distance) == cache.rounds - before


# What is measured


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", ["passkey", "multivalue"])
def test_loss_is_that_of_one_plain_pass(strategy, task, trial, model):
    made, attend = trial(task), causal_attention
    if strategy != "full":
        attend = FreqKVAttention(CONFIG, OPERATORS[strategy])
    found = recall(model, made, new_cache(strategy, CONFIG, 900), DISTANCES, 33)
    for distance, (loss, absent, right) in zip(DISTANCES, found, strict=True):
        ask = made.ask.expand(2, -1)
        whole = torch.cat((made.text[:, : made.end + distance], ask), dim=1)
        with torch.no_grad():
            shares = model(whole, attend).log_softmax(-1)
        expected = [0.0, 0.0]
        for row, i in product((0, 1), range(whole.shape[1] - made.answer, whole.shape[1])):
            expected[row] -= shares[row, i - 1, whole[row, i]].item()
        assert_close([loss, absent], expected, rtol=1e-4, atol=1e-4)
        assert right == 0


def test_losses_that_are_not_numbers(trial, model):
    broken = copy.deepcopy(model)
    broken.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="losses: were not numbers, must be; try another --dtype"):
        recall(broken, trial(), new_cache("full", CONFIG, 900), DISTANCES, 512)


class Copier:
    """Stands in for a model: goes on as the text did where its last REACH tokens stood before.

    All it knows of them is what the cache gives back for one query: each token is a value, whose
    key is the tokens before it.
    """

    REACH = 6

    def __init__(self, vocab=400):
        self.codes, self.norm = torch.eye(vocab), Namespace(weight=torch.zeros(1))

    def hidden(self, tokens, cache):
        past = getattr(cache, "past", tokens.new_zeros(len(tokens), self.REACH))
        codes = self.codes[torch.cat((past, tokens), dim=1)]  # [B, REACH + T, V]
        cache.past = torch.cat((past, tokens), dim=1)[:, -self.REACH :]
        shifted = codes.unfold(1, tokens.shape[1], 1).transpose(2, 3).transpose(0, 1)
        keys, queries = torch.cat([*shifted[:-1]], -1), torch.cat([*shifted[1:]], -1)
        values = F.pad(shifted[-1], (0, keys.shape[-1] - len(self.codes)))
        sharp = 20 * keys.shape[-1] ** 0.5
        found = cache(
            0, sharp * queries[:, None], keys[:, None], values[:, None], lambda x, *_, **__: x
        )
        return found[:, 0, :, : len(self.codes)]

    def logits(self, hidden):
        return 40 * hidden


@pytest.mark.parametrize("task", ["passkey", "multikey"])
def test_full_attention_recalls_at_any_distance(task, trial):
    for number in range(2):
        made = trial(task, number)
        found = recall(Copier(), made, new_cache("full", CONFIG, 900), DISTANCES, 512)
        assert [right for _, _, right in found] == [1] * len(DISTANCES)
        assert max(loss for loss, _, _ in found) < 1e-3
        assert min(absent for _, absent, _ in found) > 10
    made.ask[-1] = made.ask[0]  # one wrong token is a wrong answer
    found = recall(Copier(), made, new_cache("full", CONFIG, 900), DISTANCES, 512)
    assert [right for _, _, right in found] == [0] * len(DISTANCES)
    assert min(loss for loss, _, _ in found) > 10


def test_eviction_recalls_what_the_slots_still_hold(trial):
    held, gone = 0, 0
    for number in range(8):
        made = trial(number=number)
        fact = made.end - int((made.text[0] != made.text[1]).nonzero()[0])  # its tokens
        found = recall(Copier(), made, new_cache("window", CONFIG, 0), DISTANCES, 512)
        for distance, (_, _, right) in zip(DISTANCES, found, strict=True):
            asked = made.end + distance + len(made.ask)
            oldest = [n - CONFIG.slots(n) + CONFIG.sinks for n in (asked - made.answer, asked)]
            if oldest[1] <= made.end - fact:
                assert right == 1
                held += 1
            elif oldest[0] >= made.end:
                assert right == 0
                gone += 1
    assert held >= 8
    assert gone >= 8


# The script


def records(out):
    return json.loads((out / "recall.json").read_text())


def test_what_a_run_leaves(script, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    ran = script("--tasks", "passkey, tracking", "--distances", "200,30", "--plot")
    assert ran.code == 0, ran.err
    found = records(out)
    keys = [(r["strategy"], r["task"], r["distance"]) for r in found]
    assert keys == [*product(("full", "freqkv", "window"), ("passkey", "tracking"), (30, 200))]
    assert {r["trials"] for r in found} == {2}
    assert {r["accuracy"] for r in found} == {0}
    assert all(r["ci95"][0] < r["loss"] < r["ci95"][1] for r in found)
    assert {r["rounds"] for r in found if r["strategy"] == "full"} == {0}
    assert [r["rounds"] for r in found if r["strategy"] == "window"] == [
        r["rounds"] for r in found if r["strategy"] == "freqkv"
    ]
    assert all(r["window"] == 64 for r in found if r["strategy"] != "full")
    for record in found:
        assert re.search(rf"{record['strategy']} .*{record['loss']:.2f}   0%", ran.out)
        assert re.search(rf"no fact .*{record['loss_absent']:.2f}", ran.out)
    rows = (out / "recall.csv").read_text().splitlines()
    assert len(rows) == 1 + len(found)
    assert {"ci95_low", "rounds", "loss_absent"} < set(rows[0].split(","))
    assert json.loads((out / "recall.settings.json").read_text())["settings"]["trials"] == 2
    for name in ("recall.png", "recall_accuracy.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_means_over_trials(script, tmp_path, monkeypatch):
    """Of the records, taken from the journal's lines by hand."""
    script("--distances", "20,90", "--strategies", "freqkv")
    lines = (tmp_path / "out/recall.journal.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["value"] for line in lines)
    for i, record in enumerate(records(tmp_path / "out")):
        assert record["loss"] == pytest.approx((first[i][0] + second[i][0]) / 2)
        assert record["loss_absent"] == pytest.approx((first[i][1] + second[i][1]) / 2)
        half = 12.706 * abs(first[i][0] - second[i][0]) / 2  # Student's t, one degree of freedom
        assert record["ci95"] == pytest.approx([record["loss"] - half, record["loss"] + half], 1e-3)
    monkeypatch.setattr("evaluation.recall.recall", lambda *_: [(1.0, 3.0, 1.0), (2.0, 4.0, 0.0)])
    found = {"--seed": script("--distances", "20,90", "--strategies", "freqkv", "--seed", 5).out}
    assert re.search(r"freqkv +1.00 100% +2.00 +0%\n +no fact +3.00 +4.00", found["--seed"])
    assert [r["accuracy"] for r in records(tmp_path / "out")] == [1, 0]


def test_usual_distances_and_limit(script, tmp_path):
    assert script("--strategies", "window", "--limit", "1", "--trials", "5").code == 0
    found = records(tmp_path / "out")
    assert [r["distance"] for r in found] == [8, 32, 64, 128, 256]
    assert [(r["trials"], r["ci95"]) for r in found] == [(1, None)] * 5
    assert np.diff([r["rounds"] for r in found]).min() >= 0


def test_a_stopped_run_goes_on(script, tmp_path, monkeypatch):
    flags = ("--distances", "20,90", "--trials", "3")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert script(*flags, out=whole).code == 0
    read_so_far = []

    def stop(*args):
        if len(read_so_far) == 4:
            raise KeyboardInterrupt
        read_so_far.append(args)
        return recall(*args)

    monkeypatch.setattr("evaluation.recall.recall", stop)
    assert script(*flags, out=part).code == 130
    read_so_far[:] = [None] * 5  # which lets through no more than it should
    monkeypatch.setattr("evaluation.recall.recall", lambda *a: read_so_far.append(a) or recall(*a))
    assert script(*flags, out=part).code == 0
    assert len(read_so_far) == 5 + 9 - 4
    assert records(part) == records(whole)
    assert script(*flags, "--trials", "4", out=part).code == 0  # more trials: the others are known
    assert len(read_so_far) == 5 + 9 - 4 + 3
    assert script(*flags, "--seed", "1", out=part).code == 0
    assert len(read_so_far) == 5 + 9 - 4 + 3 + 9
    assert records(part) != records(whole)


def test_pictures_show_the_records():
    each = product(("full", "freqkv"), ("passkey", "tracking"), ((10, 0.5), (40, 2.0)))
    made = [
        {"strategy": s, "task": t, "distance": x, "loss": y, "accuracy": y / 2, "loss_absent": 9.0}
        for s, t, (x, y) in each
    ]
    figure = pytest.importorskip("matplotlib.figure").Figure()
    draw(figure, made, "loss")
    assert [axes.get_title() for axes in figure.axes] == ["passkey", "tracking"]
    for axes in figure.axes:
        curves = {line.get_label(): [*line.get_ydata()] for line in axes.lines}
        assert curves["full"] == curves["freqkv"] == [0.5, 2.0]
        assert curves["no fact"] == [9.0, 9.0]
        assert axes.get_ylim()[1] > 9
    figure = pytest.importorskip("matplotlib.figure").Figure()
    draw(figure, made, "accuracy")
    assert [[*line.get_ydata()] for line in figure.axes[0].lines] == [[0.25, 1.0]] * 2


# Bad input


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tasks", "passkey,quiz"], "--tasks: was 'quiz', must be of passkey, multikey"),
        (["--tasks", ""], "--tasks: was ''"),
        (["--distances", "0"], "--distances: was '0'"),
        (["--distances", "10,far"], "--distances: was 'far'"),
        (
            ["--distances", "10,99999"],
            r"--distances: was 99999, which takes \d+ .* haystack.txt, has \d+ tokens; must be",
        ),
        (["--trials", "0"], "--trials: was '0'"),
        (["--trials", "some"], "--trials: was 'some'"),
    ],
)
def test_bad_flags(script, flags, says, tmp_path):
    ran = script(*flags)
    assert ran.code == 2
    assert re.search(says, ran.err), ran.err
    assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "out/recall.json").exists()


# A GPU


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(trial, model, dtype):
    made = trial()
    fast = copy.deepcopy(model).to("cuda", dtype)
    for strategy in ("full", "freqkv"):
        found, expected = (
            recall(m, made, new_cache(strategy, CONFIG, 900), DISTANCES, 512) for m in (fast, model)
        )
        rtol = 1e-3 if dtype == torch.float32 else 0.1
        assert_close([x[:2] for x in found], [x[:2] for x in expected], rtol=rtol, atol=0.01)
