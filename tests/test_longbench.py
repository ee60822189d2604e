"""experiments/longbench.py: the published metrics, reading and cutting, resuming, every bad input.

Run: pytest tests/test_longbench.py
"""

import difflib
import json
import random
import re
import string
import sys
from itertools import pairwise

import pytest
import torch

import generate
from experiments import longbench, metrics
from experiments.longbench import Record, cut_middle
from experiments.metrics import TASKS
from freqkv import FreqKVAttention, FreqKVConfig
from tests.helpers import tiny_checkpoint
from weights import chat_tokens, load_model, load_tokenizer

for name in ("jieba", "rapidfuzz", "rouge"):
    pytest.importorskip(name)

POSITIONS = 120
CONTEXT = "def compress(x, keep):\n    return x  # once upon a time\n"
PROMPTS = {  # with words that the tokenizer, trained on this project's source, has
    "hotpotqa": "Read.\n{context}\nQuestion: {input}\nAnswer:",
    "trec": "Name the type.\n{context}\n{input}",
    "multifieldqa_zh": "阅读 {context}\n问题 {input}\n回答 ",
    "passage_retrieval_en": "{context}\n{input}\nThe answer is: ",
    "lcc": "{context}Next line of code:\n",
}
LENGTHS = {"hotpotqa": 8, "trec": 6, "multifieldqa_zh": 7, "passage_retrieval_en": 5, "lcc": 6}


def record(number, answers, classes=None, context=CONTEXT, asked="what is x?", **others):
    """A line as LongBench publishes it."""
    about = {"length": len(context), "dataset": "made here", "language": "en"} | others
    texts = {"input": asked, "context": context, "answers": answers}
    return texts | about | {"all_classes": classes, "_id": f"{number:04x}"}


RECORDS = {
    "hotpotqa": [
        record(0, ["The keep"]),
        record(1, ["x", "the x!"], context=CONTEXT * 12),
        record(2, ["no"], asked="which {one}?"),
    ],
    "trec": [record(3, ["Date"], ["Date", "Other"], context="Question: when\nType: Date")],
    "multifieldqa_zh": [
        record(4, ["北京大学"], context="他在北京大学学习。", asked="他在哪里学习")
    ],
    "passage_retrieval_en": [record(5, ["Paragraph 3"])],
    "lcc": [record(6, ["    return x"], asked="")],
}


