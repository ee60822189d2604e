# SPDX-License-Identifier: Apache-2.0
"""LLaMA: configuration, rotary positions, attention, block, forward. Needs only torch.

Llama 2, 3, 3.1, 3.2, 3.3 and models of the same architecture (Touvron et al., arXiv 2307.09288;
Grattafiori et al., arXiv 2407.21783). Parameter names are those of the published safetensors less
their prefix `model.`, and RoPE is in the half-split layout of the same files. Reads no files
(weights/ does), and knows no KV cache but a plain one.

Attention is a strategy. Every layer hands its *unrotated* projections to one callable,

    attend(layer, q, k, v, rope) -> out

which owns positions, masks and whatever it remembers: `causal_attention` and `FullCache` here, or
any other with that signature. `rope(x, start=0, inverse=False)` rotates x as positions
start .. start+T-1.

Shapes: B batch, T tokens, H query heads, K kv heads, D head dimension, E hidden size, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["FullCache", "Llama", "LlamaConfig", "Rope", "RopeScaling", "causal_attention"]


@dataclass(frozen=True)
class RopeScaling:
    """How a model stretches its rotary frequencies; names as in the published config.json.

    "linear" divides all by `factor`; "llama3" (Llama 3.1 and later) those that turn fewer than
    low_freq_factor times in the original context, none beyond high_freq_factor, a blend between.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192  # tokens

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise ValueError(f"rope_type: was {self.rope_type!r}, must be 'linear' or 'llama3'")
        for name in ("factor", "original_max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < 1e30:
                raise ValueError(f"rope_scaling {name}: was {value!r}, must be a number above 0")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError("low_freq_factor: must be above 0 and below high_freq_factor")


@dataclass(frozen=True)
class LlamaConfig:
    """What defines a checkpoint; field names as in the published config.json."""

    vocab_size: int  # V
    hidden_size: int  # E
    intermediate_size: int  # width of the feed-forward layer
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K; fewer than H is grouped-query attention
    head_dim: int  # D
    max_position_embeddings: int  # pre-trained context length, in tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False  # the output layer is the transposed embedding

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or not 0 < value < 1 << 31):
                must = "a whole number, 1 to 2^31 - 1"
                raise ValueError(f"{field.name}: was {value!r}, must be {must}")
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_key_value_heads: was {self.num_key_value_heads}, "
                f"must divide num_attention_heads, {self.num_attention_heads}"
            )
        if self.head_dim % 2 == 1:
            raise ValueError(f"head_dim: was {self.head_dim}, must be even (RoPE turns pairs)")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < 1e30:
                raise ValueError(f"{name}: was {value!r}, must be a number above 0")


