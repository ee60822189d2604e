"""Train a LLaMA with FreqKV in the loop: pre-train, extend the window, LoRA, instruction-tune.

    python train.py                                           # the built-in model, in minutes
    python train.py --model DIR --data 'books/*.txt' --lora   # the recipe of the paper
    python train.py --out runs/tiny-full --resume             # go on where a run stopped

Attention and compression alternate inside every sequence, with gradients through both
(`FreqKVAttention`). One device; several GPUs would take torch's FSDP, and are left out.

The folder --out: config.json, all settings; log.jsonl, a record for each step and each evaluation;
data/, the tokens; checkpoints/, the newest and the best, which best.json names; and at the end
model/ or adapter/, which are the last weights, and loss.png.
"""

import copy
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cli
from checkpoints import Checkpoints
from data import (
    IGNORE,
    Data,
    Row,
    check_bin_dtype,
    collate,
    data_files,
    read_bins,
    read_records,
    read_texts,
    train_tokenizer,
)
from freqkv import FreqKVAttention
from levels import LevelsAttention, LevelsConfig
from lora import add_lora, load_adapter, merge_lora, save_adapter
from model import Attend, Llama, causal_attention
from settings import Settings, check_new, choose_settings, make_parser, merges_at_once
from weights import NAMES, Tokenizer, fingerprint, load_model, load_tokenizer, save_model
from weights.files import (
    damaged,
    read_json_lines,
    write_beside,
    write_json,
)
from weights.safetensors_dir import read_config

CHUNK = 1024  # tokens whose logits are in memory at a time
VARIED_PARTS = [1, 2, 4]  # of the window, for --vary: all, a half, a fourth
VARIED_SHARES = [0, 1 / 8, 1 / 4, 1 / 2]  # of that, left to recent tokens
STARTING = ".starting"  # a mark in --out of a start that is not yet a run
STARTED = ["data/tokens.tmp", "data/tokens.bin", "data/tokens.json", "tokenizer/tokenizer.model"]


# The model and the data


def make_model(settings: Settings, device: torch.device, dtype: torch.dtype) -> Llama:
    """The model to train: what is trained in float32, what is frozen in `dtype`."""
    torch.manual_seed(settings.seed)
    if settings.init:
        model = Llama(read_config(Path(settings.init)))
    elif settings.lora:
        model = load_model(settings.model)
    else:
        model = load_model(settings.model, adapter=settings.adapter)
    model.to(device)
    if settings.lora and settings.adapter:
        load_adapter(model, settings.adapter, torch.float32)
    elif settings.lora:
        parts = [part for part in settings.train.split(",") if part != "none"]
        add_lora(model, settings.rank, settings.alpha, whole=parts)
    for parameter in model.parameters():
        wanted = torch.float32 if parameter.requires_grad else dtype
        parameter.data = parameter.data.to(wanted)
    model.gradient_checkpointing = settings.checkpointing
    return model


def hash_start(model: Llama, settings: Settings) -> str:
    """A hash of what a run begins from, but for what is drawn at random."""
    if settings.init:
        return hashlib.sha256(repr(model.config).encode()).hexdigest()
    if settings.lora and not settings.adapter:
        return fingerprint(model, leave_out=".lora_")
    return fingerprint(model)


def choose_attention(name: str, schedule: cli.Schedule) -> Attend:
    """The strategy to train with, by its name in cli.CACHES."""
    if name == "full":
        return causal_attention
    if isinstance(schedule, LevelsConfig):
        return LevelsAttention(schedule, cli.OPERATORS[name])
    return FreqKVAttention(schedule, cli.OPERATORS[name])


def vary_schedule(schedule: cli.Schedule, seed: int, step: int) -> cli.Schedule:
    """Another window and share of recent tokens for a step: it learns rounds, not one schedule."""
    rng = np.random.default_rng((seed, step, 1))
    part = int(rng.choice(VARIED_PARTS))
    share = float(rng.choice(VARIED_SHARES))
    return scale_schedule(schedule, part, share)


def check_varied(schedule: cli.Schedule) -> None:
    """ValueError unless every schedule that `vary_schedule` may draw is possible."""
    for part, share in product(VARIED_PARTS, VARIED_SHARES):
        try:
            scale_schedule(schedule, part, share)
        except ValueError as error:
            raise ValueError(
                f"--vary: was with --window {schedule.window}, must be with a longer one: "
                f"1/{part} of it is too short ({error})"
            ) from None


