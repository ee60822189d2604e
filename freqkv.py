"""FreqKV: a KV cache of constant size, compressed along the sequence in the frequency domain.

Kai et al., ICLR 2026, arXiv 2505.00570. The schedule (`FreqKVConfig`), the compression (`compress`)
and two forms of one function: `FreqKVAttention`, a whole sequence in one differentiable call, and
`FreqKVCache`, any number of tokens a call. Any model's attention may call attend(layer, q, k, v,
rope): q, k, v unrotated; rope(x, start, inverse=False) rotates x as positions start on, or back.
Shapes: B batch, H query heads, K kv heads, T new tokens, D head dimension, N slots (the window).
The first N tokens are ordinary causal attention. A token that finds all of them taken sets off a
round of compression, which frees `stride` slots:

    | S sinks |              span              | R recent |     before: N slots taken
    | S sinks | L = int(ratio span) | R recent |   stride |     after, the last `stride` free

Positions are slots, not places in the text, so none ever exceeds the pre-trained window; keys are
compressed before rotation. Later rounds compress again what earlier ones left: after r of them a
passage of n tokens has about n * ratio^r slots. Memory is bounded, and so is what it can recall.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dct import dct, idct, lowpass_halves

Operator = Callable[[Tensor, int], Tensor]  # x [..., n, D], keep -> [..., keep, D]
Rope = Callable[..., Tensor]  # rope(x, start, inverse=False)


@dataclass(frozen=True)
class FreqKVConfig:
    """The schedule; ValueError for an impossible one. Defaults: the paper's, for LLaMA-2."""

    window: int = 4096  # N: slots a layer; at most the pre-trained context length, in tokens
    sinks: int = 4  # S: tokens at the start of the text that are never compressed
    ratio: float | tuple[float, ...] = 0.5  # kept share of the span, in [0, 1); or one a layer
    recent: int = 0  # R: newest tokens that a round leaves as they are

    def __post_init__(self) -> None:
        for name in ("window", "sinks", "recent"):
            if type(value := getattr(self, name)) is not int or value < 0:
                raise ValueError(f"{name}: was {value!r}, must be a whole number, 0 or more")
        if (kept := self.sinks + self.recent) >= self.window:
            raise ValueError(f"sinks + recent: was {kept}, must be below window, {self.window}")
        if not all(isinstance(x, (int, float)) and 0 <= x < 1 for x in self.ratios or (None,)):
            raise ValueError(f"ratio: was {self.ratio!r}, must be a number in [0, 1), or several")

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratio of each layer, or the one of all."""
        return self.ratio if isinstance(self.ratio, tuple) else (self.ratio,)

    def at(self, layer: int) -> "FreqKVConfig":
        """The schedule of one layer; where ratios differ, the sizes below are of the highest."""
        return replace(self, ratio=self.ratio[layer]) if isinstance(self.ratio, tuple) else self

    @property
    def span(self) -> int:
        """Slots that a round compresses."""
        return self.window - self.sinks - self.recent

    @property
    def keep(self) -> int:
        """L, the slots that a round compresses the span to."""
        return int(max(self.ratios) * self.span)

    @property
    def stride(self) -> int:
        """Slots that a round frees, 1 or more (ratio < 1): the tokens admitted until the next."""
        return self.span - self.keep

    def rounds(self, tokens: int) -> int:
        """Rounds of compression that reading `tokens` tokens takes."""
        return -(-max(tokens - self.window, 0) // self.stride)

    def slots(self, tokens: int) -> int:
        """Slots in use once `tokens` tokens have been read."""
        return tokens - self.rounds(tokens) * self.stride


def compress(x: Tensor, keep: int) -> Tensor:
    """The low band of x [..., n, D] along its sequence, as `keep` samples [..., keep, D].

    Equals `lowpass_matrix(n, keep) @ x` (paper, section 3) at half the arithmetic: sums of mirrored
    samples hold the even frequencies, differences the odd ones. Computed in float32 or wider.
    """
    n, wide = x.shape[-2], torch.promote_types(x.dtype, torch.float32)
    if 0 < keep <= n > 4096:  # there and back by the FFT is faster, and needs no large matrices
        return ((keep / n) ** 0.5 * idct(dct(x.to(wide), -2)[..., :keep, :], -2)).to(x.dtype)
    half, (a, b) = (n + 1) // 2, lowpass_halves(n, keep, wide, x.device)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        front, back = x[..., :half, :].to(wide), x[..., n - half :, :].to(wide).flip(-2)
        even, odd = a @ (front + back), b @ (front - back)
        # The output mirrors too; the middle sample of an odd `keep` is in the first half.
        y = torch.cat((even + odd, (even - odd)[..., : keep // 2, :].flip(-2)), dim=-2)
    return y.to(x.dtype)


def newest(x: Tensor, keep: int) -> Tensor:
    """The last `keep` samples of x [..., n, D]: eviction, the baseline (arXiv 2309.17453)."""
    return x[..., x.shape[-2] - keep :, :]


class FreqKVAttention:
    """The parallel form. `operator` is what a round does to the span, keys and values alike."""

    def __init__(self, config: FreqKVConfig, operator: Operator = compress) -> None:
        self.config, self.operator = config, operator

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """Unrotated q [B, H, T, D]; k, v [B, K, T, D] to out [B, H, T, D]."""
        _check_shapes(q, k, v)
        config, time = self.config.at(layer), q.shape[-2]
        sizes = [config.window, *config.rounds(time) * [config.stride]]
        sizes[-1] += time - sum(sizes)
        outs: list[Tensor] = []
        slots: list[Tensor] = []  # keys and values, unrotated
        # Split once: of a slice for each chunk, every gradient would be as long as the text.
        for q_new, *new in zip(*(torch.split(x, sizes, -2) for x in (q, k, v)), strict=True):
            old = (_round(x, config, self.operator) for x in slots)
            slots = [torch.cat(x, dim=-2) for x in zip(old, new, strict=True)] if outs else new
            keys, values = slots
            q_new = rope(q_new, keys.shape[-2] - q_new.shape[-2])  # in the newest slots
            outs.append(_attend(q_new, rope(keys, 0), values))
        return torch.cat(outs, dim=-2)


class FreqKVCache:
    """The recurrent form: reads a text, in calls of any length, into N slots a layer.

    No gradient, no padding: rows of a batch advance alike. A call that fails leaves layers apart:
    reset(). Keys are stored rotated, as slots stay between rounds: decoding is plain attention.
    """

    def __init__(self, config: FreqKVConfig, operator: Operator = compress) -> None:
        self.config, self.operator = config, operator
        self.reset()

    def reset(self) -> None:
        """Forget the text and free the buffers."""
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> k, v [B, K, N, D]
        self._seen: dict[int, int] = {}  # layer -> tokens read; equal between calls of the model

    @property
    def tokens_seen(self) -> int:
        """Tokens of the text read so far."""
        return next(iter(self._seen.values()), 0)

    @property
    def slots(self) -> int:
        """Slots in use, at most N; of layers that differ, the most."""
        return max((self.config.at(i).slots(n) for i, n in self._seen.items()), default=0)

    @property
    def rounds(self) -> int:
        """Rounds of compression so far."""
        return self.config.rounds(self.tokens_seen)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, whatever the length of the text."""
        return sum(buffer.nbytes for pair in self._buffers.values() for buffer in pair)

    @torch.no_grad()
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """Unrotated q [B, H, T, D]; k, v [B, K, T, D] to out [B, H, T, D]."""
        _check_shapes(q, k, v)
        keys, values = self._buffers.get(layer) or self._allocate(layer, k, v)
        if (k.shape[:2], k.shape[3:], k.dtype) != (keys.shape[:2], keys.shape[3:], keys.dtype):
            was, must = (f"{tuple(x.shape)} {x.dtype}" for x in (k, keys))
            raise ValueError(f"k: was {was}, must fit the slots, {must}; reset() for a new batch")
        out, start, config = torch.empty_like(q), 0, self.config.at(layer)
        while start < q.shape[-2]:
            used = config.slots(self._seen[layer])
            if used == config.window:
                self._compress(config, keys, values, rope)
                used -= config.stride
            new = slice(start, min(start + config.window - used, q.shape[-2]))
            start, end = new.stop, used + new.stop - start
            keys[:, :, used:end] = rope(k[:, :, new], used)
            values[:, :, used:end] = v[:, :, new]
            out[:, :, new] = _attend(rope(q[:, :, new], used), keys[:, :, :end], values[:, :, :end])
            self._seen[layer] += end - used
        return out

    @torch.inference_mode(False)  # slots made inside that mode could not be written outside it
    def _allocate(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*k.shape[:2], self.config.window, k.shape[-1])
        self._buffers[layer], self._seen[layer] = (k.new_zeros(shape), v.new_zeros(shape)), 0
        return self._buffers[layer]

    def _compress(self, config: FreqKVConfig, keys: Tensor, values: Tensor, rope: Rope) -> None:
        changed = slice(config.sinks, config.window - config.stride)
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))  # rounded once, at the end
        unrotated = _round(rope(wide, 0, inverse=True), config, self.operator)
        keys[:, :, changed] = rope(unrotated, 0)[:, :, changed]
        values[:, :, changed] = _round(values, config, self.operator)[:, :, changed]

    def state_dict(self) -> dict[str, Tensor]:
        """Copies: config, layers [n, 2] (id, tokens), k (rotated) and v [n, B, K, slots, D]."""
        pairs = zip(*self._buffers.values(), strict=True)
        k, v = (torch.stack([x[:, :, : self.slots] for x in buffers]) for buffers in pairs)
        layers = torch.tensor([*self._seen.items()])
        return {"config": self._state(), "layers": layers, "k": k, "v": v}

    def _state(self) -> Tensor:
        c = self.config
        return torch.tensor([c.window, c.sinks, *c.ratios, c.recent], dtype=torch.float64)

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a `state_dict`, in its dtype, on its device; ValueError for a wrong one."""
        if missing := {"config", "layers", "k", "v"} - state.keys():
            raise ValueError(f"saved cache: was without {min(missing)}, must be whole")
        if (was := state["config"].tolist()) != self._state().tolist():
            raise ValueError(f"saved cache: was of {was}, must be of {self.config}")
        seen, k, v = dict(state["layers"].tolist()), state["k"], state["v"]
        slots = max(self.config.at(i).slots(n) for i, n in seen.items())
        if k.shape != v.shape or k.ndim != 5 or (len(k), k.shape[3]) != (len(seen), slots):
            raise ValueError(f"saved cache: k was {[*k.shape]}, must be [n, B, K, {slots}, D]")
        k, v = (F.pad(x, (0, 0, 0, self.config.window - slots)) for x in (k, v))  # a copy
        self._buffers, self._seen = dict(zip(seen, zip(k, v, strict=True), strict=True)), seen


def _round(x: Tensor, config: FreqKVConfig, operator: Operator) -> Tensor:
    """One round of compression of full slots x, unrotated: [..., N, D] -> [..., N - stride, D]."""
    sinks, span, recent = x.tensor_split((config.sinks, config.sinks + config.span), dim=-2)
    return torch.cat((sinks, operator(span, config.keep), recent), dim=-2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the T newest of n positions: q [B, H, T, D] over k, v [B, K, n, D]."""
    time, n, gqa = q.shape[-2], k.shape[-2], q.shape[1] != k.shape[1]
    mask: Tensor | None = None  # query t sees up to n - T + t; is_causal only knows T = n
    if 1 < time < n and q.is_cuda:  # the flash kernel needs no mask in memory
        from torch.nn.attention.bias import causal_lower_right  # takes seconds to import

        mask = causal_lower_right(time, n)
    elif 1 < time < n:
        mask = torch.ones(time, n, dtype=torch.bool, device=q.device).tril(n - time)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=1 < time == n, enable_gqa=gqa)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    same = (q.shape[0], q.shape[2:]) == (k.shape[0], k.shape[2:]) and k.shape == v.shape
    if not same or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v: were {shapes}, must be [B, H, T, D], [B, K, T, D] twice")
