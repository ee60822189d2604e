"""The published layout: a folder with config.json and safetensors, one file or an index and shards.

Reads and writes what Hugging Face's tools read and write, as transformers 5.24 reads it. The names
are the model's own behind a prefix `model.`; of tied models lm_head is not stored.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import Llama, LlamaConfig, RopeScaling
from weights.blank import blank_model, check_sizes
from weights.files import (
    name_file,
    positive_number,
    read_json,
    whole_number,
    write_beside,
    write_json,
)
from weights.tokenizer import Tokenizer

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIX = "model."
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
# What this LLaMA does, and does not: a checkpoint that asks for anything else is refused, not
# misread. Where config.json has no such key, the first value is meant.
FIXED: dict[str, tuple[object, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_causal": (True,),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "per_layer_config": (None,),
}

# A tensor's place: an open file, and the name that it has there.
Place = tuple[Any, str]


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of this layout."""
    named = (folder / SINGLE).exists() or (folder / INDEX).exists()
    return named and (folder / CONFIG).exists()


def read(folder: Path) -> tuple[LlamaConfig, Iterator[tuple[str, Tensor]]]:
    """Configuration and tensors of a checkpoint folder, by the names of `model.Llama`."""
    config = read_config(folder / CONFIG)
    places = _find_tensors(_find_files(folder))
    if config.tie_word_embeddings and HEAD in places:
        with name_file(folder):
            config = _tie(config, places)
    return config, ((name, _read_tensor(place)) for name, place in places.items())


def _find_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.exists():
        raise FileNotFoundError(
            f"{folder}: was without weights, must hold model.safetensors, or its index and shards"
        )
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise ValueError(f"{index}: weight_map was missing, must map tensor names to files")
    return [folder / name for name in sorted(set(shards.values()))]


def _find_tensors(files: list[Path]) -> dict[str, Place]:
    """Where each tensor is, by its name in `model.Llama`."""
    places: dict[str, Place] = {}
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file}: was not there, must be a shard of the checkpoint")
        try:
            content = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: was not whole ({error}), must be safetensors") from None
        for stored in content.keys():  # noqa: SIM118 (not a dict)
            if stored.endswith("rotary_emb.inv_freq"):
                continue  # a table that Rope makes
            name = stored.removeprefix(PREFIX)
            if name in places:
                raise ValueError(f"{file}: tensor {stored} was there twice, must be once")
            places[name] = content, stored
    return places


def _read_tensor(place: Place) -> Tensor:
    content, stored = place
    return content.get_tensor(stored)


def _tie(config: LlamaConfig, places: dict[str, Place]) -> LlamaConfig:
    """Settle what a config that ties means where an output layer is stored all the same."""
    head = places.pop(HEAD)
    if EMBEDDING not in places:  # the shared matrix is stored under the other name
        places[EMBEDDING] = head
        return config
    head_values = _read_tensor(head)
    embedding_values = _read_tensor(places[EMBEDDING])
    widest = torch.promote_types(head_values.dtype, embedding_values.dtype)
    if head_values.to(widest).equal(embedding_values.to(widest)):
        return config
    places[HEAD] = head  # another matrix: the tensors are right, and the flag is not
    return replace(config, tie_word_embeddings=False)


