"""The README is true: its Python runs, its numbers are the tree's, its flags exist.

Run: pytest tests/test_readme.py
"""

import re
import shlex

import pytest

import evaluate
import generate
import train
from tests.helpers import ROOT, smollm2_path
from weights import load_tokenizer

README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_python_runs(monkeypatch, capsys):
    smollm2_path()
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(block, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == re.search(r"print\(cache.*#(.*)", block)[1].strip()
    assert printed[1] == "tensor(True)"


@pytest.mark.parametrize(("name", "budget"), [("dct", 120), ("freqkv", 250), ("model", 300)])
def test_lines_and_budgets(name, budget):
    lines = len((ROOT / f"{name}.py").read_text().splitlines())
    assert lines <= budget
    assert f"| [{name}.py]({name}.py) | {lines} |" in README


def test_the_first_example_is_of_this_tree():
    """It reads the head of train.py: where that has changed, run it again."""
    head = "".join((ROOT / "train.py").read_text().splitlines(keepends=True)[:320])
    assert f"read {len(load_tokenizer('tiny').encode(head)):,} tokens" in README


@pytest.mark.parametrize(("script", "least"), [(generate, 6), (train, 4), (evaluate, 6)])
def test_commands_parse(script, least):
    pages = ["weights/tiny/README.md", "weights/smollm2-freqkv/README.md", "docs/results.md"]
    pages = [README, script.__doc__, *((ROOT / page).read_text() for page in pages)]
    text = "\n".join(pages).replace("\\\n", " ")
    commands = re.findall(rf"^ *python {script.__name__}\.py(.*)$", text, re.MULTILINE)
    assert len(commands) >= least
    for command in commands:
        script.parser().parse_args(shlex.split(command, comments=True))
