"""train.py, settings.py, checkpoints.py: losses, gradients, runs that are stopped, bad input.

Run: pytest tests/test_train.py
"""

import errno
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.testing import assert_close

import checkpoints
import cli
import train
from data import IGNORE
from freqkv import FreqKVAttention, FreqKVConfig, distinct, lowband, newest
from levels import LevelsAttention, LevelsConfig
from lora import load_adapter
from model import causal_attention
from settings import choose_settings, make_parser, read_settings
from tests.helpers import DEVICES, ROOT, random_tokens, tiny_checkpoint, tiny_config, tiny_model
from weights import load_model, load_tokenizer, save_model

CONFIG = FreqKVConfig(window=16, sinks=2)
DRAW = train.draw_losses


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_checkpoint(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """Drawing takes longer than training does here; one test draws."""
    monkeypatch.setattr(train, "draw_losses", lambda out: "not drawn")


@pytest.fixture(scope="module")
def tokens_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "tokens.bin"
    np.random.default_rng(0).integers(0, 50, 1500).astype(np.uint16).tofile(file)
    return file


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text((ROOT / "dct.py").read_text()[:3000])
    return file


def flags(checkpoint, data, out, *more):
    """A run of three steps that compresses four times in each row."""
    argv = ["--window", 16, "--sinks", 2, "--seq-len", 40, "--batch-size", 2, "--accumulate", 1]
    argv += ["--steps", 3, "--lr", 0.01, "--eval-rows", 2, "--device", "cpu", "--out", out]
    argv += ["--no-checkpointing"]  # faster
    if checkpoint is not None:
        argv += ["--model", checkpoint]
    if data is not None:
        argv += ["--data", data]
    return [str(word) for word in [*argv, *more]]


@pytest.fixture
def script(outcome):
    """Run train.py in this process; its exit code, stdout and stderr."""
    return lambda *argv: outcome(train, *argv)


@pytest.fixture
def succeed(script):
    """Run train.py to its end; its stdout."""

    def run(*argv):
        ended = script(*argv)
        assert ended.code == 0, ended.err
        return ended.out

    return run


@pytest.fixture
def fail(script):
    """Run train.py on wrong input; its one line on stderr."""

    def run(*argv):
        ended = script(*argv)
        assert ended.code == 2
        assert ended.err.startswith("train.py: error: ")
        assert ended.err.count("\n") == 1
        return ended.err

    return run


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def values(out, name):
    """What the log has by this name, by step."""
    return {record["step"]: record[name] for record in log(out) if name in record}


def files_in(folder):
    """The content of every file in a folder, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def settings_of(*argv):
    """The settings that a command line gives."""
    given = vars(make_parser().parse_args([str(x) for x in argv]))
    return choose_settings(given, False)


# Settings

GIVEN = [
    ("--model", "x"), ("--tokenizer", "x"), ("--adapter", "smollm2-freqkv"), ("--data", ["x", "y"]),
    ("--bin-dtype", "uint32"), ("--sft", "x"), ("--seq-len", 3), ("--val-share", 0.25),
    ("--rank", 3), ("--alpha", 3.0), ("--train", "x"), ("--attention", "distinct"),
    ("--window", 3), ("--schedule", "levels"), ("--block", 3), ("--vary", True),
    ("--sinks", 3), ("--ratio", 0.25), ("--recent", 3), ("--distill", 0.25),
    ("--steps", 3), ("--batch-size", 3), ("--accumulate", 3), ("--lr", 0.25), ("--warmup", 3),
    ("--lr-schedule", "cosine"), ("--weight-decay", 0.25), ("--grad-clip", 0.25), ("--seed", 3),
    ("--out", "x"), ("--eval-every", 3), ("--eval-rows", 3), ("--save-every", 3),
    ("--keep-last", 3), ("--save-dtype", "float32"), ("--device", "x"), ("--dtype", "bfloat16"),
    ("--full", True), ("--lora", True), ("--checkpointing", True), ("--no-checkpointing", False),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), GIVEN)
def test_flags(flag, value):
    words = [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
    needed = ["--lora"] if flag in ("--rank", "--alpha", "--train") else []
    settings = settings_of(flag, *words, *needed)
    name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
    assert getattr(settings, name) == value


def test_an_adapter_is_trained_on_as_it_was_tuned(tmp_path):
    tuned = {"attention": "distinct", "window": 64, "sinks": 3, "ratio": 0.75, "recent": 8}
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "freqkv.json").write_text(json.dumps(tuned | {"schedule": "paper"}))
    settings = train.asdict(settings_of("--lora", "--adapter", tmp_path))
    assert (tuned | {"schedule": "paper", "seq_len": None}).items() <= settings.items()
    settings = train.asdict(settings_of("--lora", "--adapter", tmp_path, "--window", 32))
    expected = {"attention": "distinct", "window": 32, "sinks": 3, "ratio": 0.75, "recent": None}
    assert expected.items() <= settings.items()
    settings = train.asdict(settings_of("--lora", "--adapter", tmp_path, "--schedule", "levels"))
    expected = {"schedule": "levels", "window": 64, "sinks": 3, "ratio": None, "recent": None}
    assert expected.items() <= settings.items()


def test_every_flag_is_in_help_and_tried_here(script):
    shown = script("--help").out
    tried = {flag for flag, _ in GIVEN} | {"--init", "--merge", "--resume", "--help"}
    assert (
        set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", shown, re.MULTILINE)) | {"--no-checkpointing"}
        == tried
    )
    for words in (
        "[100; --lora 1000, --init 1000]",
        "[2e-05; --init 0.001]",
        "[tiny]",
        "else 0.5]",
    ):
        assert words in " ".join(shown.split())


def test_defaults_by_recipe(tmp_path):
    paper = settings_of("--model", "x/llama.gguf", "--lora")
    expected = {"rank": 8, "alpha": 16, "train": "embed,norm", "lr": 2e-5, "warmup": 20}
    expected |= {"lr_schedule": "constant", "weight_decay": 0, "steps": 1000, "checkpointing": True}
    expected |= {"out": "runs/llama-lora", "sinks": 4, "schedule": "paper"}
    assert expected.items() <= train.asdict(paper).items()
    slots = cli.given_settings(paper)
    assert cli.make_schedule(slots, tiny_config(max_position_embeddings=8192)) == FreqKVConfig()
    assert (FreqKVConfig.ratio, FreqKVConfig.recent) == (0.5, 0)
    assert paper.batch_size * paper.accumulate == 64
    assert settings_of("--lora", "--steps", 3).steps == 3
    assert settings_of().out == "runs/tiny-full"
    assert settings_of("--sft", "x.json", "--lora").out == "runs/tiny-lora-sft"
    scratch = settings_of("--init", tmp_path / "shape/config.json")
    assert (scratch.out, scratch.lr_schedule, scratch.warmup) == ("runs/shape-init", "cosine", 100)


def test_window_and_length_are_chosen_from_the_model(checkpoint, text_file, tmp_path):
    for attention, length in (("freqkv", 128), ("full", 64)):
        argv = "--model", checkpoint, "--data", text_file, "--out", tmp_path / attention
        settings = settings_of(*argv, "--attention", attention, "--device", "cpu")
        trainer, _ = train.prepare(settings, False)
        assert (trainer.settings.window, trainer.settings.seq_len) == (64, length)
        saved = read_settings(tmp_path / attention / "config.json")
        assert saved == trainer.settings
        assert len(trainer.data.train[0][0]) == length


def test_text_is_tokenized_again_for_another_share(checkpoint, text_file, tmp_path):
    lengths = []
    for share in (0.1, 0.3):
        out = tmp_path / str(share)
        settings = settings_of(*flags(checkpoint, text_file, out, "--val-share", share))
        rows = train.read_data(settings, load_tokenizer(checkpoint), 400, 40)
        lengths.append(len(rows.held_out))
    assert lengths[1] > 2 * lengths[0] > 0


@pytest.mark.parametrize("name", ["freqkv", "distinct", "window", "full"])
def test_attention(name):
    schedule = FreqKVConfig(16, 2, 0.5, 3)
    attend = train.choose_attention(name, schedule)
    if name == "full":
        assert attend is causal_attention
    else:
        assert attend.config == schedule
        assert attend.operator is {"freqkv": lowband, "distinct": distinct, "window": newest}[name]


def test_attention_on_levels():
    schedule = LevelsConfig(32, 2, 4, 2)
    attend = train.choose_attention("distinct", schedule)
    assert isinstance(attend, LevelsAttention)
    assert (attend.config, attend.operator) == (schedule, distinct)


@pytest.mark.parametrize("schedule", [FreqKVConfig(64, 2, 0.5, 3), LevelsConfig(64, 2, 4, 4)])
def test_a_varied_schedule_is_another_for_another_step(schedule):
    seen = [train.vary_schedule(schedule, seed=0, step=step) for step in range(60)]
    assert seen == [train.vary_schedule(schedule, seed=0, step=step) for step in range(60)]
    assert {varied.window for varied in seen} == {64, 32, 16}
    shares = {(varied.window, varied.recent * 8 // varied.window) for varied in seen}
    assert {share for _, share in shares} == {0, 1, 2, 4}
    assert len(shares) == 12
    assert {varied.sinks for varied in seen} == {2}


@pytest.mark.parametrize(
    "flags",
    [
        ["--window", "16"],  # sinks 4 and two recent do not fit into 4
        ["--window", "64", "--sinks", "20"],
        ["--window", "64", "--schedule", "levels", "--block", "8"],
    ],
)
def test_a_window_too_short_to_vary_is_refused_at_the_start(fail, flags):
    said = fail("--vary", *flags)
    assert f"--vary: was with --window {flags[1]}, must be with a longer one: 1/" in said


@pytest.mark.parametrize("flag", ["--checkpointing", "--no-checkpointing"])
def test_checkpointing_is_passed_on(checkpoint, flag):
    settings = settings_of("--model", checkpoint, flag)
    model = train.make_model(settings, torch.device("cpu"), torch.float32)
    assert model.gradient_checkpointing == (flag == "--checkpointing")


@pytest.mark.parametrize("parts", ["none", "norm", "embed,norm"])
def test_what_is_trained_is_float32_and_the_rest_as_asked(checkpoint, parts):
    settings = settings_of("--model", checkpoint, "--lora", "--train", parts)
    model = train.make_model(settings, torch.device("cpu"), torch.bfloat16)
    for name, parameter in model.named_parameters():
        whole = ("norm" in name and "norm" in parts) or ("embed" in name and "embed" in parts)
        assert parameter.requires_grad == (whole or "lora" in name)
        wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == wanted


# Losses and gradients


def total_loss(model, attend, rows, teacher=None, batch_size=4, dtype="float32", distill=0.0):
    settings = train.Settings("", batch_size=batch_size, dtype=dtype, distill=distill)
    return sum(train.compute_losses(model, attend, rows, settings, teacher))


def gradients(model, attend, rows, **changes):
    model.zero_grad()
    loss = total_loss(model, attend, rows, **changes)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def rows_of(tokens):
    return [(row[:-1], row[1:].clone()) for row in tokens]


@pytest.mark.parametrize("tied", [False, True])
def test_loss_in_chunks_equals_cross_entropy(monkeypatch, tied):
    monkeypatch.setattr(train, "CHUNK", 7)
    model = tiny_model(tiny_config(tie_word_embeddings=tied))
    hidden = torch.randn(2, 20, 32, requires_grad=True)
    labels = random_tokens(2, 20, seed=3)
    labels[0, :5] = IGNORE
    labels[1, 11] = IGNORE
    head = model.embed_tokens.weight if tied else model.lm_head.weight
    logits = model.logits(hidden).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    expected_gradients = torch.autograd.grad(expected, (hidden, head))
    lengths = []
    compute_logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: lengths.append(len(x)) or compute_logits(x))
    loss = train.sum_losses(model, hidden, labels)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, (hidden, head)), expected_gradients)
    assert max(lengths) == 7
    assert sum(lengths) == 2 * 34  # once forward and once backward, labelled tokens alone


def test_gradients_equal_finite_differences():
    """Through three rounds of compression, in float64, along a random direction of each weight."""
    model = tiny_model().double()
    attend = FreqKVAttention(CONFIG)
    rows = rows_of(random_tokens(2, 38))
    assert CONFIG.rounds(37) == 3
    _, slopes = gradients(model, attend, rows)
    step = 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += step * direction
            above = total_loss(model, attend, rows)
            parameter -= 2 * step * direction
            below = total_loss(model, attend, rows)
            parameter += step * direction
        difference = ((above - below) / (2 * step)).item()
        slope = (slopes[name] * direction).sum().item()
        assert difference == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_imitation_is_of_the_predictions_of_full_attention(monkeypatch, share):
    """Against the divergence as it is defined, token by token, labelled tokens alone."""
    monkeypatch.setattr(train, "CHUNK", 7)
    model = tiny_model().double()
    attend = FreqKVAttention(CONFIG)
    teacher = train.copy_frozen(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    tokens = random_tokens(1, 40)
    labels = random_tokens(1, 40, seed=3)
    labels[0, :5] = IGNORE
    student = model(tokens, attend)[0].softmax(-1)
    target = teacher(tokens, causal_attention)[0].softmax(-1)
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(5, 40):
        imitation = (target[t] * (target[t] / student[t]).log()).sum()
        expected += (share * imitation - (1 - share) * student[t, labels[0, t]].log()) / 35
    loss = total_loss(model, attend, [(tokens[0], labels[0])], teacher, distill=share)
    weights = list(model.parameters())
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_teacher_stays_and_shares_what_is_frozen(checkpoint, tokens_file, tmp_path):
    argv = flags(checkpoint, tokens_file, tmp_path / "run", "--lora", "--train", "norm")
    trainer, _ = train.prepare(settings_of(*argv, "--distill", 1, "--warmup", 0), False)
    model, teacher = trainer.model, trainer.teacher
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    trainer.train_step()
    assert_close(dict(teacher.named_parameters()), before, rtol=0, atol=0)
    assert model.layers[0].mlp.up_proj.weight is teacher.layers[0].mlp.up_proj.weight
    assert not model.norm.weight.equal(teacher.norm.weight)


def test_checkpointing_and_accumulation_change_no_gradient():
    model = tiny_model()
    attend = FreqKVAttention(CONFIG)
    rows = rows_of(random_tokens(6, 30))
    for (_, labels), cut in zip(rows, (0, 3, 9, 20, 0, 28), strict=True):
        labels[:cut] = IGNORE  # unequal counts: a mean of means would be another
    expected = gradients(model, attend, rows, batch_size=6)
    for checkpointing, batch_size in ((True, 6), (False, 1), (True, 4)):
        model.gradient_checkpointing = checkpointing
        assert_close(gradients(model, attend, rows, batch_size=batch_size), expected)


def test_padding_changes_nothing():
    """Rows of unequal length in one batch, against one row at a time."""
    model = tiny_model()
    attend = FreqKVAttention(CONFIG)
    rows = rows_of(row[: 12 + 9 * i] for i, row in enumerate(random_tokens(4, 60)))
    one_by_one = gradients(model, attend, rows, batch_size=1)
    assert_close(gradients(model, attend, rows, batch_size=4), one_by_one)
    total = 0.0
    for tokens, labels in rows:
        total += F.cross_entropy(model(tokens[None], attend)[0], labels, reduction="sum").item()
    count = sum(len(labels) for _, labels in rows)
    assert one_by_one[0] == pytest.approx(total / count, rel=1e-5)


def test_products_in_bfloat16():
    model = tiny_model()
    attend = FreqKVAttention(CONFIG)
    rows = rows_of(random_tokens(2, 40))
    exact, _ = gradients(model, attend, rows)
    low, low_gradients = gradients(model, attend, rows, dtype="bfloat16")
    assert low != exact
    assert low == pytest.approx(exact, rel=0.02)
    assert {gradient.dtype for gradient in low_gradients.values()} == {torch.float32}


def test_one_step_of_the_optimizer(checkpoint, tokens_file, tmp_path, succeed, monkeypatch):
    """AdamW's first step by hand: decay of matrices, then the rate against the gradient's sign."""
    optimizer_step = torch.optim.AdamW.step
    norms = []

    def measure(self):
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(grads).norm().item())
        optimizer_step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", measure)
    out = tmp_path / "run"
    more = "--steps", 1, "--warmup", 0, "--weight-decay", 0.5, "--grad-clip", 0.125
    succeed(*flags(checkpoint, tokens_file, out, *more, "--save-dtype", "float32"))
    assert norms == [pytest.approx(0.125, rel=1e-4)]
    assert values(out, "grad_norm")[1] > 0.2  # as it was before
    before = load_model(checkpoint).state_dict()
    after = load_model(out / "model").state_dict()
    for name, weight in before.items():
        decay = 0.0 if "norm" in name else 0.5
        moved = (after[name] - weight * (1 - 0.01 * decay)).abs()
        assert moved.max() <= 0.01 + 1e-6
        assert moved.median() == pytest.approx(0.01, rel=0.02) or "embed" in name


def test_the_gradient_may_be_of_any_length(checkpoint, tokens_file, tmp_path, succeed):
    """--grad-clip 0: as a bound that is never met, and not as one of 0."""
    rates = "--warmup", 0, "--save-dtype", "float32"
    weights = []
    for clip in (0, 1e6):
        out = tmp_path / str(clip)
        succeed(*flags(checkpoint, tokens_file, out, *rates, "--grad-clip", clip))
        weights.append(load_model(out / "model").state_dict())
    assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_gradients_do_not_stay_for_the_next_step(checkpoint, tokens_file, tmp_path):
    argv = flags(checkpoint, tokens_file, tmp_path / "run", "--lr", 0, "--seed", 3)
    trainer, _ = train.prepare(settings_of(*argv), False)
    trainer.train_step()
    trainer.train_step()
    rows = trainer.data.choose_rows(3, 2, 2)
    loss, slopes = gradients(trainer.model, trainer.attend, rows, batch_size=2)
    assert values(tmp_path / "run", "loss")[2] == pytest.approx(loss)
    norm = torch.cat([slope.flatten() for slope in slopes.values()]).norm()
    assert values(tmp_path / "run", "grad_norm")[2] == pytest.approx(norm.item(), rel=1e-5)


def test_learning_rate(checkpoint, tokens_file, tmp_path, succeed):
    settings = train.Settings("", lr=2.0, warmup=4, steps=12)
    rates = [train.choose_rate(settings, step) for step in range(1, 13)]
    assert rates == [0.5, 1, 1.5] + [2.0] * 9
    settings = train.replace(settings, lr_schedule="cosine")
    rates = [train.choose_rate(settings, step) for step in range(1, 13)]
    assert rates[:4] == [0.5, 1, 1.5, 2]
    assert rates[7] == pytest.approx(1 + math.cos(math.pi * 4 / 9))
    assert 0 < rates[-1] < 0.1
    assert train.choose_rate(train.replace(settings, warmup=0), 12) > 0
    out = tmp_path / "run"
    succeed(*flags(checkpoint, tokens_file, out, "--warmup", 2, "--lr-schedule", "cosine"))
    assert list(values(out, "lr").values()) == pytest.approx([0.005, 0.01, 0.005])


# Runs


def test_a_run_leaves_what_it_says(checkpoint, text_file, tmp_path, succeed):
    out = tmp_path / "run"
    before = files_in(checkpoint)
    more = "--eval-every", 2, "--save-every", 1, "--accumulate", 2
    said = succeed(*flags(checkpoint, text_file, out, *more))
    assert "from step 0 to 3" in said
    assert f"python generate.py --model {out / 'model'}" in said
    assert files_in(checkpoint) == before  # weights are mapped from the file, and not written
    assert list(values(out, "loss")) == [1, 2, 3]
    assert list(values(out, "val_loss")) == [0, 2, 3]
    assert set(values(out, "tokens").values()) == {2 * 2 * 40}
    for name in ("tokens_per_second", "grad_norm", "memory_bytes", "seconds"):
        assert min(values(out, name).values()) > 0
    sizes = json.loads((out / "data/tokens.json").read_text())
    density = sizes["held_out_tokens"] / sizes["held_out_bytes"]
    for step, bits in values(out, "bits_per_byte").items():
        assert bits == pytest.approx(values(out, "val_loss")[step] / math.log(2) * density)
    model = load_model(out / "model")
    assert model.norm.weight.dtype == torch.bfloat16
    assert not torch.equal(
        model.embed_tokens.weight.float(), load_model(checkpoint).embed_tokens.weight
    )
    load_tokenizer(out / "model").check_fits(model.config.vocab_size)
    assert json.loads((out / "model/freqkv.json").read_text()) == {
        "attention": "freqkv", "window": 16, "sinks": 2, "ratio": 0.5, "recent": 0, "seq_len": 40,
        "schedule": "paper",
    }  # fmt: skip


def test_evaluation_reads_rows_from_all_that_is_held_out(checkpoint, tokens_file, tmp_path):
    argv = flags(checkpoint, tokens_file, tmp_path / "run", "--val-share", 0.5)
    trainer, _ = train.prepare(settings_of(*argv, "--eval-rows", 3, "--distill", 0.5), False)
    trainer.evaluate()
    held_out = trainer.data.held_out
    assert len(held_out) == 18
    rows = [held_out[0], held_out[8], held_out[17]]
    expected = total_loss(trainer.model, trainer.attend, rows).item()
    assert values(tmp_path / "run", "val_loss") == {0: pytest.approx(expected)}
    trainer.settings = train.replace(trainer.settings, eval_rows=1000)
    trainer.evaluate()
    expected = total_loss(trainer.model, trainer.attend, list(held_out)).item()
    assert trainer.evaluation["val_loss"] == pytest.approx(expected)


def test_a_run_without_evaluations(checkpoint, tokens_file, tmp_path, succeed):
    out = tmp_path / "run"
    succeed(*flags(checkpoint, tokens_file, out, "--val-share", 0, "--save-every", 0))
    assert values(out, "val_loss") == {}
    assert json.loads((out / "best.json").read_text()) == {}
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000003"]


@pytest.mark.parametrize("attention", ["freqkv", "distinct", "window", "full"])
def test_the_loss_falls_with_each_attention(checkpoint, tmp_path, succeed, attention):
    file = tmp_path / "x.bin"
    np.tile(np.arange(2, 40, dtype=np.uint16), 40).tofile(file)
    more = "--attention", attention, "--warmup", 0, "--lr", 0.03, "--eval-every", 0
    succeed(*flags(checkpoint, file, tmp_path / "run", *more, "--steps", 10))
    losses = values(tmp_path / "run", "val_loss")
    assert list(losses) == [0, 10]
    assert losses[10] < losses[0] - 2
    assert json.loads((tmp_path / "run/model/freqkv.json").read_text())["attention"] == attention


def test_instruction_tuning(checkpoint, tmp_path, succeed):
    records = [
        {"instruction": "Say yes.", "output": "yes yes"},
        {"instruction": "a", "output": "b"},
    ]
    (tmp_path / "x.json").write_text(json.dumps(records))
    argv = flags(checkpoint, None, tmp_path / "run", "--sft", tmp_path / "x.json", "--distill", 0.5)
    said = succeed(*argv, "--steps", 20, "--warmup", 0, "--lr", 0.03)
    assert "2 of 2 records" in said
    losses = values(tmp_path / "run", "loss")
    assert losses[20] < losses[1] / 2


def test_the_last_checkpoints_and_the_best_stay(
    checkpoint, tokens_file, tmp_path, succeed, monkeypatch
):
    out = tmp_path / "run"
    # Downhill for two steps, then uphill.
    monkeypatch.setattr(train, "choose_rate", lambda settings, step: 0.02 * (1 if step < 3 else -1))
    more = "--steps", 6, "--eval-every", 2, "--save-every", 1
    succeed(*flags(checkpoint, tokens_file, out, *more))
    losses = values(out, "val_loss")
    assert losses[2] < min(losses[4], losses[6])
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000005", "step-000006"]
    best = json.loads((out / "best.json").read_text())
    assert best == {"step": 2, "val_loss": losses[2]}
    # A resumed run does not forget it, and may keep fewer.
    succeed("--out", out, "--resume", "--steps", 8, "--keep-last", 1)
    assert json.loads((out / "best.json").read_text()) == best
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000008"]


def test_the_best_is_one_of_which_there_is_a_checkpoint(
    checkpoint, tokens_file, tmp_path, succeed, monkeypatch
):
    """Evaluated at 2, 4 and 6, saved at 3 and 6, and worse all the time."""
    monkeypatch.setattr(train, "choose_rate", lambda settings, step: -0.02)
    more = "--steps", 6, "--eval-every", 2, "--save-every", 3
    succeed(*flags(checkpoint, tokens_file, tmp_path / "run", *more))
    assert json.loads((tmp_path / "run/best.json").read_text())["step"] == 6


def test_training_from_random_weights(tmp_path, succeed):
    content = json.loads((ROOT / "tests/data/meta/hf/config.json").read_text())
    content["vocab_size"] = 400
    (tmp_path / "config.json").write_text(json.dumps(content))
    more = "--init", tmp_path / "config.json", "--tokenizer", "train:400"
    for out, seed in ((tmp_path / "a", 0), (tmp_path / "b", 0), (tmp_path / "c", 1)):
        succeed(*flags(None, ROOT / "freqkv.py", out, *more, "--lr", 0, "--seed", seed))
    loss, same, other = (values(tmp_path / name, "val_loss")[0] for name in "abc")
    assert loss == pytest.approx(math.log(400), rel=0.02)  # it knows nothing
    assert same == loss
    assert other != loss
    text = (ROOT / "freqkv.py").read_text()
    tokenizer = load_tokenizer(tmp_path / "a/model")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # A tokenizer that is there is not made again.
    path = tmp_path / "a/tokenizer/tokenizer.model"
    path.write_bytes((ROOT / "weights/tiny/tokenizer.model").read_bytes())
    settings = settings_of("--out", tmp_path / "a", *more)
    assert train.choose_tokenizer(settings).vocab_size == 2048


def test_lora_and_merge(checkpoint, tokens_file, tmp_path, succeed, script):
    """The adapter of a run, continued, merged at the end and merged at once: one function."""
    first, merged = tmp_path / "first", tmp_path / "merged"
    more = "--lora", "--warmup", 0, "--rank", 4, "--alpha", 12, "--save-dtype", "float32"
    said = succeed(*flags(checkpoint, tokens_file, first, *more, "--merge", merged))
    assert f"--model {merged}" in said
    assert json.loads((first / "adapter/freqkv.json").read_text())["window"] == 16
    config = json.loads((first / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    model = load_model(checkpoint)
    tokens = random_tokens(1, 20)
    before = model(tokens)
    load_adapter(model, first / "adapter")
    with_adapter = model(tokens)
    assert (with_adapter - before).abs().max() > 0.01
    assert_close(load_model(merged)(tokens), with_adapter, atol=1e-4, rtol=1e-4)
    assert json.loads((merged / "freqkv.json").read_text())["window"] == 16

    at_once = tmp_path / "at-once"
    said = succeed("--model", checkpoint, "--adapter", first / "adapter", "--merge", at_once)
    assert f"--model {at_once}" in said
    assert_close(load_model(at_once)(tokens), with_adapter, atol=1e-4, rtol=1e-4)
    assert (
        files_in(at_once)[at_once / "freqkv.json"]
        == files_in(first / "adapter")[first / "adapter/freqkv.json"]
    )
    load_tokenizer(at_once)
    assert script("--model", checkpoint, "--adapter", "x", "--merge", at_once).code == 2
    # Once more at the end of the run: what was merged may have been changed since.
    argv = "--out", first, "--resume"
    assert (
        script(*argv).err
        == f"train.py: error: --merge: {merged} was there already, must be new: name another\n"
    )
    succeed(*argv, "--merge", tmp_path / "again")
    assert list(files_in(tmp_path / "again").values()) == list(files_in(merged).values())

    second = tmp_path / "second"
    more = "--lora", "--adapter", first / "adapter", "--lr", 0
    said = succeed(*flags(checkpoint, tokens_file, second, *more))
    assert f"--model {checkpoint} --adapter {second / 'adapter'}" in said
    adapters = [load_file(x / "adapter/adapter_model.safetensors") for x in (first, second)]
    assert_close(adapters[0], adapters[1], rtol=0, atol=0)
    third = tmp_path / "third"
    more = "--adapter", first / "adapter", "--lr", 0, "--save-dtype", "float32"  # all weights
    succeed(*flags(checkpoint, tokens_file, third, *more))
    assert_close(load_model(third / "model")(tokens), with_adapter, atol=1e-4, rtol=1e-4)


def test_an_adapter_in_bfloat16(checkpoint, tokens_file, tmp_path, succeed):
    """Half the bytes of the same adapter, and one that loads."""
    adapters = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        succeed(*flags(checkpoint, tokens_file, out, "--lora", "--save-dtype", dtype))
        adapters[dtype] = load_file(out / "adapter/adapter_model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in adapters["float32"].items()}
    assert_close(adapters["bfloat16"], rounded, rtol=0, atol=0)
    load_model(checkpoint, adapter=tmp_path / "bfloat16/adapter")


def test_an_adapter_goes_on_in_full_precision(checkpoint, tokens_file, tmp_path, succeed):
    """Over a base in bfloat16."""
    save_model(load_model(checkpoint, torch.bfloat16), tmp_path / "low", load_tokenizer(checkpoint))
    adapters = []
    for name, more in (("a", []), ("b", ["--adapter", tmp_path / "a/adapter", "--lr", 0])):
        argv = flags(tmp_path / "low", tokens_file, tmp_path / name, "--lora", *more)
        succeed(*argv, "--dtype", "bfloat16")
        adapters.append(load_file(tmp_path / name / "adapter/adapter_model.safetensors"))
    assert_close(adapters[0], adapters[1], rtol=0, atol=0)
    assert {tensor.dtype for tensor in adapters[0].values()} == {torch.float32}


def test_the_picture(tmp_path, monkeypatch):
    records = [{"step": 0, "val_loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 1, "val_loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert "pip install matplotlib" in DRAW(tmp_path)
    axes = pytest.importorskip("matplotlib.axes")
    lines = []
    plot = axes.Axes.plot
    monkeypatch.setattr(axes.Axes, "plot", lambda *x, **y: lines.append(x[1:]) or plot(*x, **y))
    assert "loss.png" in DRAW(tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert lines == [([1], [2.0]), ([0, 1], [3.0, 1.0])]


# Stopped and resumed

RUN = ("--steps", "6", "--eval-every", "2", "--save-every", "2", "--accumulate", "2")
RECIPES = ["--full", "--lora", "--distill=1"]


@pytest.fixture(scope="module")
def whole(checkpoint, tokens_file, tmp_path_factory):
    """Runs that nothing interrupts, to compare with."""
    runs = {}
    for recipe in RECIPES:
        runs[recipe] = tmp_path_factory.mktemp("whole") / "run"
        train.main(flags(checkpoint, tokens_file, runs[recipe], *RUN, recipe))
    return runs


def assert_same_run(out, expected, recipe="--full"):
    """Bit for bit: threads, shapes and machine are the same."""
    for name in ("loss", "grad_norm", "lr", "val_loss", "tokens"):
        assert values(out, name) == values(expected, name)
    assert len(log(out)) == len(log(expected))
    name = "adapter/adapter_model" if recipe == "--lora" else "model/model"
    for file in (f"{name}.safetensors", "best.json"):
        assert (out / file).read_bytes() == (expected / file).read_bytes()
    assert not list(out.glob("**/.tmp-*"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["--full", "--lora"])
def test_in_bfloat16_on_a_gpu(checkpoint, tokens_file, tmp_path, succeed, recipe, device):
    """Autocast, layers computed again, and four steps after two: as four in one go, nearly."""
    more = (recipe, "--device", device, "--dtype", "bfloat16", "--checkpointing")
    argv = flags(checkpoint, tokens_file, tmp_path / "a", *more, "--steps", 4)
    succeed(*argv)
    succeed(*flags(checkpoint, tokens_file, tmp_path / "b", *more, "--steps", 2))
    succeed("--out", tmp_path / "b", "--resume", "--steps", 4)
    for step, loss in values(tmp_path / "a", "loss").items():
        assert values(tmp_path / "b", "loss")[step] == pytest.approx(loss, rel=1e-2)
    assert values(tmp_path / "a", "loss").keys() == {1, 2, 3, 4}


def stop_at(monkeypatch, steps, number):
    """Have the process signalled while it computes these steps."""
    train_step = train.Trainer.train_step

    def stop(self):
        if self.step + 1 in steps:
            signal.raise_signal(number)
        return train_step(self)

    monkeypatch.setattr(train.Trainer, "train_step", stop)


@pytest.mark.parametrize(
    ("recipe", "number"),
    [*((recipe, signal.SIGINT) for recipe in RECIPES), ("--full", signal.SIGTERM)],
)
def test_resumed_exactly(
    checkpoint, tokens_file, tmp_path, succeed, monkeypatch, whole, recipe, number
):
    out = tmp_path / "run"
    stop_at(monkeypatch, (1, 2, 5), number)
    handler = signal.getsignal(number)
    said = succeed(*flags(checkpoint, tokens_file, out, *RUN, recipe))
    for step in (1, 2, 5):
        assert f"{number.name}: saved after step {step}; " in said
        assert f"go on with: python train.py --out {out} --resume" in said
        assert (out / f"checkpoints/step-{step:06d}").exists()
        assert signal.getsignal(number) is handler
        torch.manual_seed(step)  # whatever else happened since
        said = succeed("--out", out, "--resume")
        assert f"from step {step} to 6" in said
    assert "done; generate with" in said
    assert signal.getsignal(number) is handler
    assert_same_run(out, whole[recipe], recipe)


def test_the_second_signal_ends_it_at_once(checkpoint, tokens_file, tmp_path, script, monkeypatch):
    steps = []

    def train_step(self):
        steps.append(self.step)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        steps.append("not reached")

    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        assert script(*flags(checkpoint, tokens_file, tmp_path / "run")).code == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == [0]


def test_resumed_after_an_exception(checkpoint, tokens_file, tmp_path, script, monkeypatch, whole):
    """The log runs ahead of the last checkpoint, and its last line is cut short."""
    out = tmp_path / "run"
    train_step = train.Trainer.train_step

    def unplug(self):
        if self.step == 4:
            raise OSError("unplugged")
        return train_step(self)

    argv = flags(checkpoint, tokens_file, out, *RUN, "--save-every", 3)
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", unplug)
        assert script(*argv).code == 2
    assert log(out)[-1]["step"] == 4
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000003"]
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert script(*argv, "--resume").code == 0
    assert_same_run(out, whole["--full"])


def test_resumed_before_the_first_checkpoint(
    checkpoint, tokens_file, tmp_path, script, succeed, monkeypatch, whole
):
    """From the start: the log of what is lost goes with it."""
    out = tmp_path / "run"
    argv = flags(checkpoint, tokens_file, out, *RUN)
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(argv)
    assert list(values(out, "val_loss")) == [0]
    succeed(*argv, "--resume")
    assert_same_run(out, whole["--full"])


def test_a_finished_run_can_be_made_longer(checkpoint, tokens_file, tmp_path, succeed, whole):
    out = tmp_path / "run"
    succeed(*flags(checkpoint, tokens_file, out, *RUN, "--steps", 4))
    succeed("--out", out, "--resume", "--steps", 6)
    assert_same_run(out, whole["--full"])
    assert "from step 6 to 6" in succeed("--out", out, "--resume")  # the results again
    assert_same_run(out, whole["--full"])


@pytest.fixture(scope="module")
def finished(checkpoint, text_file, tmp_path_factory):
    """The folder of a short run, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.main(flags(checkpoint, text_file, out))
    return out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{}", "was without out, must be of a run of train.py"),
        ("config.json", {"lr": "fast"}, "config.json: lr was 'fast', must be of a run"),
        ("config.json", {"data": [3]}, "config.json: data was [3], must be of a run"),
        ("config.json", {"window": None}, None),  # is chosen
        ("log.jsonl", b"junk\n", "log.jsonl: was damaged"),
        ("log.jsonl", b"{}\n", "log.jsonl: was damaged"),
        ("log.jsonl", b'{"step": "1"}\n', "log.jsonl: was damaged (ValueError(\"step '1'\"))"),
        ("log.jsonl", b'["step"]\n', "log.jsonl: was damaged"),
        ("config.json", {"attention": "foo"}, "argument --attention: invalid choice: 'foo'"),
        ("config.json", {"seq_len": 0}, "config.json: argument --seq-len: was '0', must be"),
        ("config.json", {"lr": math.nan}, "config.json: argument --lr: was 'nan', must be"),
        ("config.json", {"seed": -1}, "config.json: argument --seed: was '-1', must be"),
        ("config.json", {"steps": True}, "config.json: steps was True, must be of a run"),
        ("data/tokens.bin", b"12345678", "data: was damaged"),
        ("data/tokens.json", b"{}", "was changed since"),
        ("checkpoints/step-000003/weights.safetensors", b"junk", "step-000003: was damaged"),
        ("checkpoints/step-000003/state.pt", b"", "step-000003: was damaged"),
        ("checkpoints/step-000003/state.pt", None, "damaged (ValueError('without state.pt'))"),
        ("checkpoints/step-000003/record.json", b"{}", "step-000003: was damaged"),
        ("checkpoints/step-000003/record.json", {"step": 2}, "damaged (ValueError('of step 2'))"),
        ("checkpoints/step-000003/record.json", {"best": {"step": "x"}}, "step-000003: was dam"),
        ("checkpoints/step-more/x", b"", None),  # is no checkpoint
    ],
)
def test_resuming_a_damaged_run(finished, tmp_path, succeed, fail, name, content, message):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / name).parent.mkdir(exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps(json.loads((out / name).read_text()) | content).encode()
    if content is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(content)
    if message is None:
        succeed("--out", out, "--resume", "--steps", 4)
    else:
        assert message in fail("--out", out, "--resume", "--steps", 4)


def test_resuming_to_a_step_that_is_past_is_refused(finished, fail):
    before = files_in(finished)
    error = fail("--out", finished, "--resume", "--steps", 1)
    assert "--steps: was 1, must be at least the 3 that are done" in error
    assert "--vary: was given, must be without" in fail("--out", finished, "--resume", "--vary")
    assert files_in(finished) == before


def test_resuming_with_other_settings_is_refused(checkpoint, text_file, finished, fail):
    argv = flags(checkpoint, text_file, finished, "--resume")
    before = files_in(finished)
    error = fail(*argv, "--lr", "0.5", "--seq-len", 30, "--lora", "--steps", 9)
    for words in ("--lr: was 0.5, must be 0.01", "--seq-len: was 30, must be 40", "--lora: was"):
        assert words in error
    assert "steps" not in error
    assert "--full: was given with --lora" in fail(*argv[:-1], "--full", "--lora")
    assert files_in(finished) == before


def test_resuming_a_cosine_with_other_steps_is_refused(
    checkpoint, tokens_file, tmp_path, succeed, fail
):
    out = tmp_path / "run"
    succeed(*flags(checkpoint, tokens_file, out, "--lr-schedule", "cosine"))
    assert "--steps: was 9, must be 3" in fail("--out", out, "--resume", "--steps", 9)
    succeed("--out", out, "--resume", "--steps", 3)


def test_resuming_with_other_data_is_refused(checkpoint, tmp_path, succeed, fail):
    file = tmp_path / "x.txt"
    file.write_text("some words of a text\n" * 50)
    succeed(*flags(checkpoint, file, tmp_path / "run"))
    file.write_text("other words of a text\n" * 50)
    error = fail("--out", tmp_path / "run", "--resume", "--steps", 5)
    assert "--data: was changed since " in error


def test_resuming_with_other_records_is_refused(checkpoint, tmp_path, succeed, fail):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "some words of a text, and some more"}\n' * 5)
    succeed(*flags(checkpoint, None, tmp_path / "run", "--sft", file))
    file.write_text('{"text": "other words of a text, and some more"}\n' * 5)
    error = fail("--out", tmp_path / "run", "--resume", "--steps", 5)
    assert "--sft: was changed since the run began, must be the same to resume" in error


