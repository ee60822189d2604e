"""LoRA: low-rank updates of linear layers, and adapters in the layout of PEFT.

    add_lora(model, rank=8, alpha=16)                   # all else is frozen
    save_adapter(model, "folder", base="llama-2-7b")    # what is trained, and nothing else
    load_adapter(model, "folder")                       # onto the same base, checked
    merge_lora(model)                                   # a plain Llama again

Hu et al., arXiv 2106.09685: a layer becomes W x + (alpha / rank) B A x, with W frozen, A random and
B zero at first. Norms and embeddings may be trained whole beside them (LongLoRA, arXiv 2309.12307).
An adapter holds what has `requires_grad`, in adapter_config.json and adapter_model.safetensors,
which `peft` reads too; freqkv.json holds the settings of FreqKV that it was trained with.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import Llama
from weights.blank import blank_model
from weights.files import damaged, read_json, write_beside, write_json

__all__ = ["LoraLinear", "add_lora", "find_adapter", "load_adapter", "merge_lora", "save_adapter"]

BUILT_IN = "smollm2-freqkv"

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
PARTS = {"embed": ("embed_tokens",), "norm": NORMS}  # what may be trained whole
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Of PEFT's options, those that change what the tensors mean; an adapter that uses one is refused.
UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out")
UNSUPPORTED += ("layer_replication", "trainable_token_indices", "target_parameters")
LORA, ROOT, HEAD = (".lora_A", ".lora_B"), "base_model.model.", "base_model.model.lm_head.weight"


class LoraLinear(nn.Linear):
    """A linear layer and its update. W keeps its name, `weight`; A and B are float32."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.rank, self.scale = base.weight, rank, scale
        a = torch.empty(rank, base.in_features, device="cpu")  # the same on every device
        b = torch.zeros(base.out_features, rank, device="cpu")
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(b.to(base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return F.linear(x, self.weight) + F.linear(self.scale * F.linear(x, a), b)


def add_lora(
    model: Llama,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = TARGETS,
    whole: Sequence[str] = (),
) -> None:
    """Give the linear layers `targets` an update, train it and the PARTS `whole`; freeze the rest.

    ValueError for names that the model does not have.
    """
    if missing := [t for t in targets if not _named(model, [t])]:
        raise ValueError(f"targets: was {missing[0]!r}, must be a linear layer of the model")
    if unknown := [part for part in whole if part not in PARTS]:
        raise ValueError(f"train: was {unknown[0]!r}, must be of {', '.join(PARTS)}")
    most = model.config.hidden_size
    if not 1 <= rank <= most or not alpha > 0:
        raise ValueError(f"rank, alpha: were {rank}, {alpha}, must be 1 to {most} and above 0")
    _wrap(model, _named(model, targets), rank, alpha / rank)
    modules = [module for part in whole for module in PARTS[part]]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(LORA) or name.split(".")[-2] in modules)


def merge_lora(model: Llama) -> None:
    """Add every update to its W, in float32, rounded once: a plain `Llama` of the same function."""
    for name, layer in _linears(model).items():
        if isinstance(layer, LoraLinear):
            update = layer.scale * layer.lora_B.detach().float() @ layer.lora_A.detach().float()
            wide = torch.promote_types(layer.weight.dtype, torch.float32)
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter((layer.weight.detach().to(wide) + update).to(layer.weight))
            model.set_submodule(name, plain)


def save_adapter(
    model: Llama,
    path: str | Path,
    base: str = "",
    freqkv: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write what is trained of a model with LoRA into the folder `path`; `base` is for readers.

    dtype: the parameters' own unless given.
    """
    updates = {n: m for n, m in _linears(model).items() if isinstance(m, LoraLinear)}
    if len({(m.rank, m.scale) for m in updates.values()}) != 1:
        raise ValueError(f"model: had {len(updates)} LoRA layers, must have some, of one rank")
    trained = {
        name: parameter.detach().to("cpu", dtype)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    tensors = {_published(name): tensor.contiguous() for name, tensor in trained.items()}
    whole = {name.split(".")[-2] for name in trained if not name.endswith(LORA)}
    if model.lm_head is None and "embed_tokens" in whole:
        # PEFT has an output layer all the same, and ties it again only where told to.
        tensors[HEAD] = trained["embed_tokens.weight"].clone()
        whole.add("lm_head")
    first = next(iter(updates.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.scale * first.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in updates}),
        "modules_to_save": sorted(whole) or None,
        "inference_mode": True,
    }
    config |= {"ensure_weight_tying": True} if HEAD in tensors and model.lm_head is None else {}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(folder / TENSORS, lambda to: save_file(tensors, to, metadata={"format": "pt"}))
    for name, content in (("freqkv.json", freqkv), (CONFIG, config)):
        if content is not None:
            write_json(folder / name, content)


def find_adapter(path_or_name: str | Path) -> Path:
    """Where an adapter is: a folder. One name is known, of the one that comes with this code."""
    path = Path(path_or_name)
    if path_or_name == BUILT_IN:
        return Path(__file__).parent / BUILT_IN
    if not path.is_dir():
        was = f"adapter: was {str(path_or_name)!r}"
        raise FileNotFoundError(f"{was}, must be {BUILT_IN!r} or a folder with {CONFIG}")
    return path


def load_adapter(model: Llama, path_or_name: str | Path, dtype: torch.dtype | None = None) -> None:
    """Put an adapter onto a plain `Llama`; what it holds is trained, the rest frozen.

    Whole parameters take the model's dtype unless one is given. ValueError, with the model as it
    was, for an adapter of another model: a tensor missing, unexpected or misshapen.
    """
    path = find_adapter(path_or_name)
    file = path / TENSORS
    config, tensors = _read(path)
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    with damaged(path / CONFIG, "as PEFT writes it"):
        names = _named(model, config["target_modules"])
        whole = [*map(str, config.get("modules_to_save") or [])]
    twin = blank_model(model.config)
    _wrap(twin, names, config["r"], scale)
    expected = {
        _published(name): parameter.shape
        for name, parameter in twin.named_parameters()
        if name.endswith((*LORA, *(f"{module}.weight" for module in whole)))
    }
    if model.lm_head is None and (embedding := _published("embed_tokens.weight")) in expected:
        expected[HEAD] = expected[embedding]
    for name in sorted(expected.keys() | tensors.keys()):
        was = tuple(tensors[name].shape) if name in tensors else "missing"
        if was != (must := tuple(expected.get(name, ())) or "absent"):
            raise ValueError(f"{file}: tensor {name}: was {was}, must be {must} for this model")
    if model.lm_head is None and HEAD in tensors and not tensors[HEAD].equal(tensors[embedding]):
        raise ValueError(f"{file}: tensor {HEAD}: was apart, must be the tied embedding")
    _wrap(model, names, config["r"], scale)
    for name, parameter in model.named_parameters():
        tensor = tensors.get(_published(name))
        parameter.requires_grad_(tensor is not None)
        if tensor is not None:
            kept = parameter.dtype if name.endswith(LORA) else dtype or parameter.dtype
            parameter.data = tensor.to(parameter.device, kept)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an adapter; whatever this LoRA does not do is a ValueError."""
    config, file = read_json(folder / CONFIG), folder / TENSORS
    rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    wrong = [key for key in UNSUPPORTED if config.get(key)]
    wrong += [] if config.get("peft_type") == "LORA" else ["peft_type"]
    wrong += [] if config.get("bias", "none") == "none" else ["bias"]
    wrong += [] if type(rank) is int and 0 < rank < 1 << 16 else ["r"]
    wrong += [] if isinstance(alpha, (int, float)) and 0 < alpha < 1e30 else ["lora_alpha"]
    wrong += [] if targets and isinstance(targets, (str, list)) else ["target_modules"]
    if wrong:
        was = config.get(wrong[0])
        raise ValueError(f"{folder / CONFIG}: {wrong[0]}: was {was!r}, must be as in plain LoRA")
    if not file.exists():
        raise FileNotFoundError(f"{file}: was not there, must hold the adapter's tensors")
    try:
        return config, load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: was not whole ({error}), must be safetensors") from None


def _linears(model: Llama) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def _named(model: Llama, targets: str | Sequence[str]) -> list[str]:
    """Linear layers whose name ends in one of `targets`, or, as PEFT has it too, fits a pattern."""
    if isinstance(targets, str):
        return [n for n in _linears(model) if re.fullmatch(targets, _published(n)[len(ROOT) :])]
    return [n for n in _linears(model) if f".{n}".endswith(tuple(f".{t}" for t in targets))]


def _wrap(model: Llama, names: Sequence[str], rank: int, scale: float) -> None:
    for name, layer in _linears(model).items():
        if isinstance(layer, LoraLinear):
            raise ValueError("model: had LoRA layers already, must be plain: merge_lora first")
        if name in names:
            model.set_submodule(name, LoraLinear(layer, rank, scale))


def _published(name: str) -> str:
    """A name of `model.Llama` as PEFT writes it; A and B are modules there, with a weight."""
    end = ".weight" if name.endswith(LORA) else ""
    return ROOT + ("" if name.startswith("lm_head") else "model.") + name + end
