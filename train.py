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

import argparse
import copy
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cli
from corpus import IGNORE, Data, Row, collate, read_data, read_tokenizer
from freqkv import FreqKVAttention, FreqKVConfig, compress, newest
from generate import SETTINGS, fitted
from model import Llama, causal_attention
from weights import Tokenizer, load_model, load_tokenizer, save_model
from weights.files import damaged, read_json, write_beside, write_json
from weights.lora import add_lora, find_adapter, load_adapter, merge_lora, save_adapter
from weights.safetensors_dir import read_config

CHUNK = 1024  # tokens whose logits are in memory at a time
Args = argparse.Namespace

COUNT, WHOLE, REAL = cli.number(int, 1), cli.number(int, 0), cli.number(float, 0, 1e30)
FLAGS: list[tuple[str, Any, Any, str]] = [  # name, type, default, help; a bool is --x/--no-x
    ("--model", str, "tiny", "what to begin from: a name, a folder, a .gguf file"),
    ("--init", str, None, "begin from random weights instead: the config.json of a LLaMA"),
    ("--tokenizer", str, None, "name or path, or train:SIZE (with --init); the model's own"),
    ("--adapter", str, None, "LoRA to train on (with --lora), else to merge into the model first"),
    ("--data", [str], None, "text files, folders, patterns, or .bin files; Python's own source"),
    ("--bin-dtype", ("uint16", "uint32"), None, "of .bin files; uint16 if the vocabulary fits"),
    ("--sft", str, None, "instruction tuning: JSON of (instruction, output) or messages"),
    ("--out", str, None, "the run's folder; runs/<model>-<recipe>"),
    ("--resume", None, False, "go on from the newest checkpoint in --out, if there is one"),
    ("--full", None, False, "train all weights; the default"),
    ("--lora", None, False, "train low-rank updates of q, k, v, o, and what --train names"),
    ("--rank", COUNT, 8, "of the updates"),
    ("--alpha", REAL, 16.0, "the updates are scaled by alpha/rank"),
    ("--train", str, "embed,norm", "what else --lora trains: of embed, norm, or none"),
    ("--merge", str, None, "write a merged model here: after --lora, or with --adapter at once"),
    ("--attention", ("freqkv", "full", "window"), "freqkv", "window: sinks and the newest"),
    ("--window", COUNT, None, "slots N a layer; 4096, or the model's positions if fewer"),
    ("--sinks", WHOLE, FreqKVConfig.sinks, "first tokens, never compressed"),
    (
        "--ratio",
        cli.ratio,
        FreqKVConfig.ratio,
        "share that a round keeps; or one a layer, with commas",
    ),
    ("--recent", WHOLE, FreqKVConfig.recent, "newest tokens that a round leaves as they are"),
    ("--distill", cli.number(float, 0, 1), 0.0, "share of the loss that imitates full attention"),
    ("--seq-len", COUNT, None, "tokens; twice the window, the window for --attention full"),
    ("--steps", COUNT, 100, "steps of the optimizer"),
    ("--batch-size", COUNT, 8, "sequences at a time"),
    ("--accumulate", COUNT, 1, "batches a step"),
    ("--lr", REAL, 2e-5, "learning rate of AdamW"),
    ("--warmup", WHOLE, 20, "steps until the full rate"),
    ("--schedule", ("constant", "cosine"), "constant", "of the rate, after the warm-up"),
    ("--weight-decay", REAL, 0.0, "of matrices"),
    ("--grad-clip", REAL, 1.0, "longest gradient; 0: any"),
    ("--checkpointing", bool, True, "compute layers again in backward, to save memory"),
    ("--val-share", cli.number(float, 0, 0.5), 0.05, "of the data, held out"),
    ("--eval-every", WHOLE, 50, "steps between evaluations; 0: at the ends only"),
    ("--eval-rows", COUNT, 64, "held-out sequences read in an evaluation, evenly spaced"),
    ("--save-every", WHOLE, 50, "steps between checkpoints; 0: at the end only"),
    ("--keep-last", COUNT, 2, "checkpoints to keep, beside the best"),
    (
        "--save-dtype",
        ("bfloat16", "float32"),
        None,
        "of the last model, bfloat16; adapter, float32",
    ),
    ("--seed", WHOLE, 0, "of random weights and of the order of the data"),
    ("--device", str, None, "cuda if there is one, else cpu"),
    ("--dtype", ("bfloat16", "float32"), None, "of products and frozen weights; bfloat16 on cuda"),
]
RECIPES: dict[str, dict[str, Any]] = {  # where a recipe's defaults are others
    "full": {},
    "lora": {"steps": 1000, "batch_size": 1, "accumulate": 64},
    "init": {"steps": 1000, "lr": 1e-3, "warmup": 100, "schedule": "cosine", "weight_decay": 0.1},
}
# What a resumed run may change: what does not bear on the weights.
FREE = {"steps", "out", "resume", "merge", "eval_every", "save_every", "keep_last", "save_dtype"}
FREE |= {"device", "checkpointing"}