def scale_schedule(schedule: cli.Schedule, part: int, recent_share: float) -> cli.Schedule:
    """The schedule of 1/part of the window, with such a share of that left to recent tokens."""
    window = schedule.window // part
    recent = int(window * recent_share)
    if isinstance(schedule, LevelsConfig):
        block = max(schedule.block // part, 1)
        return replace(schedule, window=window, recent=recent, block=block)
    return replace(schedule, window=window, recent=recent)


def choose_tokenizer(settings: Settings) -> Tokenizer | None:
    """The tokenizer that --tokenizer names, or has made; else the model's own, if it has one."""
    name = settings.tokenizer
    if name is None and settings.init:
        return None
    if name is None:
        return load_tokenizer(settings.model)
    if not name.startswith("train:"):
        if name not in NAMES and not Path(name).exists():
            raise FileNotFoundError(f"--tokenizer: was {name!r}, must be a name or a path")
        return load_tokenizer(name)
    size = name.removeprefix("train:")
    if not size.isdecimal():
        raise ValueError(f"--tokenizer: was {name}, must be train:SIZE, a number of tokens")
    path = Path(settings.out) / "tokenizer/tokenizer.model"
    if not path.exists():  # it is there if the run goes on
        content = train_tokenizer(data_files(settings.data), int(size))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, lambda to: to.write_bytes(content))
    return load_tokenizer(path.parent)


def read_data(settings: Settings, tokenizer: Tokenizer | None, vocab: int, seq_len: int) -> Data:
    """The rows that --sft or --data names."""
    share = settings.val_share
    files = []
    if not settings.sft:
        files = data_files(settings.data)
    if any(file.suffix == ".bin" for file in files):
        return read_bins(files, settings.bin_dtype, vocab, seq_len, share)
    if settings.data_sha256 is None:  # a run that has begun may have it
        check_bin_dtype(files, settings.bin_dtype)
    if tokenizer is None:
        raise ValueError("--tokenizer: was not given with --init, must be a path or train:SIZE")
    if settings.sft:
        return read_records(Path(settings.sft), tokenizer, seq_len, share)
    folder = Path(settings.out) / "data"
    about = repr((settings.tokenizer, settings.model, share))
    return read_texts(files, tokenizer, seq_len, share, folder, about)


# Losses


def copy_frozen(model: Llama) -> Llama:
    """The model as it is now, whatever training makes of it; what is frozen is shared, not copied.

    The teacher of --distill: it reads the same text with full attention.
    """
    shared = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            shared[id(parameter)] = parameter
    return copy.deepcopy(model, shared).requires_grad_(False)


def sum_chunk(
    model: Llama, hidden: Tensor, labels: Tensor,
    teacher: Llama | None, teacher_hidden: Tensor | None, share: float,
) -> Tensor:  # fmt: skip
    """Total loss of labels [n] after hidden states [n, E]; see `sum_losses`."""
    predictions = log_softmax(model.logits(hidden))  # [n, V]
    loss = F.nll_loss(predictions, labels, reduction="sum")
    if teacher is None or teacher_hidden is None:
        return loss
    target = log_softmax(teacher.logits(teacher_hidden))
    imitation = F.kl_div(predictions, target, reduction="sum", log_target=True)
    return torch.lerp(loss, imitation, share)


