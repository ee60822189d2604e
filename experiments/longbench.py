"""LongBench: questions about long texts (arXiv 2308.14508), answered greedily and scored.

    python -m experiments.longbench --model smollm2 --data LongBench/ --window 2048 --limit 20

Records, prompts and lengths of answers are read from the published files; none come with this.
Bounded caches read a prompt whole, however long it is: that is their point. For `full`, a prompt
beyond the model's positions loses its middle: the first and the last half of what fits stay.

What differs from the published way: the template is the family's own; samsum writes on after its
line, which scoring drops; the average is over tasks, not over groups of tasks. A measurement that
was stopped goes on where it was when the same command is given again.
"""

import hashlib
import json
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import cli
from data import data_files
from experiments import harness, report
from experiments.harness import Strategy
from experiments.metrics import ONE_LINE, PLAIN, TASKS
from generate import Sampling, encode_message, encode_text, read, read_token, write
from model import Llama
from weights import Tokenizer, chat_stops
from weights.files import read_json, read_text, write_beside
from weights.fingerprint import hash_tokenizer

# Grey and hatching of the first bar, the second, ...: told apart in black and white.
FILLS = [("1", ""), ("0.3", ""), ("0.75", "///"), ("1", "..."), ("0.5", "xx"), ("0.9", "\\\\\\")]


# Records


@dataclass(frozen=True)
class Record:
    task: str
    id: str
    prompt: str
    limit: int  # tokens to write
    answers: list[str]  # any of them will do
    classes: Any  # their names, in a task of classification

    def score(self, prediction: str) -> float:
        """The best score, from 0 to 1, that the prediction has against any of the answers."""
        if self.task in ONE_LINE:
            prediction = prediction.lstrip("\n").split("\n")[0]
        _, metric = TASKS[self.task]
        return max((metric(prediction, x, self.classes) for x in self.answers), default=0.0)

    def key(self, strategy: Strategy) -> str:
        """What the journal knows an answer by."""
        digest = hashlib.sha256(f"{self.limit} {self.prompt}".encode()).hexdigest()
        return f"{strategy} {self.task} {self.id} {digest[:16]}"


def find_files(patterns: Sequence[str] | None) -> dict[str, Path]:
    """The file of each task that --data holds, in the order of TASKS."""
    if patterns is None:
        raise ValueError("--data: was not given, must be the folder of LongBench's .jsonl files")
    files: dict[str, Path] = {}
    for file in data_files(patterns):
        if file.suffix == ".jsonl" and file.stem in TASKS:
            other = files.setdefault(file.stem, file)
            if other != file:
                raise ValueError(f"--data: held {other} and {file}, must hold one of them")
    if not files:
        raise ValueError("--data: held no TASK.jsonl of LongBench, must hold one")
    return {task: files[task] for task in TASKS if task in files}


def choose_files(given: str | None, files: dict[str, Path]) -> list[Path]:
    """The files of the tasks that --tasks names, or of all."""
    if given is None:
        return list(files.values())
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in files:
            raise ValueError(f"--tasks: was {name!r}, must be of {', '.join(files)} (in --data)")
    return [file for task, file in files.items() if task in names]


def find_settings(file: Path, name: str) -> Path:
    """The published file of settings of that name, near the file of a task."""
    folder = file.absolute().parent
    for place in (folder, folder / "config", folder.parent / "config"):
        if (place / name).exists():
            return place / name
    raise FileNotFoundError(f"--data: {folder / name} was not there, must be, or in config/")


def read_records(file: Path, most: int) -> list[Record]:
    """The records of a task, the first `most` of them unless that is 0; all can be scored."""
    task = file.stem
    prompts = find_settings(file, "dataset2prompt.json")
    prompt = read_json(prompts).get(task)
    if not isinstance(prompt, str):
        raise ValueError(f"{prompts}: {task} was {prompt!r}, must be a text")
    limits = find_settings(file, "dataset2maxlen.json")
    limit = read_json(limits).get(task)
    if type(limit) is not int or not 0 < limit < 1 << 31:
        raise ValueError(f"{limits}: {task} was {limit!r}, must be a number of tokens")
    records: list[Record] = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        if most and len(records) == most:
            break
        try:
            records.append(parse_record(line, task, prompt, limit))
        except (
            AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError
        ) as error:  # fmt: skip
            was = f"line {number} was {line[:30]!r}... ({error!r})"
            raise ValueError(f"{file}: {was}, must be a record of LongBench") from None
    if not records:
        raise ValueError(f"{file}: was without records, must have one")
    return records


