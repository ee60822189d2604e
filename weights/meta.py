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
from weights.files import read_json

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


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection [heads * D, E] from interleaved to half-split order."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def read(folder: Path) -> tuple[LlamaConfig, Iterator[tuple[str, Tensor]]]:
    """Configuration and tensors of a release, by the names of `model.Llama`."""
    params = read_json(folder / "params.json")
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{folder}: was without weights, must hold consolidated.*.pth")
    for rank in range(len(files)):
        if not (expected := folder / f"consolidated.{rank:02d}.pth").exists():
            raise FileNotFoundError(f"{expected}: was not there, must be one of {len(files)} ranks")
    shards = [_load(file) for file in files]
    try:
        config = _config(params, shards)
    except KeyError as missing:
        raise ValueError(f"{folder}: {missing} was missing, must be given") from None
    except (TypeError, ValueError, ZeroDivisionError, IndexError) as error:
        raise ValueError(f"{folder / 'params.json'}, or its tensors: {error}") from None
    return config, _tensors(folder, config, shards)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever torch meets in a broken zip or pickle
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"{file}: was not whole ({reason}), must be a .pth of tensors") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(x, Tensor) and x.layout == torch.strided
        for name, x in content.items()
    ):
        raise ValueError(f"{file}: was a {type(content).__name__}, must be tensors by name")
    return content


def _config(params: dict[str, Any], shards: list[dict[str, Tensor]]) -> LlamaConfig:
    dim, heads = params["dim"], params["n_heads"]
    theta = float(params.get("rope_theta", 10000.0))
    scaling, positions = None, 4096 if theta == 10000.0 else 8192  # Llama 2; Llama 3
    if params.get("use_scaled_rope"):  # Llama 3.1 and later
        scaling = RopeScaling("llama3", float(params.get("rope_scaling_factor", 8)))
        positions = 131072
    rows = [shard["tok_embeddings.weight"].shape for shard in shards]
    vocab = sum(row[0] for row in rows) if rows[0][1] == dim else rows[0][0]
    if params.get("vocab_size", -1) not in (-1, vocab):
        raise ValueError(f"vocab_size: was {params['vocab_size']}, must be {vocab}, as the tensors")
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=sum(len(shard["layers.0.feed_forward.w1.weight"]) for shard in shards),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        head_dim=dim // heads,
        max_position_embeddings=params.get("max_seq_len", positions),
        rms_norm_eps=params.get("norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _tensors(
    folder: Path, config: LlamaConfig, shards: list[dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    heads = {"attention.wq": config.num_attention_heads, "attention.wk": config.num_key_value_heads}
    for full_name in shards[0]:
        if full_name == "rope.freqs":
            continue  # a table that Rope makes
        match = re.fullmatch(r"(layers\.\d+\.|)(.+)\.weight", full_name)
        layer, name = match.groups() if match else ("", full_name)
        if name == "tok_embeddings":
            # Llama 2 splits its columns among the ranks, Llama 3 its rows.
            whole = shards[0][full_name].shape[-1] == config.hidden_size
            ours, dim = "embed_tokens", 0 if whole else 1
        elif name in NAMES:
            ours, dim = NAMES[name]
        else:
            raise ValueError(f"{folder}: tensor {full_name} was unexpected, must not be in a LLaMA")
        try:
            parts = [shard[full_name] for shard in shards]
            tensor = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)
            tensor = half_split(tensor, heads[name]) if name in heads else tensor
        except KeyError:
            raise ValueError(f"{folder}: tensor {full_name} was missing in a rank") from None
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{folder}: tensor {full_name} was misshapen: {error}") from None
        yield f"{layer}{ours}.weight", tensor
