"""The settings of a training: flags, defaults by recipe, and what must hold among them.

train.py runs what these say. A run keeps them in its config.json; one that goes on (`--resume`)
takes them from there, and may change only what does not bear on its weights.
"""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import cli
from freqkv import FreqKVConfig
from weights.files import check_folder, name_file, read_json

CONFLICTS = [
    ("full", "lora"),
    ("full", "merge"),
    ("init", "lora"),
    ("init", "adapter"),
    ("sft", "data"),
]
LEARNING_RATES = ("constant", "cosine")
# The defaults of a recipe, where they are others.
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"steps": 1000, "batch_size": 1, "accumulate": 64},
    "init": {
        "steps": 1000,
        "lr": 1e-3,
        "warmup": 100,
        "lr_schedule": "cosine",
        "weight_decay": 0.1,
    },
}
# What a resumed run may change: what does not bear on the weights.
FREE = {"out", "full", "merge", "steps", "eval_every", "save_every", "keep_last", "save_dtype"}
FREE |= {"device", "checkpointing"}


@dataclass(frozen=True)
class Settings:
    """All that a run depends on, as its config.json keeps it.

    The names are those of the flags, and --help says what they mean. What is None is chosen when
    the run begins, or is not used. ValueError for settings that contradict each other.
    """

    out: str
    # Model
    model: str = "tiny"
    init: str | None = None
    tokenizer: str | None = None
    adapter: str | None = None
    # Data
    data: list[str] | None = None
    bin_dtype: str | None = None
    sft: str | None = None
    seq_len: int | None = None
    val_share: float = 0.05
    data_sha256: str | None = None  # no flags: a resumed run must find the same data and model
    model_sha256: str | None = None
    # What is trained
    full: bool = False
    lora: bool = False
    rank: int = 8
    alpha: float = 16.0
    train: str = "embed,norm"
    merge: str | None = None
    # FreqKV
    attention: str = "freqkv"
    schedule: str = "paper"
    window: int | None = None
    sinks: int = FreqKVConfig.sinks
    ratio: float | None = None
    recent: int | None = None
    block: int | None = None
    vary: bool = False
    distill: float = 0.0
    # Optimisation
    steps: int = 100
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-5
    warmup: int = 20
    lr_schedule: str = "constant"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    seed: int = 0
    # Run
    eval_every: int = 50
    eval_rows: int = 64
    save_every: int = 50
    keep_last: int = 2
    save_dtype: str | None = None
    checkpointing: bool = True
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for one, other in CONFLICTS:
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"--{one}: was given with --{other}, must be without")
        if self.merge and not self.lora and not self.adapter:
            raise ValueError("--merge: was given alone, must be with --lora or --adapter")
        if self.merge and self.lora:
            merged = Path(self.merge)
            out = Path(self.out)
            if is_inside(merged, out) or is_inside(out, merged):
                raise ValueError(
                    f"--merge: was {merged}, must be apart from the run's folder, {out}"
                )


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is a folder itself, or somewhere in it."""
    return path.resolve().is_relative_to(folder.resolve())


def make_parser(description: str | None = None) -> cli.Parser:
    """The command line. A flag that is not given leaves no trace, so its default is `Settings`'."""
    parser = cli.Parser(
        prog="train.py", description=description, argument_default=argparse.SUPPRESS
    )
    count = cli.integer(1)
    whole = cli.integer(0)
    real = cli.real(0, 1e30)
    path = cli.name_or_path

    add = parser.add_argument_group("model").add_argument
    text = f"what to begin from: a name or a path {show_default('model')}"
    add("--model", type=path, help=text)
    text = "begin from random weights instead: the config.json of a LLaMA"
    add("--init", type=path, help=text)
    text = "a name or a path, or train:SIZE to make one (with --init) [the model's own]"
    add("--tokenizer", type=path, help=text)
    text = "LoRA to train on (with --lora) or to merge first; its attention and slots are defaults"
    add("--adapter", type=path, help=text)

    add = parser.add_argument_group("data").add_argument
    text = "text files, folders, patterns, or .bin files of tokens [Python's own source]"
    add("--data", nargs="+", metavar="PATH", help=text)
    text = "of .bin files [uint16 if the vocabulary fits]"
    add("--bin-dtype", choices=("uint16", "uint32"), help=text)
    text = "instruction tuning: JSON of (instruction, output), messages, or parts; or of whole text"
    add("--sft", type=path, metavar="FILE", help=text)
    text = "tokens of a row [twice the window; the window for --attention full]"
    add("--seq-len", type=count, help=text)
    text = f"share of the data that is held out {show_default('val_share')}"
    add("--val-share", type=cli.real(0, 0.5), help=text)

    add = parser.add_argument_group("what is trained").add_argument
    add("--full", action="store_true", help="all weights; the default")
    text = "low-rank updates of q, k, v, o, and what --train names"
    add("--lora", action="store_true", help=text)
    add("--rank", type=count, help=f"of the updates {show_default('rank')}")
    add(
        "--alpha",
        type=cli.real(0, 1e30, above=True),
        help=f"the updates are scaled by alpha/rank {show_default('alpha')}",
    )
    text = f"what else --lora trains: of embed, norm, or none {show_default('train')}"
    add("--train", help=text)
    text = "write a merged model here: after --lora, or with --adapter at once"
    add("--merge", type=path, metavar="FOLDER", help=text)

    group = parser.add_argument_group("FreqKV")
    add = group.add_argument
    text = "compressed; the most distinct tokens; sinks and newest; or everything"
    add("--attention", choices=cli.CACHES, help=f"{text} {show_default('attention')}")
    cli.add_schedule_flags(group, "as the adapter; else")
    text = "draw window (all, half or a quarter) and recent (up to half of it) anew for each step"
    add("--vary", action="store_true", help=text)
    text = f"share of the loss that imitates full attention {show_default('distill')}"
    add("--distill", type=cli.real(0, 1), help=text)

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=count, help=f"steps of the optimizer {show_default('steps')}")
    add("--batch-size", type=count, help=f"rows at a time {show_default('batch_size')}")
    add("--accumulate", type=count, help=f"batches a step {show_default('accumulate')}")
    add("--lr", type=real, help=f"learning rate of AdamW {show_default('lr')}")
    add("--warmup", type=whole, help=f"steps until the full rate {show_default('warmup')}")
    text = f"of the rate, after the warm-up {show_default('lr_schedule')}"
    add("--lr-schedule", choices=LEARNING_RATES, help=text)
    add("--weight-decay", type=real, help=f"of matrices {show_default('weight_decay')}")
    add("--grad-clip", type=real, help=f"longest gradient; 0: any {show_default('grad_clip')}")
    text = f"of random weights and of the order of the data {show_default('seed')}"
    add("--seed", type=whole, help=text)

    add = parser.add_argument_group("run").add_argument
    add("--out", type=path, metavar="FOLDER", help="the run's folder [runs/MODEL-RECIPE]")
    text = "go on from the newest checkpoint in --out, if there is one"
    add("--resume", action="store_true", help=text)
    text = f"steps between evaluations; 0: at the ends only {show_default('eval_every')}"
    add("--eval-every", type=whole, help=text)
    text = f"held-out rows of an evaluation, evenly spaced {show_default('eval_rows')}"
    add("--eval-rows", type=count, help=text)
    text = f"steps between checkpoints; 0: at the end only {show_default('save_every')}"
    add("--save-every", type=whole, help=text)
    text = f"checkpoints to keep, beside the best {show_default('keep_last')}"
    add("--keep-last", type=count, help=text)
    text = "of the last model [bfloat16], or adapter [float32]"
    add("--save-dtype", choices=("bfloat16", "float32"), help=text)
    text = f"compute layers again in backward, to save memory {show_default('checkpointing')}"
    add("--checkpointing", action=argparse.BooleanOptionalAction, help=text)
    add("--device", help="cpu, cuda, cuda:1, ... [cuda where there is one]")
    text = "of products and frozen weights [bfloat16 on cuda, float32 elsewhere]"
    add("--dtype", choices=("bfloat16", "float32"), help=text)
    return parser


