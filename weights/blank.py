"""A model without values: the names and shapes that tensors of a checkpoint have to fit."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from model import Llama, LlamaConfig

# Far above any model: a damaged file may ask for what takes minutes to build, or no number holds.
LIMITS = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 14,
    "head_dim": 1 << 14,
}


def check_sizes(config: LlamaConfig) -> None:
    """ValueError for sizes that no model has."""
    for name, most in LIMITS.items():
        value = getattr(config, name)
        if value > most:
            raise ValueError(f"{name}: was {value}, must be at most {most}")


def blank_model(config: LlamaConfig) -> Llama:
    """A `Llama` on the meta device, to be given its parameters, or to be compared with."""
    with torch.device("meta"), SkipNormal():
        return Llama(config)


class SkipNormal(TorchFunctionMode):
    """Leaves out the random values of an embedding: to draw them on meta, PyTorch loads its
    compiler, which takes seconds, for values that nobody will see.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.init.normal_:
            return None
        return func(*args, **(kwargs or {}))
