"""examples/: FreqKV in models of transformers, in an attention layer of one's own, in a package.

Run: pytest tests/test_examples.py
"""

import copy
import importlib
import runpy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from examples import own_attention
from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig, newest
from tests.helpers import (
    DEVICES,
    ROOT,
    attend_in_pieces,
    load_published,
    plain_rope,
    random_qkv,
    random_tokens,
    smollm2_path,
    tiny_config,
)

transformers = pytest.importorskip("transformers", minversion="5.5")
example = importlib.import_module("examples.transformers_freqkv")
time_transformers = importlib.import_module("examples.time_transformers")
CACHE, FAMILIES, Conversation = example.CACHE, example.FAMILIES, example.Conversation
attach, detach = example.attach, example.detach

CONFIG = FreqKVConfig(window=16, sinks=2, recent=3)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("cohere", {"use_qk_norm": True}),
    ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
]


def close(actual, expected, atol=1e-4):
    assert_close(actual, expected, rtol=0, atol=atol)


def make_host(family="llama", **changes):
    """A model of transformers with the sizes of `tiny_config` and logits of a deviation near 1."""
    sizes = vars(tiny_config(rms_norm_eps=1e-6)).copy()
    del sizes["rope_theta"], sizes["rope_scaling"]
    special = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": None}
    if family == "cohere":
        special["logit_scale"] = 1.0
    if family in ("mistral", "mixtral", "phi3"):
        special["sliding_window"] = None
    if "rope_parameters" in changes:
        changes["rope_parameters"]["rope_theta"] = 10000.0
    config = transformers.AutoConfig.for_model(family, **sizes | special | changes)
    host = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in host.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return host


@pytest.fixture
def host():
    return make_host()


@pytest.fixture
def attached(host):
    attach(host, CONFIG)
    return host


def make_own(host):
    """model.py with the weights of a LLaMA of transformers."""
    return load_published(tiny_config(rms_norm_eps=1e-6), host.state_dict())


def read(host, tokens, conversation, where=()):
    """Logits of tokens [B, T], read in the pieces between the cuts `where`."""
    pieces = tokens.tensor_split(list(where), dim=1)
    with torch.no_grad():
        return torch.cat([host(piece, **{CACHE: conversation}).logits for piece in pieces], dim=1)


def check_greedy(own, tokens, start, stop=None):
    """Tokens start .. stop-1 of each row are what `own` finds likeliest after those before."""
    with torch.no_grad():
        likeliest = own(tokens, FreqKVAttention(CONFIG)).argmax(dim=-1)
    stop = stop or tokens.shape[1]
    assert torch.equal(tokens[:, start:stop], likeliest[:, start - 1 : stop - 1])


# Reading


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_families(family, changes):
    """Within the window the host's own logits; past it, both forms and any pieces agree."""
    host = make_host(family, **changes)
    tokens = random_tokens(2, 50)
    short = tokens[:, : CONFIG.window]
    with torch.no_grad():
        expected = host(short).logits
        attach(host, CONFIG)
        close(host(short).logits, expected)
        close(host(short, use_cache=False).logits, expected)
        whole = host(tokens, use_cache=False).logits
    assert expected.std() > 0.5
    for where in ([], range(1, 50), [7, 16, 17, 40]):
        conversation = Conversation(CONFIG)
        close(read(host, tokens, conversation, where), whole)
        assert conversation.freqkv.rounds == CONFIG.rounds(50) > 3


@pytest.mark.parametrize("device", DEVICES)
def test_on_a_gpu(host, device):
    tokens = random_tokens(2, 50)
    expected = make_own(host)(tokens, FreqKVAttention(CONFIG))
    attach(host.to(device), CONFIG)
    read_there = read(host, tokens.to(device), Conversation(CONFIG), [7, 16, 17, 40])
    assert_close(read_there.cpu(), expected, atol=1e-3, rtol=0)
    written = host.generate(tokens.to(device), max_new_tokens=20, do_sample=False)
    assert written.shape == (2, 70)


@pytest.mark.parametrize("operator", [example.lowband, newest])
def test_llama_is_our_llama(host, operator):
    attach(host, CONFIG, operator)
    tokens = random_tokens(2, 50)
    conversation = Conversation(CONFIG, operator)
    with torch.no_grad():
        expected = make_own(host)(tokens, FreqKVAttention(CONFIG, operator))
        close(host(tokens, use_cache=False).logits, expected)
    close(read(host, tokens, conversation, range(3, 50, 9)), expected)


