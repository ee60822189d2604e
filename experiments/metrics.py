"""LongBench's metrics: a prediction, the answer, and the classes, to a score from 0 to 1.

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

Metric = Callable[[str, str, Any], float]

# What the Chinese F1 leaves out: the published list of punctuation, which has gaps, and spaces.
MARKS_ZH = re.compile(
    rf"[\s{re.escape(string.punctuation)}\u2013\u2014\u2018\u2019\u201b-\u201f\u2026\u2027"
    r"\u3001-\u3003\u300b-\u3011\u3014-\u301f\u3030\u303e\u303f\ufe4f\uff01-\uff0d\uff0f"
    r"\uff1a-\uff20\uff3b-\uff40\uff5b-\uff64]"
)
MARKS = str.maketrans("", "", string.punctuation)


def library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(f"longbench: {name} was not found: pip install {name}") from None


def overlap(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of two bags of words."""
    shared = sum((Counter(prediction) & Counter(answer)).values())
    if shared == 0:
        return 0.0
    return 2 * shared / (len(prediction) + len(answer))


def f1(prediction: str, answer: str, classes: object) -> float:
    """Of words in lower case, without punctuation and articles."""
    return overlap(split_words(prediction), split_words(answer))


def split_words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(MARKS)).split()


def f1_zh(prediction: str, answer: str, classes: object) -> float:
    return overlap(split_words_zh(prediction), split_words_zh(answer))


def split_words_zh(text: str) -> list[str]:
    words = [MARKS_ZH.sub("", word.lower()) for word in cut_zh(text)]
    return [word for word in words if word]


def cut_zh(text: str) -> list[str]:
    jieba = library("jieba")
    jieba.setLogLevel("WARNING")  # else it tells of its dictionary
    return jieba.lcut(text)


def rouge_l(prediction: str, answer: str, classes: object) -> float:
    try:
        return library("rouge").Rouge(["rouge-l"]).get_scores(prediction, answer)[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):  # no words, or too many between two full stops
        return 0.0  # as published


def rouge_l_zh(prediction: str, answer: str, classes: object) -> float:
    return rouge_l(" ".join(cut_zh(prediction)), " ".join(cut_zh(answer)), classes)


def classified(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """One over the classes named, if the right one is; a class within its name does not count."""
    named = [name for name in classes if name in prediction]
    named = [name for name in named if name == answer or name not in answer]
    return 1 / len(named) if answer in named else 0.0


def numbered(prediction: str, answer: str, classes: object) -> float:
    """The share of the numbers predicted that are the right one, of a paragraph or a count."""
    number = re.search("(?:Paragraph |\u6bb5\u843d|^)(\\d+)", answer)
    if number is None:
        raise ValueError(f"an answer was {answer!r}, must have a number")
    numbers = re.findall(r"\d+", prediction)
    if not numbers:
        return 0.0
    return numbers.count(number[1]) / len(numbers)


def edit_similarity(prediction: str, answer: str, classes: object) -> float:
    """Of the first line that has no comment and no fence, in whole percent."""
    lines = [x for x in prediction.lstrip("\n").split("\n") if not re.search("`|#|//", x)]
    line = lines[0] if lines else ""
    return round(library("rapidfuzz").fuzz.ratio(line, answer)) / 100


TASKS: dict[str, tuple[str, Metric]] = {  # the metric's name, and the metric
    "narrativeqa": ("F1", f1),
    "qasper": ("F1", f1),
    "multifieldqa_en": ("F1", f1),
    "hotpotqa": ("F1", f1),
    "2wikimqa": ("F1", f1),
    "musique": ("F1", f1),
    "triviaqa": ("F1", f1),
    "multifieldqa_zh": ("F1", f1_zh),
    "gov_report": ("ROUGE-L", rouge_l),
    "qmsum": ("ROUGE-L", rouge_l),
    "multi_news": ("ROUGE-L", rouge_l),
    "samsum": ("ROUGE-L", rouge_l),
    "vcsum": ("ROUGE-L", rouge_l_zh),
    "dureader": ("ROUGE-L", rouge_l_zh),
    "trec": ("accuracy", classified),
    "lsht": ("accuracy", classified),
    "passage_retrieval_en": ("accuracy", numbered),
    "passage_retrieval_zh": ("accuracy", numbered),
    "passage_count": ("accuracy", numbered),
    "lcc": ("edit similarity", edit_similarity),
    "repobench-p": ("edit similarity", edit_similarity),
}
ONE_LINE = {"trec", "triviaqa", "samsum", "lsht"}  # go on from examples: the answer is a line
PLAIN = ONE_LINE | {"lcc", "repobench-p"}  # published without a chat template