def log_softmax(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def sum_losses(
    model: Llama, hidden: Tensor, labels: Tensor,
    teacher: Llama | None = None, teacher_hidden: Tensor | None = None, share: float = 0.0,
) -> Tensor:  # fmt: skip
    """Total loss of the labelled tokens, in nats, in chunks to save memory.

    hidden: [B, T, E]. labels: [B, T], IGNORE where there is none. With a teacher and its hidden
    states, a share of each loss is the divergence from its prediction, KL(teacher || model).

    The logits [B, T, V] of long rows would take more memory than the model. Those of CHUNK tokens
    live until their loss is known, and are computed again in backward.
    """
    labelled = labels != IGNORE
    # Split at once: a slice for each chunk would have a gradient as long as all of them.
    hidden_chunks = torch.split(hidden[labelled], CHUNK)  # [CHUNK, E] each
    label_chunks = torch.split(labels[labelled], CHUNK)
    teacher_chunks: Sequence[Tensor | None] = [None] * len(hidden_chunks)
    if teacher_hidden is not None:
        teacher_chunks = torch.split(teacher_hidden[labelled], CHUNK)
    chunks = zip(hidden_chunks, label_chunks, teacher_chunks, strict=True)
    losses = []
    for hidden_chunk, label_chunk, teacher_chunk in chunks:
        loss = checkpoint(
            sum_chunk, model, hidden_chunk, label_chunk, teacher, teacher_chunk, share,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        losses.append(loss)
    return torch.stack(losses).sum()


def compute_losses(
    model: Llama, attend: Attend, rows: Sequence[Row], settings: Settings, teacher: Llama | None
) -> Iterator[Tensor]:
    """The mean loss of all labels of the rows, batch by batch: what is yielded adds up to it."""
    device = model.norm.weight.device
    count = 0
    for _, labels in rows:
        count += int((labels != IGNORE).sum())
    for start in range(0, len(rows), settings.batch_size):
        tokens, labels = collate(rows[start : start + settings.batch_size], device)
        low = settings.dtype == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
            teacher_hidden = None
            if teacher is not None:
                with torch.no_grad():
                    teacher_hidden = teacher.hidden(tokens)
            hidden = model.hidden(tokens, attend)
            total = sum_losses(model, hidden, labels, teacher, teacher_hidden, settings.distill)
        yield total / count


def choose_rate(settings: Settings, step: int) -> float:
    """Linear to the full rate at step `warmup`; then constant, or half a cosine towards 0."""
    if step <= settings.warmup:
        return settings.lr * step / settings.warmup
    if settings.lr_schedule == "constant":
        return settings.lr
    share = (step - settings.warmup) / (settings.steps - settings.warmup + 1)
    return settings.lr * (1 + math.cos(math.pi * share)) / 2


# The run


class Trainer:
    """A run: model, optimizer and data, and the folder that it writes."""

    def __init__(
        self, settings: Settings, model: Llama, schedule: cli.Schedule, data: Data
    ) -> None:
        self.settings = settings
        self.model = model
        self.schedule = schedule
        self.attend = choose_attention(settings.attention, schedule)
        self.data = data
        self.teacher = copy_frozen(model) if settings.distill > 0 else None
        self.trained = {}  # parameters by name
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.trained[name] = parameter
        self.optimizer = make_optimizer(list(self.trained.values()), settings)
        self.out = Path(settings.out)
        self.checkpoints = Checkpoints(self.out / "checkpoints")
        self.step = 0
        self.evaluation: dict[str, float] = {}  # the last one
        self.best: dict[str, float] = {}  # the best one of which there is a checkpoint

    def run(self) -> str | None:
        """Train to the last step, or to a signal, whose name is returned; save either way."""
        settings = self.settings
        with (
            catch_signals() as signals,
            tqdm(total=settings.steps, initial=self.step, disable=None) as bar,
        ):
            if self.step == 0:
                self.evaluate()
            while self.step < settings.steps and not signals:
                loss = self.train_step()
                bar.set_postfix(loss=f"{loss:.3f}")
                bar.update()
                if self.step == settings.steps or self.is_due(settings.eval_every):
                    self.evaluate()
                if self.is_due(settings.save_every):
                    self.save()
            self.save()
        return signals[0] if self.step < settings.steps else None

    def is_due(self, every: int) -> bool:
        """Whether it is time for what comes every so many steps; 0 is never."""
        return every > 0 and self.step % every == 0

    def train_step(self) -> float:
        """One step of the optimizer, logged; the loss before it."""
        began = time.perf_counter()
        settings = self.settings
        step = self.step + 1
        rows = self.data.choose_rows(settings.seed, step, settings.batch_size * settings.accumulate)
        total = torch.zeros((), device=self.model.norm.weight.device)
        attend = self.attend
        if settings.vary:
            varied = vary_schedule(self.schedule, settings.seed, step)
            attend = choose_attention(settings.attention, varied)
        for part in compute_losses(self.model, attend, rows, settings, self.teacher):
            part.backward()
            total += part.detach()
        loss = total.item()
        longest = settings.grad_clip if settings.grad_clip > 0 else math.inf
        norm = nn.utils.clip_grad_norm_(self.trained.values(), longest).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ValueError(
                f"loss at step {step}: was {loss}, its gradient {norm}, must be finite; "
                f"{self.checkpoints.describe_newest()}"
            )
        rate = choose_rate(settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step = step
        seconds = time.perf_counter() - began
        tokens = sum(len(row[0]) for row in rows)
        memory, _ = cli.peak_memory(self.model.norm.weight.device)
        self.log(
            {
                "loss": loss,
                "grad_norm": norm,
                "lr": rate,
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "memory_bytes": memory,
            }
        )
        return loss

    @torch.no_grad()
    def evaluate(self) -> None:
        """Loss of held-out rows, always the same ones, in nats a token and in bits a byte."""
        held_out = self.data.held_out
        count = min(self.settings.eval_rows, len(held_out))
        if count == 0:
            return
        rows = [held_out[round(i)] for i in np.linspace(0, len(held_out) - 1, count)]
        loss = 0.0
        for part in compute_losses(self.model, self.attend, rows, self.settings, None):
            loss += part.item()
        self.evaluation = {"step": self.step, "val_loss": loss}
        text = f"step {self.step}: held-out loss {loss:.4f} nats a token"
        if self.data.tokens_per_byte is not None:
            bits = loss * self.data.tokens_per_byte / math.log(2)
            self.evaluation["bits_per_byte"] = bits
            text += f", {bits:.4f} bits a byte"
        tqdm.write(text)
        self.log(self.evaluation)

    def log(self, record: dict[str, float]) -> None:
        """Add a record of this step to log.jsonl."""
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step} | record) + "\n")

    def save(self) -> None:
        """Write a checkpoint unless there is one of this step; mark the best, drop the old."""
        if not self.checkpoints.path(self.step).exists():
            least = self.best.get("val_loss", math.inf)
            evaluated = self.evaluation.get("step") == self.step
            if evaluated and self.evaluation["val_loss"] < least:
                self.best = self.evaluation
            weights = {}
            for name, parameter in self.trained.items():
                weights[name] = parameter.detach().cpu().contiguous()
            state = {"optimizer": self.optimizer.state_dict()}
            record = {"step": self.step, "best": self.best, "settings": asdict(self.settings)}
            self.checkpoints.save(self.step, weights, state, record)
        write_json(self.out / "best.json", self.best)
        self.checkpoints.prune(self.settings.keep_last, self.best.get("step"))

    def resume(self) -> None:
        """Go back to the newest checkpoint, or to the start, and cut the log there."""
        steps = self.checkpoints.steps()
        if steps:
            weights, state, record = self.checkpoints.load(steps[-1])
            shapes = {name: parameter.shape for name, parameter in self.trained.items()}
            if shapes != {name: tensor.shape for name, tensor in weights.items()}:
                path = self.checkpoints.path(steps[-1])
                raise ValueError(f"{path}: was of another model, must be of {self.settings.model}")
            for name, parameter in self.trained.items():
                parameter.data.copy_(weights[name])
            with self.checkpoints.damaged(steps[-1]):
                self.optimizer.load_state_dict(state["optimizer"])
            self.step = record["step"]
            self.best = record["best"]
        lines = ""
        for record in read_log(self.out):
            if self.step > 0 and record["step"] <= self.step:
                lines += json.dumps(record) + "\n"
        write_beside(self.out / "log.jsonl", lambda to: to.write_text(lines))