def test_a_call_without_a_cache_begins_one_and_returns_it(attached):
    tokens = random_tokens(2, 50)
    with torch.no_grad():
        whole = attached(tokens, use_cache=False).logits
        first = attached(tokens[:, :30])
        second = attached(tokens[:, 30:], **{CACHE: first[CACHE]})
    close(torch.cat((first.logits, second.logits), dim=1), whole)
    assert first[CACHE] is second[CACHE]


def test_bfloat16_within_its_rounding(host):
    tokens = random_tokens(1, 50)
    attach(host, CONFIG)
    with torch.no_grad():
        expected = host(tokens, use_cache=False).logits
        host.bfloat16()
        for logits in (host(tokens, use_cache=False).logits, host(tokens).logits):
            close(logits.float(), expected, atol=0.1)


def test_changing_what_a_conversation_holds(attached):
    tokens = random_tokens(2, 40)
    conversation = Conversation(CONFIG)
    whole = read(attached, tokens, conversation)
    conversation.crop(-2)
    assert conversation.get_seq_length() == 38
    close(read(attached, tokens[:, 38:], conversation), whole[:, 38:])
    conversation.crop(0)
    conversation.batch_repeat_interleave(2)
    conversation.batch_select_indices(torch.tensor([0, 2]))
    conversation.crop(-2)
    close(read(attached, tokens[:, 38:], conversation), whole[:, 38:])
    conversation.reset()
    close(read(attached, tokens, conversation), whole)


# Generating


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefill_chunk_size": 5},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_generate_is_the_same_with_a_cache_and_without(attached, settings):
    tokens = random_tokens(2, 24)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        cached = settings if use_cache else {**settings, "prefill_chunk_size": None}
        outputs.append(attached.generate(tokens, use_cache=use_cache, max_new_tokens=20, **cached))
    assert torch.equal(*outputs)
    assert outputs[0].shape == (2 * settings.get("num_return_sequences", 1), 44)
    if "num_beams" not in settings and "do_sample" not in settings:
        check_greedy(make_own(attached), outputs[0], 24)


def test_a_second_turn_with_the_cache_that_the_first_returned(attached):
    own = make_own(attached)
    tokens = random_tokens(2, 24)
    first = attached.generate(tokens, max_new_tokens=9, return_dict_in_generate=True)
    tokens = torch.cat((first.sequences, random_tokens(2, 11, seed=1)), dim=1)
    second = attached.generate(tokens, max_new_tokens=9, **{CACHE: first[CACHE]})
    check_greedy(own, second, 24, 33)
    check_greedy(own, second, 44)
    assert first[CACHE].get_seq_length() == second.shape[1] - 1


@pytest.mark.filterwarnings("error::FutureWarning")  # a name given twice
def test_two_conversations_take_turns(attached):
    """By either name of the argument: past_key_values is the older one."""
    own = make_own(attached)
    arguments = [{CACHE: Conversation(CONFIG)}, {"past_key_values": Conversation(CONFIG)}]
    texts = [random_tokens(1, 20), random_tokens(1, 27, seed=1)]
    for turn in range(3):
        for i in range(2):
            tokens = torch.cat((texts[i], random_tokens(1, 5 + i, seed=turn)), dim=1)
            texts[i] = attached.generate(tokens, max_new_tokens=6, **arguments[i])
            check_greedy(own, texts[i], tokens.shape[1])


# Training


def expected_gradients(own, tokens):
    logits = own(tokens, FreqKVAttention(CONFIG))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: weight.grad for name, weight in own.named_parameters()}


over_checkpointing = pytest.mark.parametrize("checkpointing", [False, True])


@over_checkpointing
def test_gradients_are_those_of_our_model(attached, checkpointing):
    tokens = random_tokens(2, 50)
    expected = expected_gradients(make_own(attached), tokens)
    attached.train()
    if checkpointing:
        attached.gradient_checkpointing_enable()
    attached(tokens, labels=tokens).loss.backward()
    for name, weight in attached.named_parameters():
        close(weight.grad, expected[name.removeprefix("model.")], atol=1e-5)


