"""Checkpoints: every format gives the same model; a broken one says what is wrong, in one line.

Run: pytest tests/test_weights.py
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from model import Llama, RopeScaling
from tests.helpers import DATA, random_tokens, smollm2_path, tiny_config, tiny_model
from weights import load_model, save_model
from weights.meta import NAMES

META = DATA / "meta"
EXPECTED = load_file(META / "expected.safetensors")
LLAMA3 = RopeScaling("llama3", 8.0, original_max_position_embeddings=64)
VARIANTS = {
    "mha": tiny_config(num_key_value_heads=4),
    "gqa": tiny_config(),
    "tied": tiny_config(tie_word_embeddings=True),
    "llama3": tiny_config(rope_scaling=LLAMA3, rope_theta=500000.0),
    "linear": tiny_config(rope_scaling=RopeScaling("linear", 2.0)),
    "wide heads": tiny_config(head_dim=16),
    "blocks of 32": tiny_config(intermediate_size=64),  # what Q8_0 can hold
}


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens)


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


@pytest.fixture
def folder(tmp_path):
    """A folder of safetensors to spoil."""
    save_model(tiny_model(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("name", ["hf", "mp1"])
def test_golden_checkpoints(name):
    assert_close(
        logits(load_model(META / name), EXPECTED["input_ids"]),
        EXPECTED["logits_T200"],
        atol=5e-4,
        rtol=0,
    )


# Meta's releases


def split_ranks(source, target, ranks, embedding_dim):
    """The release in `source`, of one file, split as Meta splits it for `ranks` GPUs."""
    target.mkdir()
    shutil.copy(source / "params.json", target)
    whole = torch.load(source / "consolidated.00.pth", weights_only=True)
    rows, columns = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")
    dims = dict.fromkeys(rows, 0) | dict.fromkeys(columns, 1) | {"tok_embeddings": embedding_dim}
    for rank in range(ranks):
        part = {}
        for name, tensor in whole.items():
            dim = dims.get(name.removesuffix(".weight").rpartition(".")[2])
            part[name] = tensor if dim is None else tensor.chunk(ranks, dim)[rank].clone()
        torch.save(part | {"rope.freqs": torch.ones(8)}, target / f"consolidated.{rank:02d}.pth")
    return target


@pytest.mark.parametrize("embedding_dim", [1, 0], ids=["Llama 2", "Llama 3"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_are_merged(tmp_path, ranks, embedding_dim):
    release = split_ranks(META / "mp1", tmp_path / "release", ranks, embedding_dim)
    model = load_model(release)
    assert model.config.vocab_size == 128
    assert_close(logits(model, EXPECTED["input_ids"]), EXPECTED["logits_T200"], atol=5e-4, rtol=0)


def test_params_of_later_releases(tmp_path):
    release = split_ranks(META / "mp1", tmp_path / "release", 1, 0)
    edit_json(release / "params.json", rope_theta=500000.0, use_scaled_rope=True, vocab_size=128)
    config = load_model(release).config
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert (config.rope_theta, config.max_position_embeddings) == (500000.0, 131072)


def spoil_pth(change):
    def spoil(release):
        file = release / "consolidated.01.pth"
        content = torch.load(file, weights_only=True)
        change(content)
        torch.save(content, file)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda r: (r / "consolidated.00.pth").unlink(), "consolidated.00.pth"),
        (lambda r: (r / "consolidated.01.pth").write_bytes(b"junk"), "consolidated.01.pth"),
        (lambda r: edit_json(r / "params.json", dim=...), "dim"),
        (lambda r: edit_json(r / "params.json", vocab_size=99), "vocab_size: was 99"),
        (lambda r: (r / "params.json").write_text("{"), "params.json: was not JSON"),
        (spoil_pth(lambda c: c.pop("norm.weight")), "norm.weight was missing"),
        (
            spoil_pth(lambda c: c.update({"layers.1.attention.wq.weight": torch.ones(3, 5)})),
            "layers.1.attention.wq.weight was misshapen",
        ),
        (spoil_pth(lambda c: c.update(a=[1])), "consolidated.01.pth"),
    ],
)
def test_broken_releases(tmp_path, spoil, says):
    release = split_ranks(META / "mp1", tmp_path / "release", 2, 1)
    spoil(release)
    with pytest.raises((ValueError, OSError), match=says):
        load_model(release)


def test_a_pth_that_runs_code_is_refused(tmp_path):
    release = split_ranks(META / "mp1", tmp_path / "release", 1, 1)
    torch.save({"norm.weight": subprocess.Popen}, release / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth: was not whole"):
        load_model(release)


# Safetensors


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_through_transformers(tmp_path, variant):
    transformers = pytest.importorskip("transformers")
    model, tokens = tiny_model(VARIANTS[variant]), random_tokens(2, 60)
    save_model(model, tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(theirs(tokens).logits.detach(), logits(model, tokens), atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")  # and back, in the layout of their version
    again = load_model(tmp_path / "theirs")
    assert again.config == model.config
    assert_close(logits(again, tokens), logits(model, tokens), atol=0, rtol=0)


def test_shards(folder, tmp_path):
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: whole[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").rename(tmp_path / "whole")
    tokens = random_tokens(1, 20)
    assert_close(logits(load_model(folder), tokens), logits(tiny_model(), tokens), atol=0, rtol=0)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors: was not there"):
        load_model(folder)


def test_a_stored_copy_of_a_tied_output_is_dropped(tmp_path):
    model = tiny_model(VARIANTS["tied"])
    save_model(model, tmp_path)
    spoil_safetensors(lambda c: c.update({"lm_head.weight": torch.zeros(50, 32)}))(tmp_path)
    tokens = random_tokens(1, 9)
    assert_close(logits(load_model(tmp_path), tokens), logits(model, tokens), atol=0, rtol=0)


def spoil_safetensors(change):
    def spoil(folder):
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors")

    return spoil


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (truncate, "model.safetensors: was not whole"),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk"), "model.safetensors: was not"),
        (lambda f: (f / "model.safetensors").unlink(), "was without weights"),
        (lambda f: (f / "config.json").unlink(), "was a folder without a checkpoint"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json: was not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: was a JSON list"),
        (lambda f: edit_json(f / "config.json", hidden_size=...), "'hidden_size' was missing"),
        (lambda f: edit_json(f / "config.json", hidden_size="x"), "config.json"),
        (lambda f: edit_json(f / "config.json", model_type="mamba"), "model_type: was 'mamba'"),
        (lambda f: edit_json(f / "config.json", attention_bias=True), "attention_bias: was True"),
        (lambda f: edit_json(f / "config.json", partial_rotary_factor=0.5), "partial_rotary"),
        (lambda f: edit_json(f / "config.json", tie_word_embeddings="false"), "tie_word"),
        (lambda f: edit_json(f / "config.json", rope_scaling="linear"), "rope_scaling: was"),
        (lambda f: edit_json(f / "config.json", rope_scaling={"type": "linear"}), "'factor' was"),
        (lambda f: edit_json(f / "config.json", rope_parameters={"a": {}}), "rope_parameters: was"),
        (lambda f: edit_json(f / "config.json", vocab_size=10**30), "vocab_size: was 1000"),
        (lambda f: edit_json(f / "config.json", num_attention_heads=0), "heads: was 0"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: was not JSON"),
        (
            lambda f: edit_json(f / "config.json", rope_scaling={"type": "yarn", "factor": 2}),
            "rope_type: was 'yarn'",
        ),
        (
            spoil_safetensors(lambda c: c.pop("model.layers.1.mlp.up_proj.weight")),
            r"layers\.1\.mlp\.up_proj\.weight was missing",
        ),
        (
            spoil_safetensors(lambda c: c.update({"model.layers.0.extra.weight": torch.ones(1)})),
            r"layers\.0\.extra\.weight was unexpected",
        ),
        (
            spoil_safetensors(lambda c: c.update({"model.norm.weight": torch.ones(5)})),
            r"norm\.weight: was \(5,\), must be \(32,\)",
        ),
        (
            spoil_safetensors(lambda c: c.update({"model.norm.weight": torch.ones(32).int()})),
            r"norm\.weight: was torch\.int32",
        ),
    ],
)
def test_broken_folders(folder, spoil, says):
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=says) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere", "no/such/model.gguf", __file__])
def test_no_such_model(path):
    with pytest.raises((ValueError, OSError), match="must be"):
        load_model(path)


def test_dtype(folder):
    assert load_model(folder).norm.weight.dtype == torch.float32
    half = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    spoil_safetensors(
        lambda c: c.update({k: v.bfloat16() for k, v in c.items() if "norm" not in k})
    )(folder)
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}


def test_save_replaces_whole_files(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()
    os.link(folder / "model.safetensors", folder.parent / "same")
    save_model(tiny_model(seed=1), folder)
    assert (folder / "model.safetensors").read_bytes() != before
    assert (folder.parent / "same").read_bytes() == before  # another file took the name
    (folder.parent / "same").replace(folder / "model.safetensors")

    def fail(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weights.safetensors_dir.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_model(tiny_model(seed=1), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_only_a_plain_model_is_saved(tmp_path):
    model = tiny_model()
    model.norm.extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="extra was missing or added"):
        save_model(model, tmp_path)


# GGUF


def interleave(weight, heads):
    """The order of rows in GGUF, from ours: the inverse of `half_split`, written otherwise."""
    dim = len(weight) // heads
    order = [
        head * dim + half * dim // 2 + pair
        for head in range(heads)
        for pair in range(dim // 2)
        for half in (0, 1)
    ]
    return weight[order]


def write_gguf(path, model, kind="F32", **fields):
    gguf = pytest.importorskip("gguf")
    from weights.gguf_file import NAMES

    c, theirs = model.config, {ours: name for name, ours in NAMES.items()}
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_key_length(c.head_dim)
    for name, value in fields.items():
        if name == "rope_freqs":
            writer.add_tensor("rope_freqs.weight", value)
        else:
            writer.add_string(name, value)
    for name, tensor in model.state_dict().items():
        layer, short = "", name.removesuffix(".weight")
        if short.startswith("layers."):
            _, number, short = short.split(".", 2)
            layer = f"blk.{number}."
        heads = {
            "self_attn.q_proj": c.num_attention_heads,
            "self_attn.k_proj": c.num_key_value_heads,
        }
        values = interleave(tensor, heads[short]) if short in heads else tensor
        number = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        packed = gguf.quantize(values.float().numpy(), number)
        writer.add_tensor(f"{layer}{theirs[short]}.weight", packed, raw_dtype=number)
    for close in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        close()
    return path


@pytest.mark.parametrize(
    ("variant", "kind"),
    [("gqa", "F32"), ("tied", "F32"), ("mha", "F32"), ("gqa", "F16"), ("blocks of 32", "Q8_0")],
)
def test_gguf(tmp_path, variant, kind):
    gguf = pytest.importorskip("gguf")
    model, tokens = tiny_model(VARIANTS[variant]), random_tokens(2, 40)
    read = load_model(write_gguf(tmp_path / "m.gguf", model, kind))
    # The file holds epsilon in float32.
    assert read.config == replace(model.config, rms_norm_eps=read.config.rms_norm_eps)
    assert read.norm.weight.dtype == (torch.float16 if kind == "F16" else torch.float32)
    number = gguf.GGMLQuantizationType[kind]
    for weight in model.parameters():  # rounded as the file rounds it
        if weight.ndim == 2 or kind == "F16":
            packed = gguf.quantize(weight.detach().numpy(), number)
            weight.data = torch.from_numpy(gguf.dequantize(packed, number))
    assert_close(logits(read.float(), tokens), logits(model, tokens), atol=2e-3, rtol=0)


def test_gguf_llama3_scaling_is_found_again(tmp_path):
    scaling = RopeScaling("llama3", 8.0)
    model = tiny_model(tiny_config(rope_scaling=scaling, rope_theta=500000.0))
    plain = tiny_model(tiny_config(rope_theta=500000.0))
    factors = (plain.rope.inv_freq / model.rope.inv_freq).float().numpy()
    assert factors.max() == 8
    path = write_gguf(tmp_path / "m.gguf", model, rope_freqs=factors)
    assert load_model(path).config.rope_scaling == scaling
    path = write_gguf(tmp_path / "n.gguf", model, rope_freqs=np.flip(factors).copy())
    with pytest.raises(ValueError, match=r"rope_freqs\.weight: was unknown"):
        load_model(path)


def test_broken_gguf(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model())
    whole = path.read_bytes()
    for content in (b"junk", whole[:100], whole[:-500], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.gguf: was not whole"):
            load_model(path)
    with pytest.raises(ValueError, match=r"general\.architecture: was 'bloom'"):
        load_model(write_gguf(path, tiny_model(), architecture="bloom"))
    with pytest.raises(ValueError, match=r"rope_type: was 'yarn'|factor"):
        load_model(write_gguf(path, tiny_model(), **{"llama.rope.scaling.type": "yarn"}))


def test_gguf_is_parsed_once_for_its_tokenizer_and_its_model(tmp_path, monkeypatch):
    """The parse takes seconds. A file written again in between is read again."""
    gguf = pytest.importorskip("gguf")
    from weights.gguf_file import open_gguf

    path, parsed = write_gguf(tmp_path / "m.gguf", tiny_model()), []

    class Reader(gguf.GGUFReader):
        def __init__(self, *args):
            parsed.append(1)
            super().__init__(*args)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    open_gguf(path)  # as a tokenizer does
    load_model(path)
    assert len(parsed) == 1
    load_model(path)  # the model has let go of it
    assert len(parsed) == 2
    open_gguf(path)
    model = tiny_model()
    model.norm.weight.data.fill_(7)
    write_gguf(tmp_path / "new.gguf", model).replace(path)
    os.utime(path, ns=(0, 0))  # whatever the clock's grain
    assert load_model(path).norm.weight[0] == 7


USE = """
import sys
from weights import load_model, save_model
from weights.lora import add_lora, save_adapter
model = load_model("tiny")
save_model(model, sys.argv[1])
add_lora(model)
save_adapter(model, sys.argv[1])
load_model("tiny", adapter=sys.argv[1])
print(*sys.modules)
"""


def test_loading_and_saving_import_no_compiler(tmp_path):
    """torch._dynamo takes seconds, and PyTorch imports it for a normal distribution on meta."""
    command = [sys.executable, "-c", USE, tmp_path / "model"]
    modules = subprocess.check_output(command, text=True).split()
    assert "torch.nn.init" in modules
    assert "torch._dynamo" not in modules


@pytest.mark.slow
def test_smollm2_equals_transformers():
    """The real model: our reader, RoPE order and all, against transformers' own GGUF reader."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    path = smollm2_path()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokens = random_tokens(1, 64, vocab_size=49152)
    ours = load_model("smollm2")
    assert sum(p.numel() for p in ours.parameters()) == 134_515_008
    assert_close(logits(ours, tokens), theirs(tokens).logits.detach(), atol=2e-3, rtol=1e-3)