def test_resuming_with_another_model_is_refused(tokens_file, checkpoint, tmp_path, succeed, fail):
    model = tmp_path / "model"
    argv = flags(model, tokens_file, tmp_path / "run")
    save_model(load_model(checkpoint), model, load_tokenizer(checkpoint))
    succeed(*argv)
    save_model(tiny_model(tiny_config(vocab_size=400, intermediate_size=64)), model)
    assert "--model: was changed since the run began, must be" in fail(*argv, "--resume")


def test_resuming_a_lora_on_other_weights_is_refused(
    tokens_file, checkpoint, tmp_path, succeed, fail
):
    model = load_model(checkpoint)
    save_model(model, tmp_path / "model", load_tokenizer(checkpoint))
    argv = flags(tmp_path / "model", tokens_file, tmp_path / "run", "--lora")
    succeed(*argv)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] += 1
    save_model(model, tmp_path / "model", load_tokenizer(checkpoint))
    assert "--model: was changed since the run began, must be" in fail(*argv, "--resume")


def test_resuming_with_another_teacher_is_refused(tokens_file, checkpoint, tmp_path, succeed, fail):
    model = load_model(checkpoint)
    save_model(model, tmp_path / "model", load_tokenizer(checkpoint))
    argv = flags(tmp_path / "model", tokens_file, tmp_path / "run", "--full", "--distill", 0.5)
    succeed(*argv)
    with torch.no_grad():
        model.norm.weight *= 2
    save_model(model, tmp_path / "model", load_tokenizer(checkpoint))
    assert "--model: was changed since the run began, must be" in fail(*argv, "--resume")