def parser() -> cli.Parser:
    """The flags of the table. What is not given is None, so that it can be told from a default."""
    made = cli.Parser(prog="train.py", description=__doc__)
    for flag, kind, default, text in FLAGS:
        others = [f", --{r}: {x[_name(flag)]}" for r, x in RECIPES.items() if _name(flag) in x]
        if default is not None and default is not False:  # 0 is one to show
            text += f" [{default}{''.join(others)}]"
        if kind is None or kind is bool:
            how = {"action": argparse.BooleanOptionalAction if kind else "store_true"}
        elif isinstance(kind, tuple):
            how = {"choices": kind}
        else:
            how = {"nargs": "+", "metavar": "PATH"} if kind == [str] else {"type": kind}
        made.add_argument(flag, help=text, default=None, **how)
    return made


def _name(flag: str) -> str:
    return flag[2:].replace("-", "_")


def settings(argv: Sequence[str] | None) -> Args:
    """All settings: those given, else the run's own on --resume, else the recipe's."""
    given = {k: v for k, v in vars(parser().parse_args(argv)).items() if v is not None}
    recipe = next((r for r in ("init", "lora") if r in given), "full")
    args = {_name(flag): default for flag, _, default, _ in FLAGS} | RECIPES[recipe] | given
    apart = "full lora", "init lora", "init adapter", "sft data", "full merge"
    for one, other in map(str.split, apart):
        if args[one] and args[other]:
            raise ValueError(f"--{one}: was given with --{other}, must be without")
    if args["merge"] and not args["lora"] and not args["adapter"]:
        raise ValueError("--merge: was given alone, must be with --lora or --adapter")
    start = Path(args["init"] or args["model"]).resolve()
    stem = start.parent.name if args["init"] else start.name.removesuffix(".gguf")
    args["out"] = args["out"] or f"runs/{stem}-{recipe}{'-sft' if args['sft'] else ''}"
    record, saved = Path(args["out"]) / "config.json", {}
    if args["resume"] and record.exists():
        saved = read_json(record)
        if missing := {"schedule", "steps", "window"} - saved.keys():
            raise ValueError(f"{record}: was without {min(missing)}, must be of a run of train.py")
        # With a cosine, the rate of every step depends on the number of steps.
        free = FREE - ({"steps"} if saved["schedule"] == "cosine" else set())
        fixed = [k for k, v in given.items() if k not in free and v != saved.get(k)]
        if fixed:
            was = [
                f"--{k}: was {given[k]}, must be {saved.get(k)}".replace("_", "-") for k in fixed
            ]
            raise ValueError(f"{'; '.join(was)}, as the run in {args['out']} began")
        args |= saved | {k: v for k, v in given.items() if k in free}
    merged = args["merge"]
    if merged and Path(args["out"]).resolve() in (Path(merged) / "x").resolve().parents:
        raise ValueError(f"--merge: was {merged}, must be outside the run's folder, {args['out']}")
    if merged and Path(merged).exists() and merged != saved.get("merge"):
        raise FileExistsError(f"--merge: {merged} was there already, must be new")
    return Args(**args)


