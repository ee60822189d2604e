"""What speed.py measures: models, caches filled as after a long text, and what FreqKV is beside.

A cache is filled with random keys and values in place of a text: reading 262,144 tokens with full
attention takes hours, and what a token costs does not depend on what the cache holds.

The one place outside tests and examples that imports `transformers`, and only where it is compared.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cli
from freqkv import FreqKVCache, FreqKVConfig
from half import use_fastest_products
from model import FullCache, Llama, LlamaConfig, RopeScaling
from weights import find, load_model
from weights.blank import blank_model
from weights.safetensors_dir import config_json

# Takes tokens [1, T], and gives the logits [1, V] after the last of them.
Reader = Callable[[Tensor], Tensor]

BLOCK = 1024  # random tokens, which come again and again in a longer cache

# Models


SHAPES = {  # of published models, for random weights
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=5e5,
        rope_scaling=RopeScaling("llama3", factor=32, original_max_position_embeddings=8192),
        tie_word_embeddings=True,
    ),
    "llama-2-7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
}


def check_model(name: str) -> None:
    """OSError or ValueError unless `make_model` knows the name or finds the path."""
    if name not in SHAPES:
        find(name)


def read_config(name: str) -> LlamaConfig:
    """The configuration of what `make_model` makes."""
    if name in SHAPES:
        return SHAPES[name]
    return load_model(name).config


def make_model(name: str, dtype: torch.dtype, device: torch.device) -> Llama:
    """A checkpoint, by name or path; or random weights of a shape in SHAPES: ready to decode."""
    if name not in SHAPES:
        model = load_model(name, dtype, device)
    else:
        model = make_random_model(name, dtype, device)
    use_fastest_products(model)
    return model


def make_random_model(name: str, dtype: torch.dtype, device: torch.device) -> Llama:
    """A model of a shape in SHAPES."""
    model = blank_model(SHAPES[name]).to(dtype)
    model.to_empty(device=device)
    # The same numbers again and again: what a weight is makes no step slower.
    numbers = 0.02 * torch.randn(1 << 20, device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter.view(-1).split(len(numbers)):
                part.copy_(numbers[: len(part)])
    return model.eval()


# Memory


def count_cache_bytes(model: Llama, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens."""
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * model.norm.weight.element_size() * tokens


def count_free_bytes(device: torch.device) -> int:
    """Bytes of a device's memory that are free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps to use again is free too
        free, _ = torch.cuda.mem_get_info(device)
        return free
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    # No Linux: of the whole, half.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def fits_memory(peer: str, model: Llama, tokens: int) -> bool:
    """Whether a cache of so many tokens fits, with some room to work in; a line where it does not.

    Everything is on the model's device.
    """
    need = count_cache_bytes(model, tokens)
    if need * 1.2 <= count_free_bytes(model.norm.weight.device):
        return True
    print(f"{peer} after {tokens:,} tokens: left out, takes {cli.format_bytes(need)}")
    return False


# Caches as they are after a text, and what reads with them


def random_slots(model: Llama, tokens: int) -> Tensor:
    """Random keys or values of one layer, [1, K, tokens, D], in the model's dtype."""
    config = model.config
    block = torch.randn(1, config.num_key_value_heads, min(tokens, BLOCK), config.head_dim)
    block = block.to(model.norm.weight)  # dtype and device
    repeats = math.ceil(tokens / BLOCK)
    return block.repeat(1, 1, repeats, 1)[:, :, :tokens]


def fill_freqkv_cache(model: Llama, tokens: int, schedule: FreqKVConfig) -> FreqKVCache:
    """A FreqKV cache as it is after so many tokens: the rounds done, the slots taken."""
    keys = random_slots(model, schedule.slots(tokens))
    values = random_slots(model, schedule.slots(tokens))
    state = {
        "config": torch.tensor(astuple(schedule), dtype=torch.float64),
        "tokens": torch.tensor(tokens),
    }
    for layer in range(model.config.num_hidden_layers):  # each layer makes its own copy
        state[f"k.{layer}"] = keys
        state[f"v.{layer}"] = values
    return FreqKVCache.from_state(state)


def fill_full_cache(model: Llama, tokens: int, more: int) -> FullCache:
    """The plain cache after so many tokens, with room for `more`."""
    cache = FullCache(tokens + more)
    keys = random_slots(model, tokens)
    values = random_slots(model, tokens)
    # The cache stores all the keys that it is given; one query is enough to have them stored.
    query = torch.zeros(1, model.config.num_attention_heads, 1, model.config.head_dim)
    for layer in range(model.config.num_hidden_layers):
        cache(layer, query.to(keys), keys, values, model.rope)
    return cache


def make_reader(model: Llama, cache: FreqKVCache | FullCache) -> Reader:
    """Our model, reading with that cache."""
    return lambda tokens: model.logits(model.hidden(tokens, cache)[:, -1])


# The same model in transformers


def make_twin(model: Llama) -> Any:
    """The same weights, shared, in `transformers`; ImportError where that is not installed."""
    import transformers

    transformers.logging.set_verbosity_error()
    published = config_json(model.config, model.norm.weight.dtype)
    config = transformers.LlamaConfig(**published)
    with torch.device("meta"):
        twin = transformers.LlamaForCausalLM(config)
    state = {}
    for name, weight in model.state_dict().items():
        state[f"model.{name}"] = weight
    head = state.pop("model.lm_head.weight", model.embed_tokens.weight)  # tied, it has none
    state["lm_head.weight"] = head
    twin.load_state_dict(state, assign=True)
    # Its tables are in no checkpoint, and were made without values too.
    tables = type(twin.model.rotary_emb)(config=config)
    twin.model.rotary_emb = tables.to(head.device)
    return twin.eval()


def fill_their_cache(model: Llama, tokens: int) -> Any:
    """The default cache of `transformers` after so many tokens."""
    from transformers import DynamicCache

    cache = DynamicCache()
    keys = random_slots(model, tokens)
    values = random_slots(model, tokens)
    for layer in range(model.config.num_hidden_layers):
        cache.update(keys, values, layer)
    return cache


def make_their_reader(twin: Any, cache: Any) -> Reader:
    """The model of `transformers`, reading with that cache."""

    # Some versions call `cache` what is `past_key_values` in the others.
    known = inspect.signature(twin.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    options = {name: cache, "use_cache": True, "logits_to_keep": 1}

    def read(tokens: Tensor) -> Tensor:
        return twin(tokens, **options).logits[:, -1]

    return read


def other_readers(
    model: Llama, lengths: Sequence[int], more: int
) -> Iterator[tuple[str, int, Reader]]:
    """What FreqKV is beside: a name, how many tokens were read, and what reads on after them.

    A reader can read `more` tokens. What does not fit into memory, or is not installed, is left
    out, with a line that says so. Drop a reader, and its cache with it, before you ask for another.
    """
    for tokens in lengths:
        if fits_memory("full cache", model, tokens):
            yield "full cache", tokens, make_reader(model, fill_full_cache(model, tokens, more))
    try:
        twin = make_twin(model)
    except ImportError:
        print("transformers: left out, not installed")
        return
    for tokens in lengths:
        if fits_memory("transformers", model, tokens):
            yield "transformers", tokens, make_their_reader(twin, fill_their_cache(model, tokens))