def test_a_run_of_an_earlier_version_goes_on(tokens_file, checkpoint, tmp_path, succeed):
    argv = flags(checkpoint, tokens_file, tmp_path / "run")
    succeed(*argv)
    path = tmp_path / "run/config.json"
    content = json.loads(path.read_text())
    del content["model_sha256"]
    path.write_text(json.dumps(content))
    succeed(*argv, "--resume")
    assert json.loads(path.read_text())["model_sha256"]


def test_a_folder_is_for_one_run_at_a_time(tokens_file, checkpoint, tmp_path, succeed, fail):
    argv = flags(checkpoint, tokens_file, tmp_path / "run")
    with train.alone_in(tmp_path / "run"):
        assert "run was in use by another run, must be free" in fail(*argv)
    succeed(*argv)


def test_a_merged_model_is_not_written_over_another(
    tokens_file, checkpoint, tmp_path, succeed, fail, monkeypatch
):
    """One that came while the run went on."""
    merged = tmp_path / "merged"
    argv = flags(checkpoint, tokens_file, tmp_path / "run", "--lora", "--merge", merged)

    def save_theirs(model, folder, tokenizer):
        save_model(model, folder, tokenizer)
        merged.mkdir(exist_ok=True)
        (merged / "mine").touch()

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_model", save_theirs)
        assert f"--merge: {merged} was there already, must be new" in fail(*argv)
    assert [path.name for path in merged.iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "run"]
    succeed("--out", tmp_path / "run", "--resume", "--merge", tmp_path / "other")


