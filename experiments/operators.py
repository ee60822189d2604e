"""Operators to compare the paper's with, and a ratio for each layer.

What drops into the place of `freqkv.lowband`: (keys, values, keep) -> (keys, values), each
[B, K, n, D], to [B, K, keep, D].
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dct import dct, idct
from freqkv import FreqKVCache, FreqKVConfig
from model import Attend


def average(keys: Tensor, values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Pooling, in place of a low band: means of `keep` stretches of the span."""
    return _average(keys, keep), _average(values, keep)


def high(keys: Tensor, values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The paper's ablation: the `keep` highest frequencies in place of the lowest."""
    return _high(keys, keep), _high(values, keep)


def _average(x: Tensor, keep: int) -> Tensor:
    if keep == 0:
        return x[:, :, :0]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = wide.transpose(2, 3).flatten(0, 1)  # [B * K, D, n]
    pooled = F.adaptive_avg_pool1d(rows, keep)
    return pooled.unflatten(0, x.shape[:2]).transpose(2, 3).to(x.dtype)


def _high(x: Tensor, keep: int) -> Tensor:
    if keep == 0:
        return x[:, :, :0]
    n = x.shape[2]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    band = dct(wide, dim=2)[:, :, n - keep :]
    return (math.sqrt(keep / n) * idct(band, dim=2)).to(x.dtype)


def by_layer(schedule: FreqKVConfig, ratios: Sequence[float]) -> Attend:
    """A cache whose layers keep different shares of their spans: `ratios`, one for each layer.

    Nothing in freqkv.py knows of it. A strategy may be made of others, layer by layer.
    """
    caches = [FreqKVCache(replace(schedule, ratio=ratio)) for ratio in ratios]

    def attend(layer: int, *rest: Any) -> Tensor:
        return caches[layer](layer, *rest)

    return attend