def publish(folder, settings="config"):
    """A folder as LongBench's: TASK.jsonl, and the two files of settings."""
    (folder / settings).mkdir(parents=True, exist_ok=True)
    for task, lines in RECORDS.items():
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (folder / f"{task}.jsonl").write_text(text + "\n", encoding="utf-8")
    for name, content in (("prompt", PROMPTS), ("maxlen", LENGTHS)):
        (folder / settings / f"dataset2{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_checkpoint(folder, max_position_embeddings=POSITIONS)
    return folder


@pytest.fixture
def data(tmp_path):
    return publish(tmp_path / "LongBench")


@pytest.fixture
def script(checkpoint, data, tmp_path, outcome):
    """Run it in this process; its exit code, stdout and stderr."""

    def run(*flags, data=data):
        where = ["--data", data] if data else []
        usual = ["--model", checkpoint, *where, "--out", tmp_path / "out"]
        return outcome(longbench, *usual, *flags, "--window", 32, "--device", "cpu")

    return run


@pytest.fixture
def calls(monkeypatch):
    """What is read: ids and a cache, in order."""
    seen = []

    def spy(model, tokens, cache, chunk):
        seen.append((tokens[0].tolist(), cache))
        return generate.read(model, tokens, cache, chunk)

    monkeypatch.setattr(longbench, "read", spy)
    return seen


def results(tmp_path):
    found = json.loads((tmp_path / "out/longbench.json").read_text())
    return {(x["strategy"], x["task"]): x for x in found}


def predictions(tmp_path):
    lines = (tmp_path / "out/longbench_predictions.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


# Metrics


def score(task, found, *answers, classes=None):
    return Record(task, "0", "", 1, list(answers), classes).score(found)


def test_the_metric_of_each_task():
    """The table in the published eval.py."""
    published = {
        metrics.f1: """narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa""",
        metrics.f1_zh: "multifieldqa_zh",
        metrics.rouge_l: "gov_report qmsum multi_news samsum",
        metrics.rouge_l_zh: "dureader vcsum",
        metrics.classified: "trec lsht",
        metrics.numbered: "passage_retrieval_en passage_count passage_retrieval_zh",
        metrics.edit_similarity: "lcc repobench-p",
    }
    assert {task: metric for task, (_, metric) in TASKS.items()} == {
        task: metric for metric, tasks in published.items() for task in tasks.split()
    }
    assert {"trec", "triviaqa", "samsum", "lsht"} == metrics.ONE_LINE
    assert {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"} == metrics.PLAIN


@pytest.mark.parametrize(
    ("task", "found", "answer", "expected"),
    [
        ("hotpotqa", "The Eiffel Tower!", "an eiffel tower", 1.0),  # case, marks, articles
        ("hotpotqa", "it is in Paris, France", "Paris", 1 / 3),  # 1 of 5, 1 of 1
        ("hotpotqa", "x x x", "x x y", 2 / 3),  # a word counts as often as both have it
        ("hotpotqa", "theatre", "the atre", 0.0),  # no article within a word
        ("hotpotqa", "well-known", "wellknown", 1.0),
        ("hotpotqa", "“the sea”", "“ sea”", 1.0),  # an article behind a mark that stays
        ("hotpotqa", "no", "yes", 0.0),
        ("hotpotqa", "", "yes", 0.0),
        ("triviaqa", "\n\nParis\nPassage: and so on", "paris", 1.0),  # the first line alone
        ("hotpotqa", "Paris\nand so", "Paris", 1 / 2),  # all lines
        ("multifieldqa_zh", "北京大学。", "北京大学", 1.0),
        ("multifieldqa_zh", "我 在 北京大学", "北京大学", 1 / 2),  # 1 of 3 words, 1 of 1
        ("multifieldqa_zh", "《ABC》", "《abc", 1.0),  # 》 is left out, 《 is not
        ("gov_report", "the cat sat", "the cat ran", 2 / 3),
        ("gov_report", "a b. c d", "c d. a b", 1.0),  # sentences, in any order
        ("gov_report", "b a", "a b", 1 / 2),
        ("gov_report", "", "a b", 0.0),
        ("gov_report", "...", "a b", 0.0),
        ("samsum", "a b\nc d", "a b", 1.0),
        ("dureader", "北京大学", "北京大学", 1.0),
        ("dureader", "我在北京大学", "北京大学", 1 / 2),
        ("passage_count", "There are 7, or 8", "7", 1 / 2),
        ("passage_count", "17", "7", 0.0),
        ("passage_count", "many", "7", 0.0),
        ("passage_retrieval_en", "Paragraph 3", "Paragraph 3", 1.0),
        ("passage_retrieval_en", "3 of 30: Paragraph 3", "Paragraph 3", 2 / 3),
        ("passage_retrieval_zh", "段落12", "段落12", 1.0),
        ("passage_retrieval_zh", "段落1", "段落12", 0.0),
        ("lcc", "\n\n```python\n# first\nreturn x\nmore", "return x", 1.0),
        ("lcc", "return x // 2\nreturn y", "return x", 0.88),  # 7 of 8 letters, 0.875
        ("lcc", "# nothing else", "return x", 0.0),
        ("lcc", "abcd", "abxd", 0.75),
    ],
)
def test_metrics_by_hand(task, found, answer, expected):
    assert score(task, found, answer) == pytest.approx(expected, abs=1e-7)  # rouge adds 1e-8


def test_classes():
    classes = ["Date", "Place", "Other place", "Title", "Title of a person"]

    def of(found, answer):
        return score("trec", found, answer, classes=classes)

    assert of("Date", "Date") == 1
    assert of("Date or Place", "Date") == 1 / 2
    assert of("Title of a person", "Title of a person") == 1  # Title is a part of the name
    assert of("Title of a person", "Title") == 1 / 2
    assert of("Other place", "Place") == 0  # classes are told apart by case
    assert of("date", "Date") == 0
    assert of("Place\nDate", "Date") == 0  # the first line alone
    assert of("\nDate\nType: Place", "Date") == 1


def test_the_best_answer_counts():
    assert score("hotpotqa", "in Paris", "Rome", "Paris", "in Paris") == 1
    assert score("hotpotqa", "in Paris", "Rome", "Paris") == pytest.approx(2 / 3)
    assert score("hotpotqa", "Paris") == 0


def common(a, b):
    """Length of the longest common subsequence, by its definition."""
    row = [0] * (len(b) + 1)
    for x in a:
        old = row[:]
        for j, y in enumerate(b):
            row[j + 1] = old[j] + 1 if x == y else max(row[j], old[j + 1])
    return row[-1]


def test_metrics_by_another_road():
    draw = random.Random(0)
    words = [f"w{i}" for i in range(30)]
    for _ in range(40):
        a, b = (draw.sample(words, draw.randint(1, 20)) for _ in range(2))
        ratio = 2 * common(a, b) / (len(a) + len(b))
        assert score("qmsum", " ".join(a), " ".join(b)) == pytest.approx(ratio, abs=1e-7)
        left = b[:]
        shared = sum(1 for x in a if x in left and not left.remove(x))
        f1 = 2 * shared / (len(a) + len(b))
        assert score("qasper", " ".join(a), " ".join(b)) == pytest.approx(f1)
        a, b = ("".join(draw.choices("abcd (=", k=draw.randint(1, 30))) for _ in range(2))
        found = score("lcc", a, b)
        assert found == round(100 * 2 * common(a, b) / (len(a) + len(b))) / 100
        assert found >= difflib.SequenceMatcher(None, a, b).ratio() - 0.005  # of fewer matches


def test_punctuation_of_the_chinese_f1():
    marks = (
        "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"  # noqa: RUF001
    )
    marks += "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001 (as published)
    every = set(map(chr, range(0x10000)))
    left_out = {x for x in every if metrics.MARKS_ZH.sub("", x) == ""}
    assert left_out == {*marks, *string.punctuation, *filter(str.isspace, every)}


# Reading


def test_a_cut_keeps_the_first_and_the_last_half():
    kept = {10: [*range(10)], 11: [*range(10)], 9: [0, 1, 2, 3, 6, 7, 8, 9], 4: [0, 1, 8, 9]}
    for room, expected in (kept | {2: [0, 9]}).items():
        assert cut_middle(torch.arange(10), room).tolist() == expected


def test_full_is_cut_and_bounded_caches_read_it_all(script, calls, checkpoint, tmp_path):
    ran = script("--tasks", "hotpotqa", "--strategies", "full,freqkv,window")
    assert ran.code == 0, ran.err
    tokenizer = load_tokenizer(checkpoint)
    text = PROMPTS["hotpotqa"].format(**RECORDS["hotpotqa"][1])
    [(whole, _)] = chat_tokens(tokenizer, [{"role": "user", "content": text}])
    half = (POSITIONS - LENGTHS["hotpotqa"]) // 2
    assert len(whole) > 2 * POSITIONS
    ids = [ids for ids, _ in calls]
    full, freqkv, window = ids[:3], ids[3:6], ids[6:]
    assert full[1] == whole[:half] + whole[-half:]
    assert full[0] == freqkv[0]  # what fits is not cut
    assert freqkv[1] == window[1] == whole
    assert calls[4][1].rounds > 10
    assert "full: 1 of 3 prompts lost their middle" in ran.out
    assert "freqkv: " not in ran.out
    read = {(x["strategy"], x["id"]): (x["tokens"], x["read"]) for x in predictions(tmp_path)}
    assert read["full", "0001"] == (len(whole), 2 * half)
    assert read["freqkv", "0001"] == (len(whole), len(whole))
    cuts = {s: x["cut"] for (s, task), x in results(tmp_path).items() if task == "hotpotqa"}
    assert cuts == {"full": 1, "freqkv": 0, "window": 0}


@pytest.mark.parametrize("flag", ["--chat", "--no-chat", "--no-bos"])
def test_how_tasks_are_asked(script, calls, checkpoint, flag):
    """In the template, but those published without; with the token of a beginning, or not."""
    assert script(flag, "--strategies", "freqkv", "--limit", "1").code == 0
    tokenizer = load_tokenizer(checkpoint)
    order = [task for task in TASKS if task in RECORDS]
    assert len(calls) == len(order)
    for task, (ids, _) in zip(order, calls, strict=True):
        text = PROMPTS[task].format(**RECORDS[task][0])
        expected = tokenizer.encode(text)
        if flag != "--no-chat" and task not in ("trec", "lcc"):
            [(expected, _)] = chat_tokens(tokenizer, [{"role": "user", "content": text}])
        assert expected[0] == tokenizer.bos_id
        if flag == "--no-bos":
            expected = expected[1:]
        assert ids == expected, task


def test_predictions_are_greedy(script, checkpoint, tmp_path):
    """Against the parallel form, run anew for each token."""
    assert script("--strategies", "freqkv", "--tasks", "lcc,multifieldqa_zh").code == 0
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, torch.float32, "cpu")
    attend = FreqKVAttention(FreqKVConfig(window=32))
    for made in predictions(tmp_path):
        task = made["task"]
        text = PROMPTS[task].format(**RECORDS[task][0])
        if task == "lcc":
            ids = tokenizer.encode(text)
        else:
            ids = chat_tokens(tokenizer, [{"role": "user", "content": text}])[0][0]
        start = len(ids)
        for _ in range(LENGTHS[task]):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids]), attend)[0, -1].argmax().item())
            if ids[-1] in tokenizer.eos_ids:
                break
        before = tokenizer.decode(ids[:start])
        assert made["prediction"] == tokenizer.decode(ids)[len(before) :]
        assert made["prediction"]