# Killed


SERVER = """
import json, os, signal, sys
import sentencepiece, torch, torch._dynamo  # which every fork would import otherwise
torch.set_num_threads(1)
import checkpoints, cli, train

def killing(function, left):
    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counted

train.draw_losses = lambda out: ""
for line in sys.stdin:
    argv, calls, seconds = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        left = [calls]
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, killing(getattr(os, name), left))
        checkpoints.save_file = killing(checkpoints.save_file, left)
        torch.save = killing(torch.save, left)
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


# Short, and such that most calls belong to a save.
BRIEF = ("--steps", "4", "--eval-every", "2", "--save-every", "1", "--keep-last", "1")
BRIEF += ("--seq-len", "20", "--batch-size", "1")


@pytest.fixture(scope="module")
def brief(checkpoint, tokens_file, tmp_path_factory):
    """Such a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("brief") / "run"
    train.main(flags(checkpoint, tokens_file, out, *BRIEF))
    return out


# About: its folder, config.json, a checkpoint, its name, best.json, an old checkpoint, the model.
@pytest.mark.parametrize("call", [1, 3, 8, 13, 16, 32, 69])
def test_killed_at_a_call(checkpoint, tokens_file, tmp_path, killed, brief, call):
    out = tmp_path / "run"
    argv = flags(checkpoint, tokens_file, out, *BRIEF, "--resume")
    assert killed(argv, calls=call) == -signal.SIGKILL
    assert killed(argv) == 0
    assert_same_run(out, brief)


