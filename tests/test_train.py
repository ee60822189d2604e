"""train.py: losses and gradients, data, runs that are stopped and killed, and every bad input.

Run: pytest tests/test_train.py
"""

import errno
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.testing import assert_close

import corpus
import train
from freqkv import FreqKVAttention, FreqKVConfig, newest
from model import causal_attention
from tests.helpers import ROOT, random_tokens, tiny_checkpoint, tiny_config, tiny_model
from weights import chat_tokens, load_model, load_tokenizer, save_model
from weights.lora import load_adapter

CONFIG = FreqKVConfig(window=16, sinks=2)
PLOT = train.plot


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_checkpoint(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """Drawing takes longer than training does here; one test draws."""
    monkeypatch.setattr(train, "plot", lambda out: "not drawn")


@pytest.fixture(scope="module")
def tokens_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "tokens.bin"
    np.random.default_rng(0).integers(0, 50, 1500).astype(np.uint16).tofile(file)
    return file


def flags(checkpoint, data, out, *more):
    """A run of three steps that compresses four times in each sequence."""
    shared = ["--window", "16", "--sinks", "2", "--seq-len", "40", "--batch-size", "2"]
    shared += ["--steps", "3", "--lr", "0.01", "--eval-rows", "2", "--device", "cpu"]
    source = ["--model", checkpoint] if checkpoint else []
    source += ["--data", data] if data else []
    return [str(x) for x in (*source, "--out", out, *shared, *more)]


@pytest.fixture
def script(outcome):
    """Run train.py in this process; its exit code, stdout and stderr."""
    return lambda *argv: outcome(train, *argv)


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def curve(out):
    """What a run must repeat bit for bit: all of its log but the clock and the memory."""
    names = ("step", "loss", "grad_norm", "lr", "val_loss", "bits_per_byte")
    return [{name: record[name] for name in names if name in record} for record in log(out)]


def args_of(**changes):
    defaults = {"batch_size": 4, "device": "cpu", "dtype": "float32", "distill": 0.0}
    return SimpleNamespace(**(defaults | changes))


def rows_of(tokens):
    return [(row[:-1], row[1:].clone()) for row in tokens]


# Losses and gradients


def gradients(model, attend, rows, **changes):
    model.zero_grad()
    losses = list(train.losses(model, attend, rows, args_of(**changes)))
    sum(losses).backward()
    return sum(losses).item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_loss_in_chunks_equals_cross_entropy(monkeypatch, tied):
    monkeypatch.setattr(train, "CHUNK", 7)
    model = tiny_model(tiny_config(tie_word_embeddings=tied))
    hidden = torch.randn(2, 20, 32, requires_grad=True)
    labels = random_tokens(2, 20, seed=3)
    labels[0, :5] = labels[1, 11] = corpus.IGNORE
    expected = F.cross_entropy(
        model.logits(hidden).flatten(0, 1), labels.flatten(), reduction="sum"
    )
    head = model.embed_tokens.weight if tied else model.lm_head.weight
    wanted = torch.autograd.grad(expected, (hidden, head))
    most, logits = [], model.logits
    monkeypatch.setattr(model, "logits", lambda x: most.append(len(x)) or logits(x))
    loss = train.loss_sum(model, hidden, labels)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, (hidden, head)), wanted)
    assert max(most) == 7
    assert sum(most) == 2 * 34  # once forward and once backward, labelled tokens alone


def test_gradients_equal_finite_differences():
    """Through three rounds of compression, in float64, along a random direction of each weight."""
    model = tiny_model().double()
    attend, rows = FreqKVAttention(CONFIG), rows_of(random_tokens(2, 38))
    assert CONFIG.rounds(37) == 3
    _, found = gradients(model, attend, rows)
    for name, parameter in model.named_parameters():
        direction, step = torch.randn_like(parameter), 1e-6
        values = []
        for sign in (1, -1):
            parameter.data.add_(direction, alpha=sign * step)
            with torch.no_grad():
                values.append(float(sum(train.losses(model, attend, rows, args_of()))))
            parameter.data.sub_(direction, alpha=sign * step)
        difference = (values[0] - values[1]) / (2 * step)
        assert difference == pytest.approx(
            (found[name] * direction).sum().item(), rel=1e-5, abs=1e-8
        )


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_imitation_is_of_the_predictions_of_full_attention(monkeypatch, share):
    """Against the divergence as it is defined, token by token, in float64."""
    monkeypatch.setattr(train, "CHUNK", 7)
    model, attend = tiny_model().double(), FreqKVAttention(CONFIG)
    teacher = train.frozen_copy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    tokens, labels = random_tokens(1, 40), random_tokens(1, 40, seed=3)
    labels[0, :5] = corpus.IGNORE
    expected = torch.zeros((), dtype=torch.float64)
    found, target = (
        m(tokens, a)[0].softmax(-1) for m, a in ((model, attend), (teacher, causal_attention))
    )
    for t in range(5, 40):
        imitation = (target[t] * (target[t] / found[t]).log()).sum()
        expected += share * imitation - (1 - share) * found[t, labels[0, t]].log()
    (loss,) = train.losses(model, attend, [(tokens[0], labels[0])], args_of(distill=share), teacher)
    weights = list(model.parameters())
    assert_close(loss, expected / 35)
    assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(expected / 35, weights))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_teacher_stays_and_shares_what_is_frozen(checkpoint, tokens_file, tmp_path):
    argv = flags(checkpoint, tokens_file, tmp_path / "run", "--lora", "--distill", 1, "--warmup", 0)
    args = train.settings([*argv, "--accumulate", "1", "--train", "norm"])
    trainer, _ = train.prepare(args)
    model, teacher = trainer.model, trainer.teacher
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    trainer.train_step()
    assert_close(dict(teacher.named_parameters()), before, rtol=0, atol=0)
    assert model.layers[0].mlp.up_proj.weight is teacher.layers[0].mlp.up_proj.weight
    assert not model.norm.weight.equal(teacher.norm.weight)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_checkpointing_and_accumulation_change_no_gradient(checkpointing, batch_size):
    model, attend = tiny_model(), FreqKVAttention(CONFIG)
    rows = rows_of(random_tokens(6, 30))
    for row, cut in zip(rows, (0, 3, 9, 20, 0, 28), strict=True):
        row[1][:cut] = corpus.IGNORE  # unequal counts: a mean of means would be another
    expected = gradients(model, attend, rows, batch_size=6)
    model.gradient_checkpointing = checkpointing
    assert_close(gradients(model, attend, rows, batch_size=batch_size), expected)


