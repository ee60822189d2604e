"""What is measured against what: models, memories as full as after a long text, and peers.

A memory is filled with random keys and values in place of a text: reading 262,144 tokens with full
attention takes hours, and what a step costs does not depend on what it finds. A step takes tokens
[1, T] and returns the logits [1, V] after the last of them.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import cli
from freqkv import FreqKVCache, FreqKVConfig
from model import FullCache, Llama, LlamaConfig, RopeScaling
from weights import load_model
from weights.blank import blank_model
from weights.safetensors_dir import config_json

Step = Callable[[Tensor], Tensor]

LLAMA3 = RopeScaling("llama3", factor=32, original_max_position_embeddings=8192)
SHAPES = {  # of published models, for random weights
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, rope_theta=5e5,
        max_position_embeddings=131072, rope_scaling=LLAMA3, tie_word_embeddings=True,
    ),
    "llama-2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, max_position_embeddings=4096,
    ),
}  # fmt: skip


def config_of(name: str) -> LlamaConfig:
    """The configuration of what `new_model` makes."""
    return SHAPES[name] if name in SHAPES else load_model(name).config


def new_model(name: str, dtype: torch.dtype, device: torch.device) -> Llama:
    """A checkpoint, by name or path; or a name of SHAPES, with random weights."""
    if name not in SHAPES:
        return load_model(name, dtype, device)
    model = blank_model(SHAPES[name]).to(dtype)
    model.to_empty(device=device)
    # One block again and again: what is in it bears on no time.
    block = 0.02 * torch.randn(1 << 20, device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
    return model.eval()


def cache_bytes(model: Llama, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens."""
    c = model.config
    sizes = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
    return 2 * math.prod(sizes) * model.norm.weight.element_size() * tokens


def available(device: torch.device) -> int:
    """Bytes of memory that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(x.split()[1]) << 10 for x in file if x.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux: of the whole, half
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def noise(model: Llama, tokens: int) -> Tensor:
    """Keys or values [1, K, tokens, D] of one layer: a random block, again and again."""
    c, like = model.config, model.norm.weight
    block = torch.randn(1, c.num_key_value_heads, min(tokens, 1024), c.head_dim).to(like)
    return block.repeat(1, 1, -(-tokens // 1024), 1)[:, :, :tokens]


def after(model: Llama, tokens: int, config: FreqKVConfig) -> FreqKVCache:
    """A FreqKV cache as it is after so many tokens."""
    cache, first = FreqKVCache(config), torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        model.hidden(first.to(model.norm.weight.device), cache)
    state, slots = cache.state_dict(), config.slots(tokens)
    state["layers"][:, 1] = tokens
    for name in "kv":
        state[name] = torch.stack([noise(model, slots) for _ in state[name]])
    cache.load_state_dict(state)
    return cache


def reading(model: Llama, attend: Any) -> Step:
    """A step of ours, with the memory `attend`."""
    return lambda tokens: model.logits(model.hidden(tokens, attend)[:, -1])


def full(model: Llama, tokens: int, more: int) -> Step:
    """A step of ours with the plain cache, after `tokens` tokens, with room for `more`."""
    cache, c = FullCache(tokens + more), model.config
    query = torch.zeros(1, c.num_attention_heads, 1, c.head_dim).to(model.norm.weight)
    for layer in range(c.num_hidden_layers):  # one query: the cache stores all keys it is given
        cache(layer, query, noise(model, tokens), noise(model, tokens), model.rope)
    return reading(model, cache)


def twin(model: Llama) -> Any:
    """The same weights, shared, in `transformers`; ImportError where that is not installed."""
    import transformers

    transformers.logging.set_verbosity_error()
    published = config_json(model.config, model.norm.weight.dtype)
    config = transformers.LlamaConfig(**published)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    state = {f"model.{name}": x for name, x in model.state_dict().items() if "lm_head" not in name}
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    theirs.load_state_dict(state | {"lm_head.weight": head.weight}, assign=True)
    # Tables that no checkpoint holds were made on the meta device too.
    tables = type(theirs.model.rotary_emb)(config=config)
    theirs.model.rotary_emb = tables.to(head.weight.device)
    return theirs.eval()


def of_transformers(theirs: Any, model: Llama, tokens: int) -> Step:
    """A step of `transformers`, with its default cache, after `tokens` tokens."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        cache.update(noise(model, tokens), noise(model, tokens), layer)

    def step(ids: Tensor) -> Tensor:
        out = theirs(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    return step


def others(model: Llama, lengths: Sequence[int], more: int) -> Iterator[tuple[str, int, Step]]:
    """What FreqKV is compared with: a peer's name, tokens read, and a step with room for `more`.

    What does not fit into memory, or is not installed, is left out, and said so.
    """
    theirs = None
    for peer in ("full cache", "transformers"):
        for tokens in lengths:
            need = cache_bytes(model, tokens)
            if need * 1.2 > available(model.norm.weight.device):
                print(f"{peer} after {tokens:,} tokens: left out, takes {cli.size(need)}")
                continue
            if peer == "full cache":
                yield peer, tokens, full(model, tokens, more)
                continue
            try:
                theirs = theirs or twin(model)
            except ImportError:
                print("transformers: left out, not installed")
                break
            yield peer, tokens, of_transformers(theirs, model, tokens)
