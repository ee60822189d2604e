"""LongBench: questions about long texts (arXiv 2308.14508), answered greedily and scored.

Records, prompts and lengths of answers are read from the published files; none come with this.
Bounded caches read a prompt whole, however long it is: that is their point. For `full`, a prompt
beyond the model's positions loses its middle: the first and the last half of what fits stay.

What differs from the published way: the template is the family's own; samsum writes on after its
line, which scoring drops; the average is over tasks, not over groups of tasks.
"""

import hashlib
import json
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

import generate
from corpus import data_files, read_text
from evaluation.harness import Bench, new_cache, slot_settings
from evaluation.metrics import ONE_LINE, PLAIN, TASKS
from evaluation.report import by_strategy, picture, table, write_results
from weights import Tokenizer, chat_tokens
from weights.files import read_json, write_beside

FILLS = [("1", ""), ("0.3", ""), ("0.75", "///"), ("1", "..."), ("0.5", "xx")]  # shade, hatch


# Records


@dataclass(frozen=True)
class Record:
    task: str
    id: str
    prompt: str
    limit: int  # tokens to write
    answers: list[str]  # any of them will do
    classes: Any  # their names, in a task of classification

    def score(self, found: str) -> float:
        line = found.lstrip("\n").split("\n")[0] if self.task in ONE_LINE else found
        metric = TASKS[self.task][1]
        return max((metric(line, x, self.classes) for x in self.answers), default=0.0)

    def key(self, strategy: str) -> str:
        """What the journal knows an answer by."""
        digest = hashlib.sha256(f"{self.limit} {self.prompt}".encode()).hexdigest()
        return f"{strategy} {self.task} {self.id} {digest[:16]}"


def add_flags(add: Callable[..., object]) -> None:
    text = "with commas between [every TASK.jsonl in --data]; dataset2prompt.json and "
    text += "dataset2maxlen.json must be in the same folder, its config/ or ../config"
    add("--tasks", metavar="T,T", help=text)
    text = "ask in the family's template, but for the tasks published without one [--chat]"
    add("--chat", action=BooleanOptionalAction, default=True, help=text)


def task_files(args: Namespace) -> list[Path]:
    """The file of each task to do, in the order of TASKS."""
    if args.data is None:
        raise ValueError("--data: was not given, must be the folder of LongBench's .jsonl files")
    files: dict[str, Path] = {}
    for file in data_files(args.data):
        known = file.suffix == ".jsonl" and file.stem in TASKS
        if known and (other := files.setdefault(file.stem, file)) != file:
            raise ValueError(f"--data: held {other} and {file}, must hold one of them")
    if not files:
        raise ValueError("--data: held no TASK.jsonl of LongBench, must hold one")
    chosen = [x.strip() for x in args.tasks.split(",")] if args.tasks else list(files)
    if wrong := [x for x in chosen if x not in files]:
        raise ValueError(f"--tasks: was {wrong[0]!r}, must be of {', '.join(files)} (in --data)")
    return [files[task] for task in TASKS if task in chosen]


def published(file: Path, name: str, kind: type) -> Any:
    """What a published file of settings, near the file of a task, has for that task."""
    folder = file.absolute().parent
    places = [x / name for x in (folder, folder / "config", folder.parent / "config")]
    if (place := next((x for x in places if x.exists()), None)) is None:
        raise FileNotFoundError(f"--data: {places[0]} was not there, must be, or in config/")
    value = read_json(place).get(file.stem)
    if type(value) is not kind or (kind is int and not 0 < value < 1 << 31):
        must = "a number of tokens" if kind is int else "a text"
        raise ValueError(f"{place}: {file.stem} was {value!r}, must be {must}")
    return value


def records(file: Path, most: int) -> Iterator[Record]:
    """The records of a task, the first `most` of them unless that is 0; all can be scored."""
    prompt = published(file, "dataset2prompt.json", str)
    limit = published(file, "dataset2maxlen.json", int)
    lines = [x for x in enumerate(read_text(file).split("\n"), 1) if x[1].strip()]
    if not lines:
        raise ValueError(f"{file}: was without records, must have one")
    for number, line in lines[: most or None]:
        try:
            x = json.loads(line)
            "".join([x["_id"], x["context"], x["input"], *x["answers"]]).encode()  # are texts
            if not isinstance(answers := x["answers"], list):
                raise TypeError("answers must be a list")
            text = prompt.format(**x)
            found = Record(file.stem, x["_id"], text, limit, answers, x.get("all_classes"))
            found.score("")  # nothing is missing, no library either
        except (
            AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError
        ) as error:  # fmt: skip
            was = f"line {number} was {line[:30]!r}... ({error!r})"
            raise ValueError(f"{file}: {was}, must be a record of LongBench") from None
        yield found


# A run


def encode(tokenizer: Tokenizer, record: Record, chat: bool) -> list[int]:
    """The prompt as ids, a message in the family's template where that is due."""
    if not chat or record.task in PLAIN:
        return tokenizer.encode(record.prompt)
    asked = [{"role": "user", "content": record.prompt}]
    return [i for ids, _ in chat_tokens(tokenizer, asked) for i in ids]


