"""GGUF, the file format of llama.cpp, through the package `gguf` (extra `gguf`).

Quantised tensors are computed back to float32. Rows of q and k are in interleaved order, as in
Meta's releases. A llama3 RoPE scaling is stored as a tensor of factors, and found again from it.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import LlamaConfig, Rope, RopeScaling
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


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader` of the file; ValueError where the file is not a whole GGUF."""
    return _parsed(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # a parse takes seconds: a model that follows its tokenizer shares it
def _parsed(path: Path, modified: int) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError(
            f"{path}: reading GGUF needs the package gguf: pip install gguf"
        ) from None
    try:
        return GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # whatever the reader meets in a broken file
        raise ValueError(f"{path}: was not whole ({error}), must be a GGUF file") from None


def read(path: Path) -> tuple[LlamaConfig, Iterator[tuple[str, Tensor]]]:
    """Configuration and tensors of a GGUF file, by the names of `model.Llama`."""
    reader = open_gguf(path)
    _parsed.cache_clear()  # held no longer than the tensors: it takes 150 MB
    fields = {
        name: field.contents() for name, field in reader.fields.items() if "tokenizer" not in name
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if (kind := fields.get("general.architecture")) != "llama":
        raise ValueError(f"{path}: general.architecture: was {kind!r}, must be 'llama'")
    try:
        heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
        head_dim = fields.get("llama.attention.key_length", hidden // heads)
        theta = float(fields.get("llama.rope.freq_base", 10000.0))
        if (turned := fields.get("llama.rope.dimension_count", head_dim)) != head_dim:
            raise ValueError(f"llama.rope.dimension_count: was {turned}, must be {head_dim}")
        config = LlamaConfig(
            vocab_size=int(tensors["token_embd.weight"].shape[-1]),
            hidden_size=hidden,
            intermediate_size=fields["llama.feed_forward_length"],
            num_hidden_layers=fields["llama.block_count"],
            num_attention_heads=heads,
            num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=fields["llama.context_length"],
            rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
            rope_theta=theta,
            rope_scaling=_scaling(fields, tensors, head_dim, theta),
            tie_word_embeddings="output.weight" not in tensors,
        )
    except KeyError as missing:
        raise ValueError(f"{path}: {missing} was missing, must be given") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from None
    return config, _tensors(path, config, tensors)


def _scaling(
    fields: dict[str, Any], tensors: dict[str, Any], head_dim: int, theta: float
) -> RopeScaling | None:
    if "rope_freqs.weight" in tensors:
        divisors = torch.tensor(tensors["rope_freqs.weight"].data).double()
        found = RopeScaling("llama3", float(divisors.max()))
        plain, scaled = (Rope(head_dim, theta, s).inv_freq for s in (None, found))
        if divisors.shape != plain.shape or not torch.allclose(plain / scaled, divisors, rtol=1e-3):
            raise ValueError("rope_freqs.weight: was unknown, must be Llama 3.1's factors")
        return found
    kind = fields.get("llama.rope.scaling.type", "none")
    return None if kind == "none" else RopeScaling(kind, float(fields["llama.rope.scaling.factor"]))


def _tensors(
    path: Path, config: LlamaConfig, tensors: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    from gguf import GGMLQuantizationType, dequantize

    floats = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for full_name, tensor in tensors.items():
        layer, name = "", full_name.removesuffix(".weight")
        if name == "rope_freqs":
            continue  # read as the RoPE scaling
        if name.startswith("blk."):
            _, number, name = name.split(".", 2)
            layer = f"layers.{number}."
        if name not in NAMES:
            raise ValueError(f"{path}: tensor {full_name} was unexpected, must not be in a LLaMA")
        try:
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            values = half_split(values, heads[name]) if name in heads else values
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: tensor {full_name}: {error}") from None
        own = floats.get(tensor.tensor_type, torch.float32)
        yield f"{layer}{NAMES[name]}.weight", values.to(own)
