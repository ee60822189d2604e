# SPDX-License-Identifier: Apache-2.0
"""Beyond the paper: the same operators on a ladder of levels, where resolution falls as 1/age.

In FreqKV every round compresses all that is there again, so a passage is halved after each window.
Here a passage is compressed once for each doubling of its age, like the levels of a log-structured
store. Slots, oldest first (m: slots of a block):

    | S sinks | level T: 2 blocks | ... | level 2: 2 blocks | level 1: 2 blocks | R + 2m newest |

New tokens enter as they are. When a token arrives and R + 2m of them stand there, the oldest 2m
become one block of m slots in level 1. Where level 1 holds two blocks already, these become one in
level 2, and so on up: as in a binary counter, every full level below the first one with room passes
one block on. In the top level two blocks become one in place, so that memory stays bounded: what
is older than about 2m * 2^T tokens is halved again every m * 2^T tokens, and fades as in FreqKV.

So a round takes the slots of the full levels and the 2m oldest of the newest, which stand side by
side, and makes every 2m of them m: `compact`. Keys are compressed before rotation, and positions
are slots, as in FreqKV. Shapes: B batch, H query heads, K kv heads, T new tokens, D head dimension.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from freqkv import (
    FreqKVCache,
    Operator,
    Rotate,
    apply_operator,
    check_shapes,
    lowband,
    masked_attention,
)


@dataclass(frozen=True)
class LevelsConfig:
    """When a round comes, and what it leaves. ValueError for impossible settings."""

    window: int = 4096  # N: slots a layer; at most the pre-trained context length, in tokens
    sinks: int = 4  # S: tokens at the start of the text that are never compressed
    recent: int = 1024  # R: newest tokens that a round leaves as they are
    block: int = 64  # m: slots of a block; a round comes every 2m tokens

    def __post_init__(self) -> None:
        for name in ("window", "sinks", "recent", "block"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}: was {value!r}, must be a whole number, 0 or more")
        if self.block == 0:
            raise ValueError("block: was 0, must be 1 or more")
        if self.levels < 1:
            least = self.sinks + self.recent + 4 * self.block
            raise ValueError(
                f"window: was {self.window}, must be at least sinks + recent + 4 block, {least}"
            )

    @property
    def levels(self) -> int:
        """Levels of two blocks each, as many as fit beside sinks and the newest tokens."""
        return (self.window - self.sinks - self.recent - 2 * self.block) // (2 * self.block)

    @property
    def stride(self) -> int:
        """Slots that a round frees: the tokens admitted between two rounds."""
        return 2 * self.block

    def rounds(self, tokens: int) -> int:
        """Rounds that reading `tokens` tokens takes: one for every 2m tokens."""
        beyond = tokens - self.sinks - self.recent - 2 * self.block
        if beyond <= 0:
            return 0
        return (beyond + 2 * self.block - 1) // (2 * self.block)

    def room(self, tokens: int) -> int:
        """Tokens that fit, once `tokens` have been read, before the next round."""
        return self.sinks + self.recent + 2 * self.block * (self.rounds(tokens) + 1) - tokens

    def blocks(self, rounds: int) -> list[int]:
        """Blocks in each level after so many rounds, from level 1 up: 0, 1 or 2."""
        counts = []
        arrived = rounds  # blocks that have come into the level so far
        for level in range(1, self.levels + 1):
            if level == self.levels:
                counts.append(min(arrived, 2))
            elif arrived == 0:
                counts.append(0)
            else:
                counts.append(2 if arrived % 2 == 0 else 1)
            arrived = max(arrived - 1, 0) // 2  # a third passes the first two on as one
        return counts

    def full_levels(self, rounds: int) -> int:
        """Levels that the next round finds full, from level 1 up to the first with room."""
        full = 0
        for count in self.blocks(rounds):
            if count < 2:
                break
            full += 1
        return full

    def slots(self, tokens: int) -> int:
        """Slots in use once `tokens` tokens have been read; at most N."""
        rounds = self.rounds(tokens)
        compressed = self.block * sum(self.blocks(rounds))
        return compressed + tokens - 2 * self.block * rounds


def compact(
    keys: Tensor, values: Tensor, config: LevelsConfig, full: int, operator: Operator = lowband
) -> tuple[Tensor, Tensor]:
    """One round, which finds `full` levels full: of their slots, and the newest, every 2m become m.

    keys, values: [B, K, n, D], the end of the slots, or all of them, keys before rotation.
    """
    pairs = full + 1  # of neighbouring blocks; the last pair is of tokens as they came
    changed = 2 * config.block * pairs
    sizes = [keys.shape[2] - changed - config.recent, changed, config.recent]
    old_keys, pair_keys, recent_keys = torch.split(keys, sizes, dim=2)
    old_values, pair_values, recent_values = torch.split(values, sizes, dim=2)
    # An operator works along dim 2, on every head alone, so pairs of blocks may stand as heads do.
    batch, kv_heads, _, dim = keys.shape
    pair_keys = pair_keys.reshape(batch, kv_heads * pairs, 2 * config.block, dim)
    pair_values = pair_values.reshape(batch, kv_heads * pairs, 2 * config.block, dim)
    new_keys, new_values = apply_operator(operator, pair_keys, pair_values, config.block)
    new_keys = new_keys.reshape(batch, kv_heads, config.block * pairs, dim)
    new_values = new_values.reshape(batch, kv_heads, config.block * pairs, dim)
    keys = torch.cat((old_keys, new_keys, recent_keys), dim=2)
    values = torch.cat((old_values, new_values, recent_values), dim=2)
    return keys, values


class LevelsAttention:
    """The form to train with: a whole text in one differentiable call, as `FreqKVAttention`."""

    def __init__(self, config: LevelsConfig, operator: Operator = lowband) -> None:
        self.config = config
        self.operator = operator

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rotate) -> Tensor:
        """q [B, H, T, D], k and v [B, K, T, D], not rotated, to out [B, H, T, D]."""
        check_shapes(q, k, v)
        config = self.config
        time = q.shape[2]
        edges = [0, *range(config.room(0), time, 2 * config.block), time]  # a round at inner edges
        sizes = [stop - start for start, stop in pairwise(edges)]
        q_chunks = torch.split(q, sizes, dim=2)
        k_chunks = torch.split(k, sizes, dim=2)
        v_chunks = torch.split(v, sizes, dim=2)
        keys, values = k[:, :, :0], v[:, :, :0]  # the slots, keys not rotated
        outs: list[Tensor] = []
        for q_new, k_new, v_new in zip(q_chunks, k_chunks, v_chunks, strict=True):
            if outs:
                full = config.full_levels(rounds=len(outs) - 1)
                keys, values = compact(keys, values, config, full, self.operator)
            start = keys.shape[2]
            keys = torch.cat((keys, k_new), dim=2)
            values = torch.cat((values, v_new), dim=2)
            outs.append(masked_attention(rope(q_new, start), rope(keys, 0), values))
        return torch.cat(outs, dim=2)


class LevelsCache(FreqKVCache):
    """The form to read and generate with: N slots a layer, calls of any length (`FreqKVCache`)."""

    config_name = "levels"
    config_type = LevelsConfig  # type: ignore[assignment]
    config: LevelsConfig  # type: ignore[assignment]

    def __init__(self, config: LevelsConfig, operator: Operator = lowband) -> None:
        super().__init__(config, operator)  # type: ignore[arg-type]

    @property
    def room(self) -> int:
        """Tokens that fit before the next round."""
        return self.config.room(self.tokens_seen)

    def _make_room(self, keys: Tensor, values: Tensor, seen: int, rope: Rotate) -> tuple[int, int]:
        config = self.config
        room = config.room(seen)
        used = config.slots(seen)
        if room > 0:
            return used, room
        # What stands before the full levels stays in its slots. The rest moves to lower ones.
        full = config.full_levels(config.rounds(seen))
        first = used - config.recent - 2 * config.block * (full + 1)
        wide = torch.promote_types(keys.dtype, torch.float32)
        old_keys = rope(keys[:, :, first:used].to(wide), first, inverse=True)
        old_values = values[:, :, first:used].to(wide)
        new_keys, new_values = compact(old_keys, old_values, config, full, self.operator)
        end = first + new_keys.shape[2]
        keys[:, :, first:end] = rope(new_keys, first)
        values[:, :, first:end] = new_values
        return end, 2 * config.block