def cut(ids: list[int], room: int) -> list[int]:
    """The first and the last half of what there is room for; all, if there is room for it."""
    return ids if len(ids) <= room else ids[: room // 2] + ids[len(ids) - room // 2 :]


def answer(bench: Bench, strategy: str, record: Record) -> dict[str, Any]:
    """What the model writes, and the tokens of the prompt: all there are, and those read."""
    model, tokenizer = bench.model, bench.tokenizer
    ids = whole = encode(tokenizer, record, bench.args.chat)
    if strategy == "full":
        ids = cut(whole, model.config.max_position_embeddings - record.limit)
    cache = new_cache(strategy, bench.config, len(ids) + record.limit)
    logits = generate.read(model, torch.tensor([ids]), cache, bench.args.chunk)
    steps = generate.write(model, logits, cache, tokenizer.eos_ids, record.limit, temperature=0)
    found = "".join(tokenizer.stream((row[0] for row in steps), ids))
    return {"prediction": found, "tokens": len(whole), "read": len(ids)}


def run(bench: Bench) -> None:
    """evaluate.py longbench: checks all there is, then predicts what the journal does not know."""
    args, most = bench.args, bench.model.config.max_position_embeddings
    found = [x for file in task_files(args) for x in records(file, args.limit)]
    if "full" in bench.strategies and (longest := max(x.limit for x in found)) > most - 2:
        must = f"must leave room for a prompt in the model's {most} positions"
        raise ValueError(f"--strategies: full was to write {longest} tokens, {must}")
    if args.chat:
        try:
            chat_tokens(bench.tokenizer, [{"role": "user", "content": "a"}])
        except ValueError as error:
            raise ValueError(f"--chat: {error}; --no-chat takes prompts as they are") from None
    journal, pairs = bench.journal("longbench", args.chat), list(product(bench.strategies, found))
    with tqdm([x for x in pairs if x[1].key(x[0]) not in journal], unit=" records") as bar:
        for strategy, record in bar:
            bar.set_description(f"{strategy}, {record.task}")
            journal[record.key(strategy)] = answer(bench, strategy, record)
    report(bench, [scored(strategy, x, journal[x.key(strategy)]) for strategy, x in pairs])


def scored(strategy: str, record: Record, made: dict[str, Any]) -> dict[str, Any]:
    about = {"strategy": strategy, "task": record.task, "id": record.id} | made
    score = 100 * record.score(made["prediction"])
    return about | {"answers": record.answers, "score": score}


def report(bench: Bench, rows: Sequence[dict[str, Any]]) -> None:
    """Write and print what strategies score in each task, and on average over the tasks."""
    args, path = bench.args, bench.args.out / "longbench_predictions.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_beside(path, lambda to: to.write_text(text, encoding="utf-8"))
    metrics = {row["task"]: TASKS[row["task"]][0] for row in rows} | {"average": ""}
    results: list[dict[str, Any]] = []
    for strategy, (task, metric) in product(bench.strategies, metrics.items()):
        mine = [row for row in rows if row["strategy"] == strategy]
        group = [row for row in mine if task in (row["task"], "average")]
        means = [x for x in results if x["strategy"] == strategy]  # of all tasks, at the average
        score = fmean(x["score"] for x in (group if metric else means))
        about = {"strategy": strategy, "task": task, "metric": metric, "score": score}
        sizes = {"records": len(group), "cut": sum(x["read"] < x["tokens"] for x in group)}
        results.append(about | sizes | slot_settings(strategy, bench.config))
        if not metric and sizes["cut"]:
            print(f"{strategy}: {sizes['cut']} of {len(group)} prompts lost their middle")
    scores = {(x["strategy"], x["task"]): f"{x['score']:.2f}" for x in results}
    lines = ([t, m, *(scores[s, t] for s in bench.strategies)] for t, m in metrics.items())
    print(table(["task", "metric", *bench.strategies], lines))
    print(f"{write_results('longbench', results, args)}, {path}")
    if args.plot:
        size = (max(7, 0.1 * len(metrics) * (len(bench.strategies) + 3)), 4.2)
        print(picture(args.out / "longbench.png", lambda figure: draw(figure, results), size))


def draw(figure: Any, results: Sequence[dict[str, Any]]) -> None:
    """Bars by task; strategies differ in shade and hatching."""
    axes, tasks = figure.subplots(), list(dict.fromkeys(x["task"] for x in results))
    names = by_strategy(results)
    for i, ((name, own), (shade, hatch)) in enumerate(zip(names.items(), FILLS, strict=False)):
        heights = [x["score"] for x in own]
        places = [x + (i - (len(names) - 1) / 2) * 0.8 / len(names) for x in range(len(tasks))]
        look = {"color": shade, "hatch": hatch, "edgecolor": "0", "linewidth": 0.6}
        axes.bar(places, heights, 0.8 / len(names), label=name, **look)
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    axes.set_ylabel("score (0 to 100)")
    axes.margins(x=0.01)
    axes.legend(ncols=len(names), loc="lower right", bbox_to_anchor=(1, 1))  # hides no bar