def test_an_answer_stops_at_the_end_of_the_turn(script, checkpoint, monkeypatch, tmp_path):
    tokenizer = load_tokenizer(checkpoint)
    said, never = tokenizer.encode("x", bos=False), tokenizer.encode("y", bos=False)
    steps = iter([*said, tokenizer.eos_id, *never])
    monkeypatch.setattr(generate, "sample", lambda *_: torch.tensor([next(steps)]))
    assert script("--strategies", "freqkv", "--tasks", "hotpotqa", "--limit", "1").code == 0
    assert [x["prediction"] for x in predictions(tmp_path)] == [" x"]  # goes on from the prompt
    assert list(steps) == never


# Scores


def test_scores_and_their_average(script, monkeypatch, tmp_path):
    """The average is over tasks, each as heavy as the others, however many its records."""
    says = {"0000": "keep", "0001": "it is x", "0002": "no", "0003": "Date or Other"}
    says |= {"0004": "北京大学", "0005": "Paragraph 30", "0006": "    return y"}

    def answer_all(model, tokenizer, strategies, records, journal, *_):
        for strategy in strategies:
            for record in records:
                prediction = says[record.id] if strategy.name == "freqkv" else ""
                made = {"prediction": prediction, "tokens": 9, "read": 9}
                journal[record.key(strategy)] = made

    monkeypatch.setattr(longbench, "answer_all", answer_all)
    ran = script("--strategies", "freqkv,window", "--plot")
    assert ran.code == 0, ran.err
    scores = {task: x["score"] for (s, task), x in results(tmp_path).items() if s == "freqkv"}
    expected = {
        "hotpotqa": 100 * (1 + 1 / 2 + 1) / 3,  # "it is x" shares 1 of 3 with 1 of 1
        "multifieldqa_zh": 100,
        "trec": 50,
        "passage_retrieval_en": 0,
        "lcc": 92,  # 11 of 12 letters
    }
    assert scores == pytest.approx(expected | {"average": sum(expected.values()) / 5})
    found = results(tmp_path)["freqkv", "hotpotqa"]
    assert (found["metric"], found["records"], found["window"]) == ("F1", 3, 32)
    assert results(tmp_path)["freqkv", "average"]["records"] == 7
    assert all(x["score"] == 0 for (s, _), x in results(tmp_path).items() if s == "window")
    rows = [line.split() for line in ran.out.split("\n")]
    assert rows[0] == ["task", "metric", "freqkv", "window"]
    assert rows[1] == ["hotpotqa", "F1", "83.33", "0.00"]
    assert ["average", "65.07", "0.00"] in rows
    made = {x["id"]: x for x in predictions(tmp_path) if x["strategy"] == "freqkv"}
    assert made["0001"]["score"] == pytest.approx(50)
    assert made["0001"]["answers"] == ["x", "the x!"]
    assert "北京大学" in (tmp_path / "out/longbench_predictions.jsonl").read_text(encoding="utf-8")
    assert (tmp_path / "out/longbench.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/longbench.csv").read_text().startswith("strategy,task,metric,score")