def build(args: Args) -> Llama:
    """The model on its device: what is trained in float32, what is frozen in --dtype."""
    torch.manual_seed(args.seed)
    if args.init:
        model = Llama(read_config(Path(args.init)))
        ends = 0.02 / math.sqrt(2 * model.config.num_hidden_layers)  # they add up in the residual
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=ends if last else 0.02)
    else:
        model = load_model(args.model, adapter=None if args.lora else args.adapter)
    model.to(args.device)
    if args.lora and args.adapter:
        load_adapter(model, args.adapter, torch.float32)
    elif args.lora:
        parts = [part for part in args.train.split(",") if part != "none"]
        add_lora(model, args.rank, args.alpha, whole=parts)
    for parameter in model.parameters():
        dtype = torch.float32 if parameter.requires_grad else getattr(torch, args.dtype)
        parameter.data = parameter.data.to(dtype)
    model.gradient_checkpointing = args.checkpointing
    return model


def attention(kind: str, config: FreqKVConfig) -> Any:
    """The strategy to train with, one of --attention."""
    if kind == "full":
        return causal_attention
    return FreqKVAttention(config, newest if kind == "window" else compress)


def frozen_copy(model: Llama) -> Llama:
    """The model as it is now, whatever training makes of it; what is frozen is shared, not copied.

    The teacher of --distill: it reads the same text with full attention.
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


def loss_sum(
    model: Llama, hidden: Tensor, labels: Tensor,
    teacher: Llama | None = None, taught: Tensor | None = None, share: float = 0.0,
) -> Tensor:  # fmt: skip
    """Sum of the losses of hidden [B, T, E] at labels [B, T] other than IGNORE.

    With a teacher and its hidden states `taught`, a share of each is the divergence of the model's
    prediction from the teacher's, KL(teacher || model), in nats as well.

    The logits [B, T, V] of a long sequence would take more memory than the model. Those of CHUNK
    tokens live until their loss is known, and are computed again in backward.
    """

    def wide(logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def part(hidden: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
        found = wide(model.logits(hidden)).log_softmax(-1)
        loss = F.nll_loss(found, labels, reduction="sum")
        if teacher is None:
            return loss
        target = wide(teacher.logits(taught)).log_softmax(-1)
        imitation = F.kl_div(found, target, reduction="sum", log_target=True)
        return torch.lerp(loss, imitation, share)

    counted = labels != IGNORE
    each = (hidden, labels, hidden.detach() if taught is None else taught)
    chunks = zip(*(x[counted].split(CHUNK) for x in each), strict=True)
    return torch.stack([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def losses(
    model: Llama, attend: Any, rows: list[Row], args: Args, teacher: Llama | None = None
) -> Iterator[Tensor]:
    """The rows' share, batch by batch, of the mean loss of all their labels."""
    count = sum(int((labels != IGNORE).sum()) for _, labels in rows)
    kind, low = torch.device(args.device).type, args.dtype == "bfloat16"
    for start in range(0, len(rows), args.batch_size):
        tokens, labels = collate(rows[start : start + args.batch_size], args.device)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=low):
            with torch.no_grad():
                taught = teacher.hidden(tokens) if teacher else None
            hidden = model.hidden(tokens, attend)
            loss = loss_sum(model, hidden, labels, teacher, taught, args.distill) / count
        yield loss


def learning_rate(args: Args, step: int) -> float:
    """Linear to the full rate at step `warmup`; then constant, or half a cosine towards 0."""
    if step <= args.warmup:
        return args.lr * step / args.warmup
    done = (step - args.warmup) / (args.steps - args.warmup + 1)
    return args.lr * ((1 + math.cos(math.pi * done)) / 2 if args.schedule == "cosine" else 1)


