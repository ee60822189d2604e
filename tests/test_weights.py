"""Checkpoints: every format gives the same model; a broken one says what is wrong, in one line.

Run: pytest tests/test_weights.py
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from model import Llama, RopeScaling
from tests.helpers import DATA, random_tokens, smollm2_path, tiny_config, tiny_model
from weights import find, load_model, save_model
from weights.files import check_writable, read_text, write_beside
from weights.gguf_file import gguf_fields
from weights.meta import NAMES
from weights.safetensors_dir import config_json

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


# Text files


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain é 北\n", "plain é 北\n"),
        ("\ufeffafter a BOM", "after a BOM"),
        ("\ufeff\ufefftwo", "\ufefftwo"),  # the second is a character of the text
        ("inside \ufeff it", "inside \ufeff it"),
        ("DOS\r\n\r\nend\r\n", "DOS\n\nend\n"),
        ("old Mac\rend\r", "old Mac\nend\n"),
        ("all\r\r\n\nthree", "all\n\n\nthree"),
        ("no line \x0b\x0c\x85\u2028 ends", "no line \x0b\x0c\x85\u2028 ends"),
        ("", ""),
    ],
)
def test_read_text_is_the_same_from_every_system(tmp_path, content, text):
    file = tmp_path / "a.txt"
    file.write_bytes(content.encode())
    assert read_text(file) == text
    # Python's own text files, with their universal newlines, as the oracle.
    assert file.read_text(encoding="utf-8-sig") == text


@pytest.mark.parametrize(
    ("content", "place"), [(b"ab\xffcd", 2), (b"\xef\xbb\xbfab\xc3", 5), (b"\xff\xfea\x00", 0)]
)
def test_read_text_names_the_byte_that_is_not_utf8(tmp_path, content, place):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt: was not UTF-8 at byte {place}, must be text"):
        read_text(file)


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


@pytest.mark.parametrize(
    ("dim", "layers", "changes", "factor"),
    [
        (2048, 16, {}, 32.0),  # Llama 3.2 1B, whose published config.json says 32
        (3072, 28, {}, 32.0),  # Llama 3.2 3B
        (4096, 32, {}, 8.0),  # Llama 3.1 8B
        (2048, 28, {}, 8.0),
        (2048, 16, {"rope_scaling_factor": 16}, 16.0),
    ],
)
def test_params_do_not_say_the_factor_of_llama_3_2(tmp_path, dim, layers, changes, factor):
    write_release(tmp_path, dim, layers, use_scaled_rope=True, **changes)
    config = load_model(tmp_path).config
    assert config.rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    assert config.rope_theta == 500000.0  # which Meta's code has where params.json has none


@pytest.mark.parametrize(
    ("changes", "theta", "positions"),
    [
        ({}, 10000.0, 4096),  # Llama 2
        ({"rope_theta": 500000.0, "use_scaled_rope": False}, 500000.0, 8192),  # Llama 3
        ({"rope_theta": 1000000}, 1000000.0, 16384),  # Code Llama
        ({"rope_theta": 1234.0, "max_seq_len": 99, "vision_chunk_size": -1}, 1234.0, 99),
        ({"quantization_args": None, "moe": None}, 10000.0, 4096),
    ],
)
def test_params_without_scaling(tmp_path, changes, theta, positions):
    write_release(tmp_path, 8, 1, **changes)
    config = load_model(tmp_path).config
    assert (config.rope_theta, config.max_position_embeddings) == (theta, positions)
    assert config.rope_scaling is None


def write_release(folder, dim, layers, **params):
    """A release of Meta's layout with one head of 2 channels, as small as its shape may be."""
    shapes = {"tok_embeddings": (3, dim), "norm": (dim,), "output": (3, dim)}
    for layer in range(layers):
        for name in ("wq", "wk", "wv"):
            shapes[f"layers.{layer}.attention.{name}"] = (2, dim)
        shapes[f"layers.{layer}.attention.wo"] = (dim, 2)
        shapes[f"layers.{layer}.feed_forward.w1"] = (1, dim)
        shapes[f"layers.{layer}.feed_forward.w2"] = (dim, 1)
        shapes[f"layers.{layer}.feed_forward.w3"] = (1, dim)
        for name in ("attention_norm", "ffn_norm"):
            shapes[f"layers.{layer}.{name}"] = (dim,)
    state = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    torch.save(state, folder / "consolidated.00.pth")
    params = {"dim": dim, "n_layers": layers, "n_heads": 1, "head_dim": 2} | params
    (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantization_args": {"group_size": 256}}, "quantization_args: was"),
        ({"lora_args": {"rank": 16, "scale": 2.0}}, "lora_args: was"),
        ({"vision_chunk_size": 448}, "vision_chunk_size: was 448"),
        ({"moe": {"num_experts": 8}}, "moe: was"),
        ({"sliding_window": 4096}, "sliding_window: was 4096"),
        ({"hidden_dim": 5}, "hidden_dim: was 5, must be 1"),
        ({"vocab_size": 4}, "vocab_size: was 4, must be 3"),
        ({"n_kv_heads": 0}, "n_kv_heads: was 0"),
        ({"n_heads": 2.0}, r"n_heads: was 2\.0"),
        ({"rope_theta": "x"}, "rope_theta: was 'x'"),
        ({"rope_theta": None}, "rope_theta: was None"),
        ({"rope_scaling_factor": 0, "use_scaled_rope": True}, "rope_scaling_factor: was 0"),
        ({"use_scaled_rope": "false"}, "use_scaled_rope: was 'false'"),
        ({"norm_eps": True}, "norm_eps: was True"),
    ],
)
def test_params_that_ask_for_something_else_are_refused_by_name(tmp_path, changes, says):
    write_release(tmp_path, 8, 1, **changes)
    with pytest.raises(ValueError, match=rf"params\.json: .*{says}"):
        load_model(tmp_path)


