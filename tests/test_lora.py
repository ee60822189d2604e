"""lora.py: updates, merging, and adapters, against themselves and against PEFT.

Run: pytest tests/test_lora.py
"""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import cli
import lora
from freqkv import FreqKVConfig
from lora import (
    BUILT_IN,
    LoraLinear,
    add_lora,
    find_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
)
from tests.helpers import ROOT, random_tokens, smollm2_path, tiny_config, tiny_model
from weights import load_model, load_tokenizer, save_model
from weights.files import make_json_writer

PARTS = [(), ("embed",), ("norm",), ("embed", "norm")]


def adapted(tied=False, whole=("embed", "norm"), rank=4, alpha=8):
    """A tiny model with LoRA, everything that it trains moved away from the base."""
    model = tiny_model(tiny_config(tie_word_embeddings=tied))
    add_lora(model, rank, alpha, whole=whole)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def base(tied=False):
    return tiny_model(tiny_config(tie_word_embeddings=tied))


def edit(folder, change):
    """Rewrite an adapter: change(config, tensors) alters both in place."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


# The module


@pytest.mark.parametrize(
    "code", ["import lora, weights", "import sys, weights; assert 'lora' not in sys.modules"]
)
def test_the_module_and_the_package_import_alone(code):
    """lora.py imports from the package weights, which imports lora.py only for an adapter."""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


# The update


def test_a_new_update_changes_nothing():
    model, tokens = base(), random_tokens(2, 9)
    before = model(tokens)
    add_lora(model, rank=3)
    assert_close(model(tokens), before, rtol=0, atol=0)


def test_the_update_is_what_the_paper_says():
    layer = torch.nn.Linear(12, 20, bias=False)
    lora = LoraLinear(layer, rank=3, scale=16 / 3)
    lora.lora_B.data.normal_()
    x = torch.randn(5, 12)
    expected = x @ (layer.weight + 16 / 3 * lora.lora_B @ lora.lora_A).T
    assert_close(lora(x), expected)
    assert lora.lora_A.abs().max() <= 1 / math.sqrt(12)
    assert lora.lora_A.std().item() == pytest.approx(1 / math.sqrt(36), rel=0.3)  # uniform


@pytest.mark.parametrize("whole", PARTS)
def test_only_what_was_asked_for_is_trained(whole):
    model = base()
    add_lora(model, whole=whole)
    model(random_tokens(1, 5)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    updates = {name for name in trained if ".lora_" in name}
    assert len(updates) == 2 * 4 * 2  # A and B of q, k, v, o, of two layers
    embeddings = {name for name in trained - updates if "embed" in name}
    norms = {name for name in trained - updates if "norm" in name}
    assert len(embeddings) == ("embed" in whole)
    assert len(norms) == (5 if "norm" in whole else 0)
    assert trained == updates | embeddings | norms


@pytest.mark.parametrize(
    "wrong",
    [{"targets": ("q_proj", "x_proj")}, {"whole": ("norms",)}, {"rank": 0}, {"alpha": 0}],
    ids=str,
)
def test_impossible_updates_are_refused(wrong):
    with pytest.raises(ValueError, match=r"was|were"):
        add_lora(base(), **wrong)


def test_an_update_on_an_update_is_refused(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="merge_lora first"):
        add_lora(model)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="merge_lora first"):
        load_adapter(model, tmp_path)


# Merging


@pytest.mark.parametrize("tied", [False, True])
def test_merged_equals_unmerged(tied):
    model, tokens = adapted(tied), random_tokens(2, 12)
    expected = model(tokens)
    merge_lora(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert_close(model(tokens), expected, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == base(tied).state_dict().keys()


def test_merging_rounds_once():
    model = adapted(whole=())
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, LoraLinear))
    layer.weight.data = layer.weight.data.bfloat16()
    update = layer.scale * layer.lora_B @ layer.lora_A
    expected = (layer.weight.float() + update).bfloat16()
    merge_lora(model)
    merged = model.get_submodule(name).weight
    assert merged.dtype == torch.bfloat16
    assert_close(merged, expected, rtol=0, atol=0)


def test_a_model_with_updates_is_not_saved_as_a_model(tmp_path):
    with pytest.raises(ValueError, match="plain Llama"):
        save_model(adapted(), tmp_path / "model")
    with pytest.raises(ValueError, match="had 0 LoRA layers"):
        save_adapter(base(), tmp_path / "adapter")


# Adapters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole", PARTS)
def test_round_trip(tmp_path, tied, whole):
    model, tokens = adapted(tied, whole), random_tokens(2, 12)
    save_adapter(model, tmp_path, base="tiny", freqkv={"window": 16})
    again = base(tied)
    load_adapter(again, tmp_path)
    assert_close(again(tokens), model(tokens), rtol=0, atol=0)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert trained[0] == trained[1]
    assert json.loads((tmp_path / "freqkv.json").read_text()) == {"window": 16}
    save_adapter(again, tmp_path / "again", base="tiny")
    files = [tmp_path / x / "adapter_model.safetensors" for x in ("", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapter_takes_the_dtype_of_the_model(tmp_path):
    save_adapter(adapted(), tmp_path)
    for dtype in (None, torch.float32, torch.float64):
        model = base().bfloat16()
        load_adapter(model, tmp_path, dtype)
        expected = dtype or torch.bfloat16
        assert model.norm.weight.dtype == model.embed_tokens.weight.dtype == expected
        assert model.layers[0].self_attn.q_proj.lora_A.dtype == torch.float32  # never rounded
        assert model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    model = base().bfloat16()
    load_adapter(model, tmp_path)
    assert model(random_tokens(1, 5)).dtype == torch.bfloat16  # as generate.py runs it


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"
WRONG = {
    "another width": (lambda c, t: t.update({A: torch.zeros(4, 31)}), "q_proj.lora_A"),
    "another rank": (lambda c, t: c.update(r=5), r"lora_A.*was \(4, 32\), must be \(5, 32\)"),
    "another vocabulary": (lambda c, t: t.update({EMBEDDING: torch.zeros(51, 32)}), "embed_tokens"),
    "a tensor missing": (lambda c, t: t.pop(A), "q_proj.lora_A.*was missing"),
    "a norm missing": (lambda c, t: t.pop("base_model.model.model.norm.weight"), "norm.*missing"),
    "more layers": (
        lambda c, t: t.update({A.replace(".0.", ".2."): t[A] + 1}),
        r"layers.2.*must be absent",
    ),
    "bare tensor": (lambda c, t: t.update(x=torch.zeros(1)), "tensor x"),
    "true": (lambda c, t: c.update(r=True), "r: was True"),
    "endless": (lambda c, t: c.update(lora_alpha=1e308), r"lora_alpha: was 1e\+308"),
    "other ranks": (lambda c, t: c.update(rank_pattern={"q_proj": 2}), r"must be \(2, 32\)"),
    "no rank": (lambda c, t: c.pop("r"), "r: was None"),
    "no alpha": (lambda c, t: c.update(lora_alpha="8"), "lora_alpha"),
    "no targets": (lambda c, t: c.update(target_modules=None), "target_modules"),
    "integers": (lambda c, t: t.update({A: t[A].int()}), "lora_A.*was torch.int32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_adapter_of_another_model_is_refused(tmp_path, name):
    change, message = WRONG[name]
    save_adapter(adapted(), tmp_path)
    edit(tmp_path, change)
    model = base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert_close(model.state_dict(), before, rtol=0, atol=0)  # and still a plain model


def test_a_tied_model_needs_one_embedding(tmp_path):
    save_adapter(adapted(tied=True), tmp_path)
    head = "base_model.model.lm_head.weight"
    edit(tmp_path, lambda c, t: t.update({head: t[head] + 1}))
    with pytest.raises(ValueError, match=r"modules_to_save: was \[.*, must be the embedding and"):
        load_adapter(base(tied=True), tmp_path)
    edit(tmp_path, lambda c, t: t.pop(head))  # the embedding trained, the output layer not
    with pytest.raises(ValueError, match="modules_to_save: was"):
        load_adapter(base(tied=True), tmp_path)
    edit(tmp_path, lambda c, t: t.update({head: t.pop(EMBEDDING)}))  # and the reverse
    edit(tmp_path, lambda c, t: c.update(modules_to_save=["lm_head"]))
    edit(tmp_path, lambda c, t: [t.pop(name) for name in list(t) if "norm" in name])
    with pytest.raises(ValueError, match="modules_to_save: was"):
        load_adapter(base(tied=True), tmp_path)
    edit(tmp_path, lambda c, t: c.update(modules_to_save=None))  # and as a copy, not declared
    with pytest.raises(ValueError, match="modules_to_save: was"):
        load_adapter(base(tied=True), tmp_path)
    edit(tmp_path, lambda c, t: t.pop(head))
    edit(tmp_path, lambda c, t: c.update(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="modules_to_save: was"):
        load_adapter(base(tied=True), tmp_path)


# Values of options that are refused: PEFT would make another function of the tensors, or refuses
# them too, or the option is not known yet.
REFUSED = [
    ("peft_type", "LOHA"),
    ("use_dora", True),
    ("lora_bias", True),
    ("use_qalora", True),
    ("bias", "all"),
    ("alora_invocation_tokens", [1, 2]),
    ("layer_replication", [[0, 2]]),
    ("trainable_token_indices", {"embed_tokens": [0]}),
    ("target_parameters", ["q_proj.weight"]),
    ("kasa_config", {}),  # its defaults, and not none
    ("of_next_year", "on"),
    ("of_next_year", 0.5),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "of_next_year"),
    ("target_modules", "("),
    ("target_modules", ".*"),  # more than linear layers
    ("target_modules", "q_proj"),  # as an expression it fits no name
    ("target_modules", []),
    ("target_modules", 5),
    ("target_modules", ["q_proj", 5]),
    ("target_modules", ["nothing"]),
    ("target_modules", ["q_proj", "embed_tokens"]),
    ("target_modules", ["self_attn"]),
    ("exclude_modules", "("),
    ("exclude_modules", "a{4294967296}"),
    ("exclude_modules", 5),
    ("exclude_modules", ["q_proj", 5]),
    ("modules_to_save", "norm"),
    ("modules_to_save", 5),
    ("modules_to_save", ["norm", 5]),
    ("layers_to_transform", "0"),
    ("layers_to_transform", ["0"]),
    ("layers_to_transform", True),
    ("layers_pattern", "h"),
    ("layers_pattern", ["h"]),
    ("rank_pattern", ["q_proj"]),
    ("rank_pattern", {"q_proj": 2.5}),
    ("rank_pattern", {"q_proj": 0}),
    ("rank_pattern", {"(": 4}),
    ("alpha_pattern", {"q_proj": "2"}),
    ("alpha_pattern", {"q_proj": -2}),
    ("alpha_pattern", {"(": 2}),
    ("use_rslora", "yes"),
]


@pytest.mark.parametrize(("option", "value"), REFUSED, ids=str)
def test_an_option_is_refused_by_its_name_and_value(tmp_path, option, value):
    save_adapter(adapted(whole=()), tmp_path)
    edit(tmp_path, lambda c, t: c.update({option: value}))
    message = f"{tmp_path / 'adapter_config.json'}: {option}: was {value!r}, must be "
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_adapter(base(), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"exclude_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "target_modules"),
        ({"layers_to_transform": [7]}, "target_modules"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "layers_to_transform"),
    ],
    ids=str,
)
def test_options_that_leave_nothing_or_do_not_fit_each_other(tmp_path, changes, option):
    save_adapter(adapted(), tmp_path)
    edit(tmp_path, lambda c, t: c.update(changes))
    with pytest.raises(ValueError, match=f"adapter_config.json: {option}: was"):
        load_adapter(base(), tmp_path)


def test_a_long_value_is_cut_in_the_message(tmp_path):
    save_adapter(adapted(), tmp_path)
    names = [f"layers.{index}.nothing" for index in range(1000)]
    edit(tmp_path, lambda c, t: c.update(target_modules=names))
    with pytest.raises(ValueError, match=r"layers\.1\.nothing.*\.\.\., must be") as error:
        load_adapter(base(), tmp_path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"task_type": None, "auto_mapping": {"base_model_class": "x"}, "revision": "main"},
        {"lora_dropout": 0.5, "inference_mode": False, "megatron_core": "x", "peft_version": "9"},
        {"enable_lora": None, "merge_weights": False},  # of the first versions of PEFT
        {"of_next_year": None, "another": False, "a_third": []},
        {"corda_config": {"corda_method": "kpm"}},  # of an adapter that PEFT has converted
        {"layers_pattern": "layers", "layers_to_transform": [0, 1]},
    ],
    ids=str,
)
def test_an_option_that_changes_nothing_passes(tmp_path, changes):
    model, tokens = adapted(), random_tokens(1, 8)
    save_adapter(model, tmp_path)
    edit(tmp_path, lambda c, t: c.update(changes))
    again = base()
    load_adapter(again, tmp_path)
    assert_close(again(tokens), model(tokens), rtol=0, atol=0)


def test_damaged_and_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="was 'no/such', must be 'smollm2-freqkv' or a fol"):
        load_adapter(base(), "no/such")
    with pytest.raises(OSError, match=r"adapter_config\.json: cannot be read \(No such file"):
        load_adapter(base(), tmp_path)
    save_adapter(adapted(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="was not whole"):
        load_adapter(base(), tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors: was not there"):
        load_adapter(base(), tmp_path)


def test_scales_and_patterns_of_other_writers(tmp_path):
    model, tokens = adapted(whole=()), random_tokens(1, 8)
    save_adapter(model, tmp_path)
    pattern = r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
    change = {"use_rslora": True, "lora_alpha": 4.0, "target_modules": pattern}
    edit(tmp_path, lambda c, t: c.update(change))  # alpha / sqrt(rank) = 4 / 2, as 8 / 4 was
    again = base()
    load_adapter(again, tmp_path)
    assert_close(again(tokens), model(tokens), rtol=0, atol=0)


# Saving over an adapter


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def fail_to_write(*args, **options):
    raise OSError(28, "No space left on device")


def fail_to_write_settings(content):
    return fail_to_write if "window" in content else make_json_writer(content)


def test_an_adapter_stays_until_all_of_the_next_is_written(tmp_path, monkeypatch):
    save_adapter(adapted(), tmp_path, freqkv={"window": 16})
    before = contents(tmp_path)
    other = adapted(rank=3, alpha=5)
    with pytest.raises(TypeError):
        save_adapter(other, tmp_path, freqkv={"window": object()})
    assert contents(tmp_path) == before
    for name, failing in (
        ("save_file", fail_to_write),
        ("make_json_writer", fail_to_write_settings),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(lora, name, failing)
            with pytest.raises(OSError, match="No space"):
                save_adapter(other, tmp_path, freqkv={"window": 8})
        assert contents(tmp_path) == before
    save_adapter(other, tmp_path)  # and of the next, no settings are left that were not its own
    assert contents(tmp_path).keys() == before.keys() - {"freqkv.json"}


# PEFT


@pytest.fixture(scope="module")
def peft():
    """PEFT of the version whose options lora.py knows."""
    pytest.importorskip("transformers")
    return pytest.importorskip("peft", minversion="0.21")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Checkpoints for transformers and for us, by whether the output layer is tied."""
    folders = {}
    for tied in (False, True):
        folders[tied] = tmp_path_factory.mktemp(f"tied-{tied}")
        save_model(base(tied), folders[tied])
    return folders


