"""A model without values: the names and shapes that tensors of a checkpoint have to fit."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from model import Llama, LlamaConfig


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
