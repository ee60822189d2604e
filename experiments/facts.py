"""Texts that tell facts and ask for them later: rows for train.py, so that it teaches the slots.

    python -m experiments.facts --model smollm2 --data 'books/*.txt' --out facts.jsonl
    python train.py --model smollm2 --sft facts.jsonl --lora --attention distinct --window 512 ...

Prose never asks for what was told a thousand tokens ago, so tuning on prose does not teach a model
to keep it. Here facts (numbers, names, places) are strewn into stretches of real text, a line each,
and asked for at any distance. What is learnt are the answers, and stretches of the text itself, so
that the model still reads prose. Templates and values that `experiments.recall` asks for in its
tasks `places` and `people` are held out of these.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cli
from data import data_files
from weights import Tokenizer, load_tokenizer
from weights.files import check_writable, read_text, write_beside

Random = np.random.Generator
Part = tuple[str, bool]  # text, and whether it is learnt
SENTENCE = re.compile(r"[.!?]['\"”]?\s")
LINE = re.compile("\n")
SPACE = re.compile(" ")
WORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

# Facts


@lru_cache
def read_words(name: str, test: bool) -> list[str]:
    """The words of that name: every fifth is kept for testing, the others are taught."""
    words = " ".join(WORDS[name]).split()
    kept = words[::5]
    if test:
        return kept
    return [word for word in words if word not in kept]


def draw_value(rng: Random, kind: str, test: bool = False) -> str:
    """A number of 2 to 7 digits, a person or a place, of those to teach or to test with."""
    if kind == "number":
        digits = int(rng.integers(2, 8))
        return str(rng.integers(10 ** (digits - 1), 10**digits))
    if kind == "person":
        first = rng.choice(read_words("first names", test))
        last = rng.choice(read_words("last names", test))
        return f"{first} {last}"
    return str(rng.choice(read_words("places", test)))


def fill_template(template: Sequence[str], thing: str, value: str) -> tuple[str, str]:
    """A fact about a thing, and the question up to where its answer begins."""
    tell, ask, _ = template
    return tell.format(thing, value), ask.format(thing)


# Rows


def make_row(
    rng: Random, paragraphs: Sequence[str], tokenizer: Tokenizer, length: int, facts: int,
    learnt: float,
) -> list[Part]:  # fmt: skip
    """Parts of a text of at least `length` tokens that tells up to `facts` facts and asks for them.

    A quarter of the texts begin with a fact. Each is asked for once or twice (an answer tells it
    again), after 32 tokens to the whole length: half of the distances are drawn evenly, half evenly
    in the logarithm. It is told and asked for at the next end of a paragraph; what is due after the
    end is left out. `learnt` is the share of paragraphs that are learnt.
    """
    events: list[tuple[float, str, str]] = []  # when it is due, in tokens; the text; the answer
    number_of_facts = rng.integers(max(facts // 4, 1), facts + 1)
    things = rng.choice(read_words("things", False), number_of_facts, replace=False)
    opens = rng.random() < 0.25
    for number, thing in enumerate(things):
        template = WORDS["taught"][rng.integers(len(WORDS["taught"]))]
        answer = draw_value(rng, template[2])
        fact, question = fill_template(template, thing, answer)
        told = rng.uniform(0, length - 96)
        if opens and number == 0:
            told = 0.0
        events.append((told, fact, ""))
        longest = length - 48 - told
        for _ in range(rng.integers(1, 3)):
            distance = 32 * (longest / 32) ** rng.random()
            if rng.random() < 0.5:
                distance = rng.uniform(32, longest)
            events.append((told + distance, question, answer))
    events.sort()
    parts: list[Part] = []
    count = 0  # tokens so far
    place = int(rng.integers(len(paragraphs)))
    while count < length:
        added: list[Part] = []
        while events and events[0][0] <= count:
            _, text, answer = events.pop(0)
            if not answer:
                added += [(f"\n{text}\n", False)]
                continue
            space = "" if text.endswith(" ") else " "
            added += [(f"\n{text}", False), (f"{space}{answer}", True), ("\n", False)]
        if not added:
            paragraph = paragraphs[place % len(paragraphs)]
            added = [(f"\n{paragraph}\n", bool(rng.random() < learnt))]
            place += 1
        parts += added
        count += sum(len(tokenizer.encode(text, bos=False)) for text, _ in added)
    return parts


def split_paragraphs(text: str, size: int = 400) -> list[str]:
    """A text in stretches of about `size` characters: whole sentences, else lines, else words."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        left = paragraph.strip("\n")
        while len(left) > size:
            for pattern in (SENTENCE, LINE, SPACE):
                end = pattern.search(left, size // 2, 2 * size)
                if end is not None:
                    break
            cut = 2 * size if end is None else end.end()
            paragraphs.append(left[:cut].rstrip())
            left = left[cut:].lstrip("\n ")
        if left.strip():
            paragraphs.append(left)
    return paragraphs


# The script


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="experiments.facts", description=__doc__)
    integer = cli.integer
    add = parser.add_argument
    add("--model", default="smollm2", help="whose tokenizer counts the tokens [%(default)s]")
    add("--data", nargs="+", metavar="PATH", required=True, help="text files, folders, patterns")
    add("--rows", type=integer(1), default=1000, help="texts to make [%(default)s]")
    add("--length", type=integer(256), default=2048, help="tokens of each, at least [%(default)s]")
    add("--facts", type=integer(1, 70), default=12, help="told in each, at most [%(default)s]")
    text = "share of the paragraphs that are learnt [%(default)s]"
    add("--learnt", type=cli.real(0, 1), default=0.03, help=text)
    add("--seed", type=integer(0), default=0, help="of what is drawn at random [%(default)s]")
    add("--out", type=cli.path, required=True, help="the file to write, a JSON record a line")
    args = parser.parse_args(argv)
    if args.out.exists() or args.out.is_symlink():
        raise FileExistsError(f"--out: {args.out} was there already, must be new")
    if not args.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out: was {args.out}, must be a file in an existing folder")
    check_writable(args.out)
    tokenizer = load_tokenizer(args.model)
    books = [split_paragraphs(read_text(file)) for file in data_files(args.data)]
    sizes = np.array([len(book) for book in books])
    if sizes.sum() == 0:
        raise ValueError(f"--data: {' '.join(args.data)} held no text, must hold some")
    lines = []
    for number in tqdm(range(args.rows), unit=" rows", disable=None):
        rng = np.random.default_rng((args.seed, number))
        book = books[rng.choice(len(books), p=sizes / sizes.sum())]
        parts = make_row(rng, book, tokenizer, args.length, args.facts, args.learnt)
        lines.append(json.dumps({"parts": parts}) + "\n")
    write_beside(args.out, lambda to: to.write_text("".join(lines)))
    print(f"{args.rows} texts of {args.length} tokens or more written to {args.out}")


if __name__ == "__main__":
    cli.run(main, "experiments.facts")
