"""experiments/associative.py: texts ask what was told, models can learn it, and a run can go on.

Run: pytest tests/test_associative.py
"""

import json

import numpy as np
import pytest
import torch

from experiments import associative
from experiments.associative import Task, make_batch, make_strategies, new_model
from model import causal_attention

TASK = Task(facts=4, keys=10, values=6, fillers=5)


@pytest.mark.parametrize("structured", [False, True])
def test_every_question_asks_for_what_was_told(structured):
    """Read back by ids alone: the last fact with that key has the answer, and that age."""
    task = Task(facts=4, keys=10, values=6, fillers=5, structured=structured)
    batch = make_batch(task, np.random.default_rng(0), batch=20, time=64)
    facts_from = task.fillers + task.keys
    asked = 0
    for tokens, answers, ages in zip(batch.tokens, batch.answers, batch.ages, strict=True):
        told = {}
        for place, token in enumerate(tokens.tolist()):
            if token >= facts_from:
                key, value = divmod(token - facts_from, task.values)
                assert key not in told
                told[key] = (place, value)
            if task.fillers <= token < facts_from:
                start, value = told[token - task.fillers]
                assert (answers[place], ages[place]) == (value, place - start)
                asked += 1
            else:
                assert (answers[place], ages[place]) == (-1, -1)
        assert len(told) == task.facts
    assert asked > 20 * 8


def test_an_embedding_tells_all_tokens_apart():
    model = new_model(TASK, positions=64, seed=0)
    ids = torch.arange(TASK.fillers + TASK.keys + TASK.keys * TASK.values)
    vectors = model.embed_tokens(ids[None])[0]
    distances = torch.cdist(vectors, vectors) + 10 * torch.eye(len(ids))
    assert distances.min() > 0.5
    fact = TASK.fillers + TASK.keys + 3 * TASK.values + 2
    other_key = fact + TASK.values
    other_value = fact + 1
    both = other_key + 1
    difference = vectors[both] - vectors[other_key] - vectors[other_value] + vectors[fact]
    assert difference.abs().max() < 1e-5  # key and value are added up


@pytest.mark.parametrize("name", make_strategies(64))
def test_every_strategy_trains_and_is_tested(name):
    model = new_model(TASK, positions=64, seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attend = make_strategies(64)[name]
    steps = []
    loss = associative.train_model(model, attend, TASK, 2, 64, 0, steps.append)
    assert loss == pytest.approx(np.log(TASK.values), rel=0.1)
    assert steps == [1, 1]
    assert all(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    records = associative.test_model(model, attend, TASK, 128, 8, 0)
    assert [record["age_from"] for record in records] == [0, 16, 32, 64, 96]
    assert all(0 <= record["accuracy"] <= 1 for record in records)


def test_the_ratio_is_that_of_all_but_levels():
    for name, attend in make_strategies(64, ratio=0.25).items():
        config = getattr(attend, "config", None)
        assert config is None or getattr(config, "ratio", 0.25) == 0.25, name


@pytest.mark.slow
def test_full_attention_learns_the_task():
    torch.manual_seed(0)
    task = Task(facts=2, keys=8, values=4, fillers=4)
    model = new_model(task, positions=64, seed=0)
    associative.train_model(model, causal_attention, task, 250, 64, 0, lambda _: None)
    records = associative.test_model(model, causal_attention, task, 64, 32, 1)
    assert records[0]["accuracy"] > 0.9


def test_lengths_grow_and_the_rate_falls():
    lengths = [associative.choose_length(step, 80, 256) for step in range(80)]
    assert lengths == [64] * 10 + [128] * 10 + [256] * 60
    rates = [associative.learning_rate(step, 800) for step in range(800)]
    assert rates[0] < rates[20] < max(rates) <= 3e-3
    assert rates[-1] == pytest.approx(3e-4, rel=0.02)


def test_an_age_that_one_model_was_not_asked_at():
    """Two models of which the second has no question of the age in the middle."""
    bins = [{"age_from": age, "age_to": age + 16, "accuracy": age / 32} for age in (0, 16, 32)]
    values = [{"tests": {"64": bins}}, {"tests": {"64": [bins[0], bins[2]]}}]
    for order in (values, values[::-1]):
        records = associative.summarize("full", 4, 64, order)
        assert [record["accuracy"] for record in records] == [0, 0.5, 1]
        assert [record["models"] for record in records] == [2, 1, 2]
        assert [record["age_to"] for record in records] == [16, 32, 48]


def test_a_run_writes_its_table_and_goes_on(tmp_path, capsys, monkeypatch):
    flags = ["--steps", "2", "--strategies", "newest,levels-lowband", "--lengths", "64,128"]
    flags += ["--train-length", "256", "--facts", "2", "--plot", "--out", str(tmp_path)]
    monkeypatch.setattr(associative, "train_model", lambda *_: 1.0)
    associative.main(flags)
    records = json.loads((tmp_path / "associative.json").read_text())
    assert {record["strategy"] for record in records} == {"newest", "levels-lowband"}
    assert {record["length"] for record in records} == {64, 128}
    assert (tmp_path / "associative_2.png").exists()
    table = capsys.readouterr().out

    def must_not_train(*_):
        raise AssertionError

    monkeypatch.setattr(associative, "train_model", must_not_train)
    associative.main(flags)
    assert capsys.readouterr().out == table


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--strategies", "lowband,best"], "--strategies: was 'best', must be of full, newest"),
        (["--facts", "30"], "--facts: was 30, must be at most 1/16 of --train-length"),
        (["--facts", "16,16"], "--facts: was '16,16', must be without repeats"),
        (["--strategies", "lowband, lowband"], "must be without repeats"),
        (["--facts", "64", "--train-length", "1024", "--lengths", "64"], "--lengths: was 64, must"),
        (["--slots", "8"], "--slots: was '8'"),
        (["--ratio", "1"], "ratio: was '1'"),
    ],
)
def test_bad_flags(outcome, tmp_path, flags, says):
    ran = outcome(associative, *flags, "--out", tmp_path)
    assert ran.code == 2
    assert says in ran.err