def parse_record(line: str, task: str, prompt: str, limit: int) -> Record:
    """A published line as a record; one of many errors for a line that is none."""
    content = json.loads(line)
    answers = content["answers"]
    if not isinstance(answers, list):
        raise TypeError("answers must be a list")
    texts = [content["_id"], content["context"], content["input"], *answers]
    "".join(texts).encode()  # all are texts, without half a surrogate pair
    asked = prompt.format(**content)
    record = Record(task, content["_id"], asked, limit, answers, content.get("all_classes"))
    record.score("")  # nothing is missing, no library either
    return record


# Answering


def encode(tokenizer: Tokenizer, record: Record, chat: bool, bos: bool) -> Tensor:
    """The prompt as tokens [T], a message in the family's template where that is due."""
    if chat and record.task not in PLAIN:
        return encode_message(record.prompt, tokenizer, continues=not bos)
    return encode_text(record.prompt, tokenizer, continues=not bos)


def cut_middle(tokens: Tensor, room: int) -> Tensor:
    """The first and the last half of what there is room for; all, if there is room for it."""
    if len(tokens) <= room:
        return tokens
    half = room // 2
    return torch.cat((tokens[:half], tokens[len(tokens) - half :]))


def answer(
    model: Llama, tokenizer: Tokenizer, strategy: Strategy, prompt: Tensor,
    stop_ids: Sequence[int], limit: int, chunk: int,
) -> dict[str, Any]:  # fmt: skip
    """What the model writes, and the tokens of the prompt: all there are, and those read."""
    tokens = prompt
    if strategy.schedule is None:
        tokens = cut_middle(prompt, model.config.max_position_embeddings - limit)
    cache = strategy.make_cache(len(tokens) + limit)
    logits = read(model, tokens[None], cache, chunk)
    step = partial(read_token, model, cache=cache)
    steps = write(step, logits, stop_ids, limit, Sampling(temperature=0))
    ids = (row[0] for row in steps)
    prediction = "".join(tokenizer.stream(ids, tokens[-8:].tolist()))
    return {"prediction": prediction, "tokens": len(prompt), "read": len(tokens)}


