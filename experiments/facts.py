"""Texts that tell facts and ask for them later: rows for train.py, so that it teaches the slots.

    python -m experiments.facts --model smollm2 --data 'books/*.txt' --out facts.jsonl
    python train.py --model smollm2 --sft facts.jsonl --lora --attention distinct --vary ...

Prose never asks for what was told a thousand tokens ago, so tuning on prose does not teach a model
to keep it. Here facts (numbers, names, places) are strewn into stretches of real text, a line each,
and asked for at any distance. What is learnt are the answers, and stretches of the text itself, so
that the model still reads prose. Templates and values that `experiments.recall` asks for in its
tasks `places` and `people` are held out of these.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cli
from data import data_files
from weights import Tokenizer, load_tokenizer
from weights.files import read_text, write_beside

Random = np.random.Generator
Part = tuple[str, bool]  # text, and whether it is learnt

# Values

FIRST = """Ada Albert Alice Amos Anna Arthur Beatrice Benjamin Cecil Clara Daniel Dora Edgar Edith
Edwin Ella Ernest Esther Felix Flora Frank George Grace Harold Helen Henry Hugo Ida Irene Isaac Ivy
Jacob Jane Jasper Joan Joseph Julia Laura Leonard Lewis Lily Louis Lucy Mabel Marcus Martha Martin
Maud Miriam Nathan Nora Oliver Olive Oscar Paul Peter Philip Ralph Rebecca Robert Rose Rufus Ruth
Samuel Sarah Silas Simon Sophie Stella Susan Theodore Thomas Ursula Victor Violet Walter
Wilfred""".split()
LAST = """Abbott Archer Barlow Barnes Bennett Booth Bowman Brooks Burton Carter Chapman Clarke Coleman
Cooper Crawford Cross Davies Dawson Dixon Douglas Ellis Farmer Fisher Fletcher Foster Fox Gardner
Gibson Gordon Graham Grant Gray Griffin Hale Hardy Harper Harvey Hayes Holmes Hudson Hunter Jackson
Jordan Kemp Knight Lambert Lawson Marsh Mason Miller Morgan Morris Murray Newton Norris Palmer
Parker Perry Porter Price Quinn Reed Rhodes Russell Sanders Shaw Sharp Slater Spencer Stone Sutton
Taylor Thorne Tucker Turner Wallace Ward Watts Webb Wells Woods""".split()
PLACES = """Aberdeen Alexandria Amsterdam Antwerp Athens Baghdad Baltimore Bangkok Barcelona Belfast
Berlin Birmingham Bombay Bordeaux Boston Bristol Brussels Budapest Cairo Calcutta Cambridge Canton
Cardiff Chester Chicago Cologne Copenhagen Cork Damascus Delhi Denver Dover Dresden Dublin Edinburgh
Exeter Florence Frankfurt Geneva Genoa Glasgow Granada Halifax Hamburg Havana Houston Istanbul
Jerusalem Kingston Kyoto Leeds Leipzig Lima Lisbon Liverpool Lyon Madrid Manchester Marseille
Melbourne Milan Montreal Moscow Munich Nairobi Naples Norwich Oslo Oxford Palermo Paris Portsmouth
Prague Quebec Rome Rotterdam Salisbury Santiago Seville Shanghai Singapore Stockholm Sydney Tokyo
Toronto Turin Utrecht Valencia Vancouver Venice Vienna Warsaw York Zurich""".split()
THINGS = """anchor apron arrow barrel basket bell blanket bottle box bracelet brush bucket button cabinet
candle carpet cart casket chain chair chest clock coat coin compass cradle crown cup curtain desk
diary door drum fan feather flag flute fork gate glove hammer harp hat helmet jar kettle key knife
ladder lamp lantern letter lock map mask mirror needle oar oven painting pearl pencil piano pillow
pipe plate purse ring robe rope saddle sail scarf shield shoe spoon statue stove sword table
telescope tent throne ticket trumpet trunk umbrella vase violin wagon wheel whistle window""".split()


def held_out(values: Sequence[str]) -> list[str]:
    """The values of which no text to train on tells: every fifth."""
    return list(values[::5])


def taught(values: Sequence[str]) -> list[str]:
    """The other values."""
    return [value for value in values if value not in held_out(values)]


def draw_number(rng: Random, test: bool) -> str:
    return str(rng.integers(10_000, 100_000)) if test else draw_digits(rng, rng.integers(2, 8))


def draw_digits(rng: Random, count: int) -> str:
    """A number of so many digits."""
    return str(rng.integers(10 ** (count - 1), 10**count))


def draw_person(rng: Random, test: bool) -> str:
    choose = held_out if test else taught
    return f"{rng.choice(choose(FIRST))} {rng.choice(choose(LAST))}"


def draw_place(rng: Random, test: bool) -> str:
    choose = held_out if test else taught
    return str(rng.choice(choose(PLACES)))


# Templates


@dataclass(frozen=True)
class Template:
    """A fact about a thing, and a question up to where its answer begins."""

    tell: str
    ask: str
    draw: Callable[[Random, bool], str]  # the answer


TAUGHT = [
    Template("The number on the {0} is {1}.", "What is the number on the {0}? It is ", draw_number),
    Template("The price of the {0} was {1} pounds.", "What was the price of the {0}? The price was ", draw_number),
    Template("The code of the {0} is {1}. Remember it.", "What is the code of the {0}? The code is ", draw_number),
    Template("{1} is the secret number of the {0}.", "What is the secret number of the {0}? The secret number of the {0} is ", draw_number),
    Template("Note: {0} = {1}", "Note: {0} = ", draw_number),
    Template("They counted {1} steps from the {0} to the sea.", "How many steps was it from the {0} to the sea? They counted ", draw_number),
    Template("The {0} belongs to {1}.", "To whom does the {0} belong? The {0} belongs to", draw_person),
    Template("It was {1} who made the {0}.", "Who made the {0}? It was made by", draw_person),
    Template("The name of the man with the {0} was {1}.", "What was the name of the man with the {0}? His name was", draw_person),
    Template("{1} stole the {0}.", "Who stole the {0}? It was", draw_person),
    Template("The {0} was a present from {1}.", "From whom was the {0} a present? It was from", draw_person),
    Template("The {0} was bought in {1}.", "Where was the {0} bought? It was bought in", draw_place),
    Template("The {0} comes from {1}.", "Where does the {0} come from? It comes from", draw_place),
    Template("In {1} there is a famous {0}.", "In which city is the famous {0}? It is in", draw_place),
    Template("They sent the {0} to {1}.", "Where did they send the {0}? They sent it to", draw_place),
    Template("The thief was seen in {1} with the {0}.", "Where was the thief seen with the {0}? He was seen in", draw_place),
]  # fmt: skip
# What only `experiments.recall` asks for.
TESTED = {
    "people": Template("The {0} was found by {1}.", "Who found the {0}? The {0} was found by", draw_person),
    "places": Template("The {0} is kept in {1}.", "Where is the {0} kept? The {0} is kept in", draw_place),
}  # fmt: skip


# Rows


def make_row(
    rng: Random, paragraphs: Sequence[str], tokenizer: Tokenizer, length: int, facts: int,
    learnt: float,
) -> list[Part]:  # fmt: skip
    """Parts of one text of at least `length` tokens that tells `facts` facts and asks for them.

    Each is asked for twice, at distances from 32 tokens to the whole length, of which all orders of
    magnitude are alike. `learnt` is the share of paragraphs that are learnt.
    """
    events: list[tuple[float, str, str]] = []  # when it is due, in tokens; the text; the answer
    things = rng.choice(taught(THINGS), facts, replace=False)
    for thing in things:
        template = TAUGHT[rng.integers(len(TAUGHT))]
        answer = template.draw(rng, False)
        told = rng.uniform(0, length - 96)
        events.append((told, template.tell.format(thing, answer), ""))
        for _ in range(2):
            longest = (length - 48 - told) / 32  # in units of the shortest
            asked = told + 32 * longest ** rng.random()
            events.append((asked, template.ask.format(thing), answer))
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
    """A text in stretches of whole sentences, where it has some, of about `size` characters."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        left = " ".join(paragraph.split())
        while len(left) > size:
            cut = left.find(". ", size // 2) + 1
            if cut == 0:
                break
            paragraphs.append(left[:cut])
            left = left[cut:].strip()
        if left:
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
    add("--length", type=integer(256), default=2048, help="tokens of each [%(default)s]")
    add("--facts", type=integer(1, 80), default=12, help="told in each [%(default)s]")
    text = "share of the paragraphs that are learnt [%(default)s]"
    add("--learnt", type=cli.real(0, 1), default=0.03, help=text)
    add("--seed", type=integer(0), default=0, help="of what is drawn at random [%(default)s]")
    add("--out", type=Path, required=True, help="the file to write, a JSON record a line")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise FileExistsError(f"--out: {args.out} was there already, must be new")
    if not args.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out: was {args.out}, must be a file in an existing folder")
    tokenizer = load_tokenizer(args.model)
    books = [split_paragraphs(read_text(file)) for file in data_files(args.data)]
    sizes = np.array([len(book) for book in books])
    lines = []
    for number in tqdm(range(args.rows), unit=" rows", disable=None):
        rng = np.random.default_rng((args.seed, number))
        book = books[rng.choice(len(books), p=sizes / sizes.sum())]
        parts = make_row(rng, book, tokenizer, args.length, args.facts, args.learnt)
        lines.append(json.dumps({"parts": parts}) + "\n")
    write_beside(args.out, lambda to: to.write_text("".join(lines)))
    print(f"{args.rows} texts of {args.length} tokens written to {args.out}")


if __name__ == "__main__":
    cli.run(main, "experiments.facts")
