# SPDX-License-Identifier: Apache-2.0
"""FreqKV: a KV cache of constant size, compressed along the sequence in the frequency domain.

Kai et al., ICLR 2026, arXiv 2505.00570. Here are the schedule (`FreqKVConfig`), one round of
compression (`compress`) with the operators that it may use, and two forms of one function:

    FreqKVAttention   a whole text in one differentiable call: to train
    FreqKVCache       any number of new tokens a call, in N slots a layer: to read and generate

Both are called as attend(layer, q, k, v, rope) -> out by any model's attention, with q, k and v
not yet rotated. rope(x, start, inverse=False) rotates x [..., T, D] as positions start, start + 1,
and so on, or undoes it. This file knows no model and no files.

Shapes: B batch, H query heads, K kv heads, T new tokens, D head dimension, N slots (the window),
L slots that are kept (`keep`). Query head h reads kv head h // (H / K).

The first N tokens are ordinary causal attention. When a token arrives and all N slots are taken,
a round of compression frees `stride` of them:

    | S sinks |             span             | R recent |     all N slots taken
    | S sinks | L kept slots | R recent |    stride     |     after a round: `stride` slots free

Positions are slots and not places in the text, so none exceeds N - 1, however long the text. Later
rounds compress again what earlier ones left: after r rounds a passage of p tokens has about
p * ratio^r slots. That bounds the memory, and what can be remembered.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dct import lowpass

# keys, values [B, K, n, D] of the span, of one dtype, and keep -> keys, values [B, K, keep, D]
Operator = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
Rotate = Callable[..., Tensor]  # rope(x, start, inverse=False)

TIE = 1e-5  # cosines closer than this may differ by rounding alone: 3e-6 after 190 rounds
HALF_WAY = (
    "cache: was left half way by a call that failed, so its layers have not read the same text; "
    "reset() it, and read the text again"
)


@dataclass(frozen=True)
class FreqKVConfig:
    """When a round comes, and what it leaves. ValueError for impossible settings.

    The defaults are the paper's, for LLaMA-2.
    """

    window: int = 4096  # N: slots a layer; at most the pre-trained context length, in tokens
    sinks: int = 4  # S: tokens at the start of the text that are never compressed
    ratio: float = 0.5  # share of the span that a round keeps, in [0, 1)
    recent: int = 0  # R: newest tokens that a round leaves as they are

    def __post_init__(self) -> None:
        for name in ("window", "sinks", "recent"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}: was {value!r}, must be a whole number, 0 or more")
        untouched = self.sinks + self.recent
        if untouched >= self.window:
            raise ValueError(
                f"sinks + recent: was {untouched}, must be below window, {self.window}"
            )
        if not isinstance(self.ratio, (int, float)) or not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: was {self.ratio!r}, must be a number in [0, 1)")

    @property
    def span(self) -> int:
        """Slots that a round compresses."""
        return self.window - self.sinks - self.recent

    @property
    def keep(self) -> int:
        """L: slots that a round compresses the span to, rounded down."""
        return int(self.ratio * self.span)

    @property
    def stride(self) -> int:
        """Slots that a round frees, 1 or more: the tokens admitted between two rounds."""
        return self.span - self.keep

    def rounds(self, tokens: int) -> int:
        """Rounds of compression that reading `tokens` tokens takes."""
        if tokens <= self.window:
            return 0
        beyond = tokens - self.window
        return (beyond + self.stride - 1) // self.stride

    def slots(self, tokens: int) -> int:
        """Slots in use once `tokens` tokens have been read."""
        return tokens - self.rounds(tokens) * self.stride


# Operators


def lowband(keys: Tensor, values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The paper's operator: the low frequencies of keys and of values, as `keep` slots (section 3).

    keys, values: [B, K, n, D], before rotation, to [B, K, keep, D] each.
    """
    both = lowpass(torch.stack((keys, values)), keep)  # one product for the two is faster
    return both[0], both[1]


