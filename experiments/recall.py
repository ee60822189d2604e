"""What is remembered, by age: a fact is planted in real text and asked for some distance later.

    python -m experiments.recall --model smollm2 --data BOOK.txt --window 1024 --plot

    | lead of real text | fact | `distance` tokens of text | question | answer |

The answer is read as it should be, which tells both how likely the model finds it (the loss of the
whole answer, in nats) and what it would say: greedy decoding says just that if and only if each of
its tokens is the likeliest. The same text with no fact planted is read beside it (but for
--planted-only): what a strategy loses less than there is what it remembers. The tasks with several
facts are after RULER (arXiv 2404.06654).

The end of the fact falls evenly on all places of a round of compression: at any distance some
trials have had a round more than others. Full attention may be asked beyond the positions that the
model was trained on; what it loses there with no fact says so. A measurement that was stopped goes
on where it was when the same command is given again.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cli
from experiments import facts, harness, report
from experiments.harness import Document, Strategy
from experiments.report import Record
from generate import read_parts
from model import Attend, Llama
from weights import Tokenizer

Random = np.random.Generator
GAP = 16  # tokens of text between two facts
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, are spread evenly, however many
NAMES = ["apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer"]
LETTERS = list("ABCDEFGHJKLMNPQRSTUVWXYZ")


# Tasks


@dataclass
class Task:
    facts: list[str]  # a line each
    question: str  # up to where the answer begins
    answer: str


def draw_keys(rng: Random, count: int) -> list[str]:
    """Different numbers of five digits."""
    return [str(10_000 + i) for i in rng.choice(90_000, count, replace=False)]


def passkey(rng: Random) -> Task:
    key = draw_keys(rng, 1)[0]
    fact = f"The pass key is {key}. Remember it. {key} is the pass key."
    return Task([fact], "What is the pass key? The pass key is ", key)


def multikey(rng: Random) -> Task:
    names = rng.choice(NAMES, 4, replace=False)
    keys = draw_keys(rng, 4)
    asked = rng.integers(4)
    facts = []
    for name, key in zip(names, keys, strict=True):
        facts.append(f"The pass key of the {name} is {key}.")
    name = names[asked]
    question = f"What is the pass key of the {name}? The pass key of the {name} is "
    return Task(facts, question, keys[asked])


def multivalue(rng: Random) -> Task:
    keys = draw_keys(rng, 3)
    facts = [f"One of the pass keys is {key}." for key in keys]
    question = "What are the three pass keys, in order? The pass keys are "
    return Task(facts, question, ", ".join(keys))


def tracking(rng: Random) -> Task:
    a, b, c, d = rng.choice(LETTERS, 4, replace=False)
    x, y = draw_keys(rng, 2)
    facts = [f"VAR {a} = {x}", f"VAR {b} = {y}", f"VAR {c} = VAR {a}", f"VAR {d} = VAR {b}"]
    name = d
    value = y
    if rng.integers(2):
        name = c
        value = x
    return Task(facts, f"What is the value of VAR {name}? The value of VAR {name} is ", value)


def assignment(rng: Random) -> Task:  # for a model of Python's source
    key = draw_keys(rng, 1)[0]
    return Task([f"PASS_KEY = {key}"], "assert PASS_KEY == ", key)


def people(rng: Random) -> Task:
    return held_out_fact(rng, "people")


def places(rng: Random) -> Task:
    return held_out_fact(rng, "places")


def held_out_fact(rng: Random, name: str) -> Task:
    """Two facts of a template, of things and values, that `experiments.facts` never writes."""
    template = facts.WORDS["tested"][name]
    things = rng.choice(facts.read_words("things", test=True), 2, replace=False)
    told = []
    for thing in things:
        value = facts.draw_value(rng, template[2], test=True)
        fact, question = facts.fill_template(template, thing, value)
        told.append(fact)
    return Task(told, f"{question} ", value)


TASKS = {
    task.__name__: task
    for task in (passkey, multikey, multivalue, tracking, assignment, people, places)
}


# Trials


@dataclass
class Trial:
    text: Tensor  # [2, end + the longest distance]: with the facts in it; without, or [1, ...]
    end: int  # tokens up to the end of the last fact
    ask: Tensor  # [n]: the question, and the answer last
    answer: int  # tokens of the answer

    def rounds(self, schedule: cli.Schedule, distance: int) -> int:
        """Rounds of compression between the end of the last fact and the answer."""
        read = self.end + distance + len(self.ask) - self.answer
        return schedule.rounds(read) - schedule.rounds(self.end)


Trials = dict[tuple[str, int], Trial]  # by task and number


def make_trial(
    task: str, number: int, texts: Sequence[Document], tokenizer: Tokenizer,
    schedule: cli.Schedule, longest: int, seed: int = 0, bos: bool = True,
) -> Trial:  # fmt: skip
    """The trial of that number, for distances up to `longest`; ValueError if no text is as long."""
    rng = np.random.default_rng((seed, number))
    said = TASKS[task](rng)
    told = [encode(tokenizer, f"\n{fact}\n") for fact in said.facts]
    question = encode(tokenizer, f"\n{said.question}")
    ask = encode(tokenizer, f"\n{said.question}{said.answer}")
    end = place_end(number, sum(len(fact) + GAP for fact in told), schedule, seed)
    without = draw_text(rng, texts, end + longest, longest, tokenizer.bos_id if bos else None)
    planted = without.clone()
    stop = end
    for fact in reversed(told):
        planted[stop - len(fact) : stop] = fact
        stop -= len(fact) + GAP
    known = 0  # tokens of the question alone: a tokenizer may join its end to the answer
    while known < min(len(question), len(ask)) and question[known] == ask[known]:
        known += 1
    return Trial(torch.stack((planted, without)), end, ask, len(ask) - known)


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer.encode(text, bos=False))


def place_end(number: int, block: int, schedule: cli.Schedule, seed: int) -> int:
    """Where the last fact of a trial ends, when all of them take `block` tokens.

    On one of the `stride` tokens that end the first window, or later where they leave no room: what
    is new when a round comes, in the first window as in any other. Trials are spread over these.
    """
    phase = (np.random.default_rng(seed).random() + number * GOLDEN) % 1
    first = max(schedule.window - schedule.stride, schedule.sinks + block)
    return first + 1 + int(phase * schedule.stride)


def draw_text(
    rng: Random, texts: Sequence[Document], length: int, distance: int, bos_id: int | None
) -> Tensor:
    """A stretch of one of the texts as tokens [length], each place alike, after any `bos_id`."""
    begin = [] if bos_id is None else [bos_id]
    need = length - len(begin)
    places = [max(len(text.tokens) - need + 1, 0) for text in texts]
    if sum(places) == 0:
        text = max(texts, key=lambda text: len(text.tokens))
        was = f"{distance}, which takes {need} of text, but the longest, {text.name}, has"
        raise ValueError(f"--distances: was {was} {len(text.tokens)} tokens; must be less")
    start = int(rng.integers(sum(places)))
    which = 0
    while start >= places[which]:
        start -= places[which]
        which += 1
    return torch.cat((torch.tensor(begin, dtype=torch.long), texts[which].cut(start, need)))


# Measuring


@torch.no_grad()
def recall(
    model: Llama, trial: Trial, cache: Attend, distances: Sequence[int], chunk: int,
    advance: Callable[[int], Any] | None = None,
) -> list[Record]:  # fmt: skip
    """What is remembered at each distance: the answer's loss, that with no fact planted (None where
    the trial has no such text), and 1 or 0 for a right or wrong answer.

    The text is read once, into `cache`; at each distance, in rising order, a copy of it is asked.
    """
    device = model.norm.weight.device
    rows = len(trial.text)
    ask = trial.ask.expand(rows, -1)
    answer = trial.ask[-trial.answer :].to(device)
    results = []
    start = 0
    for distance in distances:
        stop = trial.end + distance
        for hidden in read_parts(model, trial.text[:, start:stop], cache, chunk):
            if advance is not None:
                advance(rows * hidden.shape[1])
        start = stop
        asked = copy.deepcopy(cache)
        parts = list(read_parts(model, ask[:, :-1], asked, chunk))
        hidden = torch.cat(parts, dim=1)[:, -trial.answer :]
        logits = model.logits(hidden).float()  # [rows, answer, V]
        losses = []
        for row in logits:
            losses.append(F.cross_entropy(row, answer, reduction="sum").item())
        if not np.isfinite(losses).all():
            raise ValueError("losses: were not numbers, must be; try another --dtype")
        right = float(logits[0].argmax(-1).equal(answer))
        absent = losses[1] if rows == 2 else None
        results.append({"loss": losses[0], "loss_absent": absent, "right": right})
    return results


def measure_trials(
    model: Llama, strategies: Sequence[Strategy], trials: Trials, distances: Sequence[int],
    journal: report.Journal, chunk: int,
) -> None:  # fmt: skip
    """Have each strategy asked in each trial that the journal does not know, and write it there."""
    todo = []
    for strategy in strategies:
        todo += [(strategy, key) for key in trials if (strategy, key) not in journal]
    total = sum(trials[key].text.numel() for _, key in todo)
    with tqdm(total=total, unit=" tokens", unit_scale=True) as bar:
        for strategy, key in todo:
            task, _ = key
            bar.set_description(f"{strategy.name}, {task}")
            trial = trials[key]
            cache = strategy.make_cache(trial.text.shape[1] + len(trial.ask))
            journal[strategy, key] = recall(model, trial, cache, distances, chunk, bar.update)


def average_trials(
    strategy: Strategy, task: str, trials: Trials, distances: Sequence[int], journal: report.Journal
) -> list[Record]:
    """A record for each distance: means over the trials of a task, and the loss's 95 % interval."""
    keys = [key for key in trials if key[0] == task]
    records = []
    for place, distance in enumerate(distances):
        values = [journal[strategy, key][place] for key in keys]
        losses = [value["loss"] for value in values]
        loss, half = report.mean_interval(losses, [1] * len(losses))
        absent = [value["loss_absent"] for value in values]
        rounds = 0.0
        if strategy.schedule is not None:
            rounds = fmean(trials[key].rounds(strategy.schedule, distance) for key in keys)
        record = {
            "strategy": strategy.name,
            "task": task,
            "distance": distance,
            "rounds": rounds,
            "accuracy": fmean(value["right"] for value in values),
            "loss": loss,
            "ci95": None if half is None else [loss - half, loss + half],
            "loss_absent": None if None in absent else fmean(absent),
            "trials": len(values),
        }
        records.append(record | strategy.settings())
    return records


