"""weights/tiny: the built-in checkpoint is what its record says, and writes what it always wrote.

Run: pytest tests/test_tiny.py
"""

import io
import json
import math
from functools import partial

import pytest
import torch

import generate
from experiments import ablation, perplexity, recall, spectrum
from experiments.harness import read_held_out
from freqkv import FreqKVCache, FreqKVConfig
from model import FullCache
from tests.helpers import ROOT
from weights import load_model, load_tokenizer

FOLDER = ROOT / "weights/tiny"
BITS_A_BYTE = 2.2  # 2.04 was measured on generate.py, whose style is not that of its own library
WRITTEN = 'path):\n    """Return a path-like path to a path-like path to a path.\n\n    This'


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", torch.float32), load_tokenizer("tiny")


def test_it_is_small_and_whole():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) < 8_000_000
    assert {p.dtype for p in load_model("tiny").parameters()} == {torch.bfloat16}


def test_its_tokenizer_gives_texts_back(tiny):
    text = (ROOT / "generate.py").read_text() + "\t\x00 ünï 漢字 \r\n"
    tokenizer = tiny[1]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    blocks = [i for ids in tokenizer.encode_blocks(text) for i in ids]
    assert blocks == tokenizer.encode(text, bos=False)


def test_it_has_learnt_python(tiny):
    """Bits a byte of source that it was not trained on, far beyond its window."""
    model, tokenizer = tiny
    text = (ROOT / "generate.py").read_text()
    tokens, size = torch.tensor([tokenizer.encode(text)]), len(text.encode())
    cache = FreqKVCache(FreqKVConfig(256))
    with torch.no_grad():
        logits = torch.cat([model(part, cache) for part in tokens.split(100, dim=1)], dim=1)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
    assert cache.rounds > 20
    assert loss / math.log(2) / size < BITS_A_BYTE


def test_it_writes_what_it_always_wrote(tiny):
    model, tokenizer = tiny
    greedy = generate.Sampling(temperature=0)
    for cache in (FullCache(64), FreqKVCache(FreqKVConfig(256))):
        tokens = torch.tensor([tokenizer.encode("import os\nimport sys\n\n\ndef main(")])
        logits = generate.read(model, tokens, cache, 64)
        step = partial(generate.read_token, model, cache=cache)
        ids = [row[0] for row in generate.write(step, logits, (), 24, greedy)]
        assert tokenizer.decode(ids) == WRITTEN


def test_generate_without_arguments(monkeypatch, capsys):
    """From the beginning of a text, as on a terminal."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    generate.main(["--max-new-tokens", "20"])
    shown = capsys.readouterr()
    assert len(shown.out) > 20
    assert "wrote 20" in shown.err


@pytest.mark.slow
def test_it_is_what_experiments_measure(tmp_path):
    flags = ["--limit", "1", "--out", str(tmp_path)]
    perplexity.main([*flags, "--lengths", "256,1024"])
    values = {}
    for record in json.loads((tmp_path / "perplexity.json").read_text()):
        values[record["strategy"], record["length"]] = record["perplexity"]
    assert values["freqkv", 1024] < values["full", 1024]
    ablation.main([*flags, "--ratios", "0.5", "--sink-counts", "4", "--recents", "0,64"])
    recall.main([*flags, "--tasks", "assignment"])
    spectrum.main(flags)
    for name in ("ablation", "recall", "spectrum"):
        assert (tmp_path / f"{name}.json").exists()


def test_held_out_source_is_there():
    assert len(read_held_out(load_tokenizer("tiny"))) > 20_000
