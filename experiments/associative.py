"""What can slots remember, once a model is trained with them? Facts, by their age.

    python -m experiments.associative --steps 100 --strategies lowband,distinct   # a few minutes
    python -m experiments.associative --seeds 3 --plot                            # an hour or two

A text is filler, with a few tokens strewn in that each hold a fact, a (key, value) pair, and tokens
that ask for the value of a key told before. Small models (two layers of 64 channels) are trained
from scratch, each with one strategy in the loop, on texts that grow to --train-length tokens. The
loss is that of the answers alone. What counts is how many are right, by the age of the fact: the
tokens between it and the question. Guessing is right once in 32. A run that was stopped goes on
where it was when the same command is given again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import cli
from experiments import report
from experiments.operators import average
from experiments.report import Record
from freqkv import FreqKVAttention, FreqKVConfig, distinct, lowband, newest
from levels import LevelsAttention, LevelsConfig
from model import Attend, Llama, LlamaConfig, causal_attention

AGES = [0, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 1024, 2048, 3072]  # tokens, from

# The task


@dataclass(frozen=True)
class Task:
    """Texts that hold facts; all sizes in tokens."""

    facts: int = 8  # of a text; all of them can be asked for to its end
    keys: int = 64
    values: int = 32
    fillers: int = 16  # kinds of tokens that mean nothing
    asked: float = 0.25  # share of the tokens that are questions
    structured: bool = False  # filler that repeats a phrase, in place of random filler

    # Ids: filler, then questions by key, then facts by key and value.

    def fact(self, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """The id of the token that tells a pair."""
        return self.fillers + self.keys + key * self.values + value


@dataclass(frozen=True)
class Batch:
    """Texts [B, T]; at a question the value that is right and the fact's age, -1 elsewhere."""

    tokens: Tensor
    answers: Tensor
    ages: Tensor


def make_batch(task: Task, rng: np.random.Generator, batch: int, time: int) -> Batch:
    """Random texts of `time` tokens."""
    tokens = np.zeros((batch, time), np.int64)
    answers = np.full((batch, time), -1, np.int64)
    ages = np.full((batch, time), -1, np.int64)
    for row in range(batch):
        tokens[row] = make_filler(task, rng, time)
        keys = rng.choice(task.keys, task.facts, replace=False)
        values = rng.integers(task.values, size=task.facts)
        places = np.sort(rng.choice(time - 1, task.facts, replace=False))
        tokens[row, places] = task.fact(keys, values)
        free = np.setdiff1d(np.arange(places[0] + 1, time), places)
        count = min(len(free), int(task.asked * time))
        for place in rng.choice(free, count, replace=False):
            told = rng.integers(np.searchsorted(places, place))  # one of the facts before it
            tokens[row, place] = task.fillers + keys[told]
            answers[row, place] = values[told]
            ages[row, place] = place - places[told]
    return Batch(torch.from_numpy(tokens), torch.from_numpy(answers), torch.from_numpy(ages))


def make_filler(task: Task, rng: np.random.Generator, time: int) -> np.ndarray:
    """Tokens that mean nothing: random ones, or a random phrase of 12 tokens again and again."""
    if not task.structured:
        return rng.integers(task.fillers, size=time)
    phrase = rng.integers(task.fillers, size=12)
    return np.resize(phrase, time)


# The model