def read_config(path: Path) -> LlamaConfig:
    """config.json of a LLaMA, old layout (rope_theta, rope_scaling) or new (rope_parameters)."""
    content = read_json(path)
    with name_file(path):
        _check_fixed(content)
        hidden = whole_number(content, "hidden_size")
        heads = whole_number(content, "num_attention_heads")
        tied = content.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise ValueError(f"tie_word_embeddings: was {tied!r}, must be true or false")
        theta, scaling = _read_rope(content)
        config = LlamaConfig(
            vocab_size=whole_number(content, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=whole_number(content, "intermediate_size"),
            num_hidden_layers=whole_number(content, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=whole_number(content, "num_key_value_heads", heads),
            head_dim=whole_number(content, "head_dim", hidden // heads),
            max_position_embeddings=whole_number(content, "max_position_embeddings"),
            rms_norm_eps=positive_number(content, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=tied,
        )
        check_sizes(config)
        return config


def _check_fixed(content: dict[str, Any]) -> None:
    """ValueError for a key that asks for what this LLaMA does not do."""
    for name, values in FIXED.items():
        value = content.get(name, values[0])
        if value not in values:
            raise ValueError(f"{name}: was {value!r}, must be {values[0]!r}")
    quantization = content.get("quantization_config")
    if quantization:
        method = quantization
        if isinstance(quantization, dict):
            method = quantization.get("quant_method")
        raise ValueError(f"quantization_config: was {method!r}, must not be there: plain floats")
    layer_types = content.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"layer_types: was {layer_types!r}, must be a list")
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "attention"):
            raise ValueError(f"layer_types: was {layer_type!r}, must be 'full_attention'")


def _read_rope(content: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """RoPE's theta and scaling. Where keys conflict, those count that transformers goes by.

    That is rope_scaling before rope_parameters, and what stands in it before what stands beside;
    but of the original length, what stands beside.
    """
    name = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"
    rope = content.get(name) or {}
    if not isinstance(rope, dict) or any(isinstance(x, dict) for x in rope.values()):
        raise ValueError(f"{name}: was {rope!r}, must be an object of numbers")
    share = rope.get("partial_rotary_factor", content.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ValueError(f"partial_rotary_factor: was {share!r}, must be 1")
    theta = positive_number(rope if "rope_theta" in rope else content, "rope_theta", 10000.0)
    if "factor" in rope and "rope_type" not in rope and "type" not in rope:
        raise ValueError(f"{name}: rope_type was missing, must be given with a factor")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    factor = positive_number(rope, "factor")
    if rope_type != "llama3":
        return theta, RopeScaling(rope_type, factor)
    positions = whole_number(content, "max_position_embeddings")
    for place in (content, rope):
        if "original_max_position_embeddings" in place:
            positions = whole_number(place, "original_max_position_embeddings")
            break
    return theta, RopeScaling(
        "llama3",
        factor,
        low_freq_factor=positive_number(rope, "low_freq_factor"),
        high_freq_factor=positive_number(rope, "high_freq_factor"),
        original_max_position_embeddings=positions,
    )


def config_json(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """`config` as config.json has it, in the layout that every version of the tools reads."""
    content: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    content |= asdict(config)
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "linear":
        content["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    content["torch_dtype"] = str(dtype).removeprefix("torch.")
    return content


def save_model(model: Llama, path: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a checkpoint into the folder `path`: configuration, weights, and the tokenizer's files.

    Every file is written beside and renamed, so that one of the same name is replaced whole.
    ValueError for a model that is no plain `Llama` (one with LoRA: merge it first).
    """
    tensors = _publish_names(model)
    content = config_json(model.config, next(model.parameters()).dtype)
    # Without a tokenizer these are null, not left out, or tools take Llama 2's in their place.
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if tokenizer is not None:
        ids["bos_token_id"] = tokenizer.bos_id
        if len(tokenizer.eos_ids) == 1:
            ids["eos_token_id"] = tokenizer.eos_ids[0]
        elif tokenizer.eos_ids:
            ids["eos_token_id"] = list(tokenizer.eos_ids)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(folder / SINGLE, lambda to: save_file(tensors, to, metadata={"format": "pt"}))
    write_json(folder / CONFIG, content | ids)
    if tokenizer is not None:
        write_json(folder / "generation_config.json", ids)
        tokenizer.save(folder)


def _publish_names(model: Llama) -> dict[str, Tensor]:
    """The parameters of a plain `Llama` by their published names, on the CPU."""
    expected = blank_model(model.config).state_dict()
    state = model.state_dict()
    for name in sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"model: {name} was missing or added, must be a plain Llama")
    tensors = {}
    for name, tensor in state.items():
        published = name if name == HEAD else PREFIX + name
        tensors[published] = tensor.detach().cpu().contiguous()
    return tensors