def newest(keys: Tensor, values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Eviction, the baseline: the last `keep` tokens (StreamingLLM, arXiv 2309.17453)."""
    first = keys.shape[2] - keep
    return keys[:, :, first:], values[:, :, first:]


def distinct(keys: Tensor, values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Selection, not compression: the `keep` tokens whose keys are least like the others.

    Likeness is the cosine to the mean direction of the span's keys (KeyDiff, arXiv 2504.15364).
    Every head chooses for itself. What is kept stays in its order, and is differentiable.
    """
    n = keys.shape[2]
    directions = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    mean = directions.mean(dim=2, keepdim=True)
    likeness = F.cosine_similarity(directions, mean, dim=-1)  # [B, K, n]
    # A token that the text repeats has the same key in the first layer each time. Rounding, which
    # depends on how a text is cut into calls, must not choose among them: the newest of a tie wins.
    ascending, order = likeness.detach().sort(dim=-1)
    rank = _number_ties(ascending) * n + (n - 1 - order)
    least = rank.topk(keep, dim=-1, largest=False).indices
    places = order.gather(-1, least).sort(dim=-1).values  # [B, K, keep]
    index = places[..., None].expand(-1, -1, -1, keys.shape[-1])
    return keys.gather(2, index), values.gather(2, index)


def _number_ties(ascending: Tensor) -> Tensor:
    """Numbers for likenesses [B, K, n] in ascending order: rising, the same for all of a tie.

    Neighbours closer than TIE are tied. In a long span they all may be, so ties end at 10 TIE; of
    two copies that such an end comes between, rounding chooses.
    """
    is_new = F.pad(ascending.diff(dim=-1) > TIE, (1, 0))  # [B, K, n]
    place = torch.arange(ascending.shape[-1], device=ascending.device)
    # Where the neighbours of each begin.
    start = torch.where(is_new, place, 0).cummax(dim=-1).values
    width = ascending - ascending.gather(-1, start)
    part = (width / (10 * TIE)).long()
    is_new = is_new | F.pad(part.diff(dim=-1) > 0, (1, 0))
    return is_new.cumsum(dim=-1)


# One round


def apply_operator(
    operator: Operator, keys: Tensor, values: Tensor, keep: int
) -> tuple[Tensor, Tensor]:
    """What an operator makes of keys and values [B, K, n, D]; ValueError for another number."""
    new_keys, new_values = operator(keys, values, keep)
    if new_keys.shape[2] != keep or new_values.shape[2] != keep:
        raise ValueError(
            f"operator: gave {new_keys.shape[2]} keys and {new_values.shape[2]} values, "
            f"must give {keep} of each"
        )
    return new_keys, new_values


def compress(
    keys: Tensor, values: Tensor, config: FreqKVConfig, operator: Operator = lowband
) -> tuple[Tensor, Tensor]:
    """One round of compression: N occupied slots become N - stride.

    keys, values: [B, K, N, D], keys before rotation. Sinks and recent tokens pass as they are; the
    recent ones move down by `stride` slots.
    """
    sizes = [config.sinks, config.span, config.recent]
    sink_keys, span_keys, recent_keys = torch.split(keys, sizes, dim=2)
    sink_values, span_values, recent_values = torch.split(values, sizes, dim=2)
    kept_keys, kept_values = apply_operator(operator, span_keys, span_values, config.keep)
    keys = torch.cat((sink_keys, kept_keys, recent_keys), dim=2)  # [B, K, N - stride, D]
    values = torch.cat((sink_values, kept_values, recent_values), dim=2)
    return keys, values


# The form to train with


class FreqKVAttention:
    """Attention of a whole text in one differentiable call, with the rounds of compression in it.

    operator: what a round does to the span. Remembers nothing between calls.
    """

    def __init__(self, config: FreqKVConfig, operator: Operator = lowband) -> None:
        self.config = config
        self.operator = operator

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rotate) -> Tensor:
        """q [B, H, T, D], k and v [B, K, T, D], not rotated, to out [B, H, T, D]."""
        check_shapes(q, k, v)
        config = self.config
        time = q.shape[2]
        edges = [0, *range(config.window, time, config.stride), time]  # a round at each inner edge
        sizes = [stop - start for start, stop in pairwise(edges)]
        # By torch.split: slices would each have a gradient as long as the whole text.
        q_chunks = torch.split(q, sizes, dim=2)
        k_chunks = torch.split(k, sizes, dim=2)
        v_chunks = torch.split(v, sizes, dim=2)
        keys, values = k[:, :, :0], v[:, :, :0]  # the slots, keys not rotated
        outs: list[Tensor] = []
        for q_new, k_new, v_new in zip(q_chunks, k_chunks, v_chunks, strict=True):
            if keys.shape[2] == config.window:
                keys, values = compress(keys, values, config, self.operator)
            start = keys.shape[2]
            keys = torch.cat((keys, k_new), dim=2)
            values = torch.cat((values, v_new), dim=2)
            # Positions are slots: the old are counted anew, the new stand in slots from `start`.
            outs.append(masked_attention(rope(q_new, start), rope(keys, 0), values))
        return torch.cat(outs, dim=2)