class Rope:
    """Rotary positions (Su et al., arXiv 2104.09864), half-split layout.

    Channels i and i + D/2 form a pair, turned by position * theta^(-2i/D). Tables, float64 rounded
    to float32, are kept for each device, and grow by doubling.
    """

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> None:
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
        self.inv_freq = _scale(theta ** (-pairs / head_dim), scaling)  # [D/2], radians a token
        self._tables: dict[torch.device, Tensor] = {}

    def __call__(self, x: Tensor, start: int = 0, inverse: bool = False) -> Tensor:
        """Rotate x [..., T, D] as positions start .. start+T-1, or undo it; keeps the dtype."""
        stop = start + x.shape[-2]
        cos, sin = self.table(x.device, stop)[:, start:stop]  # [T, D] each
        if inverse:
            sin = -sin
        return _turn(x, cos, sin)

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [..., T, D] as positions [T], a tensor that a graph may read anew each time.

        The table must reach beyond them: `table(x.device, stop)` makes it.
        """
        cos, sin = self._tables[x.device].index_select(1, positions)
        return _turn(x, cos, sin)

    def table(self, device: torch.device, stop: int) -> Tensor:
        """For each channel cos, and -sin or sin of its angle: [2, at least stop, D]."""
        table = self._tables.get(device)
        if table is None or table.shape[1] < stop:
            length = 256
            while length < stop:
                length *= 2
            # Out of inference mode: a table made inside it could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                table = self._make_table(length).to(device)
            self._tables[device] = table
        return table

    def _make_table(self, length: int) -> Tensor:
        positions = torch.arange(length, dtype=torch.float64, device="cpu")
        angles = positions[:, None] * self.inv_freq  # [length, D/2]
        cos = angles.cos()
        sin = angles.sin()
        # x becomes x cos - partner sin in the first half of the channels, x cos + partner sin in
        # the second.
        cosines = torch.cat((cos, cos), dim=-1)
        sines = torch.cat((-sin, sin), dim=-1)
        return torch.stack((cosines, sines)).float()


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, D] turned by angles [T, D], of which sin has the sign of `Rope._make_table`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    partner = wide.roll(x.shape[-1] // 2, dims=-1)  # of channel i, channel i + D/2 or i - D/2
    return torch.addcmul(wide * cos, partner, sin).to(x.dtype)


def _scale(inv_freq: Tensor, scaling: RopeScaling | None) -> Tensor:
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, left alone; 0: slow, divided
    return inv_freq * (share + (1 - share) / scaling.factor)


Attend = Callable[[int, Tensor, Tensor, Tensor, Rope], Tensor]


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
    """The strategy of a plain LLaMA: the whole text in one call, positions from 0, no memory."""
    return masked_attention(rope(q), rope(k), v)


class FullCache:
    """The plain KV cache: remembers all of up to `capacity` tokens, without gradients.

    Keys are stored rotated.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.reset()

    def reset(self) -> None:
        """Forget the text, and free the memory."""
        self._keys: dict[int, Tensor] = {}  # layer -> [B, K, capacity, D]
        self._values: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}  # layer -> tokens that it has read

    @property
    def tokens_seen(self) -> int:
        """Tokens of the text read so far."""
        return next(iter(self._tokens.values()), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        buffers = [*self._keys.values(), *self._values.values()]
        return sum(buffer.nbytes for buffer in buffers)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """q [B, H, T, D], k and v [B, K, T, D], unrotated; ValueError beyond the capacity."""
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError(
                "q, k, v: need gradients, which a cache does not give; "
                "train with causal_attention, or read under torch.no_grad()"
            )
        self._check_order(layer, time=k.shape[2])
        with torch.no_grad():
            return self._read(layer, q, k, v, rope)

    def _read(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        if layer not in self._keys:
            shape = (k.shape[0], k.shape[1], self.capacity, k.shape[3])
            with torch.inference_mode(False):  # writable outside that mode too
                self._keys[layer] = k.new_empty(shape)
                self._values[layer] = k.new_empty(shape)
            self._tokens[layer] = 0
        start = self._tokens[layer]
        stop = start + k.shape[2]
        if stop > self.capacity:
            raise ValueError(f"text: was {stop} tokens, must be at most capacity, {self.capacity}")
        keys = self._keys[layer]
        values = self._values[layer]
        fits = k.shape[:2] == keys.shape[:2] and k.shape[3] == keys.shape[3]
        if not fits or v.shape != k.shape or k.dtype != keys.dtype or v.dtype != keys.dtype:
            raise ValueError(
                f"k, v: were {tuple(k.shape)} {k.dtype}, {tuple(v.shape)} {v.dtype}, "
                f"must fit the cache, {tuple(keys.shape)} {keys.dtype}"
            )
        keys[:, :, start:stop] = rope(k, start)
        values[:, :, start:stop] = v
        self._tokens[layer] = stop
        return masked_attention(rope(q, start), keys[:, :, :stop], values[:, :, :stop])

    def _check_order(self, layer: int, time: int) -> None:
        """ValueError where the call before this one failed half way, so that layers are apart.

        At the first layer all must have read the same. A layer that comes for the first time does
        so in the first call of all, of which the first layer has read `time` tokens.
        """
        first = next(iter(self._tokens), layer)
        if layer == first:
            whole = len(set(self._tokens.values())) <= 1
        else:
            whole = layer in self._tokens or self._tokens[first] == time
        if not whole:
            raise ValueError(
                "cache: was left half way by a call that failed, so its layers have not read the "
                "same text; reset() it, and read the text again"
            )


def masked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the T newest of n positions: q [B, H, T, D] over k, v [B, K, n, D].

    The same function stands in model.py and in freqkv.py, so that each can be taken alone.
    """
    batch, heads, time, dim = q.shape
    kv_heads = k.shape[1]
    n = k.shape[2]
    if time == 1:  # one query, which sees every key; those of a group read their keys together
        groups = q.reshape(batch, kv_heads, heads // kv_heads, dim)
        return F.scaled_dot_product_attention(groups, k, v).reshape(q.shape)
    grouped = heads != kv_heads
    if time == n:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    # Query t sees the n - T earlier positions, and the new ones up to itself (T = 3, n = 5):
    #     1 1 1 0 0
    #     1 1 1 1 0     (is_causal would let the first query see the first key alone)
    #     1 1 1 1 1
    mask: Tensor
    if q.is_cuda:  # a mask that the flash kernel applies without having it in memory
        from torch.nn.attention.bias import causal_lower_right  # takes seconds to import

        mask = causal_lower_right(time, n)
    else:
        mask = torch.ones(time, n, dtype=torch.bool, device=q.device).tril(n - time)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the root mean square over channels in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Projections in and out; what happens between them is the strategy's business."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, layer: int, rope: Rope, attend: Attend) -> Tensor:
        q = self._split_heads(self.q_proj(x))  # [B, H, T, D]
        k = self._split_heads(self.k_proj(x))  # [B, K, T, D]
        v = self._split_heads(self.v_proj(x))
        out = attend(layer, q, k, v, rope)  # [B, H, T, D]
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, T, E]

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, T, heads * D] to [B, heads, T, D]."""
        heads = x.shape[-1] // self.head_dim
        return x.view(x.shape[0], x.shape[1], heads, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layer: int, rope: Rope, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layer, rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The model: tokens to logits, attention by the strategy that the caller passes.

    A tied output layer has no parameter of its own: `lm_head` is then None.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = Rope(config.head_dim, config.rope_theta, config.rope_scaling)
        self.gradient_checkpointing = False  # compute a layer again in backward, to save memory
        self.init_weights()

    def init_weights(self) -> None:
        """Random weights to train from, as GPT-2 begins: matrices normal, norms 1.

        The two matrices of a layer that write into the residual stream add up: they are narrower.
        """
        std = 0.02
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                nn.init.ones_(weight)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(weight, std=residual_std)
            else:
                nn.init.normal_(weight, std=std)

    def forward(self, tokens: Tensor, attend: Attend = causal_attention) -> Tensor:
        """Logits [B, T, V] of the next token after each of tokens [B, T]."""
        return self.logits(self.hidden(tokens, attend))

    def hidden(self, tokens: Tensor, attend: Attend = causal_attention) -> Tensor:
        """Hidden states [B, T, E] after the last norm; ValueError unless tokens are [B, T]."""
        if tokens.ndim != 2 or tokens.is_floating_point():
            was = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"tokens: were {was}, must be integers [batch, time]")
        x = self.embed_tokens(tokens)
        for layer, block in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, layer, self.rope, attend,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                x = block(x, layer, self.rope, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., E] to logits [..., V]: separate, so that a caller may want the last only."""
        if self.lm_head is None:
            return F.linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)