@over_checkpointing
def test_lora_by_peft(attached, checkpointing):
    """Weights W + sBA: the gradient of A is sBᵀG and that of B is sGAᵀ, where G is that of W."""
    peft = pytest.importorskip("peft")
    tokens = random_tokens(2, 50)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj"])
    model = peft.get_peft_model(attached, config).train()
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_(0.0, 0.2, generator=generator)
    own = make_own(copy.deepcopy(model).merge_and_unload())
    gradients = expected_gradients(own, tokens)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model(tokens, labels=tokens).loss.backward()
    for name, gradient in gradients.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            module = model.get_submodule("base_model.model.model." + name.removesuffix(".weight"))
            a = module.lora_A.default.weight
            b = module.lora_B.default.weight
            close(a.grad, 3 * b.T @ gradient, atol=1e-5)
            close(b.grad, 3 * gradient @ a.T, atol=1e-5)
    model.eval()
    check_greedy(own, model.generate(input_ids=tokens, max_new_tokens=9), 50)


def test_training_after_inference_mode(attached):
    tokens = random_tokens(1, 20)
    with torch.inference_mode():
        attached(tokens)
    attached.train()(tokens, labels=tokens).loss.backward()


# Attaching and detaching


def test_the_saved_config_is_untouched_and_detach_restores_the_host(host, tmp_path):
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        before = host(tokens).logits
        written = host.generate(tokens, max_new_tokens=9)
        host.save_pretrained(tmp_path / "before")
        attach(host, CONFIG)
        host.save_pretrained(tmp_path / "attached")
        assert not torch.allclose(host(tokens).logits, before, atol=0.1)
        detach(host)
        assert torch.equal(host(tokens).logits, before)
        assert torch.equal(host.generate(tokens, max_new_tokens=9), written)
    for name in ("config.json", "generation_config.json"):
        texts = [(tmp_path / folder / name).read_text() for folder in ("before", "attached")]
        assert texts[0] == texts[1]
    assert vars(host).keys() == vars(make_host()).keys()
    attach(host, FreqKVConfig(window=8, sinks=0))  # another schedule, from the start


def test_a_copy_is_attached_for_itself(attached):
    tokens = random_tokens(1, 30)
    twin = copy.deepcopy(attached)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(1.5)
    check_greedy(make_own(twin), twin.generate(tokens, max_new_tokens=9), 30)
    detach(twin)
    check_greedy(make_own(attached), attached.generate(tokens, max_new_tokens=9), 30)


# What is refused


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral", {"sliding_window": 8}, "sliding_window: was 8"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window: was 8"),
        ("gemma2", {}, "attn_logit_softcapping: was 50.0"),
        ("gpt_oss", {"sliding_window": None}, "model_type: was 'gpt_oss'.*attention sinks"),
        ("hunyuan_v1_dense", {}, "model_type: was 'hunyuan_v1_dense'.*after the rotation"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ("llama", {"max_position_embeddings": 15}, "window: was 16, must be at most .* 15"),
    ],
)
def test_models_that_it_cannot_serve(family, changes, message):
    with pytest.raises(ValueError, match=message):
        attach(make_host(family, **changes), CONFIG)


def test_attaching_twice(attached):
    with pytest.raises(ValueError, match="model: was attached already"):
        attach(attached, CONFIG)


def test_attaching_to_another_class(host):
    with pytest.raises(ValueError, match=r"model: was a LlamaModel, must be .*get_base_model"):
        attach(host.model, CONFIG)


def test_dropout(host):
    host = make_host(attention_dropout=0.1)
    attach(host, CONFIG)
    with pytest.raises(ValueError, match=r"attention_dropout: was 0\.1 in training, must be 0"):
        host.train()(random_tokens(1, 20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.eye(2, 20)}, "attention_mask: had padding"),
        ({"attention_mask": torch.ones(2, 1, 20, 20)}, "attention_mask"),
        ({"position_ids": torch.arange(20)[None] % 10}, "position_ids: were others than 0 to 19"),
        ({CACHE: transformers.DynamicCache()}, f"{CACHE}: was a DynamicCache"),
        ({CACHE: Conversation(FreqKVConfig(window=32))}, f"{CACHE}: was of .*window=32"),
        ({CACHE: Conversation(CONFIG, newest)}, f"{CACHE}: was of .*newest"),
        ({CACHE: Conversation(CONFIG), "use_cache": False}, "use_cache: was False"),
    ],
)
def test_calls_that_it_cannot_serve(attached, arguments, message):
    tokens = random_tokens(2, 20)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        attached(tokens, **arguments)
    with pytest.raises(ValueError, match=message):
        attached.generate(tokens, max_new_tokens=2, **arguments)