class Checkpoints:
    """Folders step-000123, written beside, synced and renamed: a kill leaves none half written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp-*"):
            shutil.rmtree(stale)

    def steps(self) -> list[int]:
        numbers = (path.name[5:] for path in self.folder.glob("step-*"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def newest(self) -> str:
        return f"newest good checkpoint: {self.path(self.steps()[-1]) if self.steps() else 'none'}"

    def save(self, step: int, weights: dict[str, Tensor], state: Any, record: Any) -> None:
        """Trained weights, the state of the optimizer and of random numbers, and a JSON record."""
        beside = self.folder / f".tmp-{step}"
        try:
            beside.mkdir()
            save_file(weights, beside / "weights.safetensors")
            with (beside / "state.pt").open("wb") as file:
                torch.save(state, file)
            (beside / "record.json").write_text(json.dumps(record, indent=2) + "\n")
            for path in (*beside.iterdir(), beside):
                _sync(path)
            beside.rename(self.path(step))
            _sync(self.folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of these
            shutil.rmtree(beside, ignore_errors=True)
            raise OSError(f"{self.path(step)}: not written: {error}; {self.newest()}") from None

    def load(self, step: int) -> tuple[dict[str, Tensor], Any, Any]:
        folder = self.path(step)
        with damaged(folder, "whole, or removed, to go on from the one before"):
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            record = read_json(folder / "record.json")
            if missing := {"optimizer", "random", "step", "best"} - {*state, *record}:
                raise ValueError(f"without {min(missing)}")
            return load_file(folder / "weights.safetensors"), state, record

    def prune(self, keep: int, best: int | None) -> None:
        for step in self.steps()[:-keep]:
            if step != best:  # renamed first, so that a folder step-* is always whole
                shutil.rmtree(self.path(step).rename(self.folder / f".tmp-old-{step}"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def noted_signals() -> Iterator[list[str]]:
    """Collects SIGINT and SIGTERM, to act on between steps; the second of a kind acts at once."""
    noted: list[str] = []

    def note(number: int, frame: Any) -> None:
        noted.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """A run: model, optimizer and data, and the folder that it writes."""

    def __init__(self, args: Args, model: Llama, attend: Any, data: Data) -> None:
        self.args, self.model, self.attend, self.data = args, model, attend, data
        self.teacher = frozen_copy(model) if args.distill else None
        self.out = Path(args.out)
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self.trained.values() if p.ndim > 1]
        vectors = [p for p in self.trained.values() if p.ndim == 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        how = {"lr": args.lr, "betas": (0.9, 0.95), "weight_decay": args.weight_decay}
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], **how)
        self.checkpoints = Checkpoints(self.out / "checkpoints")
        self.step = 0
        self.evaluated: dict[str, float] = {}  # the last evaluation
        self.best: dict[str, float] = {}  # the best one of which there is a checkpoint

    def run(self) -> str:
        """Train to the last step, or to a signal, whose name is returned; save either way."""
        args = self.args
        with (
            noted_signals() as noted,
            tqdm(total=args.steps, initial=self.step, disable=None) as bar,
        ):
            if self.step == 0:
                self.evaluate()
            while self.step < args.steps and not noted:
                bar.set_postfix(loss=f"{self.train_step():.3f}")
                bar.update()
                if self.step == args.steps or (args.eval_every and not self.step % args.eval_every):
                    self.evaluate()
                if args.save_every and not self.step % args.save_every:
                    self.save()
            self.save()
            return noted[0] if self.step < args.steps else ""

    def train_step(self) -> float:
        args, began, step = self.args, time.perf_counter(), self.step + 1
        rows = self.data.rows(args.seed, step, args.batch_size * args.accumulate)
        total = torch.zeros((), device=args.device)
        for loss in losses(self.model, self.attend, rows, args, self.teacher):
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), args.grad_clip or math.inf)
        record = {"loss": total.item(), "grad_norm": norm.item(), "lr": learning_rate(args, step)}
        if not math.isfinite(record["loss"] + record["grad_norm"]):
            was = f"loss at step {step}: was {record['loss']}, its gradient {record['grad_norm']}"
            raise ValueError(f"{was}, must be finite; {self.checkpoints.newest()}")
        for group in self.optimizer.param_groups:
            group["lr"] = record["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, seconds = step, time.perf_counter() - began
        tokens = sum(len(row[0]) for row in rows)
        record |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        memory, _ = cli.peak_memory(torch.device(args.device))
        self.log(record | {"memory_bytes": memory})
        return record["loss"]

    @torch.no_grad()
    def evaluate(self) -> None:
        """Loss of held-out rows, always the same ones, in nats a token and in bits a byte."""
        held, count = self.data.held, min(self.args.eval_rows, len(self.data.held))
        if not count:
            return
        rows = [held[round(i)] for i in np.linspace(0, len(held) - 1, count)]
        loss = float(sum(losses(self.model, self.attend, rows, self.args)))
        self.evaluated = {"val_loss": loss}
        if self.data.tokens_per_byte:
            self.evaluated["bits_per_byte"] = loss * self.data.tokens_per_byte / math.log(2)
        words = (f"{name} {value:.4f}" for name, value in self.evaluated.items())
        tqdm.write(f"step {self.step}: {', '.join(words)}")
        self.evaluated["step"] = self.step
        self.log(self.evaluated)

    def log(self, record: dict[str, float]) -> None:
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step} | record) + "\n")

    def save(self) -> None:
        """Write a checkpoint unless there is one of this step; mark the best, drop the old."""
        if not self.checkpoints.path(self.step).exists():
            loss, least = (x.get("val_loss", math.inf) for x in (self.evaluated, self.best))
            if self.evaluated.get("step") == self.step and loss < least:
                self.best = self.evaluated
            weights = {name: p.detach().cpu().contiguous() for name, p in self.trained.items()}
            state = {"optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state()}
            record = {"step": self.step, "best": self.best, "settings": vars(self.args)}
            self.checkpoints.save(self.step, weights, state, record)
        write_json(self.out / "best.json", self.best)
        self.checkpoints.prune(self.args.keep_last, self.best.get("step"))

    def resume(self) -> None:
        """Go back to the newest checkpoint, or to the start, and cut the log there."""
        if steps := self.checkpoints.steps():
            weights, state, record = self.checkpoints.load(steps[-1])
            shapes = {name: parameter.shape for name, parameter in self.trained.items()}
            if shapes != {name: tensor.shape for name, tensor in weights.items()}:
                was = self.checkpoints.path(steps[-1])
                raise ValueError(f"{was}: was of another model, must be of {self.args.model}")
            for name, parameter in self.trained.items():
                parameter.data.copy_(weights[name])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            self.step, self.best = record["step"], record["best"]
        kept = [x for x in read_log(self.out) if x["step"] <= self.step and self.step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_beside(self.out / "log.jsonl", lambda to: to.write_text(lines))


def read_log(out: Path) -> list[dict[str, Any]]:
    """The records of log.jsonl, but for a last one that a kill cut short."""
    path = out / "log.jsonl"
    if not path.exists():
        return []
    with damaged(path, "a JSON record a line"):
        records = [json.loads(x) for x in path.read_text().split("\n")[:-1]]
        if not all("step" in record for record in records):
            raise ValueError("a record without its step")
        return records


def plot(out: Path) -> str:
    """Draw the losses by step into loss.png; returns a line that says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture of the losses: it takes pip install matplotlib"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("loss", "val_loss"):
        points = [(record["step"], record[name]) for record in read_log(out) if name in record]
        axes.plot(*zip(*points, strict=True), label=name) if points else None
    axes.set(xlabel="step", ylabel="nats a token")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=150)
    return f"losses drawn in {out / 'loss.png'}"


