"""Meta's own releases: consolidated.NN.pth, one file for each model-parallel rank, and params.json.

The files of several ranks are parts of one model, split along the rows or the columns of each
matrix. Rows of q and k are in interleaved order (a pair of channels side by side), which
`half_split` turns into the order of `model.Rope` (the two halves of a head).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import LlamaConfig, RopeScaling
from weights.files import name_file, positive_number, read_json, whole_number

PARAMS = "params.json"
# Meta's name -> (ours, the dimension that ranks split; None: every rank has all of it)
NAMES: dict[str, tuple[str, int | None]] = {
    "norm": ("norm", None),
    "output": ("lm_head", 0),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
# Keys of params.json that are read, or change nothing here: the width of the feed-forward layer,
# which some of them imply, is that of its tensors.
KNOWN = (
    "dim",
    "ffn_dim_multiplier",
    "head_dim",
    "hidden_dim",
    "max_batch_size",
    "max_seq_len",
    "multiple_of",
    "n_heads",
    "n_kv_heads",
    "n_layers",
    "norm_eps",
    "rope_scaling_factor",
    "rope_theta",
    "use_scaled_rope",
    "vocab_size",
)
# What Meta's code has where a model sees no pictures.
NEUTRAL = {
    "vision_chunk_size": -1,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": -1,
}
# Tokens that the families were trained on, which params.json does not say but by its rope_theta.
POSITIONS = {10000.0: 4096, 500000.0: 8192, 1000000.0: 16384}  # Llama 2, Llama 3, Code Llama


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection [heads * D, E] from interleaved to half-split order."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of this layout."""
    return (folder / PARAMS).exists() and any(folder.glob("consolidated.*.pth"))


def read(folder: Path) -> tuple[LlamaConfig, Iterator[tuple[str, Tensor]]]:
    """Configuration and tensors of a release, by the names of `model.Llama`."""
    params = read_json(folder / PARAMS)
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{folder}: was without weights, must hold consolidated.*.pth")
    for rank in range(len(files)):
        file = folder / f"consolidated.{rank:02d}.pth"
        if not file.exists():
            raise FileNotFoundError(f"{file}: was not there, must be one of {len(files)} ranks")
    ranks = [_load_rank(file) for file in files]
    with name_file(folder):
        vocab, width = _measure(ranks)
    with name_file(folder / PARAMS):
        config = _read_config(params, vocab, width)
    return config, _read_tensors(folder, config, ranks)


def _load_rank(file: Path) -> dict[str, Tensor]:
    """The tensors of one rank, mapped from its file."""
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever torch meets in a broken zip or pickle
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"{file}: was not whole ({reason}), must be a .pth of tensors") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: was a {type(content).__name__}, must be tensors by name")
    for name, value in content.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided
        if not isinstance(name, str) or not plain:
            raise ValueError(f"{file}: {name!r} was no plain tensor, must be tensors by name")
    return content


def _measure(ranks: list[dict[str, Tensor]]) -> tuple[int, int]:
    """Size of the vocabulary, and width of the feed-forward layer, by the tensors of all ranks."""
    vocab = len(ranks[0]["tok_embeddings.weight"])
    if _splits_rows(ranks[0]):
        vocab = sum(len(rank["tok_embeddings.weight"]) for rank in ranks)
    width = sum(len(rank["layers.0.feed_forward.w1.weight"]) for rank in ranks)
    return vocab, width


def _splits_rows(rank: dict[str, Tensor]) -> bool:
    """Whether ranks share out the embedding's rows, as for Llama 3, or columns, as for Llama 2."""
    return rank["tok_embeddings.weight"].shape[-1] == len(rank["norm.weight"])


def _read_config(params: dict[str, Any], vocab: int, width: int) -> LlamaConfig:
    for name, value in params.items():
        if name not in KNOWN and value not in (None, False, NEUTRAL.get(name)):
            raise ValueError(f"{name}: was {value!r}, must be null: this LLaMA has no such thing")
    dim = whole_number(params, "dim")
    heads = whole_number(params, "n_heads")
    layers = whole_number(params, "n_layers")
    for name, size in (("vocab_size", vocab), ("hidden_dim", width)):
        if params.get(name) not in (None, -1, size):
            raise ValueError(f"{name}: was {params[name]!r}, must be {size}, as the tensors")
    scaling = _read_scaling(params, dim, layers)
    theta = positive_number(params, "rope_theta", 10000.0 if scaling is None else 500000.0)
    positions = POSITIONS.get(theta, 8192) if scaling is None else 131072
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=whole_number(params, "n_kv_heads", heads),
        head_dim=whole_number(params, "head_dim", dim // heads),
        max_position_embeddings=whole_number(params, "max_seq_len", positions),
        rms_norm_eps=positive_number(params, "norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _read_scaling(params: dict[str, Any], dim: int, layers: int) -> RopeScaling | None:
    """The RoPE scaling of Llama 3.1 and later."""
    scaled = params.get("use_scaled_rope") or False
    if not isinstance(scaled, bool):
        raise ValueError(f"use_scaled_rope: was {scaled!r}, must be true or false")
    if not scaled:
        return None
    factor = 8.0
    if (dim, layers) in ((2048, 16), (3072, 28)):  # Llama 3.2 1B and 3B do not say theirs
        factor = 32.0
    return RopeScaling("llama3", positive_number(params, "rope_scaling_factor", factor))


def _read_tensors(
    folder: Path, config: LlamaConfig, ranks: list[dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    heads = {"attention.wq": config.num_attention_heads, "attention.wk": config.num_key_value_heads}
    for full_name in ranks[0]:
        if full_name == "rope.freqs":
            continue  # a table that Rope makes
        match = re.fullmatch(r"(layers\.\d+\.|)(.+)\.weight", full_name)
        layer, name = match.groups() if match else ("", full_name)
        if name == "tok_embeddings":
            ours = "embed_tokens"
            dim = 0 if _splits_rows(ranks[0]) else 1
        elif name in NAMES:
            ours, dim = NAMES[name]
        else:
            raise ValueError(f"{folder}: tensor {full_name} was unexpected, must not be in a LLaMA")
        for rank in ranks:
            if full_name not in rank:
                raise ValueError(f"{folder}: tensor {full_name} was missing in a rank")
        tensor = ranks[0][full_name]
        try:
            if dim is not None and len(ranks) > 1:
                tensor = torch.cat([rank[full_name] for rank in ranks], dim)
            if name in heads:
                tensor = half_split(tensor, heads[name])
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{folder}: tensor {full_name} was misshapen: {error}") from None
        yield f"{layer}{ours}.weight", tensor
