"""experiments/facts.py: what rows tell and ask, what is held out, and every bad input.

Run: pytest tests/test_facts.py
"""

import json
import re

import numpy as np
import pytest

from data import IGNORE, read_records
from experiments import facts
from experiments.recall import TASKS
from tests.helpers import tiny_checkpoint
from weights import load_tokenizer

PROSE = "One day she walked to the town. It was far, and she was alone. " * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_checkpoint(folder)
    return folder


def told(template):
    """A pattern of the fact of a template, with groups for the thing and for the value."""
    pattern = re.escape(template[0]).replace(r"\{0\}", "(?P<thing>.+)")
    return pattern.replace(r"\{1\}", "(?P<value>.+)")


@pytest.mark.parametrize("seed", range(20))
def test_what_is_asked_was_told_before(checkpoint, seed):
    rng = np.random.default_rng(seed)
    tokenizer = load_tokenizer(checkpoint)
    parts = facts.make_row(rng, facts.split_paragraphs(PROSE), tokenizer, 1200, 6, learnt=0)
    asked = 0
    for number, (text, is_learnt) in enumerate(parts):
        if not is_learnt:
            continue
        question = parts[number - 1][0].strip()
        before = "".join(text for text, _ in parts[: number - 1])
        answers = set()
        for template in facts.WORDS["taught"]:
            for line in before.split("\n"):
                match = re.fullmatch(told(template), line)
                if match and template[1].format(match["thing"]).strip() == question:
                    answers.add(match["value"])
        assert answers == {text.strip()}
        asked += 1
    assert 1 <= asked <= 12  # once or twice; the last ones may be due after the end


def test_some_texts_begin_with_a_fact_and_some_do_not(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    paragraphs = facts.split_paragraphs(PROSE)
    begin = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        parts = facts.make_row(rng, paragraphs, tokenizer, 256, 3, learnt=0)
        begin.append(parts[0][0].strip() not in PROSE)
    assert 0.1 < np.mean(begin) < 0.45


@pytest.mark.parametrize(
    "text", [PROSE, "x = 1\ny = [2,\n    3]\n" * 90, "word " * 900, "x" * 5000, "\n\n\n"]
)
def test_stretches_are_the_text_as_it_stands(text):
    paragraphs = facts.split_paragraphs(text)
    assert "".join("".join(paragraphs).split()) == "".join(text.split())
    assert all(paragraph in text for paragraph in paragraphs)
    assert all(0 < len(paragraph) <= 800 for paragraph in paragraphs)


def test_rows_are_as_long_as_asked_and_learn_answers_alone(checkpoint, outcome, tmp_path):
    (tmp_path / "book.txt").write_text(PROSE)
    flags = ("--model", checkpoint, "--data", tmp_path / "book.txt", "--rows", 3, "--facts", 4)
    lengths = ("--length", 500, "--learnt", 0)
    ran = outcome(facts, *flags, *lengths, "--out", tmp_path / "x.jsonl")
    assert ran.code == 0, ran.err
    tokenizer = load_tokenizer(checkpoint)
    rows = read_records(tmp_path / "x.jsonl", tokenizer, 500, 0.0).train
    records = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert len(rows) == len(records) == 3
    for (tokens, labels), record in zip(rows, records, strict=True):
        assert len(tokens) == 500
        learnt = "".join(text for text, is_learnt in record["parts"] if is_learnt)
        shown = tokenizer.decode(labels[labels != IGNORE].tolist())
        assert shown.replace(" ", "")
        assert learnt.replace(" ", "").startswith(shown.replace(" ", ""))


def test_the_share_of_prose_that_is_learnt(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    shares = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        parts = facts.make_row(rng, facts.split_paragraphs(PROSE), tokenizer, 3000, 1, 0.25)
        prose = [is_learnt for text, is_learnt in parts if "she" in text]
        shares += prose
    assert 0.15 < np.mean(shares) < 0.35


def test_what_is_tested_is_never_taught():
    for name in ("first names", "last names", "places", "things"):
        taught, tested = facts.read_words(name, False), facts.read_words(name, True)
        assert len(tested) * 3 < len(taught)
        assert not set(taught) & set(tested)
        assert len(set(taught)) == len(taught)
    for name in ("people", "places"):
        said = TASKS[name](np.random.default_rng(0))
        value = said.answer.strip()
        tell, ask, _ = facts.WORDS["tested"][name]
        thing = re.search(r"(?:found|kept)\? The (\w+)|the (\w+)\?", said.question)
        thing = next(group for group in thing.groups() if group)
        assert said.facts[-1] == tell.format(thing, value)
        assert said.question == ask.format(thing) + " "
        assert value.split()[-1] in facts.read_words(
            {"people": "last names", "places": "places"}[name], True
        )
        assert facts.WORDS["tested"][name] not in facts.WORDS["taught"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--facts", "99"], "--facts: was '99'"),
        (["--length", "9"], "--length: was '9'"),
        (["--out", "no/such/x.jsonl"], "--out: was no/such/x.jsonl"),
        (["--out", "README.md"], "--out: README.md was there already"),
        (["--data", "nowhere"], "--data: nowhere held no file"),
        (["--data", "BLANK"], "BLANK held no text, must hold some"),
    ],
)
def test_bad_input(outcome, checkpoint, tmp_path, flags, says):
    (tmp_path / "book.txt").write_text(PROSE)
    (tmp_path / "BLANK").write_text("\n \n\n")
    flags = [tmp_path / flag if flag == "BLANK" else flag for flag in flags]
    given = ["--model", checkpoint, "--data", tmp_path / "book.txt", "--out", tmp_path / "x"]
    ran = outcome(facts, *given, *flags)
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1
