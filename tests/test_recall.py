"""experiments/recall.py: the trials, what is measured of them, and the script.

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

from experiments import recall as script
from experiments.harness import OPERATORS, STRATEGIES, Document, make_strategies
from experiments.recall import GAP, TASKS, draw_recall, make_trial, recall
from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig
from generate import read
from model import causal_attention
from tests.helpers import tiny_checkpoint, tiny_config, tiny_model
from weights import load_tokenizer

SCHEDULE = FreqKVConfig(window=256)
DISTANCES = [20, 60, 150, 400]
WORDS = ["alder", "birch", "cedar", "elder", "hazel", "larch", "maple", "olive", "poplar", "rowan"]
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


@pytest.fixture
def trial(tokenizer, texts):
    """Make a trial by task, number, schedule and seed."""

    def make(task="passkey", number=0, schedule=SCHEDULE, **more):
        return make_trial(task, number, texts, tokenizer, schedule, DISTANCES[-1], **more)

    return make


def new_cache(name, schedule=SCHEDULE):
    [strategy] = make_strategies([name], schedule)
    return strategy.make_cache(900)


# The trials


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("task", TASKS)
def test_the_layout(task, number, trial, tokenizer):
    made = trial(task, number)
    said = TASKS[task](np.random.default_rng((0, number)))
    planted, without = made.text.tolist()
    assert len(planted) == len(without) == made.end + DISTANCES[-1]
    stop = made.end
    for fact in reversed(said.facts):  # from the last, each GAP tokens after another
        ids = tokenizer.encode(f"\n{fact}\n", bos=False)
        assert planted[stop - len(ids) : stop] == ids
        planted[stop - len(ids) : stop] = without[stop - len(ids) : stop]
        stop -= len(ids) + GAP
    assert planted == without
    assert stop + GAP > SCHEDULE.sinks
    assert without[0] == tokenizer.bos_id
    assert tokenizer.decode(without).strip() in HAYSTACK
    assert tokenizer.decode(made.ask.tolist()).strip() == said.question + said.answer
    assert tokenizer.decode(made.ask[-made.answer :].tolist()).strip() == said.answer


def test_a_trial_without_the_token_of_a_beginning(trial, tokenizer):
    made = trial(bos=False)
    assert made.text.shape == trial().text.shape
    assert tokenizer.bos_id not in made.text
    assert tokenizer.decode(made.text[1].tolist()).strip() in HAYSTACK


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
        said = make(np.random.default_rng((7, number)))
        assert said.question.endswith(" ")  # a space that some tokenizers keep apart is no answer
        told = re.findall(r"\d{5}", " ".join(said.facts))
        if task == "tracking":
            assert follow(said.facts, re.search("VAR (.) is", said.question)[1]) == said.answer
            assert len(set(told)) == 2
        elif task == "multikey":
            name = re.search("of the (.+)[?]", said.question)[1]
            [fact] = [fact for fact in said.facts if name in fact]
            assert fact == f"{said.question.split('? ')[1]}{said.answer}."
            assert len(set(told)) == len(said.facts) == 4
        elif task in ("people", "places"):
            begin = said.question.split("? ")[1]
            assert f"{begin}{said.answer}." in said.facts
            assert len(said.facts) == 2
        else:
            assert list(dict.fromkeys(told)) == said.answer.split(", ")
    asked = {TASKS["multikey"](np.random.default_rng((7, i))).question for i in range(20)}
    assert len(asked) > 4


@pytest.mark.parametrize("schedule", [SCHEDULE, FreqKVConfig(256, ratio=0.75, recent=32)])
def test_facts_end_evenly_over_a_round(schedule, trial):
    ends = sorted(trial(number=i, schedule=schedule).end for i in range(16))
    first = schedule.window - schedule.stride
    assert first < ends[0]
    assert ends[-1] <= schedule.window
    gaps = np.diff([first, *ends, schedule.window])
    assert gaps.max() < 3 * schedule.stride / 16


def test_a_small_window_and_no_ratio(trial):
    for schedule in (FreqKVConfig(32), FreqKVConfig(64, ratio=0), FreqKVConfig(16, sinks=0)):
        made = trial("multikey", schedule=schedule)
        changed = (made.text[0] != made.text[1]).nonzero()
        assert changed.min() > schedule.sinks
        assert changed.max() < made.end


def test_the_seed(trial):
    same = trial(seed=3)
    assert trial(seed=3).text.equal(same.text)
    for other in (trial(seed=4), trial(seed=3, number=1)):
        assert not other.ask.equal(same.ask)
        assert not other.text[1, 1:100].equal(same.text[1, 1:100])


def test_all_long_enough_texts_are_drawn_from(tokenizer):
    texts = [Document(str(i), np.full(n, 10 + i)) for i, n in enumerate((400, 900, 10, 800))]
    drawn = set()
    for number in range(30):
        row = make_trial("passkey", number, texts, tokenizer, SCHEDULE, 400).text[1, 1:]
        assert (row == row[0]).all()
        drawn.add(row[0].item())
    assert drawn == {11, 13}


def test_a_text_that_just_fits(tokenizer):
    long = Document("long", np.arange(900) % 400)
    first = make_trial("passkey", 0, [long], tokenizer, SCHEDULE, 400)
    need = first.text.shape[1] - 1  # beside its beginning
    exact = Document("text", long.tokens[:need])
    short = Document("text", long.tokens[: need - 1])
    made = make_trial("passkey", 0, [short, exact], tokenizer, SCHEDULE, 400)
    assert made.text[1, 1:].equal(torch.arange(need) % 400)
    says = f"--distances: was 400, which takes {need} .* text, has {need - 1} tokens; must be less"
    with pytest.raises(ValueError, match=says):
        make_trial("passkey", 0, [short], tokenizer, SCHEDULE, 400)


def test_a_tokenizer_that_joins_question_and_answer():
    def encode(text, bos):  # two bytes a token
        return [int.from_bytes(text[i : i + 2].encode(), "big") for i in range(0, len(text), 2)]

    tokenizer = Namespace(bos_id=None, encode=encode)
    joined = set()
    for task in TASKS:
        texts = [Document("text", np.ones(1000, np.int64))]
        made = make_trial(task, 0, texts, tokenizer, SCHEDULE, 400)
        said = TASKS[task](np.random.default_rng((0, 0)))
        assert made.ask.tolist() == encode(f"\n{said.question}{said.answer}", bos=False)
        answer = [i.to_bytes(2, "big").strip(b"\0") for i in made.ask[-made.answer :].tolist()]
        spelled = b"".join(answer).decode()
        assert spelled.removeprefix(" ") == said.answer
        joined.add(spelled[0] == " ")
        assert made.text[1].eq(1).all()
    assert joined == {True, False}  # in some the last space of the question, in some not


@pytest.mark.parametrize("schedule", [SCHEDULE, FreqKVConfig(64, ratio=0.75)])
@pytest.mark.parametrize("number", range(3))
def test_rounds_are_those_of_the_cache(number, schedule, trial, model):
    made = trial("multikey", number, schedule)
    for distance in DISTANCES:
        cache = FreqKVCache(schedule)
        stop = made.end + distance
        read(model, made.text[:1, : made.end], cache, 512)
        before = cache.rounds
        read(model, made.text[:1, made.end : stop], cache, 512)
        read(model, made.ask[None, : -made.answer], cache, 512)
        assert made.rounds(schedule, distance) == cache.rounds - before


# What is measured


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("task", ["passkey", "multivalue"])
def test_loss_is_that_of_one_plain_pass(name, task, trial, model):
    made = trial(task)
    attend = causal_attention
    if name != "full":
        attend = FreqKVAttention(SCHEDULE, OPERATORS[name])
    seen = []
    results = recall(model, made, new_cache(name), DISTANCES, 33, seen.append)
    assert sum(seen) == made.text.numel()
    for distance, result in zip(DISTANCES, results, strict=True):
        ask = made.ask.expand(2, -1)
        whole = torch.cat((made.text[:, : made.end + distance], ask), dim=1)
        with torch.no_grad():
            shares = model(whole, attend).log_softmax(-1)
        expected = [0.0, 0.0]
        for row, i in product((0, 1), range(whole.shape[1] - made.answer, whole.shape[1])):
            expected[row] -= shares[row, i - 1, whole[row, i]].item()
        losses = [result["loss"], result["loss_absent"]]
        assert_close(losses, expected, rtol=1e-4, atol=1e-4)
        assert result["right"] == 0


def test_losses_that_are_not_numbers(trial, model):
    broken = copy.deepcopy(model)
    broken.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="losses: were not numbers, must be; try another --dtype"):
        recall(broken, trial(), new_cache("full"), DISTANCES, 512)


class Copier:
    """Stands in for a model: goes on as the text did where its last REACH tokens stood before.

    All it knows of them is what the cache gives back for one query: each token is a value, whose
    key is the tokens before it.
    """

    REACH = 6

    def __init__(self, vocab=400):
        self.codes = torch.eye(vocab)
        self.norm = Namespace(weight=torch.zeros(1))

    def hidden(self, tokens, cache):
        past = getattr(cache, "past", tokens.new_zeros(len(tokens), self.REACH))
        codes = self.codes[torch.cat((past, tokens), dim=1)]  # [B, REACH + T, V]
        cache.past = torch.cat((past, tokens), dim=1)[:, -self.REACH :]
        time = tokens.shape[1]
        shifted = [codes[:, i : i + time] for i in range(self.REACH + 1)]  # the oldest first
        keys = torch.cat(shifted[:-1], dim=-1)
        queries = torch.cat(shifted[1:], dim=-1)
        values = F.pad(shifted[-1], (0, keys.shape[-1] - len(self.codes)))
        sharp = 20 * keys.shape[-1] ** 0.5
        out = cache(
            0, sharp * queries[:, None], keys[:, None], values[:, None], lambda x, *_, **__: x
        )
        return out[:, 0, :, : len(self.codes)]

    def logits(self, hidden):
        return 40 * hidden


@pytest.mark.parametrize("task", ["passkey", "multikey"])
def test_full_attention_recalls_at_any_distance(task, trial):
    for number in range(2):
        made = trial(task, number)
        for result in recall(Copier(), made, new_cache("full"), DISTANCES, 512):
            assert result["right"] == 1
            assert result["loss"] < 1e-3
            assert result["loss_absent"] > 10
    made.ask[-1] = made.ask[0]  # one wrong token is a wrong answer
    for result in recall(Copier(), made, new_cache("full"), DISTANCES, 512):
        assert result["right"] == 0
        assert result["loss"] > 10


def test_eviction_recalls_what_the_slots_still_hold(trial):
    held = 0
    gone = 0
    for number in range(8):
        made = trial(number=number)
        first = int((made.text[0] != made.text[1]).nonzero()[0])  # of the fact
        results = recall(Copier(), made, new_cache("window"), DISTANCES, 512)
        for distance, result in zip(DISTANCES, results, strict=True):
            asked = made.end + distance + len(made.ask)
            oldest = asked - SCHEDULE.slots(asked) + SCHEDULE.sinks  # that is in the slots
            if oldest <= first:
                assert result["right"] == 1
                held += 1
            asked -= made.answer
            oldest = asked - SCHEDULE.slots(asked) + SCHEDULE.sinks
            if oldest >= made.end:
                assert result["right"] == 0
                gone += 1
    assert held >= 8
    assert gone >= 8


# The script


@pytest.fixture
def run(checkpoint, outcome, tmp_path):
    """Run it in this process; its exit code, stdout and stderr."""

    def run(*flags, out=tmp_path / "out"):
        where = ["--model", checkpoint, "--data", checkpoint / "haystack.txt", "--out", out]
        usual = ["--window", 64, "--device", "cpu", "--trials", 2]
        return outcome(script, *where, *usual, *flags)

    return run


def records(out):
    return json.loads((out / "recall.json").read_text())


def test_what_a_run_leaves(run, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    ran = run("--tasks", "passkey, tracking", "--distances", "200,30", "--plot")
    assert ran.code == 0, ran.err
    made = records(out)
    keys = [(record["strategy"], record["task"], record["distance"]) for record in made]
    assert keys == [*product(("full", "freqkv", "window"), ("passkey", "tracking"), (30, 200))]
    rounds = {key: record["rounds"] for key, record in zip(keys, made, strict=True)}
    for record in made:
        name, task, distance = record["strategy"], record["task"], record["distance"]
        assert (record["trials"], record["accuracy"]) == (2, 0)
        assert record["ci95"][0] < record["loss"] < record["ci95"][1]
        if name == "full":
            assert (record["rounds"], "window" in record) == (0, False)
        else:
            assert (record["window"], record["sinks"]) == (64, 4)
            assert record["rounds"] == rounds["freqkv", task, distance] > 0
        assert re.search(rf"{name} .*{record['loss']:.2f}   0%", ran.out)
        assert re.search(rf"no fact .*{record['loss_absent']:.2f}", ran.out)
    assert "ci95_low" in (out / "recall.csv").read_text()
    assert json.loads((out / "recall.settings.json").read_text())["settings"]["trials"] == 2
    for name in ("recall.png", "recall_accuracy.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_without_the_text_that_has_no_fact(run, tmp_path):
    flags = ("--distances", "20,90", "--strategies", "freqkv,window", "--plot")
    run(*flags)
    both = records(tmp_path / "out")
    ran = run(*flags, "--planted-only", "--out", tmp_path / "less")
    assert ran.code == 0, ran.err
    assert "no fact" not in ran.out
    less = records(tmp_path / "less")
    for one, other in zip(both, less, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert other["loss_absent"] is None
        names = one.keys() - {"loss", "loss_absent", "ci95"}
        assert {name: one[name] for name in names} == {name: other[name] for name in names}


def test_means_over_trials(run, tmp_path, monkeypatch):
    """Of the records, by hand."""
    told = [(1.0, 3.0, 1.0), (2.0, 4.0, 0.0), (3.0, 6.0, 0.0), (2.0, 5.0, 0.0)]
    left = iter(told)

    def answer(*_):
        results = []
        for _ in range(2):
            loss, absent, right = next(left)
            results.append({"loss": loss, "loss_absent": absent, "right": right})
        return results

    monkeypatch.setattr(script, "recall", answer)
    ran = run("--distances", "20,90", "--strategies", "freqkv")
    near, far = records(tmp_path / "out")
    assert (near["loss"], near["loss_absent"], near["accuracy"]) == (2.0, 4.5, 0.5)
    assert (far["loss"], far["loss_absent"], far["accuracy"]) == (2.0, 4.5, 0.0)
    assert near["ci95"] == pytest.approx([2 - 12.706, 2 + 12.706], 1e-3)  # Student's t, of two
    assert far["ci95"] == [2.0, 2.0]
    assert re.search(r"freqkv +2.00  50% +2.00 +0%\n +no fact +4.50 +4.50", ran.out)


def test_usual_distances_and_limit(run, tmp_path):
    assert run("--strategies", "window", "--limit", "1", "--trials", "5").code == 0
    made = records(tmp_path / "out")
    assert [record["distance"] for record in made] == [8, 32, 64, 128, 256]
    assert {(record["trials"], record["ci95"]) for record in made} == {(1, None)}
    assert np.diff([record["rounds"] for record in made]).min() >= 0


def test_a_stopped_run_goes_on(run, tmp_path, monkeypatch):
    flags = ("--distances", "20,90", "--trials", "3")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(*flags, out=whole).code == 0
    calls = []

    def count(*about):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(about)
        return recall(*about)

    monkeypatch.setattr(script, "recall", count)
    assert run(*flags, out=part).code == 130
    calls += [None]  # which lets the rest through
    assert run(*flags, out=part).code == 0
    assert len(calls) == 1 + 9
    assert records(part) == records(whole)
    assert run(*flags, "--trials", "4", out=part).code == 0  # more trials: the others are known
    assert len(calls) == 1 + 9 + 3
    one = ("--strategies", "freqkv", "--trials", "1")
    for changed in (["--seed", "1"], ["--no-bos"], ["--distances", "20,91"], ["--recent", "8"]):
        before = len(calls)
        assert run(*flags, *one, *changed, out=part).code == 0
        assert len(calls) == before + 1


@pytest.mark.parametrize(("field", "heights"), [("loss", [0.5, 2.0]), ("accuracy", [0.25, 1.0])])
def test_pictures_show_the_records(field, heights):
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    made = []
    for name, task in product(("full", "freqkv"), ("passkey", "tracking")):
        for distance, y in ((10, 0.5), (40, 2.0)):
            record = {"strategy": name, "task": task, "distance": distance, "loss": y}
            made.append(record | {"accuracy": y / 2, "loss_absent": 9.0})
    draw_recall(figure, made, field)
    assert [axes.get_title() for axes in figure.axes] == ["passkey", "tracking"]
    for axes in figure.axes:
        curves = {line.get_label(): [*line.get_ydata()] for line in axes.lines}
        assert curves["full"] == curves["freqkv"] == heights
        assert curves.get("no fact") == ([9.0, 9.0] if field == "loss" else None)
        assert axes.get_ylim()[1] > max(9.0 if field == "loss" else 1.0, 0)


# Bad input


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tasks", "passkey,quiz"], "--tasks: was 'quiz', must be of passkey, multikey"),
        (["--tasks", ""], "--tasks: was ''"),
        (["--distances", "0"], "--distances: was '0'"),
        (
            ["--distances", "10,99999"],
            r"--distances: was 99999, which takes \d+ .* haystack.txt, has \d+ tokens; must be",
        ),
        (["--trials", "0"], "--trials: was '0'"),
        (["--seed", "-1"], "--seed: was '-1'"),
    ],
)
def test_bad_flags(run, flags, says, tmp_path):
    ran = run(*flags)
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
    rtol = 1e-3 if dtype == torch.float32 else 0.1
    for name in ("full", "freqkv"):
        there = recall(fast, made, new_cache(name), DISTANCES, 512)
        here = recall(model, made, new_cache(name), DISTANCES, 512)
        for one, two in zip(there, here, strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=rtol, abs=0.01)