def make_optimizer(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """AdamW, with weight decay of matrices alone."""
    groups: list[dict[str, Any]] = []
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    if matrices:
        groups.append({"params": matrices, "weight_decay": settings.weight_decay})
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))


@contextmanager
def catch_signals() -> Iterator[list[str]]:
    """Names of SIGINT and SIGTERM as they come, to act on between steps; a second acts at once."""
    names: list[str] = []
    handlers = {}

    def note(number: int, frame: Any) -> None:
        names.append(signal.Signals(number).name)
        signal.signal(number, handlers[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.getsignal(number)
        signal.signal(number, note)
    try:
        yield names
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# Results


def read_log(out: Path) -> list[dict[str, Any]]:
    """The records of log.jsonl, but for a last one that a kill cut short."""
    path = out / "log.jsonl"
    records = read_json_lines(path)
    with damaged(path, "a JSON record a line"):
        for record in records:
            if type(record["step"]) is not int:
                raise ValueError(f"step {record['step']!r}")
    return records


def draw_losses(out: Path) -> str:
    """Draw the losses by step into loss.png; returns a line that says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture of the losses: it takes pip install matplotlib"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    records = read_log(out)
    for name, label in (("loss", "training"), ("val_loss", "held out")):
        points = [record for record in records if name in record]
        steps = [record["step"] for record in points]
        axes.plot(steps, [record[name] for record in points], label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=150)
    return f"losses drawn in {out / 'loss.png'}"


def write_results(settings: Settings, model: Llama, tokenizer: Tokenizer | None) -> str:
    """Write the adapter or the model; returns the arguments that generate from it."""
    out = Path(settings.out)
    tuned = {}
    names = ["attention", *cli.SETTINGS, "seq_len"]
    if settings.attention == "full":  # it has no slots
        names = ["attention", "seq_len"]
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            tuned[name] = value
    if settings.lora:
        dtype = cli.DTYPES[settings.save_dtype or "float32"]
        save_adapter(model, out / "adapter", settings.model, tuned, dtype)
        if not settings.merge:
            words = ["--model", settings.model, "--adapter", str(out / "adapter")]
            return shlex.join(words)
        merge_lora(model)
    model.to(cli.DTYPES[settings.save_dtype or "bfloat16"])
    if settings.merge:
        folder = Path(settings.merge)
        save_merged(model, folder, tokenizer, tuned)
    else:
        folder = out / "model"
        save_model(model, folder, tokenizer)
        write_json(folder / "freqkv.json", tuned)
    return shlex.join(["--model", str(folder)])


def save_merged(
    model: Llama, folder: Path, tokenizer: Tokenizer | None, tuned: dict[str, Any]
) -> None:
    """Write a model into a new folder, whole or not at all; OSError where that is there by now."""
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    try:
        save_model(model, beside, tokenizer)
        if tuned:
            write_json(beside / "freqkv.json", tuned)
        check_new(folder)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# The script


def prepare(settings: Settings, resume: bool) -> tuple[Trainer, Tokenizer | None]:
    """A run at its start, or where it stopped; ValueError or OSError if it cannot be."""
    out = Path(settings.out)
    begun = check_out(out, resume)
    device = cli.choose_device(settings.device)
    dtype = cli.choose_dtype(settings.dtype, device)
    model = make_model(settings, device, dtype)
    schedule = cli.make_schedule(cli.given_settings(settings), model.config)
    if settings.vary:
        check_varied(schedule)
    seq_len = choose_length(settings, schedule, model.config.max_position_embeddings)
    if begun:
        check_steps(settings.steps, Checkpoints(out / "checkpoints"))
    cli.make_folder("--out", out)
    with starting(out):
        tokenizer = choose_tokenizer(settings)
        if tokenizer is not None:
            tokenizer.check_fits(model.config.vocab_size)
        data = read_data(settings, tokenizer, model.config.vocab_size, seq_len)
        if settings.data_sha256 not in (None, data.sha256):
            flag = "--sft" if settings.sft else "--data"
            raise ValueError(f"{flag}: was changed since the run began, must be the same to resume")
        model_sha256 = hash_start(model, settings)
        if settings.model_sha256 not in (None, model_sha256):
            flag = "--init" if settings.init else "--model"
            raise ValueError(f"{flag}: was changed since the run began, must be the same to resume")
        settings = replace(
            settings,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            **asdict(schedule),
            seq_len=seq_len,
            data_sha256=data.sha256,
            model_sha256=model_sha256,
        )
        # With it, whatever follows can be resumed.
        write_json(out / "config.json", asdict(settings))
    trainer = Trainer(settings, model, schedule, data)
    if begun:
        trainer.resume()
    return trainer, tokenizer


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold a folder, made if it is new, against other runs; OSError where one has it."""
    is_new = not out.exists()
    cli.make_folder("--out", out)
    descriptor = lock(out)
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # it holds a run
                out.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def lock(out: Path) -> int | None:
    """Lock a folder until the descriptor is closed, or the process ends; None without such locks.

    OSError where another process has locked it.
    """
    try:
        import fcntl
    except ImportError:  # no POSIX
        return None
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OSError(f"--out: {out} was in use by another run, must be free") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def check_out(out: Path, resume: bool) -> bool:
    """Whether a folder holds a run to resume; FileExistsError where it holds anything else.

    What a killed start has left there is removed.
    """
    begun = (out / "config.json").exists()
    if (out / STARTING).exists() and not begun:
        clear_start(out)
    if any(out.glob("[!.]*")) and not (begun and resume):
        raise FileExistsError(f"--out: {out} was there already, must be new, or a run to --resume")
    return begun


def choose_length(settings: Settings, schedule: cli.Schedule, most: int) -> int:
    """Tokens of a row; ValueError for more than the model's positions, `most`, with --distill."""
    length = settings.seq_len
    if length is None:
        length = schedule.window if settings.attention == "full" else 2 * schedule.window
    if settings.distill > 0 and length > most:
        raise ValueError(
            f"--seq-len: was {length}, must be at most the model's {most} with --distill"
        )
    return length


@contextmanager
def starting(out: Path) -> Iterator[None]:
    """Mark a folder until it holds the config.json of a run; if it never does, clear it."""
    mark = out / STARTING
    mark.touch()
    try:
        yield
    finally:
        if (out / "config.json").exists():
            mark.unlink()
        else:
            clear_start(out)


def clear_start(out: Path) -> None:
    """Remove what a start has made that failed or was killed: these files, and no others."""
    for name in (*STARTED, STARTING):
        with suppress(OSError):
            (out / name).unlink()
    for name in STARTED:
        with suppress(OSError):  # it is not there, or holds something else
            (out / name).parent.rmdir()


def check_steps(steps: int, checkpoints: Checkpoints) -> None:
    """ValueError where a run has done more than the steps that it is to end at."""
    done = max(checkpoints.steps(), default=0)
    if done > steps:
        raise ValueError(f"--steps: was {steps}, must be at least the {done} that are done")


def describe(trainer: Trainer) -> str:
    """The settings that were given or chosen, and what is about to happen."""
    settings = trainer.settings
    idle = {"data_sha256", "model_sha256"}  # which tell a person nothing
    if not settings.lora or settings.adapter:
        idle |= {"rank", "alpha", "train"}
    lines = []
    for name, value in asdict(settings).items():
        if value is not None and value is not False and name not in idle:
            lines.append(f"{name:>14}  {value}")
    weights = sum(parameter.numel() for parameter in trainer.trained.values())
    rows = cli.format_count(len(trainer.data.train), "row")
    lines.append(
        f"Training {weights:,} weights of {settings.init or settings.model} on {rows} of up to "
        f"{settings.seq_len:,} tokens, from step {trainer.step} to {settings.steps}, "
        f"into {settings.out}"
    )
    return "\n".join(lines)


def train(settings: Settings, resume: bool) -> None:
    """Train, and write what was trained; a signal ends it early."""
    trainer, tokenizer = prepare(settings, resume)
    print(describe(trainer))
    stopped_by = trainer.run()
    if stopped_by is not None:
        again = shlex.join(["python", "train.py", "--out", settings.out, "--resume"])
        print(f"{stopped_by}: saved after step {trainer.step}; go on with: {again}")
        return
    arguments = write_results(trainer.settings, trainer.model, tokenizer)
    print(draw_losses(trainer.out))
    if tokenizer is None:
        print("done; there is no tokenizer to generate text with: it was trained on .bin files")
    else:
        print(f"done; generate with: python generate.py {arguments}")


def merge(model_name: str, adapter: str, folder: Path) -> None:
    """Write a model with an adapter merged into it, in the model's own dtype."""
    tuned = cli.tuned_settings(model_name, adapter)  # first: they may be damaged
    model = load_model(model_name, adapter=adapter)
    save_merged(model, folder, load_tokenizer(model_name), tuned)
    print(f"merged; generate with: python generate.py {shlex.join(['--model', str(folder)])}")


def main(argv: Sequence[str] | None = None) -> None:
    given = vars(make_parser(__doc__).parse_args(argv))
    resume = given.pop("resume", False)
    settings = choose_settings(given, resume)
    if merges_at_once(settings):
        merge(settings.model, settings.adapter, Path(settings.merge))
    else:
        with alone_in(Path(settings.out)):
            train(settings, resume)


if __name__ == "__main__":
    cli.run(main, "train.py", finish=True)