@pytest.fixture
def meta_model(tmp_path):
    """Makes a model of Meta's own code, on one process, and writes it as Meta publishes it."""
    distributed = pytest.importorskip("torch.distributed")
    parallel = pytest.importorskip("fairscale.nn.model_parallel.initialize")
    theirs = pytest.importorskip("llama_models.llama3.model")
    arguments = pytest.importorskip("llama_models.llama3.args")
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    parallel.initialize_model_parallel(1)

    def make(folder, **params):
        params = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 100} | params
        sizes = {"max_batch_size": 2, "max_seq_len": 512}
        model = theirs.Transformer(arguments.ModelArgs(**sizes, **params))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
        folder.mkdir()
        (folder / "params.json").write_text(json.dumps(params))
        torch.save(model.state_dict(), folder / "consolidated.00.pth")
        return model

    yield make
    parallel.destroy_model_parallel()
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    "params",
    [
        {"rope_theta": 500000.0, "n_kv_heads": 2, "multiple_of": 16},  # as Llama 3
        {"rope_theta": 500000.0, "n_kv_heads": 2, "use_scaled_rope": True},  # as Llama 3.1
        {"use_scaled_rope": True, "ffn_dim_multiplier": 1.3, "multiple_of": 8, "norm_eps": 0.1},
        {"rope_theta": 10000.0, "n_kv_heads": 1},
    ],
)
def test_releases_equal_meta_s_own_code(tmp_path, meta_model, params):
    """Random weights in Meta's layout, 400 tokens, through the package llama-models."""
    theirs = meta_model(tmp_path / "release", **params)
    ours = load_model(tmp_path / "release")
    tokens = random_tokens(2, 400, vocab_size=100)
    assert_close(logits(ours, tokens), theirs(tokens, 0).clone(), atol=1e-4, rtol=1e-4)
    save_model(ours, tmp_path / "saved")
    assert_close(logits(load_model(tmp_path / "saved"), tokens), logits(ours, tokens))


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


def test_a_tensor_under_two_names_is_refused(tmp_path):
    release = split_ranks(META / "mp1", tmp_path / "release", 1, 1)
    content = torch.load(release / "consolidated.00.pth", weights_only=True)
    torch.save(content | {"norm": torch.ones(64)}, release / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"tensor norm\.weight was there twice"):
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


def split_shards(folder):
    """Put the tensors of model.safetensors into two files and an index."""
    whole = load_file(folder / "model.safetensors")
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    weight_map = {}
    for number, name in enumerate(sorted(whole)):
        file = sorted(shards)[number % 2]
        shards[file][name] = whole[name]
        weight_map[name] = file
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_shards(folder):
    split_shards(folder)
    tokens = random_tokens(1, 20)
    assert_close(logits(load_model(folder), tokens), logits(tiny_model(), tokens), atol=0, rtol=0)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors: was not there"):
        load_model(folder)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(ValueError, match="was there twice"):
        load_model(folder)


def test_tables_that_old_checkpoints_store_are_passed_over(folder):
    """transformers wrote RoPE's frequencies beside the weights until 2023."""
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_tensors(folder / "model.safetensors", lambda c: c.update(table))
    tokens = random_tokens(1, 20)
    assert_close(logits(load_model(folder), tokens), logits(tiny_model(), tokens), atol=0, rtol=0)