def test_killed_again_and_again(checkpoint, tokens_file, tmp_path, killed, brief):
    """At random: at calls to the file system, and by the clock, in the middle of anything."""
    for name in ("cold", "warm"):
        began = time.monotonic()
        assert killed(flags(checkpoint, tokens_file, tmp_path / name, *BRIEF)) == 0
    seconds = time.monotonic() - began  # of the second: there nothing is imported any more
    out = tmp_path / "run"
    argv = flags(checkpoint, tokens_file, out, *BRIEF, "--resume")
    draw = random.Random(0)
    codes = []
    while 0 not in codes:
        if len(codes) < 2 or draw.random() < 0.5:  # the first two in any case before the end
            code = killed(argv, calls=draw.randint(1, 30))
        else:
            code = killed(argv, seconds=draw.uniform(0.01, 2 * seconds))
        codes.append(code)
        assert code in (0, -signal.SIGKILL, -signal.SIGALRM)
        for folder in out.glob("checkpoints/step-*"):
            assert len(list(folder.iterdir())) == 3  # whole
    assert len(codes) > 2
    assert_same_run(out, brief)


def test_the_command_itself(checkpoint, tokens_file, tmp_path):
    """As a process of its own, it goes on when nobody reads what it prints, and SIGTERM saves."""
    out = tmp_path / "run"
    more = "--steps", 100_000, "--eval-every", 1
    command = [sys.executable, "-u", ROOT / "train.py", *flags(checkpoint, tokens_file, out, *more)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        while process.poll() is None and not ((out / "log.jsonl").exists() and len(log(out)) > 9):
            time.sleep(0.05)
        process.terminate()
        error = process.stderr.read()
    assert process.returncode == 0, error
    last = log(out)[-1]["step"]
    assert last < 100_000
    assert (out / f"checkpoints/step-{last:06d}/weights.safetensors").exists()


# Bad input

SHAPE = ROOT / "tests/data/meta/hf/config.json"
ADAPTER = ROOT / "weights/smollm2-freqkv"
BAD = [
    (["--data", "no/such"], "no/such held no file"),
    (["--window", 65], "--window: was 65, must be at most"),
    (["--sinks", 16], "sinks + recent: was 16, must be below window"),
    (["--ratio", 1], "--ratio: was '1', must be a number, 0 or more, below 1"),
    (["--ratio", "0.5,0.5"], "--ratio: was '0.5,0.5', must be a number, 0 or more, below 1"),
    (["--seq-len", 10_000], "must be over --seq-len, 10000"),
    (["--distill", 1, "--seq-len", 65], "--seq-len: was 65, must be at most the model's 64"),
    (["--model", "no/such"], "no/such"),
    (["--lora", "--adapter", "no/such"], "no/such"),
    (["--device", "cuda:99"], "--device: was 'cuda:99'"),
    (["--steps", 0], "--steps: was '0', must be a whole number, 1 or more"),
    (["--lr", "nan"], "--lr: was 'nan', must be a number, 0 or more"),
    (["--lr", "1e300"], "--lr: was '1e300', must be a number"),
    (["--val-share", 0.6], "--val-share: was '0.6', must be a number, 0 or more, at most 0.5"),
    (["--attention", "none"], "--attention: invalid choice: 'none'"),
    (["--lora", "--train", "head"], "train: was 'head', must be of"),
    (["--lora", "--rank", 10**13], "rank, alpha: were 10000000000000, 16.0, must be 1 to 32"),
    (["--lora", "--full"], "--full: was given with --lora"),
    (["--full", "--merge", "x"], "--full: was given with --merge"),
    (["--sft", "x"], "--sft: was given with --data"),
    (["--init", SHAPE, "--lora"], "--init: was given with --lora"),
    (["--init", SHAPE, "--adapter", "x"], "--init: was given with --adapter"),
    (["--init", SHAPE], "--model: was given with --init, must be without"),
    (["--tokenizer", "train:400"], "--tokenizer: was train:400, must be with --init"),
    (["--rank", 4], "--rank: was given without --lora, must be with it"),
    (["--bin-dtype", "uint16"], "--bin-dtype: was uint16, must be with .bin files alone"),
    (["--lora", "--merge", SHAPE / "x"], f"must be in a folder, which {SHAPE} isn't"),
    (["--out", SHAPE], f"--out: {SHAPE}: File exists, must be a folder, or new"),
    (["--tokenizer", "tiny"], "tokenizer: was of 2048 tokens, must fit the model's 400"),
    (["--sft", ""], "--sft: was '', must be a name or a path"),
    (["--adapter", ""], "--adapter: was '', must be a name or a path"),
    (["--vary", "--attention", "full"], "--vary: was given with --attention full"),
    (["--lora", "--adapter", ADAPTER, "--rank", 4], "--rank: was given with --adapter"),
    (["--adapter", ADAPTER, "--merge", "y"], "was given to merge --adapter, must be with --lora"),
    (["--window", 10**20], "must be a whole number, 1 or more, at most 9223372036854775807"),
    (["--merge", "x"], "--merge: was given alone"),
    (["--lora", "--merge", "."], "--merge: was ., must be apart from the run's folder, run"),
    (["--lora", "--merge", "run/adapter"], "run/adapter, must be apart from the run's folder"),
    (["--lora", "--merge", "run"], "run, must be apart from the run's folder"),
    (["--lora", "--merge", "new", "--out", "new/run"], "new, must be apart from the run's folder"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input_is_one_line(checkpoint, text_file, tmp_path, fail, monkeypatch, wrong, message):
    monkeypatch.chdir(tmp_path)
    assert message in fail(*flags(checkpoint, text_file, "run", *wrong))
    # The same folder is free for a run without the mistake.
    train.prepare(settings_of(*flags(checkpoint, text_file, "run")), False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--tokenizer: was not given with --init"),
        (["--tokenizer", "train:x"], "--tokenizer: was train:x, must be train:SIZE"),
        (["--tokenizer", "train:9"], "--tokenizer: was train:9, which cannot be"),
    ],
)
def test_a_tokenizer_that_cannot_be(text_file, tmp_path, fail, more, message):
    assert message in fail(*flags(None, text_file, tmp_path / "run", "--init", SHAPE, *more))


def test_an_adapter_of_another_model_is_refused(checkpoint, tokens_file, tmp_path, succeed, fail):
    succeed(*flags(checkpoint, tokens_file, tmp_path / "run", "--lora"))
    save_model(tiny_model(tiny_config(vocab_size=400, hidden_size=64)), tmp_path / "wide")
    for more in (["--lora"], ["--merge", tmp_path / "merged"]):
        adapter = "--adapter", tmp_path / "run/adapter", *more
        error = fail("--model", tmp_path / "wide", *adapter)
        assert "adapter_model.safetensors: tensor base_model" in error
    assert not (tmp_path / "merged").exists()
    merge = "--adapter", tmp_path / "run/adapter", "--merge", tmp_path / "merged"
    for name, *value in (["--out", tmp_path / "x"], ["--resume"]):
        assert f"{name}: was given to merge --adapter" in fail(*merge, name, *value)


def test_a_run_is_not_overwritten(checkpoint, text_file, tmp_path, finished, fail):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for more in ([], ["--resume"]):  # not a run at all
        error = fail(*flags(checkpoint, text_file, out, *more))
        assert f"--out: {out} was there already, must be new, or a run to --resume" in error
    before = files_in(finished)
    assert "was there already" in fail(*flags(checkpoint, text_file, finished))
    assert files_in(finished) == before


@pytest.mark.parametrize("name", ["data/tokens.bin", "tokenizer/tokenizer.model"])
def test_what_is_called_like_a_file_of_a_run_is_not_overwritten(
    checkpoint, text_file, tmp_path, fail, name
):
    mine = tmp_path / name
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    for more in ([], ["--resume"]):
        assert "was there already" in fail(*flags(checkpoint, text_file, tmp_path, *more))
    assert mine.read_bytes() == b"mine"


def test_what_a_killed_start_has_left(checkpoint, text_file, tmp_path, fail, succeed):
    """Its own files go; whatever else has come there since stays, and is in the way."""
    for name in (".starting", "data/tokens.tmp", "data/mine.txt", "tokenizer/tokenizer.model"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    argv = flags(checkpoint, text_file, tmp_path)
    assert "was there already" in fail(*argv)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "mine.txt"]
    (tmp_path / "data/mine.txt").unlink()
    (tmp_path / "data").rmdir()
    (tmp_path / ".starting").touch()
    succeed(*argv)


def test_what_a_failed_start_has_made_is_made_anew(tmp_path, succeed, fail):
    """Another size of the tokenizer, and other data, than in the start that failed."""
    content = json.loads((ROOT / "tests/data/meta/hf/config.json").read_text())
    content["vocab_size"] = 400
    (tmp_path / "config.json").write_text(json.dumps(content))
    init = "--init", tmp_path / "config.json", "--tokenizer"
    out = tmp_path / "run"
    assert "tokenizer: was of 500" in fail(*flags(None, ROOT / "dct.py", out, *init, "train:500"))
    assert not out.exists()
    too_long = "--seq-len", 10**6
    error = fail(*flags(None, ROOT / "dct.py", out, *init, "train:400", *too_long))
    assert "must be over --seq-len, 1000000" in error
    succeed(*flags(None, ROOT / "freqkv.py", out, *init, "train:400", "--resume"))
    assert not (out / ".starting").exists()
    tokenizer = load_tokenizer(out / "model")
    text = (ROOT / "freqkv.py").read_text()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["save_file", "torch.save", "sync"])
def test_a_full_disk(checkpoint, tokens_file, tmp_path, succeed, fail, monkeypatch, whole, name):
    """At the second save: one line, the first checkpoint as it was, and the run can go on."""
    out = tmp_path / "run"
    calls = []
    free, error = 1, OSError(errno.ENOSPC, "No space left on device")
    place = checkpoints
    if name == "save_file":
        error = SafetensorError("I/O error: No space left on device (os error 28)")
    elif name == "torch.save":
        place = torch
    else:
        free = 7
    write = getattr(place, name.removeprefix("torch."))

    def fill(*args, **kwargs):
        calls.append(args)
        if len(calls) > free:
            raise error
        return write(*args, **kwargs)

    argv = flags(checkpoint, tokens_file, out, *RUN)
    with monkeypatch.context() as patch:
        patch.setattr(place, name.removeprefix("torch."), fill)
        message = fail(*argv)
    assert "step-000004: was not written" in message
    assert "No space left on device" in message
    assert f"newest good checkpoint: {out / 'checkpoints/step-000002'}" in message
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    succeed(*argv, "--resume")
    assert_same_run(out, whole["--full"])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite(checkpoint, tokens_file, tmp_path, fail, monkeypatch, what):
    out = tmp_path / "run"
    compute_losses = train.compute_losses
    calls = []

    def spoil(*args):
        calls.append(args)
        for loss in compute_losses(*args):
            if len(calls) != 4:  # an evaluation and three steps
                yield loss
            elif what == "loss":
                yield loss * math.nan
            else:
                yield loss + (loss - loss.detach()).sqrt()  # a number, its slope infinite

    monkeypatch.setattr(train, "compute_losses", spoil)
    more = "--eval-every", 0, "--save-every", 1, "--steps", 5
    error = fail(*flags(checkpoint, tokens_file, out, *more))
    assert "loss at step 3: was" in error
    assert f"newest good checkpoint: {out / 'checkpoints/step-000002'}" in error
    assert list(values(out, "loss")) == [1, 2]
    weights = load_file(out / "checkpoints/step-000002/weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