# Memory

MEASURE = """
import sys
import torch
import cli
from weights import load_model
load_model(sys.argv[1])
before, _ = cli.peak_memory(torch.device("cpu"))
model = load_model(sys.argv[2])
total = sum(float(p.detach().sum()) for p in model.parameters())  # touch every page
after, _ = cli.peak_memory(torch.device("cpu"))
print((after - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_peak_memory_of_loading(tmp_path, form):
    """2.2 GB of weights, loaded in their own dtype: at most 1.2 of them in memory."""
    config = tiny_config(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
    )
    block = torch.randn(1 << 20).bfloat16()
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(config).named_parameters()}
    big = {}
    for name, shape in shapes.items():
        copies = shape.numel() // len(block) + 1
        big[name] = block.repeat(copies)[: shape.numel()].view(shape).clone()
    save_model(tiny_model(), tmp_path / "small")
    folder = tmp_path / "big"
    folder.mkdir()
    if form == "safetensors":
        content = {"model_type": "llama", **asdict(config)}
        (folder / "config.json").write_text(json.dumps(content))
        save_file(big, folder / "model.safetensors")
    else:
        theirs = {ours: name for name, (ours, _) in NAMES.items()} | {
            "embed_tokens": "tok_embeddings"
        }
        params = {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "vocab_size": -1}
        (folder / "params.json").write_text(json.dumps(params))
        state = {}
        for name, tensor in big.items():
            layer, short = "", name.removesuffix(".weight")
            if short.startswith("layers."):
                layer, short = ".".join(short.split(".")[:2]) + ".", ".".join(short.split(".")[2:])
            state[f"{layer}{theirs[short]}.weight"] = tensor
        torch.save(state, folder / "consolidated.00.pth")
        del state
    del big
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", folder], capture_output=True, text=True
    )
    shutil.rmtree(folder)
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) < 1.2


@pytest.mark.cuda
def test_loads_onto_the_gpu(folder):
    model = load_model(folder, dtype=torch.bfloat16, device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