def show_default(name: str) -> str:
    """The default of a setting, for its help: "[100; --lora 1000, --init 1000]"."""
    text = str(getattr(Settings, name))
    others = []
    for recipe, values in RECIPES.items():
        if name in values:
            others.append(f"--{recipe} {values[name]}")
    if others:
        text += f"; {', '.join(others)}"
    return f"[{text}]"


def choose_settings(given: dict[str, Any], resume: bool) -> Settings:
    """The settings of a run, from the flags that were given: those, and the defaults of its recipe.

    resume: where the run has begun, its own settings. ValueError for one that it cannot change, or
    that would be of no effect.
    """
    recipe = choose_recipe(given)
    out = given.get("out") or name_folder(given, recipe)
    path = Path(out) / "config.json"
    if resume and path.exists():
        saved = read_settings(path)
        check_same(given, saved)
        settings = replace(saved, **given)
    else:
        defaults = {"out": out} | RECIPES.get(recipe, {})
        settings = Settings(**(defaults | given))
        if settings.adapter:
            tuned = cli.tuned_settings(settings.model, settings.adapter)
            settings = replace(settings, **cli.keep_tuned(tuned, given))
    check_used(given, settings, resume)
    if settings.merge:
        check_new(Path(settings.merge))
    return settings


def choose_recipe(given: dict[str, Any]) -> str:
    """What is trained: the name in RECIPES of other defaults, or "full"."""
    for recipe in ("init", "lora"):
        if recipe in given:
            return recipe
    return "full"


