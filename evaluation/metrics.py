"""LongBench's metrics: what was found, what was wanted, and the classes, to a score from 0 to 1.

The definitions of github.com/THUDM/LongBench (metrics.py, eval.py), with `rouge` and jieba as
there. Edit similarity is what its `fuzzywuzzy` gives where python-Levenshtein is installed; where
it is not, some points less.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

# What the Chinese F1 leaves out: the published list of punctuation, which has gaps, and spaces.
MARKS_ZH = re.compile(
    rf"[\s{re.escape(string.punctuation)}\u2013\u2014\u2018\u2019\u201b-\u201f\u2026\u2027"
    r"\u3001-\u3003\u300b-\u3011\u3014-\u301f\u3030\u303e\u303f\ufe4f\uff01-\uff0d\uff0f"
    r"\uff1a-\uff20\uff3b-\uff40\uff5b-\uff64]"
)


def library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(f"longbench: {name} was not found: pip install {name}") from None


def chinese(text: str) -> list[str]:
    jieba = library("jieba")
    jieba.setLogLevel("WARNING")  # else it tells of its dictionary
    return jieba.lcut(text)


def overlap(found: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of two bags of words."""
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def f1(found: str, wanted: str, _: object) -> float:
    """Of words in lower case, without punctuation and articles."""
    marks = str.maketrans("", "", string.punctuation)
    bare = (text.lower().translate(marks) for text in (found, wanted))
    return overlap(*(re.sub(r"\b(a|an|the)\b", " ", text).split() for text in bare))


def f1_zh(found: str, wanted: str, _: object) -> float:
    words = ([MARKS_ZH.sub("", x.lower()) for x in chinese(text)] for text in (found, wanted))
    return overlap(*(list(filter(None, side)) for side in words))


def rouge_l(found: str, wanted: str, _: object) -> float:
    try:
        return library("rouge").Rouge(["rouge-l"]).get_scores(found, wanted)[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):  # no words, or too many between two full stops
        return 0.0  # as published


def rouge_l_zh(found: str, wanted: str, _: object) -> float:
    return rouge_l(" ".join(chinese(found)), " ".join(chinese(wanted)), _)


def classified(found: str, wanted: str, classes: Sequence[str]) -> float:
    """One over the classes named, if the right one is; a class within its name does not count."""
    named = [x for x in classes if x in found and (x == wanted or x not in wanted)]
    return 1 / len(named) if wanted in named else 0.0


def numbered(found: str, wanted: str, _: object) -> float:
    """The share of the numbers found that are the one wanted, of a paragraph or a count."""
    number = re.search("(?:Paragraph |\u6bb5\u843d|^)(\\d+)", wanted)
    if number is None:
        raise ValueError(f"an answer was {wanted!r}, must have a number")
    numbers = re.findall(r"\d+", found)
    return numbers.count(number[1]) / len(numbers) if numbers else 0.0


def edit_similarity(found: str, wanted: str, _: object) -> float:
    """Of the first line that has no comment and no fence, in whole percent."""
    lines = (x for x in found.lstrip("\n").split("\n") if not re.search("`|#|//", x))
    return round(library("rapidfuzz").fuzz.ratio(next(lines, ""), wanted)) / 100


TASKS: dict[str, tuple[str, Callable[[str, str, Any], float]]] = {
    task: (name, metric)
    for name, metric, tasks in (
        ("F1", f1, "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa"),
        ("F1", f1_zh, "multifieldqa_zh"),
        ("ROUGE-L", rouge_l, "gov_report qmsum multi_news samsum"),
        ("ROUGE-L", rouge_l_zh, "vcsum dureader"),
        ("accuracy", classified, "trec lsht"),
        ("accuracy", numbered, "passage_retrieval_en passage_retrieval_zh passage_count"),
        ("edit similarity", edit_similarity, "lcc repobench-p"),
    )
    for task in tasks.split()
}
ONE_LINE = {"trec", "triviaqa", "samsum", "lsht"}  # go on from examples: the answer is a line
PLAIN = ONE_LINE | {"lcc", "repobench-p"}  # published without a chat template
