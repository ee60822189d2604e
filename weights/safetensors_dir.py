"""The published layout: a folder with config.json and safetensors, one file or an index and shards.

Reads and writes what Hugging Face's tools read and write. The names are the model's own behind a
prefix `model.`; of tied models lm_head is not stored.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import Llama, LlamaConfig, RopeScaling
from weights.blank import blank_model
from weights.files import read_json, write_beside, write_json
from weights.tokenizer import Tokenizer

PREFIX, HEAD = "model.", "lm_head.weight"
# What this LLaMA does not do, so that a checkpoint which asks for it is refused, not misread.
FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}


def read(folder: Path) -> tuple[LlamaConfig, Iterator[tuple[str, Tensor]]]:
    """Configuration and tensors of a checkpoint folder, by the names of `model.Llama`."""
    config = read_config(folder / "config.json")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
            raise ValueError(f"{index}: weight_map was missing, must map tensor names to files")
        files = [folder / name for name in sorted(set(shards.values()))]
    else:
        raise FileNotFoundError(
            f"{folder}: was without weights, must hold model.safetensors, or its index and shards"
        )
    return config, _tensors(files, config.tie_word_embeddings)


def _tensors(files: list[Path], tied: bool) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file}: was not there, must be a shard of the checkpoint")
        try:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118 (not a dict)
                    if (name == HEAD and tied) or name.endswith("rotary_emb.inv_freq"):
                        continue  # copies of the embedding, and tables that Rope makes
                    yield name.removeprefix(PREFIX), content.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: was not whole ({error}), must be safetensors") from None


def read_config(path: Path) -> LlamaConfig:
    """config.json of a LLaMA, old layout (rope_theta, rope_scaling) or new (rope_parameters)."""
    content = read_json(path)
    for name, value in FIXED.items():
        if content.get(name, value) != value:
            raise ValueError(f"{path}: {name}: was {content[name]!r}, must be {value!r}")
    try:
        heads, hidden = content["num_attention_heads"], content["hidden_size"]
        rope = {k: content[k] for k in ("rope_theta",) if k in content}
        for name in ("rope_scaling", "rope_parameters"):
            given = content.get(name) or {}
            if not isinstance(given, dict) or any(isinstance(x, dict) for x in given.values()):
                raise ValueError(f"{name}: was {given!r}, must be an object of numbers")
            rope |= given
        if rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError("partial_rotary_factor: was not 1, must be")
        if not isinstance(tied := content.get("tie_word_embeddings", False), bool):
            raise ValueError(f"tie_word_embeddings: was {tied!r}, must be true or false")
        return LlamaConfig(
            vocab_size=content["vocab_size"],
            hidden_size=hidden,
            intermediate_size=content["intermediate_size"],
            num_hidden_layers=content["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=content.get("num_key_value_heads") or heads,
            head_dim=content.get("head_dim") or hidden // max(heads, 1),
            max_position_embeddings=content["max_position_embeddings"],
            rms_norm_eps=content.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", 10000.0),
            rope_scaling=_scaling(rope),
            tie_word_embeddings=tied,
        )
    except KeyError as missing:
        raise ValueError(f"{path}: {missing} was missing, must be given") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from None


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    given = {k: rope[k] for k in RopeScaling.__dataclass_fields__ if k in rope}
    given["factor"] = rope["factor"]
    return RopeScaling(**(given | {"rope_type": kind}))


def config_json(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """`config` as config.json has it, in the layout that every version of the tools reads."""
    content = {"architectures": ["LlamaForCausalLM"], **FIXED, **asdict(config)}
    del content["partial_rotary_factor"]
    if config.rope_scaling and config.rope_scaling.rope_type == "linear":
        content["rope_scaling"] = {"rope_type": "linear", "factor": config.rope_scaling.factor}
    return content | {"torch_dtype": str(dtype).removeprefix("torch.")}


def save_model(model: Llama, path: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into the folder `path`.

    Every file is written beside and renamed, so that one of the same name is replaced whole.
    ValueError for a model that is no plain `Llama` (one with LoRA: merge it first).
    """
    folder = Path(path)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    plain = blank_model(model.config).state_dict()
    if wrong := sorted(state.keys() ^ plain.keys()):
        raise ValueError(f"model: {wrong[0]} was missing or added, must be a plain Llama")
    named = {name if name == HEAD else PREFIX + name: tensor for name, tensor in state.items()}
    content = config_json(model.config, next(model.parameters()).dtype)
    if tokenizer is not None:
        content |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    folder.mkdir(parents=True, exist_ok=True)
    weights_file = folder / "model.safetensors"
    write_beside(weights_file, lambda to: save_file(named, to, metadata={"format": "pt"}))
    write_json(folder / "config.json", content)
    if tokenizer and tokenizer.made:
        made = tokenizer.made
        write_beside(folder / "tokenizer.json", lambda to: to.write_text(made, encoding="utf-8"))
    for file in tokenizer.files if tokenizer else ():
        write_beside(folder / file.name, lambda to, file=file: shutil.copyfile(file, to))
