"""What tells one model from another, and one tokenizer."""

import hashlib

import torch
from torch import Tensor

from model import Llama
from weights.tokenizer import Tokenizer


def fingerprint(model: Llama, leave_out: str | None = None) -> str:
    """A hash of a model's config, dtype and weights: of some in their places, and of all summed.

    leave_out: what is part of the names of weights that do not count. It takes as long as reading
    the weights once.
    """
    digest = hashlib.sha256(f"{model.config} {model.norm.weight.dtype}".encode())
    for name, parameter in model.named_parameters():
        if leave_out is not None and leave_out in name:
            continue
        values = parameter.detach().flatten()
        step = max(len(values) // 64, 1)
        some = torch.cat((values[::step], values[-8:]))
        digest.update(some.float().cpu().numpy().tobytes())
        digest.update(str(_sum_bits(values)).encode())
    return digest.hexdigest()


def hash_tokenizer(tokenizer: Tokenizer) -> str:
    """A hash of what a tokenizer was read from, and of its template."""
    digest = hashlib.sha256(str(tokenizer.chat_template).encode())
    for file in tokenizer.files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _sum_bits(values: Tensor) -> int:
    """The sum of values [n] read as whole numbers of 64 bits, which is the same in any order.

    But for the last few, which may not fill such a number.
    """
    per_number = 8 // values.element_size()
    count = len(values) // per_number * per_number
    words = values[:count]
    if words.storage_offset() % per_number != 0:
        words = words.clone()
    return int(words.view(torch.int64).sum())