def test_the_picture():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    heights = {"full": [10, 20], "freqkv": [30, 40]}
    results = []
    for strategy, scores in heights.items():
        for task, score in zip(("lcc", "average"), scores, strict=True):
            results.append({"strategy": strategy, "task": task, "score": score})
    longbench.draw_scores(figure, results)
    [axes] = figure.axes
    for group, (name, scores) in zip(axes.containers, heights.items(), strict=True):
        assert group.get_label() == name
        assert [bar.get_height() for bar in group] == scores
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    for one, two in pairwise(edges):
        assert one[1] <= two[0] + 1e-9  # none hidden
    assert [x.get_text() for x in axes.get_xticklabels()] == ["lcc", "average"]
    assert len({(x[0].get_facecolor(), x[0].get_hatch()) for x in axes.containers}) == 2


# Going on


def test_a_stopped_run_goes_on(script, calls, data, tmp_path):
    flags = ("--strategies", "full,freqkv")
    assert script(*flags).code == 0
    assert len(calls) == 14
    before = predictions(tmp_path)
    assert script(*flags).code == 0
    assert len(calls) == 14  # all of it was known
    journal = tmp_path / "out/longbench.journal.jsonl"
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join(lines[:9]) + b"\n" + lines[9][:20])  # killed at the tenth
    assert script(*flags).code == 0
    assert len(calls) == 14 + 5
    assert predictions(tmp_path) == before
    assert script(*flags, "--no-chat").code == 0
    assert len(calls) == 19 + 14
    assert script(*flags, "--no-bos").code == 0
    assert len(calls) == 33 + 14
    del calls[33:]
    settings = data / "config/dataset2prompt.json"
    settings.write_text(json.dumps(PROMPTS | {"lcc": "{context}"}))
    assert script(*flags).code == 0
    assert len(calls) == 33 + 2  # the task of that prompt
    settings = data / "config/dataset2maxlen.json"
    settings.write_text(json.dumps(LENGTHS | {"trec": 3}))
    assert script(*flags).code == 0
    assert len(calls) == 35 + 2
    assert script(*flags, "--tasks", "hotpotqa, lcc", "--limit", "2").code == 0
    assert len(calls) == 37
    assert [x["id"] for x in predictions(tmp_path)] == ["0000", "0001", "0006"] * 2


