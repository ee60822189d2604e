"""Each module works where it is copied to, with nothing but torch.

Run: pytest tests/test_standalone.py
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

DCT = """
import torch
from dct import dct, idct, lowpass, lowpass_matrix

x = torch.randn(3, 10)
assert torch.allclose(idct(dct(x)), x, atol=1e-5)
assert torch.allclose(lowpass_matrix(10, 4).sum(1), torch.ones(4))
assert torch.allclose(lowpass(x.T, 4), lowpass_matrix(10, 4) @ x.T, atol=1e-5)
"""

# An attention layer with one matrix for q, k, v, and a RoPE that turns neighbouring channels.
FREQKV = """
import torch
from torch import nn
from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig

def rope(x, start, inverse=False):
    speeds = 100.0 ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = torch.arange(start, start + x.shape[-2])[:, None] * speeds
    turn = torch.polar(torch.ones_like(angles), -angles if inverse else angles)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)

class TheirAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x, attend):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return self.out(attend(0, q, k, v, rope).transpose(1, 2).flatten(2))

torch.manual_seed(0)
config, layer, x = FreqKVConfig(window=12, sinks=2), TheirAttention(), torch.randn(2, 40, 24)
cache = FreqKVCache(config)
parallel = layer(x, FreqKVAttention(config))
with torch.no_grad():
    recurrent = torch.cat([layer(piece, cache) for piece in x.split(3, dim=1)], dim=1)
assert cache.rounds == 6 and torch.allclose(parallel, recurrent, atol=1e-5)
parallel.sum().backward()
"""

MODEL = """
import torch
from model import FullCache, Llama, LlamaConfig

torch.manual_seed(0)
model = Llama(LlamaConfig(50, 32, 48, 2, 4, 2, 8, 64))
tokens, cache = torch.randint(50, (2, 20)), FullCache(20)
logits = model(tokens)
with torch.no_grad():
    pieces = [model(piece, cache) for piece in tokens.split(6, dim=1)]
assert torch.allclose(torch.cat(pieces, dim=1), logits, atol=1e-5)
logits.sum().backward()
"""

LEVELS = """
import torch
from levels import LevelsAttention, LevelsCache, LevelsConfig

config = LevelsConfig(window=24, sinks=2, recent=2, block=2)
turn = lambda x, start, inverse=False: x
qkv = [torch.randn(1, 2, 90, 4) for _ in range(3)]
parallel = LevelsAttention(config)(0, *qkv, turn)
assert torch.allclose(parallel, LevelsCache(config)(0, *qkv, turn), atol=1e-5)
"""


def modules_after(code, folder):
    """Top-level names of what is imported once `code` has run in `folder`, cut off from here."""
    report = "import json; print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
    run = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.')\n{code}\n{report}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout)) - sys.stdlib_module_names


@pytest.mark.parametrize(
    ("name", "beside"),
    [("dct", []), ("freqkv", ["dct"]), ("model", []), ("levels", ["freqkv"])],
)
def test_imports(name, beside):
    """By the source: torch brings in packages of its own, which would hide an import of them."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    packages = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert packages == {"torch", *beside}


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory):
    code = "import torch.nn.attention.bias, torch.utils.checkpoint"  # the parts in use
    return modules_after(code, tmp_path_factory.mktemp("empty"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "code"),
    [
        (["dct"], DCT),
        (["dct", "freqkv"], FREQKV),
        (["model"], MODEL),
        (["dct", "freqkv", "levels"], LEVELS),
    ],
    ids=["dct", "freqkv", "model", "levels"],
)
def test_copied_files_need_only_torch(files, code, tmp_path, torch_alone):
    for name in files:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    assert modules_after(code, tmp_path) - torch_alone == set(files)


# What is installed


def test_only_what_people_import_is_installed(tmp_path):
    """A wheel brings no module called model, cli or train into anybody's site-packages."""
    pytest.importorskip("setuptools")
    pytest.importorskip("wheel")
    shutil.copytree(
        ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info")
    )
    command = [sys.executable, "-m", "pip", "wheel", ".", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "tree", check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in content.namelist() if name.endswith("METADATA"))
        lines = content.read(metadata).decode().splitlines()
    assert names == {"dct.py", "freqkv.py", "levels.py"}
    needed = [line for line in lines if line.startswith("Requires-Dist:") and "extra" not in line]
    assert needed == ["Requires-Dist: torch>=2.5"]


@pytest.mark.parametrize(
    "command",
    [
        ["generate.py"],
        ["train.py"],
        ["-m", "experiments.perplexity"],
        ["-m", "experiments.recall"],
        ["-m", "experiments.ablation"],
        ["-m", "experiments.spectrum"],
        ["-m", "experiments.longbench"],
        ["-m", "experiments.speed"],
    ],
    ids=lambda command: command[-1],
)
def test_scripts_run_the_modules_of_their_own_checkout(command, tmp_path):
    """Even where another clone is what is installed: here one whose modules all fail."""
    for name in ("dct", "freqkv", "levels", "model", "cli", "data", "generate", "weights", "lora"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the other clone')")
    run = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "the other clone" not in run.stderr
    assert run.stdout.startswith("usage:")


def test_the_compiler_is_not_imported_by_those_who_do_not_compile():
    """It takes two seconds of every start."""
    code = "import sys, generate, train, levels; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)