def test_padding_changes_nothing():
    """Rows of unequal length in one batch, against one row at a time."""
    model, attend = tiny_model(), FreqKVAttention(CONFIG)
    rows = rows_of(row[: 12 + 9 * i] for i, row in enumerate(random_tokens(4, 60)))
    one_by_one = gradients(model, attend, rows, batch_size=1)
    assert_close(gradients(model, attend, rows, batch_size=4), one_by_one)
    count = sum(len(row[1]) for row in rows)
    plain = sum(
        F.cross_entropy(model(x[None], attend)[0], y, reduction="sum") / count for x, y in rows
    )
    assert one_by_one[0] == pytest.approx(plain.item(), rel=1e-5)


def test_products_in_bfloat16():
    model, attend, rows = tiny_model(), FreqKVAttention(CONFIG), rows_of(random_tokens(2, 40))
    exact, low = (gradients(model, attend, rows, dtype=x) for x in ("float32", "bfloat16"))
    assert low[0] != exact[0]
    assert low[0] == pytest.approx(exact[0], rel=0.02)
    assert {grad.dtype for grad in low[1].values()} == {torch.float32}


def test_overfits_a_batch(checkpoint, tmp_path, script):
    np.arange(2, 43, dtype=np.uint16).tofile(tmp_path / "x.bin")
    more = "--val-share", 0, "--steps", 40, "--batch-size", 1, "--warmup", 0
    ended = script(*flags(checkpoint, tmp_path / "x.bin", tmp_path / "run", *more))
    assert ended.code == 0, ended.err
    losses = [record["loss"] for record in log(tmp_path / "run")]
    assert len(losses) == 40
    assert losses[0] > 5 > 0.2 > losses[-1]


def test_one_step_of_the_optimizer(checkpoint, tokens_file, tmp_path, script, monkeypatch):
    """AdamW's first step by hand: decay of matrices, then the rate against the gradient's sign."""
    step, norms = torch.optim.AdamW.step, []

    def measured(self):
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(grads).norm().item())
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    out = tmp_path / "run"
    more = "--steps", 1, "--warmup", 0, "--weight-decay", 0.5, "--grad-clip", 0.125
    more = *more, "--checkpointing", "--save-dtype", "float32"
    assert script(*flags(checkpoint, tokens_file, out, *more)).code == 0
    assert norms == [pytest.approx(0.125, rel=1e-4)]
    assert log(out)[1]["grad_norm"] > 0.2  # as it was before
    before, after = load_model(checkpoint).state_dict(), load_model(out / "model").state_dict()
    for name, weight in before.items():
        kept = weight * (1 - 0.01 * (0 if "norm" in name else 0.5))
        moved = (after[name] - kept).abs()
        assert moved.max() <= 0.01 + 1e-6
        assert moved.median() == pytest.approx(0.01, rel=0.02) or "embed" in name


@pytest.mark.parametrize("flag", ["--checkpointing", "--no-checkpointing"])
def test_checkpointing_is_passed_on(checkpoint, flag):
    args = train.settings(["--model", str(checkpoint), "--device", "cpu", flag])
    args.dtype = "float32"
    assert train.build(args).gradient_checkpointing == (flag == "--checkpointing")


def test_learning_rate():
    args = SimpleNamespace(lr=2.0, warmup=4, steps=12, schedule="constant")
    rates = [train.learning_rate(args, step) for step in range(1, 13)]
    assert rates == [0.5, 1, 1.5] + [2.0] * 9
    args.schedule = "cosine"
    rates = [train.learning_rate(args, step) for step in range(1, 13)]
    assert rates[:4] == [0.5, 1, 1.5, 2]
    assert rates[7] == pytest.approx(1 + math.cos(math.pi * 4 / 9))
    assert 0 < rates[-1] < 0.1
    args.warmup = 0
    assert train.learning_rate(args, 12) > 0


@pytest.mark.parametrize("kind", ["freqkv", "window", "full"])
def test_attention(kind):
    attend = train.attention(kind, FreqKVConfig(16, 2, 0.5, 3))
    if kind == "full":
        assert attend is causal_attention
    else:
        assert attend.config == FreqKVConfig(16, 2, 0.5, 3)
        assert (attend.operator is newest) == (kind == "window")


# Data


def test_rows_are_packed():
    streams = [np.arange(100, 125, dtype=np.uint32), np.arange(5), np.arange(7)]
    rows = corpus.Packed(streams, 6)
    found = [(x.tolist(), y.tolist()) for x, y in (rows[i] for i in range(len(rows)))]
    starts = [range(100, 106), range(106, 112), range(112, 118), range(118, 124), range(6)]
    assert found == [(list(r), [i + 1 for i in r]) for r in starts]


def test_every_row_once_an_epoch():
    data = corpus.Data(list(range(10)), [], "")
    order = [i for step in range(1, 11) for i in data.rows(7, step, 4)]
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert data.rows(7, 3, 4) == order[8:12]  # of the seed and the step alone
    assert data.rows(8, 3, 4) != order[8:12]


def text_args(folder, **changes):
    defaults = {"tokenizer": None, "model": "m", "val_share": 0.25, "out": str(folder)}
    return SimpleNamespace(**(defaults | changes))