class FactEmbedding(nn.Module):
    """What a token is, its key and its value, embedded each for itself and added up."""

    def __init__(self, task: Task, dim: int) -> None:
        super().__init__()
        self.task = task
        self.filler = nn.Embedding(task.fillers, dim)
        self.question = nn.Embedding(task.keys, dim)
        self.key = nn.Embedding(task.keys, dim)
        self.value = nn.Embedding(task.values, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        task = self.task
        fact = (tokens - task.fillers - task.keys).clamp(min=0)
        asked = (tokens - task.fillers).clamp(0, task.keys - 1)
        told = self.key(fact // task.values) + self.value(fact % task.values)
        x = torch.where(
            (tokens < task.fillers)[..., None], self.filler(tokens % task.fillers), told
        )
        is_question = (tokens >= task.fillers) & (tokens < task.fillers + task.keys)
        return torch.where(is_question[..., None], self.question(asked), x)


def new_model(task: Task, positions: int, seed: int) -> Llama:
    """Two layers of 64 channels, 4 heads; logits are over the values alone."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=task.values, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16,
        max_position_embeddings=positions,
    )  # fmt: skip
    model = Llama(config)
    embedding = FactEmbedding(task, config.hidden_size)
    for table in embedding.parameters():
        nn.init.normal_(table, std=0.5)
    model.embed_tokens = embedding  # type: ignore[assignment]
    return model


def make_strategies(slots: int, ratio: float = 0.5) -> dict[str, Attend]:
    """How a layer attends, by name: to everything, or to so many slots. A level always halves."""
    quarter = slots // 4
    ladder = LevelsConfig(slots, sinks=4, recent=quarter, block=max(slots // 16, 1))
    plain = FreqKVConfig(slots, sinks=4, ratio=ratio)
    some_recent = FreqKVConfig(slots, sinks=4, ratio=ratio, recent=quarter)
    half_recent = FreqKVConfig(slots, sinks=4, ratio=ratio, recent=2 * quarter)
    return {
        "full": causal_attention,
        "newest": FreqKVAttention(plain, newest),
        "lowband": FreqKVAttention(plain, lowband),
        f"lowband-recent-{quarter}": FreqKVAttention(some_recent, lowband),
        f"lowband-recent-{2 * quarter}": FreqKVAttention(half_recent, lowband),
        "average": FreqKVAttention(plain, average),
        "distinct": FreqKVAttention(plain, distinct),
        f"distinct-recent-{quarter}": FreqKVAttention(some_recent, distinct),
        "levels-lowband": LevelsAttention(ladder, lowband),
        "levels-distinct": LevelsAttention(ladder, distinct),
    }


# Training and testing


def train_model(
    model: Llama, attend: Attend, task: Task, steps: int, length: int, seed: int,
    advance: Callable[[int], Any],
) -> float:  # fmt: skip
    """Train on random texts; the mean loss of the last 50 steps, in nats an answer.

    `advance` is told of every step.
    """
    rng = np.random.default_rng((seed, 1))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in range(steps):
        time = choose_length(step, steps, length)
        batch = make_batch(task, rng, batch=16 * length // time, time=time)
        logits = model(batch.tokens, attend)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten(), ignore_index=-1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        advance(1)
    return float(np.mean(losses[-50:]))


def choose_length(step: int, steps: int, length: int) -> int:
    """The length of the texts of a step: a quarter of `length`, then half of it, then all of it."""
    if step < steps // 8:
        return length // 4
    if step < steps // 4:
        return length // 2
    return length


def learning_rate(step: int, steps: int) -> float:
    """Up over 50 steps to 3e-3, and down in a straight line to a tenth of it."""
    warmed = min(1.0, (step + 1) / 50)
    return 3e-3 * warmed * (1 - 0.9 * step / steps)


@torch.no_grad()
def test_model(
    model: Llama, attend: Attend, task: Task, length: int, texts: int, seed: int
) -> list[Record]:
    """Questions and right answers by the age of the fact, on random texts of `length` tokens."""
    rng = np.random.default_rng((seed, 2, length))
    starts = [age for age in AGES if age < length]
    asked = np.zeros(len(starts))
    right = np.zeros(len(starts))
    size = max(1, 8192 // length)  # texts at a time
    for first in range(0, texts, size):
        batch = make_batch(task, rng, min(size, texts - first), length)
        guesses = model(batch.tokens, attend).argmax(-1)
        is_question = batch.ages >= 0
        hits = (guesses == batch.answers)[is_question].numpy()
        ages = batch.ages[is_question].numpy()
        places = np.searchsorted(starts, ages, side="right") - 1
        asked += np.bincount(places, minlength=len(starts))
        right += np.bincount(places, weights=hits, minlength=len(starts))
    records = []
    for start, stop, questions, hits in zip(
        starts, [*starts[1:], length], asked, right, strict=True
    ):
        if questions > 0:
            share = hits / questions
            records.append({"age_from": start, "age_to": stop, "accuracy": share})
    return records


# The script


def add_flags(parser: cli.Parser) -> None:
    """The command line."""
    integer = cli.integer
    add = parser.add_argument
    names = ",".join(make_strategies(64))
    text = f"of {names}, with commas (of 64 slots) [all]"
    add("--strategies", type=cli.several(str), metavar="S,S", help=text)
    add("--seeds", type=integer(1), default=1, help="models of each strategy [%(default)s]")
    add("--steps", type=integer(1), default=800, help="of training, each [%(default)s]")
    add("--slots", type=integer(16), default=64, help="of all strategies but full [%(default)s]")
    text = "share of the span that a round keeps [%(default)s]"
    add("--ratio", type=cli.real(0, 1, below=True), default=0.5, help=text)
    add("--facts", type=cli.several(integer(1, 64)), default="8", metavar="N,N",
        help="facts in a text, with commas [%(default)s]")  # fmt: skip
    add("--train-length", type=integer(64), default=256, help="tokens [%(default)s]")
    add("--lengths", type=cli.several(integer(64, 1 << 20)), metavar="N,N",
        help="tokens of texts to test on [the trained length, 2 and 16 times it]")  # fmt: skip
    text = "filler that repeats a phrase, in place of random filler"
    add("--structured", action="store_true", help=text)
    add("--out", type=cli.path, default=Path("runs/associative"), help="folder [%(default)s]")
    add("--plot", action="store_true", help="draw pictures too (takes matplotlib)")


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="experiments.associative", description=__doc__)
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.plot:
        report.check_plots()
    strategies = make_strategies(args.slots, args.ratio)
    names = args.strategies or list(strategies)
    for name in names:
        if name not in strategies:
            raise ValueError(f"--strategies: was {name!r}, must be of {', '.join(strategies)}")
    lengths = args.lengths or [args.train_length, 2 * args.train_length, 16 * args.train_length]
    for facts in args.facts:
        if 4 * facts > args.train_length // 4:
            raise ValueError(f"--facts: was {facts}, must be at most 1/16 of --train-length")
        if facts >= min(lengths):
            raise ValueError(f"--lengths: was {min(lengths)}, must be above --facts, {facts}")
    folder = report.open_folder(args.out, "associative", "small")
    about = (args.slots, args.ratio, args.steps, args.train_length, args.structured, lengths)
    journal = report.Journal(folder / "associative.journal.jsonl", about)

    runs = []
    for facts in args.facts:
        for seed in range(args.seeds):
            for name in names:
                runs.append((name, facts, seed))
    todo = [run for run in runs if run not in journal]
    with tqdm(total=len(todo) * args.steps, unit=" steps") as bar:
        for name, facts, seed in todo:
            bar.set_description(f"{name}, {facts} facts, seed {seed}")
            task = Task(facts=facts, structured=args.structured)
            model = new_model(task, args.train_length, seed)
            attend = strategies[name]
            loss = train_model(model, attend, task, args.steps, args.train_length, seed, bar.update)
            tests = {}
            for length in lengths:
                texts = max(16, 65536 // length)
                tests[str(length)] = test_model(model, attend, task, length, texts, seed)
            journal[name, facts, seed] = {"loss": loss, "tests": tests}

    records = []
    for facts in args.facts:
        for name in names:
            values = [journal[name, facts, seed] for seed in range(args.seeds)]
            for length in lengths:
                records += summarize(name, facts, length, values)
    for facts in args.facts:
        for length in lengths:
            print(f"\n{facts} facts, texts of {length:,} tokens: right answers by age, %")
            print(format_ages(select(records, facts, length)))
    report.write_results(folder, "associative", records, vars(args))
    if args.plot:
        for facts in args.facts:
            path = folder / f"associative_{facts}.png"
            report.draw_picture(path, draw_ages, records, facts, lengths, args.slots)


def summarize(name: str, facts: int, length: int, values: list[Record]) -> list[Record]:
    """The mean accuracy at each age over models, with its 95 % interval."""
    by_age: dict[tuple[int, int], list[float]] = {}  # from, to -> of the models that were asked
    for value in values:
        for test in value["tests"][str(length)]:
            age = (test["age_from"], test["age_to"])
            by_age.setdefault(age, []).append(test["accuracy"])
    records = []
    for (age_from, age_to), shares in sorted(by_age.items()):
        mean, half = report.mean_interval(shares, [1] * len(shares))
        ends = None if half is None else [mean - half, mean + half]
        record = {"strategy": name, "facts": facts, "length": length}
        record |= {"age_from": age_from, "age_to": age_to}
        records.append(record | {"accuracy": mean, "ci95": ends, "models": len(shares)})
    return records


def select(records: list[Record], facts: int, length: int) -> list[Record]:
    """The records of texts of so many facts and tokens."""
    return [r for r in records if r["facts"] == facts and r["length"] == length]


def format_ages(records: list[Record]) -> str:
    """A row for each strategy, a column for each age."""
    rows = []
    head = [""]
    for name, group in report.group_by_strategy(records).items():
        head = ["", *(f"{record['age_from']}-" for record in group)]
        cells = [name]
        for record in group:
            cell = f"{100 * record['accuracy']:.0f}"
            if record["ci95"] is not None:
                cell += f" ±{50 * (record['ci95'][1] - record['ci95'][0]):.0f}"
            cells.append(cell)
        rows.append(cells)
    return report.format_table(head, rows)


def draw_ages(
    figure: Any, records: list[Record], facts: int, lengths: list[int], slots: int
) -> None:
    """A panel for each length of text: the share of right answers by age, in tokens."""
    figure.set_size_inches(3.6 * len(lengths) + 2.4, 4.2)
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, lengths, strict=True):
        curves = {}
        for name, group in report.group_by_strategy(select(records, facts, length)).items():
            ages = [(record["age_from"] + record["age_to"]) / 2 for record in group]
            curves[name] = (ages, [record["accuracy"] for record in group])
        report.draw_curves(axes, curves)
        axes.axvline(slots, color="0.7", linewidth=1)
        axes.set(title=f"texts of {length:,} tokens", xlabel="age of the fact (tokens)")
        axes.set(xscale="log", ylim=(0, 1.02))
    panels[0].set_ylabel(f"share of answers right ({facts} facts)")
    report.add_legend(figure)


if __name__ == "__main__":
    cli.run(main, "experiments.associative", finish=True)
