"""An attention layer of one's own with FreqKV: python -m examples.own_attention"""

import torch
from torch import Tensor, nn

from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, layer: int, attend: FreqKVAttention | FreqKVCache) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, H, D]
        q, k, v = qkv.transpose(1, 3).unbind(2)  # [B, H, T, D] each, not rotated
        out = attend(layer, q, k, v, rope)  # instead of rotating, masking and attending
        return self.out(out.transpose(1, 2).flatten(2))


def rope(x: Tensor, start: int, inverse: bool = False) -> Tensor:
    """Rotate x [B, H, T, D] as positions start, start + 1, ..., or undo it; keeps the dtype."""
    half = x.shape[-1] // 2
    positions = torch.arange(start, start + x.shape[-2], device=x.device)
    speeds = 10000 ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None] * speeds  # [T, D/2]
    sin = -angles.sin() if inverse else angles.sin()
    first, second = x.chunk(2, dim=-1)
    turned = (first * angles.cos() - second * sin, second * angles.cos() + first * sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


if __name__ == "__main__":
    config = FreqKVConfig(window=64)
    model = Attention(width=48, heads=6)
    text = torch.randn(1, 1000, 48)

    trained = model(text, 0, FreqKVAttention(config))  # the whole text, with gradients
    trained.sum().backward()

    cache = FreqKVCache(config)  # one for each conversation
    with torch.no_grad():
        parts = [model(part, 0, cache) for part in text.split(7, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), trained)
    print(f"{cache.tokens_seen} tokens in {cache.slots} slots")