def test_a_cache_with_gradients(attached):
    with pytest.raises(ValueError, match=r"use_cache: was True with gradients.*no_grad"):
        attached(random_tokens(1, 20))


def test_another_attention_while_attached(attached):
    attached.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation: was 'sdpa', must be 'freqkv'"):
        attached(random_tokens(1, 20))


@pytest.mark.parametrize("name", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_decoding(attached, name):
    with pytest.raises(ValueError, match=f"{name}: was given, must be None"):
        attached.generate(random_tokens(1, 20), max_new_tokens=5, **{name: 3})
    settings = transformers.GenerationConfig(prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens: was given"):
        attached.generate(random_tokens(1, 20), settings)


def test_a_conversation_in_a_model_without_it(host):
    with torch.no_grad(), pytest.raises(ValueError, match=f"{CACHE}: was a Conversation"):
        host(random_tokens(1, 20), **{CACHE: Conversation(CONFIG)})


# A real model


@pytest.mark.slow
def test_smollm2_through_both_loaders():
    path = smollm2_path()
    import weights

    config = FreqKVConfig(window=128)
    text = (ROOT / "LICENSE").read_text()[:2000]
    tokens = torch.tensor([weights.load_tokenizer("smollm2").encode(text)])
    with torch.no_grad():
        expected = weights.load_model("smollm2")(tokens, FreqKVAttention(config))
    host = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    attach(host.eval(), config)
    conversation = Conversation(config)
    close(read(host, tokens, conversation, range(100, tokens.shape[1], 100)), expected, atol=1e-2)
    assert conversation.freqkv.rounds > 3


@pytest.mark.slow
def test_time_and_memory_of_a_token(capsys):
    smollm2_path()
    time_transformers.main(["600"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "600 tokens, transformers",
        "600 tokens, with FreqKV",
        "600 tokens, model.py",
    ]
    assert lines[0].endswith(" MB")


def test_lengths_that_cannot_be(outcome):
    for wrong in ("abc", "0", "20"):
        ran = outcome(time_transformers, wrong)
        assert (ran.code, f"lengths: was '{wrong}', must be a whole" in ran.err) == (2, True)


# One's own


def test_own_attention(capsys):
    runpy.run_path(ROOT / "examples/own_attention.py", run_name="__main__")
    assert capsys.readouterr().out == "1000 tokens in 40 slots\n"


@pytest.mark.parametrize("form", [FreqKVAttention, FreqKVCache])
def test_own_attention_in_bfloat16(form):
    layer = own_attention.Attention(width=48, heads=6).bfloat16()
    attend = form(FreqKVConfig(window=64))
    with torch.no_grad():
        out = layer(torch.randn(1, 200, 48).bfloat16(), 0, attend)
    assert out.dtype == torch.bfloat16


def test_copies_in_a_package(tmp_path, monkeypatch):
    """As docs/copy.md says: in each file one line changes."""
    package = tmp_path / "theirs"
    package.mkdir()
    shutil.copy(ROOT / "dct.py", package)
    source = (ROOT / "freqkv.py").read_text()
    assert source.count("\nfrom dct import") == 1
    (package / "freqkv.py").write_text(source.replace("\nfrom dct import", "\nfrom .dct import"))
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("theirs.freqkv")
    assert theirs.lowpass.__module__ == "theirs.dct"
    config = theirs.FreqKVConfig(window=16)
    qkv = random_qkv(50)
    whole = theirs.FreqKVAttention(config)(0, *qkv, plain_rope)
    close(attend_in_pieces(theirs.FreqKVCache(config), qkv, [7, 30], plain_rope), whole)
    expected = FreqKVAttention(FreqKVConfig(window=16))(0, *qkv, plain_rope)
    assert_close(whole, expected, rtol=0, atol=0)
