"""weights/lora.py: updates, merging, and adapters, against themselves and against PEFT.

Run: pytest tests/test_lora.py
"""

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import generate
from freqkv import FreqKVConfig
from tests.helpers import random_tokens, smollm2_path, tiny_config, tiny_model
from weights import load_model, load_tokenizer, save_model
from weights.lora import LoraLinear, add_lora, load_adapter, merge_lora, save_adapter

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


def test_an_update_on_an_update_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="merge_lora first"):
        add_lora(model)


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
    for dtype, kept in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model = base().bfloat16()
        load_adapter(model, tmp_path, dtype)
        assert model.norm.weight.dtype == model.embed_tokens.weight.dtype == kept
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
    "another method": (lambda c, t: c.update(peft_type="LOHA"), "peft_type"),
    "dora": (lambda c, t: c.update(use_dora=True), "use_dora"),
    "no pattern": (lambda c, t: c.update(target_modules="("), "was damaged"),
    "parts of no kind": (lambda c, t: c.update(modules_to_save=5), "was damaged"),
    "true": (lambda c, t: c.update(r=True), "r: was True"),
    "endless": (lambda c, t: c.update(lora_alpha=1e308), r"lora_alpha: was 1e\+308"),
    "ranks by layer": (lambda c, t: c.update(rank_pattern={"q_proj": 2}), "rank_pattern"),
    "biases": (lambda c, t: c.update(bias="all"), "bias"),
    "no rank": (lambda c, t: c.pop("r"), "r: was None"),
    "no alpha": (lambda c, t: c.update(lora_alpha="8"), "lora_alpha"),
    "no targets": (lambda c, t: c.update(target_modules=None), "target_modules"),
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
    with pytest.raises(ValueError, match="must be the tied embedding"):
        load_adapter(base(tied=True), tmp_path)
    edit(tmp_path, lambda c, t: t.pop(head))  # the embedding trained, the output layer not
    with pytest.raises(ValueError, match=r"lm_head.*was missing"):
        load_adapter(base(tied=True), tmp_path)


def test_damaged_and_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="was 'no/such', must be 'smollm2-freqkv' or a fol"):
        load_adapter(base(), "no/such")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_adapter(base(), tmp_path)
    save_adapter(adapted(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="was not whole"):
        load_adapter(base(), tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
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


# PEFT


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole", PARTS)
def test_peft_reads_and_writes_the_same(tmp_path, tied, whole):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, tokens = adapted(tied, whole), random_tokens(2, 16)
    save_model(base(tied), tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
        assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
        theirs.save_pretrained(tmp_path / "theirs")
        again = load_model(tmp_path / "base")
        load_adapter(again, tmp_path / "theirs")
        assert_close(again(tokens), model(tokens), rtol=0, atol=0)
        merged = theirs.merge_and_unload()(tokens).logits
        merge_lora(model)
        assert_close(merged, model(tokens), atol=1e-4, rtol=1e-4)


# The adapter that comes with this code

PERSUASION = """Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who, for his own
amusement, never took up any book but the Baronetage; there he found occupation for an idle hour,
and consolation in a distressed one; there his faculties were roused into admiration and respect,
by contemplating the limited remnant of the earliest patents; there any unwelcome sensations,
arising from domestic affairs changed naturally into pity and contempt as he turned over the almost
endless creations of the last century; and there, if every other leaf were powerless, he could read
his own history with an interest which never failed."""  # by the author of four of its five texts


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
    args = generate.parser().parse_args(["--model", "smollm2", "--adapter", "smollm2-freqkv"])
    config = generate.schedule(args, model.config)
    assert config == FreqKVConfig(window=2048, sinks=4, ratio=0.5, recent=1536)