@pytest.mark.parametrize("settings", [".", "config", "../config"])
def test_where_settings_are_found(script, settings, tmp_path):
    folder = publish(tmp_path / "elsewhere/data", settings)
    flags = ("--strategies", "window", "--limit", "1")
    assert script(*flags, data=folder).code == 0
    assert len(results(tmp_path)) == 6
    assert script(*flags, data=folder / "lcc.jsonl").code == 0
    assert len(results(tmp_path)) == 2


def test_files_of_other_tasks_are_passed_over(script, data, tmp_path):
    (data / "lcc_e.jsonl").write_text("{}")
    (data / "notes.jsonl").write_text("not JSON")
    assert script("--strategies", "window", "--limit", "1").code == 0
    assert len(results(tmp_path)) == 6


# Bad input


def fails(ran, says):
    assert ran.code == 2
    assert re.search(says, ran.err), ran.err
    assert len(ran.err.strip().split("\n")) == 1, ran.err
    assert ran.out == ""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tasks", "squad"], "--tasks: was 'squad', must be of hotpotqa, multi.*lcc .in --data"),
        (["--tasks", "lcc,qasper"], "--tasks: was 'qasper', must be of hotpotqa"),
        (["--tasks", "lcc,"], "--tasks: was ''"),
    ],
)
def test_bad_flags(script, calls, flags, says):
    fails(script(*flags), says)
    assert not calls


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("not JSON", r"lcc\.jsonl: line 2 was 'not JSON'.*JSONDecodeError.* must be a record"),
        ("[1, 2]", "line 2 was .*TypeError.*, must be a record of LongBench"),
        ("null", "line 2 was 'null'"),
        ({"_id": None}, "line 2 was .*TypeError"),
        ({"context": 3}, "line 2 was .*TypeError"),
        ({"input": None}, "line 2 was .*TypeError"),
        ({"answers": "text"}, "line 2 was .*answers must be a list"),
        ({"answers": [1]}, "line 2 was .*TypeError"),
        ({"context": "\ud800"}, "line 2 was .*UnicodeEncodeError"),
    ],
)
def test_bad_records(script, calls, data, change, says):
    line = json.dumps(record(7, ["x"]) | change) if isinstance(change, dict) else change
    with (data / "lcc.jsonl").open("a") as file:
        file.write(line + "\n")
    fails(script(), says)
    assert not calls
    assert script("--tasks", "lcc", "--limit", "1", "--strategies", "window").code == 0


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("trec", {"all_classes": None}, "line 1 was .*TypeError"),
        ("passage_retrieval_en", {"answers": ["the third"]}, "an answer was 'the third', must"),
    ],
)
def test_records_that_no_metric_takes(script, data, task, change, says):
    (data / f"{task}.jsonl").write_text(json.dumps(RECORDS[task][0] | change))
    fails(script(), says)