def name_folder(given: dict[str, Any], recipe: str) -> str:
    """The folder of a run that is given none."""
    start = Path(given.get("model", Settings.model)).resolve()
    if "init" in given:
        start = Path(given["init"]).resolve().parent
    ending = "-sft" if "sft" in given else ""
    return f"runs/{start.name.removesuffix('.gguf')}-{recipe}{ending}"


def check_new(folder: Path) -> None:
    """OSError unless a merged model can be written to a folder, which must be new."""
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"--merge: {folder} was there already, must be new: name another")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise NotADirectoryError(
            f"--merge: was {folder}, must be in a folder, which {parent} isn't"
        )
    check_folder(parent)


def check_used(given: dict[str, Any], settings: Settings, resume: bool) -> None:
    """ValueError for a flag that the others leave without effect."""
    if merges_at_once(settings):
        unused = given.keys() - {"model", "adapter", "merge"}
        if resume:
            unused |= {"resume"}
        for name in sorted(unused):
            flag = as_flag(name)
            raise ValueError(f"--{flag}: was given to merge --adapter, must be with --lora as well")
    for name in ("rank", "alpha", "train"):
        if name in given and settings.adapter:
            raise ValueError(f"--{name}: was given with --adapter, must be as the adapter has it")
        if name in given and not settings.lora:
            raise ValueError(f"--{name}: was given without --lora, must be with it")
    if settings.vary and settings.attention == "full":
        raise ValueError("--vary: was given with --attention full, must be with slots to vary")
    if settings.init and "model" in given:
        raise ValueError("--model: was given with --init, must be without")
    if given.get("tokenizer", "").startswith("train:") and not settings.init and not resume:
        raise ValueError(f"--tokenizer: was {settings.tokenizer}, must be with --init")


def merges_at_once(settings: Settings) -> bool:
    """Whether there is nothing to train, only an adapter to merge."""
    return bool(settings.merge and settings.adapter and not settings.lora)


def as_flag(name: str) -> str:
    """The name of a setting as the command line has it, without its dashes in front."""
    return name.replace("_", "-")


def read_settings(path: Path) -> Settings:
    """The settings in the config.json of a run; ValueError where one is missing or wrong."""
    content = read_json(path)
    content.setdefault("model_sha256", None)  # which earlier versions did not write
    values = {}
    flags = []
    for field in fields(Settings):
        if field.name not in content:
            raise ValueError(f"{path}: was without {field.name}, must be of a run of train.py")
        value = content[field.name]
        if not has_type(value, field.type):
            raise ValueError(f"{path}: {field.name} was {value!r}, must be of a run of train.py")
        values[field.name] = value
        if type(value) in (int, float, str) and not field.name.endswith("_sha256"):
            flags.append(f"--{as_flag(field.name)}={value}")
    with name_file(path):
        make_parser().parse_args(flags)  # each must be what its flag takes
        return Settings(**values)


def has_type(value: Any, wanted: Any) -> bool:
    """Whether a value out of JSON is of the type of a setting."""
    if wanted == list[str] | None:
        if value is None:
            return True
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    if isinstance(value, bool):  # which Python takes for a whole number
        return wanted is bool
    if wanted in (float, float | None):
        wanted |= int
    return isinstance(value, wanted)


def check_same(given: dict[str, Any], saved: Settings) -> None:
    """ValueError where a setting was given that would change the weights of a run on its way."""
    changes = []
    for name, value in given.items():
        must = getattr(saved, name)
        # With a cosine, the rate of every step depends on the number of steps.
        free = name in FREE and not (name == "steps" and saved.lr_schedule == "cosine")
        if value != must and not free:
            flag = as_flag(name)
            if must is None or must is False:
                changes.append(f"--{flag}: was given, must be without")
            else:
                changes.append(f"--{flag}: was {value}, must be {must}")
    if changes:
        raise ValueError(f"{'; '.join(changes)}, as the run in {saved.out} began")