def load_theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def find_embeddings(theirs):
    """Embedding and output layer of a model with an adapter by PEFT, in its wrappers."""
    return theirs.base_model.model.model.embed_tokens, theirs.base_model.model.lm_head


def train_theirs(model):
    """Move whatever PEFT would train."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole", PARTS)
def test_peft_reads_and_writes_the_same(tmp_path, peft, bases, tied, whole):
    model, tokens = adapted(tied, whole), random_tokens(2, 16)
    save_adapter(model, tmp_path / "adapter", base=str(bases[tied]))
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(load_theirs(bases[tied]), tmp_path / "adapter")
        assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
        if tied and "embed" in whole:  # and would train the two as one
            saved = [m.modules_to_save["default"] for m in find_embeddings(theirs)]
            assert saved[0].weight is saved[1].weight
        theirs.save_pretrained(tmp_path / "theirs")
        again = load_model(bases[tied])
        load_adapter(again, tmp_path / "theirs")
        assert_close(again(tokens), model(tokens), rtol=0, atol=0)
        merged = theirs.merge_and_unload()(tokens).logits
        merge_lora(model)
        assert_close(merged, model(tokens), atol=1e-4, rtol=1e-4)


Q0 = "model.layers.0.self_attn.q_proj"
FORMS = [  # options of PEFT, where a form that they may have comes first
    {"target_modules": [Q0, "model.layers.1.mlp.up_proj"]},
    {"target_modules": ["layers.1.self_attn.k_proj", "q_proj", "of_another_architecture"]},
    {"target_modules": r".*\.1\.(self_attn\.(q|v)|mlp\.down)_proj"},
    {"target_modules": r"(?i).*\.Q_PROJ"},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "lm_head"]},  # with a copy of the output layer
    {"layers_to_transform": [1]},
    {"layers_to_transform": 1, "layers_pattern": "layers"},
    {"layers_to_transform": [1], "target_modules": [Q0, "k_proj", "lm_head"]},
    {"layers_to_transform": []},
    {"exclude_modules": ["k_proj", Q0], "target_modules": ["q_proj", "k_proj", "v_proj"]},
    {"exclude_modules": r".*\.1\..*"},
    {"exclude_modules": ["self_attn"]},  # the module, not what is in it
    {"exclude_modules": r".*\.self_attn"},
    {"modules_to_save": ["model.embed_tokens", "lm_head"]},
    {"modules_to_save": ["norm"]},  # all of them
    {"modules_to_save": ["model.norm"]},
    {"modules_to_save": ["layers.1.mlp", "of_a_classifier"], "target_modules": "all-linear"},
    {"modules_to_save": ["q_proj"], "target_modules": ["q_proj", "k_proj"]},
    {"modules_to_save": ["model.layers.1"]},
    {"rank_pattern": {"k_proj": 3, f"^{Q0}": 2}, "target_modules": ["q_proj", "k_proj"]},
    {"rank_pattern": {"q_proj": 2, Q0: 3}, "alpha_pattern": {"(q|v)_proj": 5}},  # the first wins
    {"rank_pattern": {"q": 2, r"model\.layers": 3}},  # the ends of no names
    {"alpha_pattern": {r"layers\.\d\.self_attn\.v_proj": 2.5}},
    {"use_rslora": True, "rank_pattern": {"v_proj": 2}},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "eva"},
    {"init_lora_weights": "mica"},
    {"fan_in_fan_out": True},
    {"lora_dropout": 0.5},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_an_adapter_by_peft_means_the_same_here(tmp_path, peft, bases, options):
    """And what is saved of it means the same to PEFT."""
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 9} | options
    tokens = random_tokens(2, 16)
    theirs = peft.get_peft_model(load_theirs(bases[False]), peft.LoraConfig(**options))
    train_theirs(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    # PEFT saves some forms as others; other writers do not.
    edit(tmp_path / "theirs", lambda c, t: c.update(options))
    theirs = peft.PeftModel.from_pretrained(load_theirs(bases[False]), tmp_path / "theirs")
    ours = load_model(bases[False])
    with torch.no_grad():
        before = ours(tokens)
        expected = theirs(tokens).logits
        load_adapter(ours, tmp_path / "theirs")
        assert (expected - before).abs().max() > 0.01
        assert_close(ours(tokens), expected, atol=1e-4, rtol=1e-4)
        save_adapter(ours, tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(load_theirs(bases[False]), tmp_path / "ours")
        assert_close(theirs(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    again = load_model(bases[False])
    load_adapter(again, tmp_path / "ours")
    assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_embedding_by_peft(tmp_path, peft, bases, modules):
    tokens = random_tokens(2, 16)
    for tying in (True, False):
        config = peft.LoraConfig(
            target_modules=["q_proj"], modules_to_save=list(modules), ensure_weight_tying=tying
        )
        theirs = peft.get_peft_model(load_theirs(bases[True]), config)
        train_theirs(theirs)
        theirs.save_pretrained(tmp_path / str(tying))
    with pytest.raises(ValueError, match=r"adapter_config\.json: modules_to_save: was \["):
        load_model(bases[True], adapter=tmp_path / "False")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(load_theirs(bases[True]), tmp_path / "True")
        ours = load_model(bases[True], adapter=tmp_path / "True")
        assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_target_that_a_tied_model_does_not_have(tmp_path, peft, bases):
    """PEFT has an output layer to update where we have the embedding alone."""
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    peft.get_peft_model(load_theirs(bases[True]), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names of linear layers, and lm_head is none"):
        load_model(bases[True], adapter=tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_copies_of_the_embeddings_beside_the_updates(tmp_path, peft, bases, tied):
    """What PEFT saves where it is told to, and what its options do not tell."""
    tokens = random_tokens(2, 16)
    theirs = peft.get_peft_model(
        load_theirs(bases[tied]), peft.LoraConfig(target_modules=["q_proj"])
    )
    train_theirs(theirs)
    with torch.no_grad():
        theirs.get_input_embeddings().weight += 0.1  # as of rows that were added and trained
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(load_theirs(bases[tied]), tmp_path)
        ours = load_model(bases[tied], adapter=tmp_path)
        assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_an_updated_output_layer_of_another_base(tmp_path, peft, bases):
    """PEFT saves the matrix under the update too, and puts it into the base that it finds."""
    tokens = random_tokens(2, 16)
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    theirs = peft.get_peft_model(load_theirs(bases[False]), config)
    train_theirs(theirs)
    with torch.no_grad():
        find_embeddings(theirs)[1].base_layer.weight += 0.1
        theirs.save_pretrained(tmp_path / "theirs")
        ours = load_model(bases[False])
        load_adapter(ours, tmp_path / "theirs")
        assert not ours.lm_head.weight.requires_grad  # W is frozen, as ever
        assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
        save_adapter(ours, tmp_path / "ours")
        again = load_model(bases[False], adapter=tmp_path / "ours")
        assert_close(again(tokens), ours(tokens), atol=1e-5, rtol=1e-5)
        theirs = peft.PeftModel.from_pretrained(load_theirs(bases[False]), tmp_path / "ours")
        assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_peft_has_converted(tmp_path, peft, bases, init):
    """PiSSA and OLoRA change the base; refused, unless PEFT has made plain LoRA of them."""
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=init)
    theirs = peft.get_peft_model(load_theirs(bases[False]), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "begun")
    theirs.peft_config["default"].init_lora_weights = init
    train_theirs(theirs)
    theirs.save_pretrained(tmp_path / "own")
    theirs.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "begun"
    )
    with pytest.raises(ValueError, match=f"init_lora_weights: was '{init}', must be"):
        load_model(bases[False], adapter=tmp_path / "own")
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        ours = load_model(bases[False], adapter=tmp_path / "converted")
        assert_close(ours(tokens), theirs(tokens).logits, atol=1e-3, rtol=1e-3)


def test_every_option_of_peft_is_known_or_must_be_off(tmp_path, peft):
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    assert fields.keys() >= {*lora.READ, *lora.INFORMATION}
    model, tokens = adapted(whole=()), random_tokens(1, 8)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    defaults = peft.LoraConfig().to_dict()
    defaults["peft_type"] = "LORA"
    edit(tmp_path, lambda c, t: c.update(defaults | written))
    again = base()
    load_adapter(again, tmp_path)
    assert_close(again(tokens), model(tokens), rtol=0, atol=0)
    for name in fields.keys() - {*lora.READ, *lora.INFORMATION}:
        edit(tmp_path, lambda c, t, name=name: c.update(defaults | written | {name: {"x": 1}}))
        with pytest.raises(ValueError, match=rf"adapter_config\.json: {name}: was \{{'x': 1}}"):
            load_adapter(base(), tmp_path)
    for name in lora.INFORMATION:  # PEFT itself marks the options that make another function
        assert not fields[name].metadata.get("is_lora_variant")


# The adapter that comes with this code

PERSUASION = """Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who, for his own
amusement, never took up any book but the Baronetage; there he found occupation for an idle hour,
and consolation in a distressed one; there his faculties were roused into admiration and respect,
by contemplating the limited remnant of the earliest patents; there any unwelcome sensations,
arising from domestic affairs changed naturally into pity and contempt as he turned over the almost
endless creations of the last century; and there, if every other leaf were powerless, he could read
his own history with an interest which never failed."""  # by the author of four of its five texts


def test_the_built_in_adapter_is_known_by_its_name():
    folder = find_adapter(BUILT_IN)
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "freqkv.json"]
    assert sorted(file.name for file in folder.iterdir()) == files


@pytest.mark.slow
def test_the_built_in_adapter():
    """It fits its model, reads what it was tuned for better, and brings its settings along."""
    smollm2_path()
    tokens = torch.tensor([load_tokenizer("smollm2").encode(PERSUASION.replace("\n", " "))])
    losses = []
    for adapter in (None, "smollm2-freqkv"):
        model = load_model("smollm2", adapter=adapter)
        with torch.no_grad():
            logits = model(tokens)
        losses.append(F.cross_entropy(logits[0, :-1], tokens[0, 1:]).item())
    assert losses[1] < losses[0] - 0.03
    tuned = cli.tuned_settings("smollm2", "smollm2-freqkv")
    assert tuned["attention"] == "distinct"
    config = cli.make_schedule({}, model.config, tuned)
    assert config == FreqKVConfig(window=2048, sinks=4, ratio=0.5, recent=0)
