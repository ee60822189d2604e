# SPDX-License-Identifier: Apache-2.0
"""Decoding in shapes that never change: one graph for a text of any length.

    read_token = Steady(model, cache)   # a FreqKVCache or LevelsCache that has read a text
    logits = read_token(tokens)         # [B] -> [B, V]

A plain cache grows, so each token is computed in a shape of its own. Here there are always N slots:
the new token reads all of them, and a mask hides those that are free. The number of its slot is
kept in a tensor, so a graph reads its current value in place of a constant. `torch.compile` makes
one graph for all tokens, on CUDA a CUDA graph that is replayed. A round of compression has other
shapes; it runs outside the graph, before the token that it frees a slot for.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from freqkv import FreqKVCache
from model import Llama, Rope

Step = Callable[[Tensor], Tensor]


class Steady:
    """Reads single tokens into a cache that has read a text, by a step that `transform` compiles.

    transform: takes the step, and gives one that computes the same; default `compile_step`. While
    it is in use, do not reset() or reorder() the cache. On CUDA the logits of one call are gone
    with the next: use them first, or clone them.
    """

    def __init__(
        self, model: Llama, cache: FreqKVCache, transform: Callable[[Step], Step] | None = None
    ) -> None:
        if cache.tokens_seen == 0:
            raise ValueError("cache: was empty, must have read a text")
        device = model.norm.weight.device
        self.model = model
        self.cache = cache
        with torch.inference_mode(False):  # tensors made in that mode could not be written outside
            self._slot = torch.zeros(1, dtype=torch.long, device=device)  # of the new token
            self._slots = torch.arange(cache.config.window, device=device)
        model.rope.table(device, cache.config.window)  # made here, not within a graph
        buffers = [self._slot, self._slots]
        buffers += cache._keys.values()
        buffers += cache._values.values()
        for buffer in buffers:
            # A CUDA graph uses these where they are, and copies whatever else it is given.
            torch._dynamo.mark_static_address(buffer)
        self._step = (transform or compile_step)(self._forward)

    @torch.inference_mode(False)  # a graph that was captured in that mode fails outside it
    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Read tokens [B], one for each row; logits [B, V] of the next."""
        cache = self.cache
        cache._check_whole()
        if tokens.shape != (cache.batch,) or tokens.device != self._slot.device:
            was = f"{tuple(tokens.shape)} on {tokens.device}"
            raise ValueError(f"tokens: were {was}, must be [{cache.batch}] on {self._slot.device}")
        cache._busy = True  # until all layers have read the token
        for layer, seen in cache._tokens.items():  # all have read the same: a round in all or none
            keys = cache._keys[layer]
            values = cache._values[layer]
            slot, _ = cache._make_room(keys, values, seen, self.model.rope)
        self._slot.fill_(slot)
        logits = _run(self._step, tokens)
        for layer in cache._tokens:
            cache._tokens[layer] += 1
        cache._busy = False
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> "Steady":
        raise TypeError("Steady: was copied, must be made anew, of a copy of its cache")

    def _forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model.hidden(tokens[:, None], self._attend)
        return self.model.logits(hidden[:, -1])

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """One query over all slots: q [B, H, 1, D], k and v [B, K, 1, D], to [B, H, 1, D]."""
        keys = self.cache._keys[layer]
        values = self.cache._values[layer]
        keys.index_copy_(2, self._slot, rope.at(k, self._slot))
        values.index_copy_(2, self._slot, v)
        batch, heads, _, dim = q.shape
        groups = rope.at(q, self._slot).reshape(batch, k.shape[1], -1, dim)  # [B, K, H/K, D]
        in_use = (self._slots <= self._slot).expand(batch, k.shape[1], groups.shape[2], -1)
        out = F.scaled_dot_product_attention(groups, keys, values, in_use)
        return out.reshape(batch, heads, 1, dim)


def check_compiler(device: torch.device) -> None:
    """ValueError where torch.compile does not work here, found out before work is done for it."""
    _run(compile_step(lambda x: 2 * x + 1), torch.ones(8, device=device))


def _run(step: Step, x: Tensor) -> Tensor:
    try:
        return step(x)
    except torch._dynamo.exc.TorchDynamoException as error:
        why = " ".join(str(error).split("\n")[:2])
        raise ValueError(f"torch.compile: failed ({why}), must work, or be left out") from error


def compile_step(step: Step) -> Step:
    """One graph of the whole step; on CUDA it becomes a CUDA graph."""
    return torch.compile(step, fullgraph=True, mode="reduce-overhead")
