"""What is remembered, by age: a fact is planted in real text and asked for some distance later.

    | lead of real text | fact | `distance` tokens of text | question | answer |

The answer is read as it should be, which tells both how likely the model finds it (the loss of the
whole answer, in nats) and what it would say: greedy decoding says just that if and only if each of
its tokens is the likeliest. The same text with no fact planted is read beside it: what a strategy
loses less than there is what it remembers. The tasks with several facts are after RULER
(arXiv 2404.06654).

The end of the fact falls evenly on all places of a round of compression: at any distance some
trials have had a round more than others. Full attention may be asked beyond the positions that the
model was trained on; what it loses there with no fact says so.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cli
from evaluation.harness import Bench, Document, interval, new_cache, slot_settings
from evaluation.report import STYLES, by_strategy, lines, log_ticks, picture, table, write_results
from freqkv import FreqKVConfig
from generate import Cache, parts
from model import Llama

Random = np.random.Generator
Task = tuple[list[str], str, str]  # facts, a line each; the question up to the answer; the answer
Found = Sequence[float]  # loss of the answer, loss with no fact planted, and 1 if right or 0
GAP = 16  # tokens of text between two facts
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, are spread evenly, however many
NAMES = ["apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer"]


# Tasks


def secrets(rng: Random, count: int) -> list[str]:
    return [str(10_000 + i) for i in rng.choice(90_000, count, replace=False)]


def passkey(rng: Random) -> Task:
    (key,) = secrets(rng, 1)
    fact = f"The pass key is {key}. Remember it. {key} is the pass key."
    return [fact], "What is the pass key? The pass key is ", key


def multikey(rng: Random) -> Task:
    names, keys, asked = rng.choice(NAMES, 4, replace=False), secrets(rng, 4), rng.integers(4)
    each = [f"The pass key of the {name} is " for name in names]
    facts = [f"{start}{key}." for start, key in zip(each, keys, strict=True)]
    return facts, f"What is the pass key of the {names[asked]}? {each[asked]}", keys[asked]


def multivalue(rng: Random) -> Task:
    keys = secrets(rng, 3)
    facts = [f"One of the pass keys is {key}." for key in keys]
    return facts, "What are the three pass keys, in order? The pass keys are ", ", ".join(keys)


def tracking(rng: Random) -> Task:
    a, b, c, d = rng.choice(list("ABCDEFGHJKLMNPQRSTUVWXYZ"), 4, replace=False)
    x, y = secrets(rng, 2)
    facts = [f"VAR {a} = {x}", f"VAR {b} = {y}", f"VAR {c} = VAR {a}", f"VAR {d} = VAR {b}"]
    name, value = (c, x) if rng.integers(2) else (d, y)
    return facts, f"What is the value of VAR {name}? The value of VAR {name} is ", value


def assignment(rng: Random) -> Task:  # for a model of Python's source
    (key,) = secrets(rng, 1)
    return [f"PASS_KEY = {key}"], "assert PASS_KEY == ", key


TASKS = {f.__name__: f for f in (passkey, multikey, multivalue, tracking, assignment)}


@dataclass
class Trial:
    text: Tensor  # [2, end + the longest distance]: with the facts in it; without
    end: int  # tokens up to the end of the last fact
    ask: Tensor  # [n]: the question, and the answer last
    answer: int  # tokens of the answer

    def rounds(self, config: FreqKVConfig, distance: int) -> int:
        """Rounds of compression between the end of the last fact and the answer."""
        read = self.end + distance + len(self.ask) - self.answer
        return config.rounds(read) - config.rounds(self.end)


def new_trial(
    bench: Bench, texts: Sequence[Document], task: str, number: int, longest: int
) -> Trial:
    """The trial of that number, for distances up to `longest`; ValueError if no text is as long."""
    config, rng = bench.config, np.random.default_rng((bench.args.seed, number))
    said, question, answer = TASKS[task](rng)
    encode = partial(bench.tokenizer.encode, bos=False)
    facts = [encode(f"\n{fact}\n") for fact in said]
    asked, ask = encode(f"\n{question}"), encode(f"\n{question}{answer}")
    begin = [] if bench.tokenizer.bos_id is None else [bench.tokenizer.bos_id]
    # The last fact ends on one of the `stride` tokens that end the first window, or later where
    # they leave no room: what is new when a round comes, in the first window as in any other.
    phase = (np.random.default_rng(bench.args.seed).random() + number * GOLDEN) % 1
    block = sum(len(fact) + GAP for fact in facts)
    end = max(config.window - config.stride, config.sinks + block) + 1 + int(phase * config.stride)
    need = end + longest - len(begin)
    rooms = np.cumsum([max(len(text.tokens) - need + 1, 0) for text in texts])
    if not rooms[-1]:
        text = max(texts, key=lambda text: len(text.tokens))
        was = f"{longest}, which takes {need} of text, but the longest, {text.name}, has"
        raise ValueError(f"--distances: was {was} {len(text.tokens)} tokens; must be less")
    place = int(rng.integers(rooms[-1]))
    which = int(np.searchsorted(rooms, place, side="right"))
    start = place - int(rooms[which - 1] if which else 0)
    without = torch.cat((torch.tensor(begin).long(), texts[which][start : start + need]))
    planted, stop = without.clone(), end
    for fact in reversed(facts):
        planted[stop - len(fact) : stop] = torch.tensor(fact)
        stop -= len(fact) + GAP
    same = [x == y for x, y in zip(asked, ask, strict=False)]
    known = [*same, False].index(False)  # a tokenizer may join the answer to what precedes it
    return Trial(torch.stack((planted, without)), end, torch.tensor(ask), len(ask) - known)


# Measuring


@torch.no_grad()
def recall(
    model: Llama, trial: Trial, cache: Cache, distances: Sequence[int], chunk: int,
    advance: Callable[[int], Any] = id,
) -> list[Found]:  # fmt: skip
    """What is found at each distance.

    The text is read once, into `cache`; at each distance, in rising order, a copy of it is asked.
    """
    ask, start, found = trial.ask.expand(2, -1).to(model.norm.weight.device), 0, []
    answer = ask[:, -trial.answer :]
    for stop in (trial.end + distance for distance in distances):
        for part in parts(trial.text[:, start:stop], cache, chunk):
            model.hidden(part.to(ask.device), cache)
            advance(part.numel())
        start, asked = stop, copy.deepcopy(cache)
        read = [model.hidden(part, asked) for part in parts(ask[:, :-1], asked, chunk)]
        logits = model.logits(torch.cat(read, dim=1)[:, -trial.answer :]).float()
        losses = F.cross_entropy(logits.transpose(1, 2), answer, reduction="none").sum(dim=1)
        if not losses.isfinite().all():
            raise ValueError("losses: were not numbers, must be; try another --dtype")
        found.append((*losses.tolist(), float(logits[0].argmax(-1).equal(answer[0]))))
    return found


def add_flags(add: Callable[..., object]) -> None:
    text = f"of {','.join(TASKS)}, with commas between [%(default)s]"
    add("--tasks", default="passkey", metavar="T,T", help=text)
    text = "tokens from fact to question [an eighth, a half, 1, 2, 4 times the window]"
    add("--distances", type=cli.numbers(int, 1), metavar="N,N", help=text)
    text = "facts of a task, or --limit if fewer [%(default)s]"
    add("--trials", type=cli.number(int, 1, 10**6), default=8, help=text)
    text = "of what is drawn at random [%(default)s]"
    add("--seed", type=cli.number(int, 0), default=0, help=text)


def run(bench: Bench) -> None:
    """evaluate.py recall"""
    args, window = bench.args, bench.config.window
    tasks = list(dict.fromkeys(name.strip() for name in args.tasks.split(",")))
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks: was {task!r}, must be of {', '.join(TASKS)}")
    usual = [max(window // 8, 1), max(window // 2, 1), window, 2 * window, 4 * window]
    distances, texts = sorted(set(args.distances or usual)), bench.documents()
    numbered = product(tasks, range(min(args.trials, args.limit or args.trials)))
    trials = {key: new_trial(bench, texts, *key, distances[-1]) for key in numbered}
    journal = bench.journal("recall", distances, args.seed, *(text.digest() for text in texts))
    todo = [x for x in product(bench.strategies, trials) if x not in journal]
    total = sum(trials[key].text.numel() for _, key in todo)
    with tqdm(total=total, unit=" tokens", unit_scale=True) as bar:
        for strategy, key in todo:
            bar.set_description(f"{strategy}, {key[0]}")
            trial = trials[key]
            cache = new_cache(strategy, bench.config, trial.text.shape[1] + len(trial.ask))
            found = recall(bench.model, trial, cache, distances, args.chunk, bar.update)
            journal[strategy, key] = found
    records = []
    for strategy, task in product(bench.strategies, tasks):
        here = {key: trial for key, trial in trials.items() if key[0] == task}
        found = [journal[strategy, key] for key in here]
        for distance, values in zip(distances, zip(*found, strict=True), strict=True):
            rounds = [trial.rounds(bench.config, distance) for trial in here.values()]
            about = {"strategy": strategy, "task": task, "distance": distance}
            about["rounds"] = 0.0 if strategy == "full" else float(np.mean(rounds))
            records.append(about | summary(values) | slot_settings(strategy, bench.config))
    for task in tasks:
        print(shown([record for record in records if record["task"] == task]), end="\n\n")
    print(write_results("recall", records, args))
    if args.plot:
        print(picture(args.out / "recall.png", lambda figure: draw(figure, records, "loss")))
        path = args.out / "recall_accuracy.png"
        print(picture(path, lambda figure: draw(figure, records, "accuracy")))


def summary(values: Sequence[Found]) -> dict[str, Any]:
    """The means over trials, and the 95 % interval of the loss."""
    _, absent, right = np.mean(values, axis=0).tolist()
    loss, half = interval([value[0] for value in values], [1] * len(values))
    ends = None if half is None else [loss - half, loss + half]
    means = {"accuracy": right, "loss": loss, "ci95": ends, "loss_absent": absent}
    return means | {"trials": len(values)}


def shown(records: Sequence[dict[str, Any]]) -> str:
    """The table of a task: for each strategy and distance the loss, and the share of right ones."""
    rows, since = [], []
    for strategy, here in by_strategy(records).items():
        rows.append([strategy, *(f"{r['loss']:.2f} {r['accuracy']:4.0%}" for r in here)])
        rows.append(["  no fact", *(f"{r['loss_absent']:.2f}     " for r in here)])
        if strategy != "full":  # the same for all others
            since = [["rounds", *(f"{r['rounds']:.1f}      " for r in here)]]
    return table([here[0]["task"], *(f"{r['distance']:,}     " for r in here)], rows + since)


def draw(figure: Any, records: Sequence[dict[str, Any]], what: str) -> None:
    """A panel for each task: the loss or the accuracy by distance, a curve for each strategy."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    figure.set_size_inches(max(7, 4.2 * len(tasks)), 4.2)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        here = [record for record in records if record["task"] == task]
        of = by_strategy(here)
        x = [record["distance"] for record in next(iter(of.values()))]
        for i, own in enumerate(of.values() if what == "loss" else ()):
            look = {"linestyle": STYLES[i][0], "color": "0.75", "linewidth": 1}
            axes.plot(x, [r["loss_absent"] for r in own], label="" if i else "no fact", **look)
        lines(axes, {name: (x, [r[what] for r in own]) for name, own in of.items()})
        axes.set(xlabel="from the fact to the question (tokens)", title=task)
        axes.set_ylabel("loss (nats an answer)" if what == "loss" else "share of answers right")
        log_ticks(axes, x)
        axes.set_ylim(-0.05, 1.05 if what == "accuracy" else 1.1 * axes.dataLim.ymax)