def test_text_is_tokenized_once(checkpoint, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(checkpoint)
    texts = [
        "def f(x):\n    return x\n" * 20,
        "é, 日本\n" * 30,
        "class A:\r\n\tpass",
        "same\n" * 9,
    ]
    for i, text in enumerate([*texts, texts[-1]]):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    files = corpus.data_files([str(tmp_path / "*.txt")])
    out = tmp_path / "run"
    [streams, [held], sha256, density] = corpus.read_texts(files, text_args(out), tokenizer)
    stream = np.concatenate([*streams, held]).tolist()
    assert stream.count(tokenizer.eos_id) == len(texts) + 1  # each once, and one is cut in two
    pieces, piece = [], []
    for token in stream:
        piece.append(token)
        if token == tokenizer.eos_id:
            assert piece[0] == tokenizer.bos_id
            pieces.append(tokenizer.decode(piece))
            piece = []
    assert not piece
    assert sorted("".join(pieces)) == sorted("".join(texts))
    size = len("".join(texts).encode())
    kept = json.loads((out / "data/tokens.json").read_text())
    assert kept["held_out_bytes"] == pytest.approx(size / 4, abs=4)
    assert density == len(held) / kept["held_out_bytes"]
    # Again: from the file, unless the texts, the tokenizer or the share are others.
    ids = [
        i
        for text in sorted(texts, key=lambda x: hashlib.sha256(x.encode()).hexdigest())[:2]
        for i in [*tokenizer.encode(text), tokenizer.eos_id]
    ]
    assert stream[: len(ids)] == ids
    monkeypatch.setattr(corpus, "write_tokens", lambda *_: pytest.fail("tokenized again"))
    assert corpus.read_texts(files, text_args(out), tokenizer)[2] == sha256
    for args, some in ((text_args(out), files[1:]), (text_args(out, val_share=0.2), files)):
        with pytest.raises(pytest.fail.Exception):
            corpus.read_texts(some, args, tokenizer)


@pytest.mark.parametrize(("dtype", "vocab"), [("uint16", 50), ("uint32", 70_000)])
def test_token_files(tmp_path, dtype, vocab):
    for name, count in (("a", 100), ("b", 40)):
        np.arange(count, dtype=dtype).clip(0, 49).tofile(tmp_path / f"{name}.bin")
    files = corpus.data_files([str(tmp_path)])
    args = SimpleNamespace(bin_dtype=None, val_share=0.1)
    trained, held, sha256 = corpus.read_bins(files, args, vocab)
    assert [len(x) for x in (*trained, *held)] == [90, 36, 10, 4]
    assert trained[1].tolist() == list(range(36))
    assert isinstance(trained[0], np.memmap)
    assert sha256 != corpus.read_bins(files[:1], args, vocab)[2]


def test_files_by_folder_pattern_and_default(tmp_path):
    for name in ("a.txt", "sub/b.txt", "sub/.hidden", ".git/c.txt", "[x].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.txt").touch()  # passed over, unless named
    whole = [tmp_path / name for name in ("[x].txt", "a.txt", "sub/b.txt")]
    assert corpus.data_files([str(tmp_path)]) == whole
    assert corpus.data_files([f"{tmp_path}/*.txt"]) == whole[:2]
    assert corpus.data_files([f"{tmp_path}/**/*.txt", str(whole[0])]) == whole
    assert corpus.data_files([str(whole[0])]) == whole[:1]  # a name, and not a pattern
    source = corpus.data_files(None)
    assert len(source) > 300
    assert source == sorted(source)
    assert not any("test" in file.parts or "site-packages" in file.parts for file in source)


RECORDS = [
    {"instruction": "Say yes.", "output": "yes yes"},
    {"instruction": "Say", "input": "no", "output": "no"},
    {"messages": [
        {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"}, {"role": "assistant", "content": "d e"},
    ]},
]  # fmt: skip


@pytest.mark.parametrize("lines", [False, True])
def test_loss_is_on_answers_alone(checkpoint, tmp_path, lines):
    tokenizer = load_tokenizer(checkpoint)
    text = "\n".join(map(json.dumps, RECORDS)) + "\n" if lines else json.dumps(RECORDS)
    (tmp_path / "x.json").write_text(text)
    args = SimpleNamespace(seq_len=100, val_share=0.4)
    data = corpus.read_records(tmp_path / "x.json", args, tokenizer)
    assert (len(data.train), len(data.held)) == (2, 1)
    rows = [*data.train, *data.held]
    for record, (tokens, labels) in zip(RECORDS, rows, strict=True):
        segments = chat_tokens(tokenizer, corpus.messages_of(record))
        ids = [i for segment, _ in segments for i in segment]
        assert tokens.tolist() == ids[:-1]
        after = [i if answer else corpus.IGNORE for part, answer in segments for i in part][1:]
        assert labels.tolist() == after
    answers = [tokenizer.decode(y[y != corpus.IGNORE].tolist()) for _, y in rows]
    assert [answer.split() for answer in answers] == [["yes", "yes"], ["no"], ["b", "d", "e"]]
    assert rows[0][1][-1] == tokenizer.eos_id  # to end is part of the answer
    assert "Say\n\nno" in tokenizer.decode(rows[1][0].tolist())


def test_long_records_are_cut_and_left_out(checkpoint, tmp_path):
    tokenizer, long = load_tokenizer(checkpoint), "long " * 50
    records = [{"instruction": long, "output": "a"}, {"instruction": "b", "output": long}]
    (tmp_path / "x.json").write_text(json.dumps(records))
    args = SimpleNamespace(seq_len=40, val_share=0.0)
    data = corpus.read_records(tmp_path / "x.json", args, tokenizer)
    [(tokens, labels)] = data.train  # the first has no answer within 40 tokens
    assert len(tokens) == len(labels) == 40
    assert labels[-1] != corpus.IGNORE


def test_a_trained_tokenizer_gives_text_back_exactly(tmp_path):
    files = sorted(ROOT.glob("*.py"))
    (tmp_path / "tokenizer.model").write_bytes(corpus.train_tokenizer(files, "400"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 400
    odd = "  two\n\n\n\tspaces  \r\n if  x :\n        return 'é日本\U0001f600'  \n "
    for text in [odd, *(file.read_text() for file in files)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" " * 8 + "return")) < 8  # indentation in one piece


# Runs


def test_a_run_leaves_what_it_says(checkpoint, tmp_path, script):
    out = tmp_path / "run"
    source = [str(ROOT / name) for name in ("dct.py", "freqkv.py")]
    more = "--data", *source, "--eval-every", 2, "--save-every", 1
    ended = script(*flags(checkpoint, None, out, *more))
    assert ended.code == 0, ended.err
    assert f"python generate.py --model {out / 'model'}" in ended.out
    records = log(out)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3]
    assert [r["step"] for r in records if "val_loss" in r] == [0, 2, 3]
    per_step = {"loss", "tokens_per_second", "grad_norm", "lr", "memory_bytes", "seconds"}
    assert all(per_step <= r.keys() for r in records if "loss" in r)
    sizes = json.loads((out / "data/tokens.json").read_text())
    density = sizes["held_out_tokens"] / sizes["held_out_bytes"]
    for record in records:
        if "val_loss" in record:
            bits = record["val_loss"] / math.log(2) * density
            assert record["bits_per_byte"] == pytest.approx(bits)
    model, again = load_model(out / "model"), load_model(checkpoint)
    assert model.norm.weight.dtype == torch.bfloat16
    assert not torch.equal(model.embed_tokens.weight.float(), again.embed_tokens.weight)
    load_tokenizer(out / "model").check_fits(model.config.vocab_size)
    settings = json.loads((out / "model/freqkv.json").read_text())
    assert settings == {
        "attention": "freqkv", "window": 16, "sinks": 2, "ratio": 0.5, "recent": 0, "seq_len": 40
    }  # fmt: skip


def test_the_model_that_was_begun_from_stays(checkpoint, tokens_file, tmp_path, script):
    """Weights are mapped from the file; training must not write through."""
    before = (checkpoint / "model.safetensors").read_bytes()
    assert script(*flags(checkpoint, tokens_file, tmp_path / "run")).code == 0
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_the_loss_falls_with_each_kind_of_attention(checkpoint, tmp_path, script):
    file = tmp_path / "x.bin"
    np.tile(np.arange(2, 40, dtype=np.uint16), 40).tofile(file)
    ends = set()
    for kind in ("freqkv", "window", "full"):
        more = "--attention", kind, "--steps", 10, "--warmup", 0, "--lr", 0.03, "--save-every", 0
        assert script(*flags(checkpoint, file, tmp_path / kind, *more)).code == 0
        first, *_, last = (r["val_loss"] for r in log(tmp_path / kind) if "val_loss" in r)
        assert last < first - 2
        ends.add(last)
    assert len(ends) == 3


def test_the_last_checkpoints_and_the_best_stay(
    checkpoint, tokens_file, tmp_path, script, monkeypatch
):
    out = tmp_path / "run"
    more = "--steps", 6, "--eval-every", 2, "--save-every", 1
    # Downhill for two steps, then uphill.
    monkeypatch.setattr(train, "learning_rate", lambda args, step: 0.02 if step < 3 else -0.02)
    assert script(*flags(checkpoint, tokens_file, out, *more)).code == 0
    losses = {r["step"]: r["val_loss"] for r in log(out) if "val_loss" in r and r["step"]}
    best = min(losses, key=losses.get)
    assert best == 2
    found = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert found == ["step-000002", "step-000005", "step-000006"]
    record = json.loads((out / "best.json").read_text())
    assert (record["step"], record["val_loss"]) == (2, losses[2])
    assert script("--out", out, "--resume", "--steps", 8).code == 0  # which does not forget it
    assert json.loads((out / "best.json").read_text()) == record
    assert (out / "checkpoints/step-000002").exists()


def test_init(tmp_path, script):
    content = json.loads((ROOT / "tests/data/meta/hf/config.json").read_text())
    content |= {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(content))
    out = tmp_path / "run"
    more = "--init", tmp_path / "config.json", "--tokenizer", "train:400", "--warmup", 9
    assert script(*flags(None, ROOT / "freqkv.py", out, *more, "--lr", 0)).code == 0
    model = load_model(out / "model", torch.float32)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert weight.eq(1).all()
        else:
            ends = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert weight.std().item() == pytest.approx(0.02 / (4 if ends else 1), rel=0.1)
    tokenizer = load_tokenizer(out / "model")
    text = (ROOT / "freqkv.py").read_text()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lora_and_merge(checkpoint, tokens_file, tmp_path, script):
    """The adapter of a run, continued, merged at the end and merged at once: one function."""
    first, merged = tmp_path / "first", tmp_path / "merged"
    more = "--lora", "--accumulate", 1, "--warmup", 0, "--rank", 4, "--save-dtype", "float32"
    ended = script(*flags(checkpoint, tokens_file, first, *more, "--merge", merged))
    assert ended.code == 0, ended.err
    assert f"--model {merged}" in ended.out
    assert json.loads((first / "adapter/freqkv.json").read_text())["window"] == 16
    model, tokens = load_model(checkpoint), random_tokens(1, 20)
    before = model(tokens)
    load_adapter(model, first / "adapter")
    with_adapter = model(tokens)
    assert (with_adapter - before).abs().max() > 0.01
    assert_close(load_model(merged)(tokens), with_adapter, atol=1e-4, rtol=1e-4)
    at_once = tmp_path / "at-once"
    ended = script("--model", checkpoint, "--adapter", first / "adapter", "--merge", at_once)
    assert ended.code == 0, ended.err
    assert_close(load_model(at_once)(tokens), load_model(merged)(tokens), atol=1e-5, rtol=1e-5)
    assert (at_once / "freqkv.json").exists()
    assert script("--model", checkpoint, "--adapter", "x", "--merge", at_once).code == 2

    second, third = tmp_path / "second", tmp_path / "third"
    more = "--lora", "--accumulate", 1, "--adapter", first / "adapter", "--lr", 0
    assert script(*flags(checkpoint, tokens_file, second, *more)).code == 0
    files = [x / "adapter/adapter_model.safetensors" for x in (first, second)]
    assert_close(load_file(files[0]), load_file(files[1]), rtol=0, atol=0)
    more = "--adapter", first / "adapter", "--lr", 0, "--save-dtype", "float32"  # all weights
    assert script(*flags(checkpoint, tokens_file, third, *more)).code == 0
    assert_close(load_model(third / "model")(tokens), with_adapter, atol=1e-4, rtol=1e-4)


def test_an_adapter_in_bfloat16(checkpoint, tokens_file, tmp_path, script):
    """Half the bytes of the same adapter, and one that loads."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        more = "--lora", "--accumulate", 1, "--save-dtype", dtype
        assert script(*flags(checkpoint, tokens_file, out, *more)).code == 0
        found[dtype] = load_file(out / "adapter/adapter_model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in found["float32"].items()}
    assert_close(found["bfloat16"], rounded, rtol=0, atol=0)
    load_model(checkpoint, adapter=tmp_path / "bfloat16/adapter")


def test_an_adapter_goes_on_in_full_precision(checkpoint, tokens_file, tmp_path, script):
    save_model(load_model(checkpoint, torch.bfloat16), tmp_path / "low", load_tokenizer(checkpoint))
    files = []
    for name, more in (("a", ()), ("b", ("--adapter", tmp_path / "a/adapter", "--lr", 0))):
        argv = flags(tmp_path / "low", tokens_file, tmp_path / name, "--lora", "--accumulate", 1)
        assert script(*argv, "--dtype", "bfloat16", *more).code == 0
        files.append(load_file(tmp_path / name / "adapter/adapter_model.safetensors"))
    assert_close(*files, rtol=0, atol=0)


@pytest.mark.parametrize("parts", ["none", "norm", "embed,norm"])
def test_frozen_weights_stay(checkpoint, tokens_file, tmp_path, script, parts):
    more = "--lora", "--accumulate", 1, "--train", parts, "--warmup", 0, "--dtype", "bfloat16"
    assert script(*flags(checkpoint, tokens_file, tmp_path / "run", *more)).code == 0
    tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    others = [name for name in tensors if "lora" not in name]
    assert any("embed" in name for name in others) == ("embed" in parts)
    assert any("norm" in name for name in others) == ("norm" in parts)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(x.any() for name, x in tensors.items() if "lora_B" in name)


def test_the_picture(checkpoint, tokens_file, tmp_path, script, monkeypatch):
    assert script(*flags(checkpoint, tokens_file, tmp_path / "run")).code == 0
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install" in PLOT(tmp_path / "run")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert "loss.png" in PLOT(tmp_path / "run")
    assert (tmp_path / "run/loss.png").read_bytes()[:4] == b"\x89PNG"


PAIRS = [
    "--full", "--lora --accumulate 1", "--lora --train none --rank 2 --alpha 4 --accumulate 2",
    "--attention window", "--attention full", "--recent 3 --ratio 0.25", "--no-checkpointing",
    "--checkpointing", "--dtype bfloat16", "--dtype float32", "--weight-decay 0.1 --grad-clip 0",
    "--schedule cosine --warmup 1", "--eval-every 0 --save-every 0", "--keep-last 1 --seed 3",
    "--eval-every 1 --save-every 1 --val-share 0.2", "--bin-dtype uint16", "--val-share 0",
    "--save-dtype float32", "--resume", "--accumulate 3", "--distill 0.5",
]  # fmt: skip


@pytest.mark.parametrize("more", PAIRS)
def test_flags(checkpoint, tokens_file, tmp_path, script, more):
    argv = flags(checkpoint, tokens_file, tmp_path / "run", "--steps", 2, *more.split())
    ended = script(*argv)
    assert ended.code == 0, ended.err
    assert [r["step"] for r in log(tmp_path / "run") if "loss" in r] == [1, 2]


def test_every_flag_is_tried_here():
    known = {flag for flag, *_ in train.FLAGS}
    source = Path(__file__).read_text()
    assert not [flag for flag in known if f'"{flag}"' not in source and f"{flag} " not in source]


def test_instruction_tuning(checkpoint, tmp_path, script):
    (tmp_path / "x.json").write_text(json.dumps(RECORDS))
    argv = flags(checkpoint, None, tmp_path / "run", "--sft", tmp_path / "x.json")
    ended = script(*argv, "--val-share", "0.34", "--steps", 30, "--seq-len", 200, "--warmup", 0)
    assert ended.code == 0, ended.err
    losses = [r["loss"] for r in log(tmp_path / "run") if "loss" in r]
    assert losses[-1] < losses[0] / 3


def test_help_and_defaults(script, monkeypatch, tmp_path, checkpoint):
    ended = script("--help")
    assert ended.code == 0
    for flag, *_ in train.FLAGS:
        assert flag in ended.out
    paper = vars(train.settings(["--model", "x/llama.gguf", "--lora"]))
    expected = {"rank": 8, "alpha": 16, "train": "embed,norm", "lr": 2e-5, "warmup": 20}
    expected |= {"schedule": "constant", "weight_decay": 0, "steps": 1000, "checkpointing": True}
    expected |= {"out": "runs/llama-lora", "sinks": 4, "ratio": 0.5, "recent": 0}
    assert expected.items() <= paper.items()
    assert paper["batch_size"] * paper["accumulate"] == 64
    assert vars(train.settings(["--lora", "--lr", "3"]))["lr"] == 3
    assert vars(train.settings([]))["out"] == "runs/tiny-full"
    monkeypatch.chdir(tmp_path)
    data = ROOT / "freqkv.py"
    assert script("--model", checkpoint, "--data", data, "--steps", 1, "--device", "cpu").code == 0
    made = json.loads(Path("runs/small-full/config.json").read_text())
    assert (made["window"], made["seq_len"]) == (64, 128)  # the model's positions, and twice


# Stopped and resumed


RUN = ("--steps", "6", "--eval-every", "2", "--save-every", "2", "--accumulate", "2")


@pytest.fixture(scope="module")
def whole(checkpoint, tokens_file, tmp_path_factory):
    """Runs that nothing interrupts, to compare with: all weights, LoRA, and imitation."""
    runs = {}
    for kind in ("--full", "--lora", "--distill=1"):
        runs[kind] = tmp_path_factory.mktemp("whole") / "run"
        train.main(flags(checkpoint, tokens_file, runs[kind], *RUN, kind))
    return runs


def assert_same_run(out, expected, kind):
    assert curve(out) == curve(expected)
    name = "adapter/adapter_model" if kind == "--lora" else "model/model"
    files = [folder / f"{name}.safetensors" for folder in (out, expected)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (out / "best.json").read_bytes() == (expected / "best.json").read_bytes()
    assert not list(out.glob("**/.tmp-*"))


def stop_at(monkeypatch, *steps, number=signal.SIGINT):
    """Have the process signalled while it computes these steps."""
    step_of = train.Trainer.train_step

    def train_step(self):
        if self.step + 1 in steps:
            os.kill(os.getpid(), number)
        return step_of(self)

    monkeypatch.setattr(train.Trainer, "train_step", train_step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["--full", "--lora", "--distill=1"])
def test_resumed_exactly(
    checkpoint, tokens_file, tmp_path, script, monkeypatch, whole, kind, number
):
    out = tmp_path / "run"
    stop_at(monkeypatch, 1, 2, 5, number=number)
    before = signal.getsignal(number)
    ended = script(*flags(checkpoint, tokens_file, out, *RUN, kind))
    for step in (1, 2, 5):
        assert ended.code == 0, ended.err
        assert f"{number.name}: saved after step {step}" in ended.out
        assert f"python train.py --out {out} --resume" in ended.out
        assert (out / f"checkpoints/step-{step:06d}").exists()
        assert signal.getsignal(number) is before
        torch.manual_seed(step)  # whatever else happened since
        ended = script("--out", out, "--resume")
    assert ended.code == 0, ended.err
    assert "done" in ended.out
    assert_same_run(out, whole[kind], kind)


def test_the_second_signal_ends_it_at_once(checkpoint, tokens_file, tmp_path, script, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    assert script(*flags(checkpoint, tokens_file, tmp_path / "a")).code == 0
    assert signal.getsignal(signal.SIGINT) is before
    losses = train.losses

    def twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return losses(*args)

    monkeypatch.setattr(train, "losses", twice)
    assert script(*flags(checkpoint, tokens_file, tmp_path / "b")).code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_resumed_after_an_exception(checkpoint, tokens_file, tmp_path, script, monkeypatch, whole):
    """The log runs ahead of the last checkpoint, and its last line is cut short."""
    out, step_of = tmp_path / "run", train.Trainer.train_step
    ahead = {4}

    def train_step(self):
        if self.step in ahead:
            ahead.clear()
            raise OSError("unplugged")
        return step_of(self)

    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    argv = flags(checkpoint, tokens_file, out, *RUN, "--save-every", 3)
    assert script(*argv).code == 2
    assert log(out)[-1]["step"] == 4
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000003"]
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert script(*argv, "--resume").code == 0
    assert_same_run(out, whole["--full"], "--full")


def test_a_finished_run_can_be_made_longer(checkpoint, tokens_file, tmp_path, script, whole):
    out = tmp_path / "run"
    assert script(*flags(checkpoint, tokens_file, out, *RUN, "--steps", 4)).code == 0
    assert script("--out", out, "--resume", "--steps", 6).code == 0
    assert_same_run(out, whole["--full"], "--full")
    assert script("--out", out, "--resume").code == 0  # nothing left to do: the results again
    assert_same_run(out, whole["--full"], "--full")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"{}", "was without schedule, must be of a run of train.py"),
        ("log.jsonl", b"junk\n", "was damaged"),
        ("log.jsonl", b"{}\n", "was damaged"),
        ("data/tokens.bin", b"12345678", "data: was damaged"),
        ("data/tokens.json", b"{}", None),  # is made anew
        ("checkpoints/step-000003/weights.safetensors", b"junk", "step-000003: was damaged"),
        ("checkpoints/step-000003/state.pt", b"", "step-000003: was damaged"),
        ("checkpoints/step-000003/record.json", b"{}", "step-000003: was damaged"),
        ("checkpoints/step-more/x", b"", None),  # is no checkpoint
    ],
)
def test_resuming_a_damaged_run(checkpoint, tmp_path, script, name, content, says):
    out = tmp_path / "run"
    assert script(*flags(checkpoint, ROOT / "freqkv.py", out)).code == 0
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(content)
    ended = script("--out", out, "--resume", "--steps", 4)
    if says is None:
        assert ended.code == 0, ended.err
    else:
        assert ended.code == 2
        assert ended.err.count("\n") == 1
        assert says in ended.err


def test_training_goes_on_when_nobody_reads_what_it_prints(checkpoint, tokens_file, tmp_path):
    argv = flags(checkpoint, tokens_file, tmp_path / "run", "--eval-every", 1)
    command = [sys.executable, "-u", ROOT / "train.py", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.readline()
        run.stdout.close()
        errors = run.stderr.read()
    assert run.returncode == 0, errors
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_resuming_with_other_settings_is_refused(checkpoint, tokens_file, tmp_path, script):
    out = tmp_path / "run"
    argv = flags(checkpoint, tokens_file, out)
    assert script(*argv).code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    ended = script(*argv, "--resume", "--lr", "0.5", "--seq-len", 30, "--lora", "--steps", 9)
    assert ended.code == 2
    for words in ("--lr: was 0.5, must be 0.01", "--seq-len: was 30, must be 40", "--lora: was"):
        assert words in ended.err
    assert "steps" not in ended.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    other = tmp_path / "cosine"
    assert script(*flags(checkpoint, tokens_file, other, "--schedule", "cosine")).code == 0
    ended = script("--out", other, "--resume", "--steps", 9)
    assert (ended.code, "--steps: was 9, must be 3" in ended.err) == (2, True)


def test_resuming_with_other_data_is_refused(checkpoint, tmp_path, script):
    file = tmp_path / "x.txt"
    file.write_text("some words of a text\n" * 50)
    assert script(*flags(checkpoint, file, tmp_path / "run")).code == 0
    file.write_text("other words of a text\n" * 50)
    ended = script("--out", tmp_path / "run", "--resume", "--steps", 5)
    assert ended.code == 2
    assert "was changed since the run began" in ended.err


def test_resuming_with_another_model_is_refused(tokens_file, tmp_path, script):
    model, tokenizer = tmp_path / "model", corpus.train_tokenizer([ROOT / "train.py"], "400")
    for width, code in ((48, 0), (64, 2)):
        save_model(tiny_model(tiny_config(vocab_size=400, intermediate_size=width)), model)
        (model / "tokenizer.model").write_bytes(tokenizer)
        ended = script(*flags(model, tokens_file, tmp_path / "run", "--resume"))
        assert ended.code == code
    assert "step-000003: was of another model" in ended.err


# Killed


SERVER = """
import json, os, signal, sys
import torch, torch._dynamo  # which the first use of torch would import in every fork
torch.set_num_threads(1)
import cli, train
train.plot = lambda out: ""

def killing(function, left):
    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counted

for line in sys.stdin:
    argv, calls, seconds = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        left = [calls]
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, killing(getattr(os, name), left))
        train.save_file, torch.save = killing(train.save_file, left), killing(torch.save, left)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM has no handler: it kills
        cli.run(lambda: train.main(argv), "train.py")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed():
    """Run train.py in a fork of a process that has imported it, and kill that at a call to the
    file system or after some seconds; returns its exit code, below 0 where it was killed."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(argv, calls=0, seconds=0.0):
            process.stdin.write(json.dumps([argv, calls, seconds]) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run
        process.stdin.close()


EAGER = "--save-every", "1", "--keep-last", "1"  # so that most calls belong to a save


@pytest.mark.parametrize("call", [1, 4, 9, 13, 15, 17, 28, 60])
def test_killed_at_a_call(checkpoint, tokens_file, tmp_path, killed, whole, call):
    out = tmp_path / "run"
    argv = flags(checkpoint, tokens_file, out, *RUN, *EAGER, "--resume")
    assert killed(argv, calls=call) == -signal.SIGKILL
    assert killed(argv) == 0
    assert_same_run(out, whole["--full"], "--full")


@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again(checkpoint, tokens_file, tmp_path, killed, whole, seed):
    """At random: at calls to the file system, and by the clock, in the middle of anything."""
    out, draw, ends, began = tmp_path / "run", random.Random(seed), [], time.monotonic()
    assert killed(flags(checkpoint, tokens_file, tmp_path / "timed", *RUN, *EAGER)) == 0
    seconds = time.monotonic() - began
    argv = flags(checkpoint, tokens_file, out, *RUN, *EAGER, "--resume")
    while not ends or ends[-1] != 0:
        when = {"calls": draw.randint(1, 40)} if draw.random() < 0.5 else {}
        ends.append(killed(argv, **when or {"seconds": draw.uniform(0.01, seconds)}))
        assert ends[-1] in (0, -signal.SIGKILL, -signal.SIGALRM)
        saved = list(out.glob("checkpoints/step-*"))
        assert all(len(list(path.iterdir())) == 3 for path in saved)
    assert len(ends) > 2
    assert_same_run(out, whole["--full"], "--full")


def test_the_command_itself(checkpoint, tokens_file, tmp_path):
    """As a process of its own: SIGTERM saves, exit code 0."""
    out = tmp_path / "run"
    argv = [sys.executable, "train.py", *flags(checkpoint, tokens_file, out, "--steps", 100_000)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, cwd=ROOT, **pipes) as process:
        while process.poll() is None and not (out / "log.jsonl").exists():
            time.sleep(0.05)
        time.sleep(0.2)
        process.terminate()
        said, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    last = log(out)[-1]["step"]
    assert f"SIGTERM: saved after step {last}" in said
    assert (out / f"checkpoints/step-{last:06d}/weights.safetensors").exists()


# Bad input


def write(name, content):
    """A bad data file: made in the test's folder, given as --data."""

    def make(folder):
        (folder / name).write_bytes(content)
        return "--data", folder / name

    return make


def sft(content):
    return lambda folder: ("--sft", write("x.json", content)(folder)[1])


BAD = {
    "empty": (write("x.txt", b""), "x.txt: was empty, must hold text or tokens"),
    "short": (write("x.txt", b"a few words"), "must be over --seq-len, 40"),
    "not UTF-8": (write("x.txt", b"words \xff" * 99), "x.txt: was not UTF-8 at byte 6"),
    "beyond the vocabulary": (
        write("x.bin", np.arange(401, dtype=np.uint16).tobytes()),
        "x.bin: held id 400 as uint16, must be below the vocabulary, 400",
    ),
    "short tokens": (write("x.bin", bytes(80)), "must be over --seq-len, 40"),
    "half a token": (
        write("x.bin", bytes(401)),
        "x.bin: was 401 bytes, must be whole uint16 tokens",
    ),
    "no such file": (lambda folder: ("--data", "no/such"), "no/such held no file"),
    "no JSON": (sft(b"{"), "x.json: was not JSON"),
    "no record": (sft(b"[]"), "must have one"),
    "no output": (sft(b'[{"instruction": "a"}]'), "record 0: was wrong (KeyError('output'))"),
    "no text": (sft(b'[{"instruction": 3, "output": "a"}]'), "record 0: was wrong"),
    "no role": (sft(b'[{"messages": [{"role": "x", "content": "a"}]}]'), "record 0: was wrong"),
    "no object": (sft(b"[3]"), "record 0: was wrong"),
    "answer too far": (
        sft(json.dumps([{"instruction": "word " * 99, "output": "a"}]).encode()),
        "had no answer within --seq-len, 40",
    ),
    "wide window": (lambda folder: ("--window", 65), "--window: was 65, must be at most"),
    "no teacher so far": (
        lambda folder: ("--distill", 1, "--seq-len", 65),
        "--seq-len: was 65, must be at most the model's 64 with --distill",
    ),
    "no span": (lambda folder: ("--sinks", 16), "sinks + recent: was 16, must be below window"),
    "ratio 1": (lambda folder: ("--ratio", 1), "ratio: was 1.0, must be a number in [0, 1)"),
    "no model": (lambda folder: ("--model", "no/such"), "no/such"),
    "no adapter": (lambda folder: ("--lora", "--adapter", "no/such"), "no/such"),
    "no device": (lambda folder: ("--device", "cuda:99"), "--device: was 'cuda:99'"),
    "no steps": (
        lambda folder: ("--steps", 0),
        "--steps: was '0', must be a whole number, 1 or more",
    ),
    "no part": (lambda folder: ("--lora", "--train", "head"), "train: was 'head', must be of"),
    "rate": (lambda folder: ("--lr", "nan"), "--lr: was 'nan', must be a number, 0 or more"),
    "both": (lambda folder: ("--lora", "--full"), "--full: was given with --lora"),
    "merge alone": (lambda folder: ("--merge", "x"), "--merge: was given alone"),
    "merge over": (lambda folder: ("--lora", "--merge", folder), "was there already, must be new"),
    "merge into the run": (
        lambda folder: ("--lora", "--merge", folder / "run/adapter"),
        "run/adapter, must be outside the run's folder",
    ),
    "merge over the run": (
        lambda folder: ("--lora", "--merge", folder / "run"),
        "run, must be outside the run's folder",
    ),
    "ratios of other layers": (
        lambda folder: ("--ratio", "0.5,0.5,0.5"),
        "--ratio: was 3 numbers, must be 1 or 2",
    ),
    "no ratio": (
        lambda folder: ("--ratio", "half"),
        "--ratio: was 'half', must be a number, 0 or more, at most 1",
    ),
    "endless rate": (lambda folder: ("--lr", "1e300"), "--lr: was '1e300', must be a number"),
    "endless rank": (
        lambda folder: ("--lora", "--rank", 10**13),
        "rank, alpha: were 10000000000000, 16.0, must be 1 to 32",
    ),
    "no end of lists": (sft(b"[" * 100_000), "was not JSON"),
    "half a character": (
        sft(json.dumps([{"instruction": "\ud800", "output": "a"}]).encode()),
        "record 0: was wrong",
    ),
    "no tokenizer": (
        lambda folder: ("--init", ROOT / "tests/data/meta/hf/config.json"),
        "--tokenizer: was not given with --init",
    ),
    "no size": (
        lambda folder: (
            "--init",
            ROOT / "tests/data/meta/hf/config.json",
            "--tokenizer",
            "train:x",
        ),
        "--tokenizer: was train:x",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(checkpoint, tmp_path, script, name):
    make, message = BAD[name]
    wrong = make(tmp_path)
    source = checkpoint if "--model" not in wrong and "--init" not in wrong else None
    data = None if "--data" in wrong or "--sft" in wrong else ROOT / "freqkv.py"
    ended = script(*flags(source, data, tmp_path / "run"), *wrong)
    assert ended.code == 2
    assert ended.err.startswith("train.py: error: ")
    assert ended.err.count("\n") == 1
    assert message in ended.err
    # The same folder is free for a run without the mistake.
    assert not (tmp_path / "run/config.json").exists()
    assert not (tmp_path / "run/checkpoints").exists()
    ended = script(*flags(checkpoint, ROOT / "freqkv.py", tmp_path / "run", "--steps", 1))
    assert ended.code == 0, ended.err


def test_an_adapter_of_another_model_is_refused(checkpoint, tokens_file, tmp_path, script):
    argv = flags(checkpoint, tokens_file, tmp_path / "run", "--lora", "--accumulate", 1)
    assert script(*argv).code == 0
    save_model(tiny_model(tiny_config(vocab_size=400, hidden_size=64)), tmp_path / "wide")
    for more in (["--lora"], ["--merge", tmp_path / "merged"]):
        adapter = "--adapter", tmp_path / "run/adapter", *more
        ended = script("--model", tmp_path / "wide", "--out", tmp_path / "new", *adapter)
        assert ended.code == 2
        assert "adapter_model.safetensors: tensor base_model" in ended.err
    assert not (tmp_path / "merged").exists()


def test_a_run_is_not_overwritten(checkpoint, tokens_file, tmp_path, script):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for more in ([], ["--resume"]):  # not a run at all
        ended = script(*flags(checkpoint, tokens_file, out, *more))
        assert (ended.code, "run was there already" in ended.err) == (2, True)
    (out / "thesis.txt").unlink()
    assert script(*flags(checkpoint, tokens_file, out)).code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert script(*flags(checkpoint, tokens_file, out)).code == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("how", ["save_file", "torch.save", "fsync"])
def test_a_full_disk(checkpoint, tokens_file, tmp_path, script, monkeypatch, whole, how):
    """At the second save: one line, the first checkpoint as it was, and the run can go on."""
    out, calls = tmp_path / "run", []

    def full(function, error):
        def write(*args, **kwargs):
            calls.append(0)
            if len(calls) > (7 if how == "fsync" else 1):
                raise error
            return function(*args, **kwargs)

        return write

    error = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        if how == "save_file":
            rust = SafetensorError("I/O error: No space left on device (os error 28)")
            patch.setattr(train, "save_file", full(train.save_file, rust))
        elif how == "torch.save":
            patch.setattr(torch, "save", full(torch.save, error))
        else:
            patch.setattr(train, "_sync", full(train._sync, error))
        argv = flags(checkpoint, tokens_file, out, *RUN)
        ended = script(*argv)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "step-000004: not written" in ended.err
    assert "No space left on device" in ended.err
    assert f"newest good checkpoint: {out / 'checkpoints/step-000002'}" in ended.err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    assert script(*argv, "--resume").code == 0
    assert_same_run(out, whole["--full"], "--full")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite(checkpoint, tokens_file, tmp_path, script, monkeypatch, what):
    out, losses, seen = tmp_path / "run", train.losses, []

    def broken(*args):
        seen.append(0)
        for loss in losses(*args):
            if len(seen) != 4:  # an evaluation and three steps
                yield loss
            elif what == "loss":
                yield loss * math.nan
            else:
                yield loss + (loss - loss.detach()).sqrt()  # a number, its slope infinite

    monkeypatch.setattr(train, "losses", broken)
    more = "--eval-every", 0, "--save-every", 1, "--steps", 5
    ended = script(*flags(checkpoint, tokens_file, out, *more))
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "at step 3: was" in ended.err
    assert "step-000002" in ended.err
    assert [r["step"] for r in log(out) if "loss" in r] == [1, 2]
    weights = load_file(out / "checkpoints/step-000002/weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
