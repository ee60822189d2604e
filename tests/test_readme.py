"""The README and the pages of docs/ are true: their Python runs, their commands and links exist.

Run: pytest tests/test_readme.py
"""

import importlib
import re
import shlex

import pytest
import torch

from tests.helpers import ROOT, smollm2_path
from weights import load_model

README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "experiments/README.md",
    ROOT / "weights/tiny/README.md",
    ROOT / "weights/smollm2-freqkv/README.md",
]
SCRIPTS = ["generate", "train"]


def find_commands(text, program):
    """The arguments of every call of `python PROGRAM` in a page or a docstring."""
    text = text.replace("\\\n", " ")
    return re.findall(rf"^ *python {re.escape(program)}(?= |$)(.*)$", text, re.MULTILINE)


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.slow
def test_python_of_the_method_page_runs(monkeypatch, capsys):
    smollm2_path()
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/method.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == re.search(r"print\(cache.*#(.*)", block)[1].strip()
    assert printed[1] == "tensor(True)"


def test_weights_for_a_copied_model(monkeypatch):
    page = (ROOT / "docs/copy.md").read_text()
    (block,) = re.findall(r"```py\n(import dataclasses.*?)```", page, re.DOTALL)
    monkeypatch.chdir(ROOT / "weights/tiny")
    made = {}
    exec(block, made)
    expected = load_model("tiny").state_dict()
    found = made["model"].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert made["config"] == load_model("tiny").config


def test_the_layer_of_the_first_page_is_that_of_the_example():
    """Line by line, but for its indentation."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    example = {line.strip() for line in (ROOT / "examples/own_attention.py").open()}
    lines = [line.strip() for line in block.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("def forward"))
    stop = next(i for i, line in enumerate(lines) if line.startswith("return"))
    assert stop - start == 4
    for line in lines[start : stop + 1]:
        assert line in example


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_parse(script):
    module = importlib.import_module(script)
    commands = find_commands(module.__doc__, f"{script}.py")
    for page in PAGES:
        commands += find_commands(page.read_text(), f"{script}.py")
    assert len(commands) >= 4
    for command in commands:
        module.make_parser().parse_args(shlex.split(command, comments=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    for link in links:
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_commands_run_exist(page):
    for name in re.findall(r"python -m (experiments|examples)\.(\w+)", page.read_text()):
        assert (ROOT / name[0] / f"{name[1]}.py").exists(), name
    for name in re.findall(r"^ *python (\w+)\.py", page.read_text(), re.MULTILINE):
        assert (ROOT / f"{name}.py").exists(), name