# The script


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="experiments.longbench", description=__doc__)
    harness.add_flags(parser)
    add = parser.add_argument
    text = "with commas between [every TASK.jsonl in --data]; dataset2prompt.json and "
    text += "dataset2maxlen.json must be in the same folder, its config/ or ../config"
    add("--tasks", metavar="T,T", help=text)
    text = "ask in the family's template, but for the tasks published without one [--chat]"
    add("--chat", action=BooleanOptionalAction, default=True, help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.plot:
        report.check_plots()
    folder = report.open_folder(args.out, "longbench", args.model, args.adapter)
    model, tokenizer = cli.load(args)
    strategies = harness.make_strategies(args.strategies, cli.choose_schedule(args, model.config))
    records = []
    for file in choose_files(args.tasks, find_files(args.data)):
        records += read_records(file, args.limit)
    if "full" in args.strategies:
        check_room(records, model.config.max_position_embeddings)
    if args.chat:
        check_template(tokenizer)

    path = folder / "longbench.journal.jsonl"
    journal = harness.open_journal(path, model, args.chat, args.bos, hash_tokenizer(tokenizer))
    answer_all(model, tokenizer, strategies, records, journal, args.chat, args.bos, args.chunk)
    rows = []
    for strategy in strategies:
        for record in records:
            rows.append(score_answer(strategy, record, journal[record.key(strategy)]))
    results = average_scores(strategies, rows)

    for result in results:
        if result["task"] == "average" and result["cut"]:
            cut = f"{result['cut']} of {result['records']} prompts lost their middle"
            print(f"{result['strategy']}: {cut}")
    print(format_scores(results))
    write_predictions(folder / "longbench_predictions.jsonl", rows)
    report.write_results(folder, "longbench", results, vars(args) | harness.describe_place(model))
    if args.plot:
        report.draw_picture(folder / "longbench.png", draw_scores, results)


def check_room(records: Sequence[Record], positions: int) -> None:
    """ValueError unless full attention has positions left for a prompt, beside every answer."""
    longest = max(record.limit for record in records)
    if longest > positions - 2:
        must = f"must leave room for a prompt in the model's {positions} positions"
        raise ValueError(f"--strategies: full was to write {longest} tokens, {must}")


def check_template(tokenizer: Tokenizer) -> None:
    """ValueError, with advice, unless the tokenizer's family has a template."""
    try:
        encode_message("a", tokenizer, continues=False)
    except ValueError as error:
        raise ValueError(f"--chat: {error}; --no-chat takes prompts as they are") from None


def answer_all(
    model: Llama, tokenizer: Tokenizer, strategies: Sequence[Strategy], records: Sequence[Record],
    journal: report.Journal, chat: bool, bos: bool, chunk: int,
) -> None:  # fmt: skip
    """Have each strategy answer each record that the journal does not know, and write it there."""
    todo = []
    for strategy in strategies:
        for record in records:
            if record.key(strategy) not in journal:
                todo.append((strategy, record))
    with tqdm(todo, unit=" records") as bar:
        for strategy, record in bar:
            bar.set_description(f"{strategy.name}, {record.task}")
            prompt = encode(tokenizer, record, chat, bos)
            stop_ids = chat_stops(tokenizer) if chat else tokenizer.eos_ids
            made = answer(model, tokenizer, strategy, prompt, stop_ids, record.limit, chunk)
            journal[record.key(strategy)] = made


# Scores


def score_answer(strategy: Strategy, record: Record, made: dict[str, Any]) -> dict[str, Any]:
    """All about an answer, with its score from 0 to 100."""
    about = {"strategy": strategy.name, "task": record.task, "id": record.id}
    score = 100 * record.score(made["prediction"])
    return about | made | {"answers": record.answers, "score": score}


def average_scores(
    strategies: Sequence[Strategy], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What strategies score in each task, and on average over the tasks, each as heavy."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    results = []
    for strategy in strategies:
        own = [row for row in rows if row["strategy"] == strategy.name]
        scores = []
        for task in tasks:
            group = [row for row in own if row["task"] == task]
            metric, _ = TASKS[task]
            scores.append(fmean(row["score"] for row in group))
            results.append(summarize(strategy, task, metric, scores[-1], group))
        results.append(summarize(strategy, "average", "", fmean(scores), own))
    return results


def summarize(
    strategy: Strategy, task: str, metric: str, score: float, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What a strategy scores in some answers, and how many of their prompts were cut."""
    cut = [row for row in rows if row["read"] < row["tokens"]]
    result = {
        "strategy": strategy.name,
        "task": task,
        "metric": metric,
        "score": score,
        "records": len(rows),
        "cut": len(cut),
    }
    return result | strategy.settings()


def format_scores(results: Sequence[dict[str, Any]]) -> str:
    """A table: a row for each task, a column for each strategy."""
    groups = report.group_by_strategy(results)
    rows: dict[str, list[str]] = {}
    for result in results:
        row = rows.setdefault(result["task"], [result["task"], result["metric"]])
        row.append(f"{result['score']:.2f}")
    return report.format_table(["task", "metric", *groups], list(rows.values()))


def write_predictions(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write all answers, a JSON line each."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_beside(path, lambda to: to.write_text("".join(lines), encoding="utf-8"))
    print(path)


def draw_scores(figure: Any, results: Sequence[dict[str, Any]]) -> None:
    """Bars by task; strategies differ in grey and hatching."""
    groups = report.group_by_strategy(results)
    tasks = list(dict.fromkeys(result["task"] for result in results))
    figure.set_size_inches(max(7, 0.1 * len(tasks) * (len(groups) + 3)), 4.2)
    axes = figure.subplots()
    width = 0.8 / len(groups)
    for number, (name, group) in enumerate(groups.items()):
        grey, hatch = FILLS[number % len(FILLS)]
        shift = (number - (len(groups) - 1) / 2) * width
        places = [place + shift for place in range(len(tasks))]
        heights = [result["score"] for result in group]
        axes.bar(
            places, heights, width, label=name, color=grey, hatch=hatch, edgecolor="0",
            linewidth=0.6,
        )  # fmt: skip
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    axes.set_ylabel("score (0 to 100)")
    axes.margins(x=0.01)
    axes.legend(ncols=len(groups), loc="lower right", bbox_to_anchor=(1, 1))  # hides no bar


if __name__ == "__main__":
    cli.run(main, "experiments.longbench", finish=True)
