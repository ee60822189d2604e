"""A token at a time in shapes that never change: one graph for a text of any length.

    read_token = Steady(model, cache)   # a FreqKVCache or LevelsCache that has read a text
    logits = read_token(tokens)         # [B] -> [B, V]

A plain cache grows, so each token is computed in a shape of its own. Here there are N slots for
ever: the new token reads all of them, and a mask hides those that are free. Where it stands is a
tensor, which the graph reads anew each time. So `torch.compile` makes one graph for all tokens (on
CUDA with mode="reduce-overhead" a CUDA graph, which is replayed). A round of compression has other
shapes; it runs outside the graph, before the token that needs its room.
"""

from collections.abc import Callable

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
    it is used, the cache must not be given anything else to read.
    """

    def __init__(
        self, model: Llama, cache: FreqKVCache, transform: Callable[[Step], Step] | None = None
    ) -> None:
        if cache.tokens_seen == 0:
            raise ValueError("cache: was empty, must have read a text")
        device = model.norm.weight.device
        self.model = model
        self.cache = cache
        self._slot = torch.zeros(1, dtype=torch.long, device=device)  # where the new token stands
        self._slots = torch.arange(cache.config.window, device=device)
        model.rope.table(device, cache.config.window)  # made here, not within a graph
        for buffer in (*cache._keys.values(), *cache._values.values(), self._slot):
            torch._dynamo.mark_static_address(buffer)  # CUDA graphs write where they were captured
        self._step = (transform or compile_step)(self._forward)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Read tokens [B], one for each row; logits [B, V] of the next."""
        cache = self.cache
        cache._check_whole()
        cache._busy = True  # until all layers have read the token
        for layer, seen in cache._tokens.items():
            slot, _ = cache._make_room(
                cache._keys[layer], cache._values[layer], seen, self.model.rope
            )
        self._slot.fill_(slot)  # the same in all layers
        logits = self._run(tokens)
        for layer in cache._tokens:
            cache._tokens[layer] += 1
        cache._busy = False
        return logits

    def _run(self, tokens: Tensor) -> Tensor:
        try:
            return self._step(tokens)
        except torch._dynamo.exc.TorchDynamoException as error:  # once, before anything is written
            why = " ".join(str(error).split("\n")[:2])
            must = "must work; without --compile there is no need of it"
            raise ValueError(f"torch.compile: failed ({why}), {must}") from error

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
        taken = (self._slots <= self._slot).expand(batch, k.shape[1], groups.shape[2], -1)
        out = F.scaled_dot_product_attention(groups, keys, values, taken)
        return out.reshape(batch, heads, 1, dim)


def compile_step(step: Step) -> Step:
    """One graph of the whole step; on CUDA it becomes a CUDA graph."""
    return torch.compile(step, fullgraph=True, mode="reduce-overhead")
