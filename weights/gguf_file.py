"""GGUF, the file format of llama.cpp, through the package `gguf` (extra `gguf`).

Quantised tensors are computed back to float32. Rows of q and k are in interleaved order, as in
Meta's releases. A llama3 RoPE scaling is stored as a tensor of factors, and found again from it.
A model that was split into parts is read from any of them.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import LlamaConfig, Rope, RopeScaling
from weights.files import name_file, positive_number, whole_number
from weights.meta import half_split

NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys that `_read_config` and `_read_scaling` read.
READ = (
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.scale",
    "llama.attention.value_length",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scale_linear",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.type",
)
# Keys that change nothing in a LLaMA.
NOTES = (
    "llama.attention.layer_norm_epsilon",
    "llama.rope.scaling.finetuned",
    "llama.rope.scaling.original_context_length",
    "llama.vocab_size",
)
# What other keys must say, where a file has them. Every key of `llama.` that is in none of these
# lists must be 0 or false, which is how a file says that it has no experts, no window, no cap.
FIXED = {
    "general.type": "model",
    "general.quantization_version": 2,
    "llama.attention.causal": True,
    "llama.rope.scaling.attn_factor": 1.0,
    "llama.tensor_data_layout": "Meta AI original pth",
}
PART = re.compile(r"(?P<name>.+)-(?P<part>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
# The package dequantises 16 rows at a time. Rows of up to 256 blocks keep its arrays in the
# processor's cache, and take a third of the time of rows as short as a small model's.
ROW_BLOCKS = 256


def find_parts(path: Path) -> list[Path]:
    """The files of a model, in order: `path` alone, or all parts of what was split."""
    match = PART.fullmatch(path.name)
    if match is None or not 1 <= int(match["part"]) <= int(match["count"]):
        return [path]
    count = int(match["count"])
    parts = []
    for number in range(1, count + 1):
        part = path.with_name(f"{match['name']}-{number:05d}-of-{count:05d}.gguf")
        if not part.exists():
            raise FileNotFoundError(
                f"{part}: was not there, must be one of the {count} parts of a split GGUF"
            )
        parts.append(part)
    return parts


def gguf_fields(path: Path) -> dict[str, Any]:
    """What a GGUF file says beside its tensors, in plain Python values: "llama.block_count": 30.

    Of a model in parts this is what the first one says; the others only say which part they are.
    """
    first = find_parts(path)[0]
    return _read_fields(first, open_gguf(first))


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader` of one file; ValueError where the file is not a whole GGUF."""
    try:
        from weights.gguf_reader import ArrayReader
    except ImportError:
        raise ImportError(
            f"{path}: reading GGUF needs the package gguf: pip install gguf"
        ) from None
    try:
        # Copy on write: tensors are mapped, and may be changed without changing the file.
        return ArrayReader(path, "c")
    except OSError:
        raise
    except Exception as error:  # whatever the reader meets in a broken file
        raise ValueError(f"{path}: was not whole ({error}), must be a GGUF file") from None


def read(path: Path) -> tuple[LlamaConfig, Iterator[tuple[str, Tensor]]]:
    """Configuration and tensors of a GGUF file, by the names of `model.Llama`."""
    parts = find_parts(path)
    tensors: dict[str, Any] = {}
    for index, part in enumerate(parts):
        reader = open_gguf(part)
        part_fields = _read_fields(part, reader)
        _check_part(part, part_fields, index, len(parts))
        if index == 0:
            fields = part_fields
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise ValueError(f"{part}: tensor {tensor.name} was there twice, must be once")
            tensors[tensor.name] = tensor
    with name_file(parts[0]):
        config = _read_config(fields, tensors)
    return config, _read_tensors(path, config, tensors)


def _read_fields(path: Path, reader: Any) -> dict[str, Any]:
    with name_file(path):
        return {name: field.contents() for name, field in reader.fields.items()}


def _check_part(path: Path, fields: dict[str, Any], index: int, count: int) -> None:
    """ValueError unless a file is the part, counted from 0, that its name makes it."""
    number = fields.get("split.no", 0)
    total = max(fields.get("split.count", 1), 1)
    if (number, total) == (index, count):
        return
    was = f"{path}: was part {number + 1} of {total} (split.no, split.count)"
    if count == 1:
        name = f"NAME-{number + 1:05d}-of-{total:05d}.gguf"
        raise ValueError(f"{was}, must lie beside the other parts, under a name like {name}")
    raise ValueError(f"{was}, must be part {index + 1} of {count}, as its name says")