# The form to read and generate with


class FreqKVCache:
    """A KV cache of N slots a layer, which reads a text of any length, in calls of any length.

    It computes what `FreqKVAttention` does, up to rounding, without gradients. The rows of a batch
    are of equal length. Keys are stored rotated, because slots stay where they are between two
    rounds; a round rotates them back first.
    """

    config_name = "config"  # what a saved state calls the schedule, and what it is an object of
    config_type: Callable[..., FreqKVConfig] = FreqKVConfig

    def __init__(self, config: FreqKVConfig, operator: Operator = lowband) -> None:
        self.config = config
        self.operator = operator
        self.reset()

    def reset(self) -> None:
        """Forget the text, and free the memory."""
        self._keys: dict[int, Tensor] = {}  # layer -> [B, K, N, D], rotated
        self._values: dict[int, Tensor] = {}  # layer -> [B, K, N, D]
        self._tokens: dict[int, int] = {}  # layer -> tokens that it has read
        self._busy = False  # True during a call; later on only if that failed

    # What it holds

    @property
    def tokens_seen(self) -> int:
        """Tokens of the text read so far."""
        return next(iter(self._tokens.values()), 0)

    @property
    def rounds(self) -> int:
        """Rounds of compression so far."""
        return self.config.rounds(self.tokens_seen)

    @property
    def slots(self) -> int:
        """Slots in use, at most N."""
        return self.config.slots(self.tokens_seen)

    @property
    def room(self) -> int:
        """Slots that are free: the tokens that fit before the next round."""
        return self.config.window - self.slots

    @property
    def batch(self) -> int:
        """B, the texts read side by side; 0 before the first call."""
        first = next(iter(self._keys.values()), None)
        return 0 if first is None else len(first)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, taken or free, whatever the length of the text."""
        buffers = [*self._keys.values(), *self._values.values()]
        return sum(buffer.nbytes for buffer in buffers)

    # Reading

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rotate) -> Tensor:
        """q [B, H, T, D], k and v [B, K, T, D], not rotated, to out [B, H, T, D]."""
        check_shapes(q, k, v)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError(
                "q, k, v: need gradients, which a cache does not give; "
                "train with FreqKVAttention, or read under torch.no_grad()"
            )
        self._check_order(layer, time=q.shape[2])
        if layer not in self._keys:
            self._allocate(layer, k)
        self._check_fits(layer, k, v)
        with torch.no_grad():
            return self._read(layer, q, k, v, rope)

    def _read(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rotate) -> Tensor:
        keys = self._keys[layer]
        values = self._values[layer]
        seen = self._tokens[layer]
        self._busy = True
        time = q.shape[2]
        out = torch.empty_like(q)
        start = 0  # tokens of this call that are read
        while start < time:
            used, room = self._make_room(keys, values, seen, rope)
            count = min(room, time - start)
            stop = start + count
            end = used + count  # tokens start..stop of this call move into slots used..end
            keys[:, :, used:end] = rope(k[:, :, start:stop], used)
            values[:, :, used:end] = v[:, :, start:stop]
            q_new = rope(q[:, :, start:stop], used)
            out[:, :, start:stop] = masked_attention(q_new, keys[:, :, :end], values[:, :, :end])
            seen += count
            start = stop
        self._tokens[layer] = seen
        self._busy = False
        return out

    def _make_room(self, keys: Tensor, values: Tensor, seen: int, rope: Rotate) -> tuple[int, int]:
        """Slots in use, and slots that are free; a round makes some free where all are in use."""
        window = self.config.window
        used = self.config.slots(seen)
        if used == window:
            self._compress(keys, values, rope)
            used -= self.config.stride
        return used, window - used

    def _compress(self, keys: Tensor, values: Tensor, rope: Rotate) -> None:
        """One round, in place: keys and values [B, K, N, D] move to their new slots."""
        config = self.config
        wide = torch.promote_types(keys.dtype, torch.float32)  # to round once, at the end
        unrotated = rope(keys.to(wide), 0, inverse=True)
        new_keys, new_values = compress(unrotated, values.to(wide), config, self.operator)
        new_keys = rope(new_keys, 0)  # positions change here: from old slots to new ones
        first = config.sinks  # sinks stay: written again, they would be rounded in every round
        end = config.window - config.stride
        keys[:, :, first:end] = new_keys[:, :, first:]
        values[:, :, first:end] = new_values[:, :, first:]

    def _allocate(self, layer: int, k: Tensor) -> None:
        """Give a layer N free slots that fit its keys [B, K, T, D]."""
        shape = (k.shape[0], k.shape[1], self.config.window, k.shape[3])
        with torch.inference_mode(False):  # slots made in that mode could not be written outside it
            self._keys[layer] = k.new_zeros(shape)
            self._values[layer] = k.new_zeros(shape)
        self._tokens[layer] = 0

    def _check_fits(self, layer: int, k: Tensor, v: Tensor) -> None:
        """ValueError unless k and v [B, K, T, D] fit the slots of their layer."""
        slots = self._keys[layer]
        for name, x in (("k", k), ("v", v)):
            sizes_fit = x.shape[:2] == slots.shape[:2] and x.shape[3] == slots.shape[3]
            if not sizes_fit or x.dtype != slots.dtype or x.device != slots.device:
                raise ValueError(
                    f"{name}: was {tuple(x.shape)} {x.dtype} on {x.device}, must fit the slots, "
                    f"{tuple(slots.shape)} {slots.dtype} on {slots.device} ([B, K, N, D], heads "
                    "before time); reset() for a new batch"
                )

    def _check_order(self, layer: int, time: int) -> None:
        """ValueError where the call before this one failed half way, as by Ctrl-C in a notebook.

        Layers read in order, so a call of the model begins at the first one: there, all must have
        read the same. A layer that has no slots yet can only be in the first call of all: there,
        the first layer must have read just the `time` tokens of this call.
        """
        first = next(iter(self._tokens), layer)
        if layer == first:
            self._check_whole()
        elif layer not in self._tokens and self._tokens[first] != time:
            raise ValueError(HALF_WAY)

    def _check_whole(self) -> None:
        """ValueError unless all layers have read the same text to its end."""
        seen = self.tokens_seen
        for tokens in self._tokens.values():
            if self._busy or tokens != seen:
                raise ValueError(HALF_WAY)

    # Changing what it holds

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Make row i a copy of row rows[i]: for beam search, or to go on from one row in many.

        rows: [new B], numbers of rows that there are.
        """
        self._check_whole()
        index = torch.as_tensor(rows, device="cpu")
        is_list = index.ndim == 1 and len(index) > 0 and index.dtype in (torch.int32, torch.int64)
        if not is_list or index.min() < 0 or index.max() >= self.batch:
            raise ValueError(f"rows: were {rows}, must be numbers of rows, below {self.batch}")
        keys = {}
        values = {}
        with torch.inference_mode(False):
            for layer, old_keys in self._keys.items():
                here = index.to(old_keys.device)
                keys[layer] = old_keys.index_select(0, here)
                values[layer] = self._values[layer].index_select(0, here)
        self._keys = keys
        self._values = values

    def crop(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens; a number below 0 forgets so many of the newest.

        For speculative decoding. ValueError for tokens from before the last round, and for 0, which
        might be meant either way: reset() forgets all.
        """
        self._check_whole()
        seen = self.tokens_seen
        if tokens == 0:
            raise ValueError("tokens: was 0, must be above 0 (to keep) or below 0 (to forget)")
        left = tokens if tokens >= 0 else seen + tokens
        if not 0 <= left <= seen:
            raise ValueError(f"tokens: was {tokens}, must be within the {seen} that were read")
        if self.config.rounds(left) < self.rounds:
            least = left
            while self.config.rounds(least) < self.rounds:
                least += 1
            raise ValueError(
                f"tokens: was {tokens}, must leave {least} or more of {seen}: "
                "the last round of compression cannot be undone"
            )
        for layer in self._tokens:
            self._tokens[layer] = left

    # Saving

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what it holds, to be saved; `from_state` makes a cache of them again.

        config [4]: window, sinks, ratio, recent. tokens []: tokens read. For each layer k.LAYER,
        rotated, and v.LAYER, [B, K, slots in use, D]. ValueError for a cache that has read nothing.
        """
        self._check_whole()
        if self.tokens_seen == 0:
            raise ValueError("cache: was empty, must have read a text before it is saved")
        state = {
            self.config_name: torch.tensor(astuple(self.config), dtype=torch.float64),
            "tokens": torch.tensor(self.tokens_seen),
        }
        for layer, keys in self._keys.items():
            state[f"k.{layer}"] = keys[:, :, : self.slots].clone()
            state[f"v.{layer}"] = self._values[layer][:, :, : self.slots].clone()
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], operator: Operator = lowband) -> "FreqKVCache":
        """The cache of which `state_dict` made `state`, in its dtype, on its device.

        operator: what it was read with. ValueError for a state that is not whole.
        """
        layers = [name[2:] for name in state if re.fullmatch("k\\.[0-9]+", name)]
        names = {cls.config_name, "tokens"}
        for layer in layers:
            names |= {f"k.{layer}", f"v.{layer}"}
        for name in state.keys() ^ names:
            raise ValueError(
                f"saved cache: {name} was missing or unexpected, must be of this version"
            )
        try:
            numbers = state[cls.config_name].tolist()
            settings = [int(x) if x.is_integer() else x for x in numbers]  # saved as float64
            config = cls.config_type(*settings)
            if len(settings) != len(astuple(config)):
                raise ValueError(f"were {len(settings)}, must be {len(astuple(config))}")
            tokens = int(state["tokens"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"saved cache: its settings were wrong ({error})") from None
        cache = cls(config, operator)
        slots = config.slots(tokens)
        for layer in layers:
            keys = state[f"k.{layer}"]
            values = state[f"v.{layer}"]
            if keys.ndim != 4 or keys.shape[2] != slots or values.shape != keys.shape:
                raise ValueError(
                    f"saved cache: k.{layer}, v.{layer} were {tuple(keys.shape)}, "
                    f"{tuple(values.shape)}, must be [B, K, {slots}, D] both"
                )
            cache._allocate(int(layer), keys)
            cache._keys[int(layer)][:, :, :slots] = keys
            cache._values[int(layer)][:, :, :slots] = values
            cache._tokens[int(layer)] = tokens
        if cache.tokens_seen < 1:
            raise ValueError(
                f"saved cache: was of {tokens} tokens, must be of some, with their slots"
            )
        return cache


# Attention


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


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless q is [B, H, T, D], and k and v are [B, K, T, D], with K dividing H."""
    alike = q.ndim == 4 and k.ndim == 4 and k.shape == v.shape
    alike = alike and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not alike or q.shape[1] % k.shape[1] != 0:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v: were {shapes}, must be [B, H, T, D], [B, K, T, D] twice")