# The script


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="experiments.recall", description=__doc__)
    harness.add_flags(parser)
    add = parser.add_argument
    text = f"of {','.join(TASKS)}, with commas between [%(default)s]"
    add("--tasks", type=harness.one_of_each(TASKS), default="passkey", metavar="T,T", help=text)
    text = "tokens from fact to question [an eighth, a half, 1, 2, 4 times the window]"
    add("--distances", type=cli.several(cli.integer(1)), metavar="N,N", help=text)
    text = "facts of a task, or --limit if fewer [%(default)s]"
    add("--trials", type=cli.integer(1, 10**6), default=8, help=text)
    text = "leave out the same text with no fact in it, in half the time"
    add("--planted-only", action="store_true", help=text)
    add("--seed", type=cli.integer(0), default=0, help="of what is drawn at random [%(default)s]")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.plot:
        report.check_plots()
    folder = report.open_folder(args.out, "recall", args.model, args.adapter)
    model, tokenizer = cli.load(args)
    schedule = cli.choose_schedule(args, model.config)
    strategies = harness.make_strategies(args.strategies, schedule)
    window = schedule.window
    usual = [max(window // 8, 1), max(window // 2, 1), window, 2 * window, 4 * window]
    distances = sorted(set(args.distances or usual))
    # A trial begins somewhere within a text, and with the token of a beginning itself.
    vocab = model.config.vocab_size
    texts = harness.read_documents(args.data, args.bin_dtype, False, tokenizer, vocab)
    count = min(args.trials, args.limit or args.trials)
    trials: Trials = {}
    for task in args.tasks:
        for number in range(count):
            trial = make_trial(
                task, number, texts, tokenizer, schedule, distances[-1], args.seed, args.bos
            )
            if args.planted_only:
                trial.text = trial.text[:1]
            trials[task, number] = trial

    digests = [text.digest() for text in texts]
    path = folder / "recall.journal.jsonl"
    about = (schedule, distances, args.seed, args.bos, args.planted_only, digests)
    journal = harness.open_journal(path, model, *about)
    measure_trials(model, strategies, trials, distances, journal, args.chunk)
    records = []
    for strategy in strategies:
        for task in args.tasks:
            records += average_trials(strategy, task, trials, distances, journal)

    for task in args.tasks:
        own = [record for record in records if record["task"] == task]
        print(format_recall(own), end="\n\n")
    report.write_results(folder, "recall", records, vars(args) | harness.describe_place(model))
    if args.plot:
        report.draw_picture(folder / "recall.png", draw_recall, records, "loss")
        report.draw_picture(folder / "recall_accuracy.png", draw_recall, records, "accuracy")


def format_recall(records: Sequence[Record]) -> str:
    """The table of a task: for each strategy and distance the loss, and the share of right ones."""
    rows = []
    last = []  # rounds, which are the same for all strategies but full attention
    for strategy, group in report.group_by_strategy(records).items():
        head = [group[0]["task"]]
        told = [strategy]
        absent = ["  no fact"]
        rounds = ["rounds"]
        for record in group:
            head.append(f"{record['distance']:,}     ")
            told.append(f"{record['loss']:.2f} {record['accuracy']:4.0%}")
            rounds.append(f"{record['rounds']:.1f}      ")
            if record["loss_absent"] is not None:
                absent.append(f"{record['loss_absent']:.2f}     ")
        rows.append(told)
        if len(absent) > 1:
            rows.append(absent)
        if strategy != "full":
            last = [rounds]
    return report.format_table(head, rows + last)


def draw_recall(figure: Any, records: Sequence[Record], field: str) -> None:
    """The loss or the accuracy by distance, a panel for each task.

    The loss where no fact was planted is pale, in each strategy's own line.
    """
    tasks = list(dict.fromkeys(record["task"] for record in records))
    figure.set_size_inches(3 + 4.2 * len(tasks), 4.2)
    row = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(row, tasks, strict=True):
        own = [record for record in records if record["task"] == task]
        groups = report.group_by_strategy(own)
        curves = {}
        for number, (name, group) in enumerate(groups.items()):
            x = [record["distance"] for record in group]
            curves[name] = (x, [record[field] for record in group])
            if field == "loss" and group[0]["loss_absent"] is not None:
                absent = [record["loss_absent"] for record in group]
                label = "" if number else "no fact"
                line = report.LOOKS[number % len(report.LOOKS)][0]
                axes.plot(x, absent, label=label, linestyle=line, color="0.75", linewidth=1)
        report.draw_curves(axes, curves)
        report.mark_tokens(axes, x)
        axes.set(xlabel="from the fact to the question (tokens)", title=task)
        if field == "loss":
            axes.set_ylim(-0.05, 1.1 * axes.dataLim.ymax)
        else:
            axes.set_ylim(-0.05, 1.05)
    row[0].set_ylabel("loss (nats an answer)" if field == "loss" else "share of answers right")
    report.add_legend(figure)


if __name__ == "__main__":
    cli.run(main, "experiments.recall", finish=True)