def _read_config(fields: dict[str, Any], tensors: dict[str, Any]) -> LlamaConfig:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture: was {architecture!r}, must be 'llama'")
    _check_fixed(fields)
    hidden = whole_number(fields, "llama.embedding_length")
    heads = whole_number(fields, "llama.attention.head_count")
    head_dim = whole_number(fields, "llama.attention.key_length", hidden // heads)
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.get(name, head_dim) != head_dim:
            raise ValueError(f"{name}: was {fields[name]!r}, must be {head_dim}, as of the keys")
    scale = fields.get("llama.attention.scale", 0.0)  # 0: as usual
    if scale != 0 and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise ValueError(f"llama.attention.scale: was {scale!r}, must be 1 / sqrt({head_dim})")
    theta = positive_number(fields, "llama.rope.freq_base", 10000.0)
    return LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        hidden_size=hidden,
        intermediate_size=whole_number(fields, "llama.feed_forward_length"),
        num_hidden_layers=whole_number(fields, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=whole_number(fields, "llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=whole_number(fields, "llama.context_length"),
        rms_norm_eps=positive_number(fields, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_read_scaling(fields, tensors, head_dim, theta),
        tie_word_embeddings="output.weight" not in tensors,
    )


def _check_fixed(fields: dict[str, Any]) -> None:
    """ValueError for a key that asks for what this LLaMA does not do."""
    for name, value in fields.items():
        if name in FIXED:
            if value != FIXED[name]:
                raise ValueError(f"{name}: was {value!r}, must be {FIXED[name]!r}")
        elif name.startswith("llama.") and name not in READ and name not in NOTES and value != 0:
            raise ValueError(f"{name}: was {value!r}, must be 0: this LLaMA has no such thing")


def _read_scaling(
    fields: dict[str, Any], tensors: dict[str, Any], head_dim: int, theta: float
) -> RopeScaling | None:
    """The RoPE scaling as llama.cpp reads it: a factor without a type is linear."""
    rope_type = fields.get("llama.rope.scaling.type", "linear")
    old_factor = fields.get("llama.rope.scale_linear", 0.0)
    factor = float(fields.get("llama.rope.scaling.factor", old_factor))
    if rope_type not in ("none", "linear"):
        raise ValueError(
            f"llama.rope.scaling.type: was {rope_type!r}, must be 'none' or 'linear' "
            "(a llama3 scaling is a tensor of factors, rope_freqs.weight)"
        )
    linear = None
    if rope_type == "linear" and factor not in (0.0, 1.0):
        linear = RopeScaling("linear", factor)
    if "rope_freqs.weight" not in tensors:
        return linear
    if linear is not None:
        raise ValueError("rope_freqs.weight: was beside a linear scaling, must be the only one")
    divisors = torch.tensor(tensors["rope_freqs.weight"].data).double()
    llama3 = RopeScaling("llama3", float(divisors.max()))
    plain = Rope(head_dim, theta).inv_freq
    scaled = Rope(head_dim, theta, llama3).inv_freq
    if divisors.shape != plain.shape or not torch.allclose(plain / scaled, divisors, rtol=1e-3):
        raise ValueError("rope_freqs.weight: was unknown, must be Llama 3.1's factors")
    return llama3


def _read_tensors(
    path: Path, config: LlamaConfig, tensors: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for full_name, tensor in tensors.items():
        layer = ""
        name = full_name.removesuffix(".weight")
        if name == "rope_freqs":
            continue  # read as the RoPE scaling
        if name.startswith("blk.") and name.count(".") >= 2:
            _, number, name = name.split(".", 2)
            layer = f"layers.{number}."
        if name not in NAMES:
            raise ValueError(f"{path}: tensor {full_name} was unexpected, must not be in a LLaMA")
        with name_file(path, f"tensor {full_name}"):
            values = _compute_values(tensor)
            if name in heads:
                values = half_split(values, heads[name])
        yield f"{layer}{NAMES[name]}.weight", values


def _compute_values(tensor: Any) -> Tensor:
    """A tensor of the file in its own dtype; in float32 where the file has it quantised."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    stored = tensor.tensor_type
    if tensor.data.dtype.name != "uint8":  # plain numbers
        return torch.from_numpy(tensor.data)
    if stored == GGMLQuantizationType.BF16:  # which numpy has not
        return torch.from_numpy(tensor.data).view(torch.bfloat16)
    _, block_bytes = GGML_QUANT_SIZES[stored]
    blocks = math.gcd(tensor.data.size // block_bytes, ROW_BLOCKS)
    rows = tensor.data.reshape(-1, blocks * block_bytes)
    shape = tensor.shape[::-1].tolist()  # the file has the last dimension first
    return torch.from_numpy(dequantize(rows, stored)).view(shape)
