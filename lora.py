# SPDX-License-Identifier: Apache-2.0
"""LoRA: low-rank updates of linear layers, and adapters in the layout of PEFT.

    add_lora(model, rank=8, alpha=16)                   # all else is frozen
    save_adapter(model, "folder", base="llama-2-7b")    # what is trained, and nothing else
    load_adapter(model, "folder")                       # onto the same base, checked
    merge_lora(model)                                   # a plain Llama again

Hu et al., arXiv 2106.09685: a layer becomes W x + (alpha / rank) B A x, with W frozen, A random and
B zero at first. Norms and embeddings may be trained whole beside them (LongLoRA, arXiv 2309.12307).

An adapter is a folder: adapter_config.json, adapter_model.safetensors, and in freqkv.json the
settings of FreqKV that it was trained with. `peft` reads the first two. An adapter that others made
is read as PEFT 0.21 reads it, or refused by the name of the option that is not understood.

A module has two names: ours, layers.0.mlp.up_proj, and the published one that transformers and PEFT
use, model.layers.0.mlp.up_proj.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import Llama
from weights.files import make_json_writer, read_json, write_together

__all__ = [
    "BUILT_IN",
    "LoraLinear",
    "add_lora",
    "find_adapter",
    "load_adapter",
    "merge_lora",
    "save_adapter",
]

BUILT_IN = "smollm2-freqkv"

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*TARGETS, "gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
PARTS = {"embed": ("embed_tokens",), "norm": NORMS}  # what may be trained whole

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
SETTINGS = "freqkv.json"
LORA = (".lora_A", ".lora_B")  # how the names of A and B end

ROOT = "base_model.model."  # before every tensor's name
EMBEDDING = ROOT + "model.embed_tokens.weight"
HEAD = ROOT + "lm_head.weight"
HEAD_BASE = ROOT + "lm_head.base_layer.weight"  # the same matrix, where lm_head has an update

Updates = dict[str, tuple[int, float]]  # rank and scale of layers, by their names here

# Options of PEFT that say what the tensors are for: read below.
READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "init_lora_weights",
    "bias",
)
# Options that change nothing here, whatever they say.
INFORMATION = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "runtime_config",
    "lora_dropout",  # of training
    "fan_in_fan_out",  # PEFT ignores it where a layer is linear
    "ensure_weight_tying",  # the tensors tell
    "megatron_core",  # of megatron_config, which must be off
    "qalora_group_size",  # of use_qalora, which must be off
    "loftq_config",  # this and the next three: of values of init_lora_weights
    "eva_config",
    "corda_config",
    "lora_ga_config",
)
# How A and B may have begun: W stayed the base's. Others (pissa, olora, loftq, ...) change W first.
INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


class LoraLinear(nn.Linear):
    """A linear layer and its update.

    weight [out, in] is the layer's own, in its dtype; lora_A [rank, in] and lora_B [out, rank] are
    float32.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.rank = rank
        self.scale = scale
        # Drawn on the CPU: the same values on every device.
        a = torch.empty(rank, base.in_features, device="cpu")
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = torch.zeros(base.out_features, rank, device="cpu")
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(b.to(base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        a = self.lora_A.to(x.dtype)
        b = self.lora_B.to(x.dtype)
        update = F.linear(self.scale * F.linear(x, a), b)
        return F.linear(x, self.weight) + update


# A model with updates


def add_lora(
    model: Llama,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = TARGETS,
    whole: Sequence[str] = (),
) -> None:
    """Give the linear layers `targets` an update, train it and the PARTS `whole`; freeze the rest.

    targets: ends of names. ValueError for names that the model does not have.
    """
    most = model.config.hidden_size
    if not 1 <= rank <= most or not alpha > 0:
        raise ValueError(f"rank, alpha: were {rank}, {alpha}, must be 1 to {most} and above 0")
    updates: Updates = {}
    for target in targets:
        names = [name for name in _find_linear(model) if _ends_in(name, [target])]
        if not names:
            raise ValueError(f"targets: was {target!r}, must be a linear layer of the model")
        for name in names:
            updates[name] = (rank, alpha / rank)
    modules: list[str] = []
    for part in whole:
        if part not in PARTS:
            raise ValueError(f"train: was {part!r}, must be of {', '.join(PARTS)}")
        modules.extend(PARTS[part])
    _check_plain(model)
    _put_updates(model, updates)
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        parameter.requires_grad_(name.endswith(LORA) or module in modules)


def merge_lora(model: Llama) -> None:
    """Add every update to its W, in float32, rounded once: a plain `Llama` of the same function."""
    for name, layer in _find_updates(model).items():
        update = layer.scale * layer.lora_B.detach().float() @ layer.lora_A.detach().float()
        weight = layer.weight.detach() + update  # in the wider of their dtypes
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.to(layer.weight.dtype))
        model.set_submodule(name, plain)


# Adapters


def save_adapter(
    model: Llama,
    path: str | Path,
    base: str = "",
    freqkv: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write what is trained of a model with LoRA into the folder `path`; `base` is for readers.

    dtype: the parameters' own unless given. An adapter that is there already stays as it is until
    all files of the new one are written.
    """
    updates = _find_updates(model)
    if not updates:
        raise ValueError("model: had 0 LoRA layers, must have some: add_lora first")
    tensors = _collect_tensors(model, dtype)
    config = _describe_updates(model, updates) | _describe_whole(model)
    config["base_model_name_or_path"] = base

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        folder / CONFIG: make_json_writer(config),
        folder / TENSORS: lambda to: save_file(tensors, to, metadata={"format": "pt"}),
    }
    if freqkv is not None:
        files[folder / SETTINGS] = make_json_writer(freqkv)
    write_together(files)
    if freqkv is None:
        (folder / SETTINGS).unlink(missing_ok=True)  # of the adapter that was there


def find_adapter(path_or_name: str | Path) -> Path:
    """Where an adapter is: a folder. One name is known, of the one that comes with this code."""
    if path_or_name == BUILT_IN:
        return Path(__file__).parent / "weights" / BUILT_IN
    path = Path(path_or_name)
    if not path.is_dir():
        was = f"adapter: was {str(path_or_name)!r}"
        raise FileNotFoundError(f"{was}, must be {BUILT_IN!r} or a folder with {CONFIG}")
    return path


def load_adapter(model: Llama, path_or_name: str | Path, dtype: torch.dtype | None = None) -> None:
    """Put an adapter onto a plain `Llama`; what it holds is trained, the rest frozen.

    Whole parameters take the model's dtype unless one is given. ValueError, with the model as it
    was, for an adapter of another model (a tensor missing, unexpected or misshapen), and for one
    with an option that is not understood.
    """
    _check_plain(model)
    folder = find_adapter(path_or_name)
    options = AdapterOptions(folder / CONFIG)
    updates = options.choose_updates(model)
    tensors = _read_tensors(folder / TENSORS)
    _check_tensors(folder / TENSORS, tensors, model, options, updates)
    if model.lm_head is None:
        _check_tied(tensors, options)
    _put_updates(model, updates)
    for name, parameter in model.named_parameters():
        tensor = tensors.get(_name_tensor(name))
        parameter.requires_grad_(tensor is not None)
        if tensor is not None:
            wanted = parameter.dtype
            if dtype is not None and not name.endswith(LORA):
                wanted = dtype
            parameter.data = tensor.to(parameter.device, wanted)
    if model.lm_head is not None and HEAD_BASE in tensors:
        head = model.lm_head.weight
        head.data = tensors[HEAD_BASE].to(head.device, head.dtype)


class AdapterOptions:
    """What an adapter_config.json says, and what that means for each module, as in PEFT 0.21.

    The rules are those of peft/tuners/tuners_utils.py (`check_target_module_exists`) and
    peft/utils/other.py (`get_pattern_key`, `_set_trainable`). ValueError, by name and value, for an
    option that is not understood.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values = read_json(file)
        self._check_method()
        self._check_numbers()
        self._check_names()

    def choose_updates(self, model: Llama) -> Updates:
        """Rank and scale of every layer that has an update."""
        modules = dict(model.named_modules())
        del modules[""]  # the model itself
        if model.lm_head is None:
            modules["lm_head"] = model.embed_tokens  # a tied output layer is a module to PEFT
        updates: Updates = {}
        for name, module in modules.items():
            published = _publish_name(name)
            if not self._is_target(published):
                continue
            if not isinstance(module, nn.Linear):
                self.refuse("target_modules", f"names of linear layers, and {published} is none")
            rank = self._look_up("rank_pattern", published, self.values["r"])
            alpha = self._look_up("alpha_pattern", published, self.values["lora_alpha"])
            scale = alpha / rank
            if self.values.get("use_rslora"):
                scale = alpha / math.sqrt(rank)  # Kalajdzievski, arXiv 2312.03732
            updates[name] = (rank, scale)
        if not updates:
            must = "names of linear layers of the model, and other options leave some of them"
            self.refuse("target_modules", must)
        return updates

    def saves_whole(self, parameter: str) -> bool:
        """Whether modules_to_save holds a parameter, by its published name.

        It does where a module around the parameter ends in one of its names, even in the middle of
        a word: norm means input_layernorm too.
        """
        ends = tuple(self.values.get("modules_to_save") or ())
        module = parameter.rpartition(".")[0]
        while module:
            if module.endswith(ends):
                return True
            module = module.rpartition(".")[0]
        return False

    def refuse(self, option: str, must: str) -> NoReturn:
        """Raise a ValueError about the value of an option."""
        was = repr(self.values.get(option))
        if len(was) > 200:
            was = was[:200] + "..."
        raise ValueError(f"{self.file}: {option}: was {was}, must be {must}") from None

    def _is_target(self, name: str) -> bool:
        """Whether the module of this published name has an update."""
        excluded = self.values.get("exclude_modules") or []
        if self._is_called("exclude_modules", excluded, name):
            return False
        if self.saves_whole(f"{name}.weight"):
            return False
        targets = self.values["target_modules"]
        if isinstance(targets, str) and targets.lower() == "all-linear":
            targets = ALL_LINEAR
        if not self._is_called("target_modules", targets, name):
            return False
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        if name in targets:
            return True  # called by its full name, in whatever layer
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return layer is not None and int(layer[1]) in _as_list(layers)

    def _is_called(self, option: str, names: str | Iterable[str], module: str) -> bool:
        """Whether a module's name fits a regular expression, or ends in one of several names."""
        if isinstance(names, str):
            return self._compile(option, names).fullmatch(module) is not None
        return _ends_in(module, names)

    def _look_up(self, option: str, name: str, default: Any) -> Any:
        """The value of the first expression in rank_pattern or alpha_pattern that ends a name."""
        for expression, value in (self.values.get(option) or {}).items():
            if self._compile(option, rf"(.*\.)?({expression})$").match(name):
                return value
        return default

    def _compile(self, option: str, expression: str) -> re.Pattern[str]:
        try:
            return re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            self.refuse(option, f"a regular expression ({error})")

    def _check_method(self) -> None:
        """ValueError for whatever is not plain LoRA on the base as it is."""
        if self.values.get("peft_type") != "LORA":
            self.refuse("peft_type", "'LORA'")
        # Whatever it is called, and whatever comes next: what is not known must be off.
        for option, value in self.values.items():
            known = option in READ or option in INFORMATION
            if not known and value not in (None, False, []):
                self.refuse(option, "null or false: it is not part of plain LoRA")
        if self.values.get("init_lora_weights", True) not in INITS:
            must = "true, false, 'gaussian', 'orthogonal', 'eva' or 'mica': others change the base"
            hint = "PEFT converts them by path_initial_model_for_weight_conversion"
            self.refuse("init_lora_weights", f"{must} ({hint})")
        if self.values.get("bias", "none") != "none":
            self.refuse("bias", "'none': a LLaMA has no biases")

    def _check_numbers(self) -> None:
        if not _is_rank(self.values.get("r")):
            self.refuse("r", "a whole number, 1 to 65535")
        if not _is_alpha(self.values.get("lora_alpha")):
            self.refuse("lora_alpha", "a number above 0")
        if self.values.get("use_rslora") not in (None, False, True):
            self.refuse("use_rslora", "true or false")
        for option, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
            pattern = self.values.get(option) or {}
            if not isinstance(pattern, dict) or not all(map(is_valid, pattern.values())):
                self.refuse(option, "numbers by the names of layers")

    def _check_names(self) -> None:
        targets = self.values.get("target_modules")
        if not _is_text(targets):
            self.refuse("target_modules", "a list of names or a regular expression")
        if not _is_text(self.values.get("exclude_modules") or []):
            self.refuse("exclude_modules", "a list of names or a regular expression")
        whole = self.values.get("modules_to_save") or []
        if isinstance(whole, str) or not _is_text(whole):
            self.refuse("modules_to_save", "a list of names")
        layers = self.values.get("layers_to_transform")
        if layers is not None and not all(type(layer) is int for layer in _as_list(layers)):
            self.refuse("layers_to_transform", "the numbers of layers")
        if layers is not None and isinstance(targets, str):
            self.refuse("layers_to_transform", "null where target_modules is no list")
        if self.values.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
            self.refuse("layers_pattern", "null or 'layers', as a LLaMA calls them")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 16


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def _is_text(value: Any) -> bool:
    """Whether a value is a string or a list of strings."""
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def _as_list(value: Any) -> list[Any]:
    """A list as it is, any other value as a list of one."""
    if isinstance(value, list):
        return value
    return [value]


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise FileNotFoundError(f"{file}: was not there, must hold the adapter's tensors")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: was not whole ({error}), must be safetensors") from None


def _check_tensors(
    file: Path,
    tensors: dict[str, Tensor],
    model: Llama,
    options: AdapterOptions,
    updates: Updates,
) -> None:
    """ValueError unless an adapter holds the tensors that its options and the model call for.

    It may hold a copy of the embedding and of the output layer as well. PEFT adds them on demand,
    or where they are targets, and its options do not tell.
    """
    needed: dict[str, tuple[int, ...]] = {}
    layers = _find_linear(model)
    for name, (rank, _) in updates.items():
        needed[_name_tensor(f"{name}.lora_A")] = (rank, layers[name].in_features)
        needed[_name_tensor(f"{name}.lora_B")] = (layers[name].out_features, rank)
    for name, parameter in model.named_parameters():
        if options.saves_whole(_publish_name(name)):
            needed[_name_tensor(name)] = tuple(parameter.shape)
    for name, shape in needed.items():
        if name not in tensors:
            raise ValueError(f"{file}: tensor {name}: was missing, must be {shape} for this model")

    embedding_shape = tuple(model.embed_tokens.weight.shape)
    head_name = HEAD_BASE if "lm_head" in updates else HEAD
    allowed = {EMBEDDING: embedding_shape, head_name: embedding_shape} | needed
    for name, tensor in tensors.items():
        was = tuple(tensor.shape)
        must = allowed.get(name, "absent")
        if was != must:
            raise ValueError(f"{file}: tensor {name}: was {was}, must be {must} for this model")
        if not tensor.is_floating_point():
            raise ValueError(f"{file}: tensor {name}: was {tensor.dtype}, must be floats")


def _check_tied(tensors: dict[str, Tensor], options: AdapterOptions) -> None:
    """ValueError unless an adapter of a tied model holds embedding and output layer as one.

    To PEFT they are two modules, and one of them may change alone.
    """
    embedding = tensors.get(EMBEDDING)
    head = tensors.get(HEAD)
    saves_embedding = options.saves_whole("model.embed_tokens.weight")
    saves_head = options.saves_whole("lm_head.weight")
    if head is None and not saves_embedding and not saves_head:
        return
    if embedding is not None and head is not None and embedding.equal(head.to(embedding.dtype)):
        return
    must = "the embedding and lm_head as one, as this model ties them"
    options.refuse("modules_to_save", f"{must} (PEFT: ensure_weight_tying)")


# Writing


def _collect_tensors(model: Llama, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of an adapter: what is trained, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[_name_tensor(name)] = parameter
    if isinstance(model.lm_head, LoraLinear):
        # As PEFT does; it may have come with an adapter, and not be the base's.
        tensors[HEAD_BASE] = model.lm_head.weight
    for name, tensor in tensors.items():
        tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
    if model.lm_head is None and EMBEDDING in tensors:
        tensors[HEAD] = tensors[EMBEDDING].clone()  # a matrix of its own to PEFT
    return tensors


def _describe_updates(model: Llama, updates: Mapping[str, LoraLinear]) -> dict[str, Any]:
    """The options of PEFT that tell which layers have an update, and of what rank and scale."""
    first = next(iter(updates.values()))
    first_alpha = first.scale * first.rank
    rank_pattern = {}
    alpha_pattern = {}
    for name, layer in updates.items():
        alpha = layer.scale * layer.rank
        if layer.rank != first.rank:
            rank_pattern[_publish_name(name)] = layer.rank
        if alpha != first_alpha:
            alpha_pattern[_publish_name(name)] = alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": first.rank,
        "lora_alpha": first_alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _shorten(model, [_publish_name(name) for name in updates]),
        "inference_mode": True,
    }


def _describe_whole(model: Llama) -> dict[str, Any]:
    """The options of PEFT that tell which modules are trained whole."""
    modules = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith(LORA):
            modules.append(_publish_name(name).rpartition(".")[0])
    if not modules:
        return {"modules_to_save": None}
    names = _shorten(model, modules)
    if model.lm_head is None and "model.embed_tokens" in modules:
        # PEFT has an output layer all the same, and ties it again only where told to.
        return {"modules_to_save": [*names, "lm_head"], "ensure_weight_tying": True}
    return {"modules_to_save": names}


def _shorten(model: Llama, names: Sequence[str]) -> list[str]:
    """Published names of modules by their last parts, where these mean no other module to PEFT."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    for name, _ in model.named_modules():
        published = _publish_name(name)
        if published.endswith(tuple(ends)) and published not in names:
            return sorted(names)
    return ends


# Modules and names


def _find_linear(model: Llama) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def _find_updates(model: Llama) -> dict[str, LoraLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def _check_plain(model: Llama) -> None:
    if _find_updates(model):
        raise ValueError("model: had LoRA layers already, must be plain: merge_lora first")


def _put_updates(model: Llama, updates: Updates) -> None:
    """Put an update of the given rank and scale onto each of these layers."""
    layers = _find_linear(model)
    for name, (rank, scale) in updates.items():
        model.set_submodule(name, LoraLinear(layers[name], rank, scale))


def _ends_in(name: str, ends: Iterable[str]) -> bool:
    """Whether a module's name is one of `ends`, or ends in one after a dot."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _publish_name(name: str) -> str:
    """The published name of a module or parameter of `model.Llama`."""
    if name.startswith("lm_head"):
        return name
    return f"model.{name}"


def _name_tensor(name: str) -> str:
    """The name of a parameter's tensor in an adapter; A and B are modules there, with a weight."""
    published = ROOT + _publish_name(name)
    if name.endswith(LORA):
        return f"{published}.weight"
    return published