def write_results(args: Args, model: Llama, tokenizer: Tokenizer | None) -> str:
    """Write the adapter or the model; returns the arguments that generate from it."""
    names = ("attention", "window", "sinks", "ratio", "recent", "seq_len")
    freqkv, out = {name: getattr(args, name) for name in names}, Path(args.out)
    if args.lora:
        dtype = getattr(torch, args.save_dtype or "float32")
        save_adapter(model, out / "adapter", args.model, freqkv, dtype)
        if not args.merge:
            return f"--model {args.model} --adapter {out / 'adapter'}"
        merge_lora(model)
    folder = Path(args.merge or out / "model")
    save_model(model.to(getattr(torch, args.save_dtype or "bfloat16")), folder, tokenizer)
    write_json(folder / "freqkv.json", freqkv)
    return f"--model {folder}"


def merge(args: Args) -> None:
    """Write --model with --adapter merged into it, in the model's own dtype."""
    model = load_model(args.model, adapter=args.adapter)
    save_model(model, args.merge, load_tokenizer(args.model))
    if (settings := find_adapter(args.adapter) / "freqkv.json").exists():
        write_json(Path(args.merge) / "freqkv.json", read_json(settings))
    print(f"merged; generate with: python generate.py --model {args.merge}")


def prepare(args: Args) -> tuple[Trainer, Tokenizer | None]:
    """A run from the start, or from where --resume finds it; ValueError before it writes any."""
    out = Path(args.out)
    begun = (out / "config.json").exists()
    strange = {x.name for x in out.glob("[!.]*")} - {"data", "tokenizer"}
    if strange and not (begun and args.resume):
        raise FileExistsError(f"--out: {out} was there already, must be new, or a run to --resume")
    device, dtype = cli.place(args.device, args.dtype)
    args.device, args.dtype = str(device), str(dtype).removeprefix("torch.")
    model, tokenizer = build(args), read_tokenizer(args)
    config = model.config
    if tokenizer is not None:
        tokenizer.check_fits(config.vocab_size)
    most = config.max_position_embeddings
    slots = fitted({name: getattr(args, name) for name in SETTINGS}, config)
    args.window = slots.window
    args.seq_len = args.seq_len or args.window * (1 if args.attention == "full" else 2)
    if args.distill and args.seq_len > most:
        must = f"at most the model's {most} with --distill"
        raise ValueError(f"--seq-len: was {args.seq_len}, must be {must}")
    attend = attention(args.attention, slots)
    data = read_data(args, tokenizer, config.vocab_size)
    if vars(args).setdefault("data_sha256", data.sha256) != data.sha256:
        raise ValueError("--data: was changed since the run began, must be the same to resume")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", vars(args))  # first: with it, whatever follows can be resumed
    trainer = Trainer(args, model, attend, data)
    if begun:
        trainer.resume()
    return trainer, tokenizer


def train(args: Args) -> None:
    trainer, tokenizer = prepare(args)
    idle = set() if args.lora else {"rank", "alpha", "train"}
    given = {name: x for name, x in vars(args).items() if name not in idle}
    shown = {name: x for name, x in given.items() if x is not None and x is not False}
    print("\n".join(f"{name:>14}  {x}" for name, x in shown.items()))
    count, rows = sum(p.numel() for p in trainer.trained.values()), len(trainer.data.train)
    print(
        f"Training {count:,} weights of {args.init or args.model} on {rows} rows of up to "
        f"{args.seq_len} tokens, steps {trainer.step + 1} to {args.steps}, into {args.out}"
    )
    again = f"python train.py --out {args.out} --resume"
    if stopped := trainer.run():
        print(f"{stopped}: saved after step {trainer.step}; go on with: {again}")
        return
    use = write_results(args, trainer.model, tokenizer)
    print(f"{plot(trainer.out)}\ndone; generate with: python generate.py {use}")


def main(argv: Sequence[str] | None = None) -> None:
    args = settings(argv)
    if args.merge and not args.lora:
        merge(args)
    else:
        train(args)


if __name__ == "__main__":
    cli.run(main, "train.py", finish=True)