def edit_tensors(path, change):
    """Save a safetensors file again, its tensors by name changed."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def move_head(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def copy_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def other_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def wider_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].double()


def wider_other_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].double() + 1e-3


@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (move_head, True),
        (copy_head, True),
        (wider_head, True),
        (other_head, False),
        (wider_other_head, False),
    ],
)
@pytest.mark.parametrize("shards", [False, True])
def test_the_tensors_say_whether_a_tied_checkpoint_is_tied(tmp_path, change, tied, shards):
    """As transformers reads it: the one matrix under either name, and two that differ apart."""
    transformers = pytest.importorskip("transformers")
    save_model(tiny_model(VARIANTS["tied"]), tmp_path)
    edit_tensors(tmp_path / "model.safetensors", change)
    if shards:
        split_shards(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_model(tmp_path, dtype=torch.float32)
    assert (ours.lm_head is None) == tied
    tokens = random_tokens(1, 9)
    assert_close(logits(ours, tokens), theirs(tokens).logits.detach(), atol=1e-5, rtol=1e-5)
    save_model(ours, tmp_path / "again")
    assert_close(
        logits(load_model(tmp_path / "again"), tokens), logits(ours, tokens), atol=0, rtol=0
    )


def test_a_tied_checkpoint_as_safetensors_itself_saves_it(tmp_path):
    """safetensors' save_model keeps one of two names for a tensor: the first, that is lm_head."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_model as save_without_copies

    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    config.save_pretrained(tmp_path)
    save_without_copies(theirs, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    tokens = random_tokens(1, 9)
    ours = logits(load_model(tmp_path), tokens)
    assert_close(ours, theirs(tokens).logits.detach(), atol=1e-5, rtol=1e-5)


def spoil_safetensors(change):
    return lambda folder: edit_tensors(folder / "model.safetensors", change)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def make_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (truncate, "model.safetensors: was not whole"),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk"), "model.safetensors: was not"),
        (lambda f: (f / "model.safetensors").unlink(), "was without weights"),
        (make_folder, "model.safetensors: was not whole"),
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


# config.json: what transformers would act on is read as it reads it, or refused by name

STRETCH = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD_LENGTH = {"original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": ...},
        {"rope_theta": 500},
        {"rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        {"rope_scaling": {"rope_theta": 500.0}, "rope_theta": 20000.0},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": ..., "rope_parameters": {"rope_theta": 500.0}},
        {"rope_scaling": ..., "rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        },
        {
            "rope_scaling": ...,
            "rope_theta": 500.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 70.0},
        },
        {"rope_scaling": STRETCH | OLD_LENGTH},
        {"rope_scaling": STRETCH},  # the original length is then max_position_embeddings
        {"rope_scaling": STRETCH | OLD_LENGTH, "original_max_position_embeddings": 32},
        {"rope_parameters": STRETCH | OLD_LENGTH | {"rope_theta": 500.0}},
        {"partial_rotary_factor": 1.0},
        {"num_key_value_heads": None},
        {"head_dim": None},
        {"rms_norm_eps": ...},
        {"rms_norm_eps": 0.1},
        {"hidden_act": "swish"},
        {"pretraining_tp": 2},
        {"layer_types": ["full_attention"] * 2},
        {"sliding_window": None, "quantization_config": None, "tie_word_embeddings": ...},
        {"initializer_range": 1.0, "use_cache": False, "attention_dropout": 0.5},
    ],
)
def test_config_is_read_as_transformers_reads_it(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    variant = "mha" if "num_key_value_heads" in changes else "gqa"
    save_model(tiny_model(VARIANTS[variant]), tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    ours = load_model(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens(2, 60)
    assert_close(logits(ours, tokens), theirs(tokens).logits.detach(), atol=1e-4, rtol=1e-4)
    assert ours.rope.inv_freq.dtype == torch.float64
    assert_close(ours.rope.inv_freq.float(), theirs.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mistral"}, "model_type: was 'mistral', must be 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act: was 'gelu', must be 'silu'"),
        ({"attention_bias": True}, "attention_bias: was True"),
        ({"mlp_bias": True}, "mlp_bias: was True"),
        ({"is_causal": False}, "is_causal: was False"),
        ({"sliding_window": 16}, "sliding_window: was 16, must be None"),
        ({"attention_chunk_size": 16}, "attention_chunk_size: was 16"),
        ({"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config: was"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types: was 'sliding_attention'"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config: was 'g",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: was 0\.5"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor: was 0\.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type: was 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: was 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 1.0}},
            "rope_type: was 'longrope'",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: rope_type was missing"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters: was"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' was missing"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor' was missing"),
        ({"layer_types": "full_attention"}, "layer_types: was 'full_attention', must be a list"),
        ({"rope_scaling": STRETCH | {"low_freq_factor": "1"}}, "low_freq_factor: was '1'"),
        ({"original_max_position_embeddings": None, "rope_scaling": STRETCH}, "'original_max_p"),
        ({"rope_theta": 10**30}, r"rope_theta: was 1e\+30"),
        ({"original_max_position_embeddings": 1 << 31, "rope_scaling": STRETCH}, "was 2147483648"),
        ({"rope_theta": None}, "rope_theta: was None"),
        ({"rope_theta": "10000"}, "rope_theta: was '10000'"),
        ({"head_dim": 0}, "head_dim: was 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: was 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: was 3"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers: was 2\.0"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' was missing"),
        ({"num_hidden_layers": 1 << 30}, "num_hidden_layers: was 1073741824, must be at most 1024"),
        ({"num_hidden_layers": 1}, r"layers\.1\.\S+ was unexpected"),
        ({"rms_norm_eps": None}, "rms_norm_eps: was None"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings: was None"),
    ],
)
def test_config_that_asks_for_something_else_is_refused_by_name(folder, changes, says):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=says) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_config_may_begin_with_a_bom(folder):
    path = folder / "config.json"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert load_model(folder).config == tiny_config()


# Which checkpoint of a folder


def test_safetensors_go_before_params_json(folder):
    """After a conversion in place, and in Mistral's layout, a folder holds both."""
    (folder / "params.json").write_text('{"dim": 32, "n_layers": 2, "n_heads": 4}')
    tokens = random_tokens(1, 20)
    expected = logits(tiny_model(), tokens)
    assert_close(logits(load_model(folder), tokens), expected, atol=0, rtol=0)
    shutil.copy(META / "mp1/consolidated.00.pth", folder)
    assert_close(logits(load_model(folder), tokens), expected, atol=0, rtol=0)
    assert load_model(folder).config.max_position_embeddings == 64
    split_shards(folder)
    assert_close(logits(load_model(folder), tokens), expected, atol=0, rtol=0)


def test_config_json_without_weights_does_not_hide_others(tmp_path):
    """Repositories of GGUF files, and Meta's own, have a config.json beside them."""
    release = split_ranks(META / "mp1", tmp_path / "release", 1, 0)
    (release / "config.json").write_text('{"model_type": "llama"}')
    assert load_model(release).config.vocab_size == 128
    write_gguf(release / "m.gguf", tiny_model())
    assert load_model(release).config.vocab_size == 128
    model = tiny_model()
    path = write_gguf(tmp_path / "gguf/m.gguf", model)
    (path.parent / "config.json").write_text('{"model_type": "llama"}')
    tokens = random_tokens(1, 20)
    assert_close(logits(load_model(path.parent), tokens), logits(model, tokens))
    shutil.copy(path, path.with_name("n.gguf"))
    (path.parent / "config.json").unlink()
    with pytest.raises(ValueError, match="held 2 GGUF models, must be one"):
        load_model(path.parent)


@pytest.mark.parametrize("path", ["nowhere", "no/such/model.gguf", __file__])
def test_no_such_model(path):
    with pytest.raises((ValueError, OSError), match="must be"):
        load_model(path)


def test_dtype(folder):
    assert load_model(folder).norm.weight.dtype == torch.float32
    half = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("embedding", "norms", "others", "widest"),
    [
        ("float16", "float32", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16", "float32"),
        ("bfloat16", "float32", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("float16", "bfloat16", "float16", "float32"),  # neither holds the other
        ("float16", "float64", "float32", "float64"),
    ],
)
def test_mixed_dtypes_are_all_the_widest(folder, embedding, norms, others, widest):
    """So that no value is rounded or becomes infinite, whatever config.json says."""

    def cast(tensors):
        for name, tensor in tensors.items():
            dtype = norms if "norm" in name else others
            if "embed" in name:
                dtype = embedding
            tensors[name] = tensor.to(getattr(torch, dtype))

    edit_tensors(folder / "model.safetensors", lambda c: c["model.norm.weight"].mul_(1e4))
    edit_tensors(folder / "model.safetensors", cast)
    edit_json(folder / "config.json", torch_dtype="float16")
    model = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, widest)}
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        published = name if name == "lm_head.weight" else f"model.{name}"
        assert parameter.double().equal(stored[published].double())
    half = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


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


def test_save_replaces_links_and_leaves_what_they_name(folder, tmp_path):
    """A snapshot in a cache of downloads is a folder of links to the only good copies."""
    blobs = tmp_path / "blobs"
    snapshot = tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    before = {}
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = blobs / f"blob{number}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / blob.name)
        before[blob] = blob.read_bytes()
    assert len(before) == 2
    model = load_model(snapshot)
    model.norm.weight.data = torch.full((32,), 7.0)
    save_model(model, snapshot, Ids(1, (2, 3)))
    assert {blob: blob.read_bytes() for blob in blobs.iterdir()} == before
    assert not any(file.is_symlink() for file in snapshot.iterdir())
    assert load_model(snapshot).norm.weight.data.eq(7).all()


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        for call in (lambda path: write_beside(path, Path.touch), check_writable):
            with pytest.raises(IsADirectoryError, match="was a folder, must be a file"):
                call(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]


@dataclass
class Ids:
    """What `save_model` asks of a tokenizer."""

    bos_id: int | None
    eos_ids: tuple[int, ...]

    def save(self, folder):
        (folder / "tokenizer.saved").touch()


@pytest.mark.parametrize(
    ("bos", "ends", "eos"), [(1, (2,), 2), (9, (4, 2, 3), [4, 2, 3]), (None, (), None)]
)
def test_what_is_saved_names_the_tokenizer_s_ids(tmp_path, bos, ends, eos):
    transformers = pytest.importorskip("transformers")
    save_model(tiny_model(), tmp_path, Ids(bos, ends))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for config in (theirs.config, theirs.generation_config):
        assert config.bos_token_id == bos
        assert config.eos_token_id == eos
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": bos, "eos_token_id": eos}
    assert (tmp_path / "tokenizer.saved").exists()


def test_without_a_tokenizer_no_ids_are_made_up(tmp_path):
    """transformers takes Llama 2's, 1 and 2, where config.json has no such keys."""
    transformers = pytest.importorskip("transformers")
    save_model(tiny_model(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (None, None)


def test_only_keys_that_the_scaling_has_are_saved():
    """transformers warns of others."""
    linear = config_json(VARIANTS["linear"], torch.float32)
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    llama3 = config_json(VARIANTS["llama3"], torch.float32)
    assert llama3["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0} | {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert config_json(VARIANTS["gqa"], torch.float32)["rope_scaling"] is None


def write_mixed(folder):
    def halve(tensors):
        for name, tensor in tensors.items():
            if "mlp" in name:
                tensors[name] = tensor.half()

    save_model(tiny_model(), folder)
    edit_tensors(folder / "model.safetensors", halve)


def write_other_head(folder):
    save_model(tiny_model(VARIANTS["tied"]), folder)
    edit_tensors(folder / "model.safetensors", other_head)


LOADABLE = {
    "mixed dtypes": write_mixed,
    "tied, with another head": write_other_head,
    "GGUF": lambda folder: write_gguf(folder / "m.gguf", tiny_model()),
    "GGUF in parts, tied": lambda folder: write_gguf(
        folder / "m.gguf", tiny_model(VARIANTS["tied"]), "F16", split=4
    ),
    "GGUF, linear": lambda folder: write_gguf(
        folder / "m.gguf", tiny_model(), "BF16", **{"llama.rope.scale_linear": 4.0}
    ),
    "Q8_0": lambda folder: write_gguf(
        folder / "m.gguf", tiny_model(VARIANTS["blocks of 32"]), "Q8_0"
    ),
    "Llama 3.2 1B": lambda folder: write_release(folder, 2048, 16, use_scaled_rope=True),
    "Meta": lambda folder: shutil.copytree(META / "mp1", folder, dirs_exist_ok=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", LOADABLE)
def test_what_is_saved_is_what_was_loaded(tmp_path, form, dtype):
    """For this code, and for transformers, in the dtype that it was saved in."""
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "source"
    source.mkdir()
    LOADABLE[form](source)
    model = load_model(source, dtype=dtype)
    save_model(model, tmp_path / "saved")
    tokens = random_tokens(1, 60, vocab_size=3)
    again = load_model(tmp_path / "saved")
    assert again.config == model.config
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert_close(logits(again, tokens), logits(model, tokens), atol=0, rtol=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert theirs.dtype == dtype
    expected = logits(model.float(), tokens)
    assert_close(theirs.float()(tokens).logits.detach(), expected, atol=1e-4, rtol=1e-4)


def test_only_a_plain_model_is_saved(tmp_path):
    model = tiny_model()
    model.norm.extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="extra was missing or added"):
        save_model(model, tmp_path)


# GGUF


def interleave(weight, heads):
    """The order of rows in GGUF, from ours: the inverse of `half_split`, written otherwise."""
    half = len(weight) // heads // 2
    order = []
    for head in range(heads):
        for pair in range(half):
            order.append(2 * head * half + pair)
            order.append(2 * head * half + half + pair)
    return weight[order]


def write_gguf(path, model, kind="F32", embedding_kind=None, split=0, order=None, **fields):
    """A GGUF file as llama.cpp's converter writes one; matrices of the type `kind`, norms F32.

    fields: further keys, None for a key to leave out, or rope_freqs. split: tensors a part.
    """
    gguf = pytest.importorskip("gguf")
    from weights.gguf_file import NAMES

    c = model.config
    theirs = {ours: name for name, ours in NAMES.items()}
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(
        path,
        fields.pop("architecture", "llama"),
        split_max_tensors=split,
        endianess=order or gguf.GGUFEndian.LITTLE,
    )
    rope_freqs = fields.pop("rope_freqs", None)
    keys = {
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.key_length": c.head_dim,
        "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "llama.rope.freq_base": c.rope_theta,
    }
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in (keys | fields).items():
        if value is not None:
            adders[type(value)](name, value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        layer = ""
        short = name.removesuffix(".weight")
        if short.startswith("layers."):
            _, number, short = short.split(".", 2)
            layer = f"blk.{number}."
        name = theirs[short]
        if name in heads:
            tensor = interleave(tensor, heads[name])
        number = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        if name == "token_embd" and embedding_kind is not None:
            number = gguf.GGMLQuantizationType[embedding_kind]
        packed = gguf.quantize(tensor.float().numpy(), number)
        writer.add_tensor(f"{layer}{name}.weight", packed, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        ("gqa", "F32"),
        ("tied", "F32"),
        ("mha", "F32"),
        ("gqa", "F16"),
        ("gqa", "BF16"),
        ("blocks of 32", "Q8_0"),
        ("blocks of 32", "Q4_0"),
        ("blocks of 32", "Q4_1"),
        ("blocks of 32", "Q5_0"),
        ("blocks of 32", "Q5_1"),
    ],
)
def test_gguf(tmp_path, variant, kind):
    gguf = pytest.importorskip("gguf")
    model = tiny_model(VARIANTS[variant])
    read = load_model(write_gguf(tmp_path / "m.gguf", model, kind))
    # The file holds epsilon in float32.
    assert read.config == replace(model.config, rms_norm_eps=read.config.rms_norm_eps)
    assert {p.dtype for p in read.parameters()} == {torch.float32}  # the norms are
    number = gguf.GGMLQuantizationType[kind]
    for weight in model.parameters():  # rounded as the file rounds it
        if weight.ndim == 2:
            packed = gguf.quantize(weight.detach().numpy(), number)
            weight.data = torch.from_numpy(gguf.dequantize(packed, number))
    tokens = random_tokens(2, 40)
    assert_close(logits(read, tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_0", "Q5_0", "Q5_1"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 96), (64, 256), (48, 576), (33, 8192)])
def test_dequantising_in_long_rows_changes_nothing(tmp_path, kind, rows, columns):
    gguf = pytest.importorskip("gguf")
    from weights.gguf_file import _compute_values, open_gguf

    number = gguf.GGMLQuantizationType[kind]
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).numpy()
    packed = gguf.quantize(values, number)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("a", packed, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = open_gguf(tmp_path / "m.gguf").tensors
    expected = torch.from_numpy(gguf.dequantize(packed, number))
    assert_close(_compute_values(tensor), expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_a_quantised_file_is_float32_whatever_its_embedding(tmp_path, kind):
    """llama-quantize has the options --token-embedding-type and --output-tensor-type."""
    model = tiny_model(VARIANTS["blocks of 32"])
    read = load_model(write_gguf(tmp_path / "m.gguf", model, "Q8_0", embedding_kind=kind))
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    assert_close(read.embed_tokens.weight, model.embed_tokens.weight, atol=1e-2, rtol=1e-2)


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
    linear = {"llama.rope.scaling.factor": 2.0}
    path = write_gguf(tmp_path / "o.gguf", model, rope_freqs=factors, **linear)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight: was beside a linear scaling"):
        load_model(path)


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),  # llama.cpp takes it for linear
        ({"llama.rope.scale_linear": 4.0}, 4.0),  # the key of before 2024
        ({"llama.rope.scale_linear": 4.0, "llama.rope.scaling.type": "linear"}, 4.0),
        ({"llama.rope.scale_linear": 4.0, "llama.rope.scaling.factor": 2.0}, 2.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.type": "linear"}, None),
        ({"llama.rope.scaling.factor": 1.0}, None),
        ({"llama.rope.scaling.factor": 0.0}, None),
        ({}, None),
    ],
)
def test_gguf_linear_scaling(tmp_path, fields, factor):
    """As llama.cpp reads the keys; the values as transformers computes them."""
    transformers = pytest.importorskip("transformers")
    scaling = None if factor is None else {"rope_type": "linear", "factor": factor}
    save_model(tiny_model(), tmp_path / "theirs")
    edit_json(tmp_path / "theirs/config.json", rope_scaling=scaling)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    ours = load_model(write_gguf(tmp_path / "m.gguf", tiny_model(), **fields))
    tokens = random_tokens(2, 60)
    assert_close(logits(ours, tokens), theirs(tokens).logits.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"general.type": "model", "general.quantization_version": 2, "general.name": "any"},
        {
            "llama.vocab_size": 50,
            "llama.attention.value_length": 8,
            "llama.rope.dimension_count": 8,
        },
        {"llama.expert_count": 0, "llama.attention.causal": True, "llama.attention.clamp_kqv": 0.0},
        {"llama.tensor_data_layout": "Meta AI original pth"},
        {"llama.attention.scale": 8**-0.5, "llama.rope.scaling.finetuned": True},
        {"llama.rope.freq_base": None, "llama.attention.key_length": None},
    ],
)
def test_gguf_keys_that_say_what_a_llama_is_anyway(tmp_path, fields):
    model = tiny_model()
    tokens = random_tokens(2, 40)
    read = load_model(write_gguf(tmp_path / "m.gguf", model, **fields))
    assert_close(logits(read, tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"architecture": "bloom"}, r"general\.architecture: was 'bloom'"),
        ({"general.type": "adapter"}, r"general\.type: was 'adapter', must be 'model'"),
        ({"general.quantization_version": 1}, r"quantization_version: was 1, must be 2"),
        ({"llama.expert_count": 8}, r"llama\.expert_count: was 8, must be 0"),
        ({"llama.attention.sliding_window": 16}, r"sliding_window: was 16"),
        ({"llama.attention.causal": False}, r"causal: was False, must be True"),
        ({"llama.attention.scale": 0.5}, r"llama\.attention\.scale: was 0\.5"),
        ({"llama.attention.value_length": 4}, r"value_length: was 4, must be 8"),
        ({"llama.attention.head_count": [4, 4]}, r"llama\.attention\.head_count: was \[4, 4\]"),
        ({"llama.attention.head_count": 0}, r"llama\.attention\.head_count: was 0"),
        ({"llama.feed_forward_length": [48, 48]}, r"feed_forward_length: was \[48, 48\]"),
        ({"llama.block_count": None}, r"'llama\.block_count' was missing"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, r"rms_epsilon' was missing"),
        ({"llama.block_count": 1}, r"layers\.1\.\S+ was unexpected"),
        ({"llama.rope.dimension_count": 4}, r"rope\.dimension_count: was 4, must be 8"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type: was 'yarn'"),
        ({"llama.rope.scaling.attn_factor": 2.0}, r"attn_factor: was 2\.0, must be 1\.0"),
        ({"llama.rope.scaling.factor": -2.0}, r"factor: was -2\.0"),
        ({"llama.final_logit_softcapping": 30.0}, r"final_logit_softcapping: was 30\.0, must be 0"),
        ({"llama.tensor_data_layout": "other"}, r"tensor_data_layout: was 'other'"),
        ({"llama.a_later_key": "x"}, r"llama\.a_later_key: was 'x', must be 0"),
    ],
)
def test_gguf_that_asks_for_something_else_is_refused_by_name(tmp_path, fields, says):
    path = write_gguf(tmp_path / "m.gguf", tiny_model(), **fields)
    with pytest.raises(ValueError, match=says) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_broken_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    words = {"tokenizer.ggml.tokens": ["word"] * 50, "tokenizer.ggml.scores": [0.5] * 50}
    whole = write_gguf(path, tiny_model(), **words).read_bytes()
    in_words = whole[: whole.index(b"ggml.tokens") + 60]
    in_scores = whole[: whole.index(b"scores") + 40]
    for content in (b"junk", whole[:100], whole[:-500], in_words, in_scores, b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.gguf: was not whole"):
            load_model(path)
    write_gguf(path, tiny_model(), order=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="byte order is that of another machine"):
        load_model(path)


@pytest.mark.parametrize("part", [1, 2, 5])
def test_a_split_gguf_is_read_from_any_part(tmp_path, part):
    model = tiny_model()
    write_gguf(tmp_path / "m.gguf", model, split=5)
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths][-1] == "m-00005-of-00005.gguf"
    tokens = random_tokens(2, 40)
    for place in (paths[part - 1], tmp_path):
        assert_close(logits(load_model(place), tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)
    assert gguf_fields(paths[part - 1])["llama.block_count"] == 2
    assert find(paths[part - 1]) == find(tmp_path) == paths[0]


def test_a_broken_split_gguf_names_its_parts(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny_model(), split=15)
    first, second = sorted(tmp_path.iterdir())
    first_bytes = first.read_bytes()
    lone = tmp_path / "m.gguf"
    shutil.copy(second, lone)
    with pytest.raises(ValueError, match=r"m\.gguf: was part 2 of 2 .*NAME-00002-of-00002\.gguf"):
        load_model(lone)
    lone.unlink()
    shutil.copy(second, first)
    with pytest.raises(ValueError, match=r"was part 2 of 2 .*must be part 1 of 2"):
        load_model(tmp_path)
    first.write_bytes(first_bytes)
    shutil.copy(first, tmp_path / "n-00003-of-00000.gguf")  # no part's name
    with pytest.raises(ValueError, match=r"was part 1 of 2 .*NAME-00001-of-00002\.gguf"):
        load_model(tmp_path / "n-00003-of-00000.gguf")
    (tmp_path / "n-00003-of-00000.gguf").unlink()
    second.unlink()
    for place in (first, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"m-00002-of-00002\.gguf: was not there"):
            load_model(place)


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    for number in (0, 1):
        path = tmp_path / f"m-{number + 1:05d}-of-00002.gguf"
        write_gguf(path, tiny_model(), **{"split.no": number, "split.count": 2})
    with pytest.raises(ValueError, match=r"00002-of-00002\.gguf: tensor \S+ was there twice"):
        load_model(tmp_path)


def test_gguf_fields_are_what_the_package_reads(tmp_path):
    gguf = pytest.importorskip("gguf")
    fields = {
        "tokenizer.ggml.tokens": ["", "a", "\u2581caf\u00e9", "\u5317"],
        "tokenizer.ggml.token_type": [1, 2, 3, 4],
        "tokenizer.ggml.scores": [0.5, -1.0],
        "test.flags": [True, False],
        "test.flag": True,
        "test.text": "text",
        "test.number": 0.25,
    }
    path = write_gguf(tmp_path / "m.gguf", tiny_model(), **fields)
    read = gguf_fields(path)
    expected = gguf.GGUFReader(path).fields
    assert read == {name: field.contents() for name, field in expected.items()}
    assert fields.items() <= read.items()
    assert type(read["llama.block_count"]) is int
    assert type(read["tokenizer.ggml.scores"][0]) is float


@pytest.mark.slow
def test_gguf_fields_of_a_real_model():
    gguf = pytest.importorskip("gguf")
    path = smollm2_path()
    expected = gguf.GGUFReader(path).fields
    assert gguf_fields(path) == {name: field.contents() for name, field in expected.items()}


def test_changing_a_model_does_not_change_its_gguf(tmp_path):
    """Its tensors are mapped from the file."""
    path = write_gguf(tmp_path / "m.gguf", tiny_model())
    before = path.read_bytes()
    load_model(path).norm.weight.data.fill_(7)
    assert path.read_bytes() == before
    model = tiny_model()
    model.norm.weight.data.fill_(7)
    write_gguf(tmp_path / "new.gguf", model).replace(path)
    assert load_model(path).norm.weight[0] == 7


USE = """
import sys
from weights import load_model, save_model
from lora import add_lora, save_adapter
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
        theirs = {"embed_tokens": "tok_embeddings"}
        for name, (ours, _) in NAMES.items():
            theirs[ours] = name
        params = {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "vocab_size": -1}
        (folder / "params.json").write_text(json.dumps(params))
        state = {}
        for name, tensor in big.items():
            layer = ""
            short = name.removesuffix(".weight")
            if short.startswith("layers."):
                _, number, short = short.split(".", 2)
                layer = f"layers.{number}."
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
