# SPDX-License-Identifier: Apache-2.0
"""Products in half precision on a CPU: the same numbers, by the fastest of several ways.

    use_fastest_products(model)   # a model in bfloat16 or float16, to read and write with

PyTorch computes in bfloat16 on any CPU, but few have units for it. Without them a token that is
decoded, one row, reads the matrices at less than half of the memory's rate; `torch.mv`, the product
for vectors, reads large ones faster. And the products of many rows, a text that is read, run at a
fifth of float32's rate; it is faster to widen the matrix each time, for the time of the product.
What is faster depends on the processor: it is measured, once for each dtype, in a fraction of a
second. The ways differ in rounding alone. A model that was changed is to read and write with, not
to save: one with a tied output layer has a layer more.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Llama

LARGE = 1 << 22  # weights; for a vector and fewer, what surrounds the product takes longer
MANY = 64  # rows; for fewer, widening the matrix takes longer than the product
PIECE = 4096  # outputs whose weights are wide at a time, so that a large vocabulary's are not all


class HalfLinear(nn.Linear):
    """A linear layer without a bias, of a weight [F, E] in half precision, to read and write with.

    as_vector: take a single row as a vector. widen: take many rows to float32, and the weight.
    """

    def __init__(self, weight: nn.Parameter, as_vector: bool, widen: bool) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight  # not a copy
        self.as_vector = as_vector
        self.widen = widen

    def forward(self, x: Tensor) -> Tensor:
        """x [..., E] to [..., F]."""
        if x.dtype != self.weight.dtype:  # as under autocast
            return super().forward(x)
        rows = x.shape[:-1].numel()
        if rows == 1 and self.as_vector:
            y = torch.mv(self.weight, x.flatten())
            return y.view(*x.shape[:-1], self.out_features)
        if rows >= MANY and self.widen:
            wide = x.float()
            parts = []
            for weight in self.weight.split(PIECE):
                parts.append(F.linear(wide, weight.float()).to(x.dtype))
            return torch.cat(parts, dim=-1)
        return super().forward(x)


def use_fastest_products(model: Llama) -> None:
    """Replace the linear layers of a model in half precision on a CPU; leave any other as it is."""
    weight = model.norm.weight
    if weight.device.type != "cpu" or weight.element_size() != 2:
        return
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                setattr(parent, name, make_layer(layer.weight))
    if model.lm_head is None:
        model.lm_head = make_layer(model.embed_tokens.weight)  # tied still: the same tensor


def make_layer(weight: nn.Parameter) -> HalfLinear:
    """A layer of such a weight, which takes the ways that are faster here."""
    as_vector = weight.numel() >= LARGE and vector_is_faster(weight.dtype)
    return HalfLinear(weight, as_vector, wide_is_faster(weight.dtype))


# What is measured


@lru_cache
def vector_is_faster(dtype: torch.dtype) -> bool:
    """Whether `torch.mv` is clearly faster for one row than `F.linear`, on this machine."""
    matrix = torch.ones(4096, 4096, dtype=dtype)
    vector = torch.ones(4096, dtype=dtype)
    return is_faster(lambda: torch.mv(matrix, vector), lambda: F.linear(vector[None], matrix))


@lru_cache
def wide_is_faster(dtype: torch.dtype) -> bool:
    """Whether MANY rows are clearly faster with their matrix in float32, on this machine."""
    matrix = torch.ones(2048, 2048, dtype=dtype)
    rows = torch.ones(MANY, 2048, dtype=dtype)
    return is_faster(
        lambda: F.linear(rows.float(), matrix.float()).to(dtype), lambda: F.linear(rows, matrix)
    )


def is_faster(one: Callable[[], Tensor], other: Callable[[], Tensor]) -> bool:
    """Whether one way takes less than 0.8 of another's time: the best of a few calls, in turns."""
    one_times = []
    other_times = []
    for _ in range(4):
        start = time.perf_counter()
        one()
        middle = time.perf_counter()
        other()
        one_times.append(middle - start)
        other_times.append(time.perf_counter() - middle)
    return min(one_times) < 0.8 * min(other_times)