def test_missing_files(script, data, tmp_path):
    fails(script(data=None), "--data: was not given, must be the folder of LongBench's .jsonl")
    fails(script(data=tmp_path / "nowhere"), "--data: .*nowhere held no file")
    fails(script(data=data / "config"), "--data: held no TASK.jsonl of LongBench, must hold one")
    fails(script("--data", data, data.parent / "copy" / "*"), "copy/.*held no file")
    (data / "copy").mkdir()
    (data / "copy/lcc.jsonl").write_text("{}")
    fails(script(), r"--data: held .*lcc\.jsonl and .*lcc\.jsonl, must hold one of them")
    (data / "copy/lcc.jsonl").unlink()
    (data / "lcc.jsonl").write_text("\n\n")
    fails(script(), r"lcc\.jsonl: was without records, must have one")
    lengths = data / "config/dataset2maxlen.json"
    lengths.write_text(json.dumps(LENGTHS | {"trec": "many"}))
    fails(script(), r"config/dataset2maxlen\.json: trec was 'many', must be a number of tokens")
    for number in (-5, True, 1 << 40):
        lengths.write_text(json.dumps(LENGTHS | {"trec": number}))
        fails(script(), rf"dataset2maxlen\.json: trec was {number}, must be a number of tokens")
    lengths.unlink()
    fails(script(), r"--data: .*dataset2maxlen\.json was not there, must be, or in config")
    (data / "config/dataset2prompt.json").write_text("{}")
    fails(script(), r"config/dataset2prompt\.json: hotpotqa was None, must be a text")


def test_prompts_with_other_fields(script, data):
    prompts = data / "config/dataset2prompt.json"
    prompts.write_text(json.dumps(PROMPTS | {"lcc": "{text}"}))
    fails(script(), r"lcc\.jsonl: line 1 was .*KeyError\('text'\)")


@pytest.mark.parametrize(
    ("library", "task"), [("rapidfuzz", "lcc"), ("jieba", "multifieldqa_zh"), ("rouge", "qmsum")]
)
def test_a_missing_library(script, calls, data, monkeypatch, library, task):
    (data / "qmsum.jsonl").write_text(json.dumps(record(8, ["x"])))
    for name, more in (
        ("prompt", PROMPTS | {"qmsum": "{input}"}),
        ("maxlen", LENGTHS | {"qmsum": 4}),
    ):
        (data / f"config/dataset2{name}.json").write_text(json.dumps(more))
    monkeypatch.setitem(sys.modules, library, None)
    fails(script(), f"longbench: {library} was not found: pip install {library}")
    assert not calls
    others = ",".join(x for x in ("lcc", "multifieldqa_zh", "qmsum") if x != task)
    assert script("--tasks", others, "--strategies", "window").code == 0


def test_an_answer_longer_than_the_positions(script, data):
    lengths = data / "config/dataset2maxlen.json"
    lengths.write_text(json.dumps(LENGTHS | {"lcc": POSITIONS - 1}))
    fails(
        script(), f"--strategies: full was to write {POSITIONS - 1} tokens, must .* {POSITIONS} pos"
    )
    assert script("--strategies", "window", "--tasks", "lcc").code == 0
    lengths.write_text(json.dumps(LENGTHS | {"lcc": POSITIONS - 2}))
    assert script("--strategies", "full", "--tasks", "lcc").code == 0


def test_a_family_without_a_template(script, monkeypatch):
    def refuse(tokenizer, messages):
        raise ValueError("tokenizer: was of an unknown family, must be ChatML")

    monkeypatch.setattr(generate, "chat_tokens", refuse)
    fails(script(), "--chat: tokenizer: was of an unknown family.*--no-chat takes prompts as")
    assert script("--no-chat", "--limit", "1", "--strategies", "window").code == 0
